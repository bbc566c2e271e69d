"""What the quality of plans on the embedded video model is measured on: budgets, menus, clips, and what must be reached."""

from dataclasses import dataclass
from pathlib import Path

from sparsesearch.bench.video_quality_rows import OURS
from sparsesearch.testbed.sampling import STEPS, Mode

WITH_RESTS = f"{OURS} with rest terms"
MENUS = ("sparse_vdit", "svg", OURS, WITH_RESTS)
"""Ours is judged without rest terms, as all published static plans are, and once more with them where its menu has some."""
DENSITIES: dict[Mode, tuple[float, ...]] = {"t2v": (0.35, 0.5), "i2v": (0.25, 0.5)}
BARS_DB: dict[Mode, dict[float, dict[str, float]]] = {
    "t2v": {0.35: {"sparse_vdit": 19.5, "video_mixture": 24.0}, 0.5: {"sparse_vdit": 22.0, "video_mixture": 31.0}},
    "i2v": {0.25: {"sparse_vdit": 21.5, "video_mixture": 24.5}, 0.5: {"sparse_vdit": 26.5, "video_mixture": 31.5}},
}
"""What each menu's static plan must reach at the full size."""


@dataclass(frozen=True)
class QualityRequest:
    """What to measure.

    Attributes:
        mode: text to video, or image to video.
        densities: budgets.
        folder: where profiles and plans go, and stay.
        device: of the model.
        calibration_clips: to profile, replay and choose on.
        held_out_clips: to judge on.
        steps: denoising steps.
        ends: where ranges of steps end, as shares of the run.
        per_head: measure the sensitivity of every head; else of every layer.
        evaluations: replays per search beyond the fixed weightings.
        menus: which of MENUS; controls are those of ours.
        again: at the lowest budget, search the mixture once more on a profile under its own plan.
        slices: at the lowest budget, profile so many slices of steps and choose ranges by interval DP; 0 leaves it out.
        other_steps: numbers of steps that the plans are also judged at.
        other_frames: lengths of clips, likewise.
        frames: of a clip.
        side: pixels of a clip.
    """

    mode: Mode
    densities: tuple[float, ...]
    folder: Path
    device: str = "cuda"
    calibration_clips: int = 4
    held_out_clips: int = 12
    steps: int = STEPS
    ends: tuple[float, ...] = (0.2, 0.5, 1.0)
    per_head: bool = False
    evaluations: int = 8
    menus: tuple[str, ...] = MENUS
    again: bool = True
    slices: int = 10
    other_steps: tuple[int, ...] = (20, 50)
    other_frames: tuple[int, ...] = (8,)
    frames: int = 16
    side: int = 32
