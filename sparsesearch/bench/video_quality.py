"""Quality of plans on the embedded video model by true sampling of held-out clips: our menus and searches, Sparse-vDiT's, SVG's, controls.

Everything is chosen on calibration clips; held-out clips only judge. PSNR is to dense sampling from the same noise.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from sparsesearch.denoising.controls import best_uniform, permuted_plan
from sparsesearch.denoising.corridor import Accepted, Corridor
from sparsesearch.denoising.judge import Judgement, judge
from sparsesearch.denoising.replay import Replay
from sparsesearch.errors import BudgetInfeasibleError
from sparsesearch.plan import Plan
from sparsesearch.profiling.denoising.record import DenoisingProfile
from sparsesearch.profiling.denoising.request import StepsRequest
from sparsesearch.runtime.diffusion.live import describe_transformer
from sparsesearch.search_space import SearchSpace
from sparsesearch.testbed.model import MODEL, load_bed
from sparsesearch.testbed.sampling import (
    CALIBRATION_SEED,
    HELD_OUT_SEED,
    STEPS,
    Mode,
    Scenes,
    psnr_db,
    sample,
    scenes,
    ssim,
)

OURS = "video_mixture"
MENUS = ("sparse_vdit", "svg", OURS)
DENSITIES: dict[Mode, tuple[float, ...]] = {"t2v": (0.35, 0.5), "i2v": (0.25, 0.5)}
BARS_DB: dict[Mode, dict[float, dict[str, float]]] = {
    "t2v": {0.35: {"sparse_vdit": 19.5, "video_mixture": 24.0}, 0.5: {"sparse_vdit": 22.0, "video_mixture": 31.0}},
    "i2v": {0.25: {"sparse_vdit": 21.5, "video_mixture": 24.5}, 0.5: {"sparse_vdit": 26.5, "video_mixture": 31.5}},
}
"""What each menu's static plan must reach at the full size."""
_DRAWS = 3
_MEASURES = {"psnr_db": psnr_db, "ssim": ssim}


@dataclass(frozen=True)
class QualityRequest:
    """What to measure.

    Attributes:
        mode: text to video, or image to video.
        densities: budgets.
        folder: where profiles go, and stay.
        device: of the model.
        calibration_clips: to profile, replay and choose on.
        held_out_clips: to judge on.
        steps: denoising steps.
        ends: where ranges of steps end, as shares of the run.
        evaluations: replays per search beyond the six fixed weightings.
        again: whether the mixture's search is repeated on a profile under its plan.
        other_steps: numbers of steps that the plans of the mixture are also judged at.
        frames: of a clip.
        side: pixels of a clip.
        per_head: measure the sensitivity of every head; else of every layer.
    """

    mode: Mode
    densities: tuple[float, ...]
    folder: Path
    device: str = "cuda"
    calibration_clips: int = 4
    held_out_clips: int = 12
    steps: int = STEPS
    ends: tuple[float, ...] = (0.2, 0.5, 1.0)
    evaluations: int = 12
    again: bool = True
    other_steps: tuple[int, ...] = (20, 50)
    other_frames: tuple[int, ...] = (8,)
    frames: int = 16
    side: int = 32
    per_head: bool = True


Progress = Callable[[str, int, int], None]


@dataclass
class _Run:
    """One mode's study."""

    request: QualityRequest
    progress: Progress
    seconds: dict[str, float] = field(default_factory=dict)
    searches: dict[str, Accepted] = field(default_factory=dict)
    infeasible: dict[str, str] = field(default_factory=dict)

    @cached_property
    def bed(self) -> Any:
        return load_bed(self.request.device)

    @cached_property
    def spaces(self) -> dict[str, SearchSpace]:
        return {name: SearchSpace.load(name) for name in MENUS}

    def scenes(self, seed: int, count: int, frames: int | None = None) -> Scenes:
        given = self.request
        return scenes(
            count, mode=given.mode, seed=seed, device=self.bed.device, frames=frames or given.frames, side=given.side
        )

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the wall time to the stage's."""
        start = perf_counter()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + perf_counter() - start

    @cached_property
    def corridor(self) -> Corridor:
        given = self.request
        menu = {rule.label: rule for space in reversed(self.spaces.values()) for rule in space.candidates}
        both = replace(self.spaces["video_mixture"], name="+".join(MENUS), candidates=tuple(menu.values()))
        clips = self.scenes(CALIBRATION_SEED, given.calibration_clips)
        request = StepsRequest(
            describe_transformer(self.bed.transformer, MODEL),
            both,
            given.steps,
            ends=given.ends,
            calibration=f"{len(clips)} procedural clips, {given.mode}, seed {CALIBRATION_SEED}",
        )
        return Corridor(
            self.bed.transformer,
            lambda: sample(self.bed, clips, steps=given.steps),
            request,
            given.folder,
            self.progress,
        )

    def plans(self, profile: DenoisingProfile) -> dict[str, Plan]:
        """Plans and controls of every budget, by name."""
        plans: dict[str, Plan] = {}
        for density in self.request.densities:
            for menu in MENUS:
                self._search(plans, profile, menu, density)
            plans[f"uniform {density}"] = best_uniform(profile, density, self.corridor.replay)
            if f"{OURS} {density}" in plans:
                for draw in range(_DRAWS):
                    plans[f"permuted {density} #{draw}"] = permuted_plan(plans[f"{OURS} {density}"], draw)
        return plans

    def _search(self, plans: dict[str, Plan], profile: DenoisingProfile, menu: str, density: float) -> None:
        """One menu at one budget; ours once more on a profile under its own plan."""
        given, corridor, space = self.request, self.corridor, self.spaces[menu]
        tries, name = (0 if menu == "svg" else given.evaluations), f"{menu} {density}"
        try:
            with self.timed("search"):
                found = corridor.search(profile, density, space=space, evaluations=tries)
        except BudgetInfeasibleError as error:
            self.infeasible[name] = str(error)
            return
        self.searches[name], plans[name] = found, found.plan
        if menu == OURS and given.again:
            with self.timed("search under the plan"):
                found = corridor.search_again(profile, density, found, space=space, evaluations=tries)
            again = f"{menu}, again {density}"
            self.searches[again], plans[again] = found, found.plan

    def held_out(self, steps: int, frames: int | None = None) -> Replay:
        """The judge at some number of steps and length of clips."""
        held = self.scenes(HELD_OUT_SEED, self.request.held_out_clips, frames)
        return Replay.of(self.bed.transformer, lambda: sample(self.bed, held, steps=steps))


def run(
    request: QualityRequest, *, command: Sequence[str] = (), progress: Progress = lambda *_: None
) -> dict[str, Any]:
    """Profile, search, judge; the record that the command writes.

    Args:
        request: what to measure.
        command: recorded as the command line.
        progress: called with (stage, done, total).
    """
    study = _Run(request, progress)
    with study.timed("profile and sensitivities"):
        profile = study.corridor.profile(density=min(request.densities), per_head=request.per_head)
    plans = study.plans(profile)
    with study.timed("held-out sampling"):
        layout, replay = profile.manifest.layout, study.held_out(request.steps)
        found = judge(replay, plans, _MEASURES, layout=layout, num_steps=request.steps)
    for name, plan in plans.items():
        plan.save(request.folder / "plans" / f"{name.replace(' ', '_').replace(',', '')}.json")
    return {
        "format": "sparsesearch.bench.video-quality",
        "provenance": provenance(request.device, command),
        "model": MODEL,
        "mode": request.mode,
        "steps": request.steps,
        "calibration": profile.manifest.calibration,
        "held_out": f"{request.held_out_clips} other clips, seed {HELD_OUT_SEED}",
        "ranges": [list(place) for place in profile.manifest.ranges],
        "candidates": len(profile.manifest.candidates),
        "unit": "PSNR to dense in dB, one value per clip; density over all steps",
        "seconds": {stage: round(taken, 1) for stage, taken in study.seconds.items()},
        "variants": {name: variant.model_dump(mode="json") for name, variant in found.variants.items()},
        "paired_db": paired_rows(found, request.densities),
        "searches": {
            name: {"weighting": a.weighting, "log10_error": a.log10_error} for name, a in study.searches.items()
        },
        "infeasible": study.infeasible,
        "elsewhere": elsewhere(study, plans),
        "bars_db": {str(density): bars for density, bars in BARS_DB[request.mode].items()},
    }


def paired_rows(found: Judgement, densities: Sequence[float]) -> dict[str, Any]:
    """The mixture's plan beside every other variant of its budget, and sparse_vdit's beside the uniform one."""
    rows = {}
    for density in densities:
        names = [name for name in found.variants if name.removesuffix(f" {density}") != name or f" {density} #" in name]
        pairs = [(f"video_mixture {density}", name) for name in names]
        for first, second in [*pairs, (f"sparse_vdit {density}", f"uniform {density}")]:
            if first != second and first in found.variants:
                pair = found.paired(first, second)
                rows[f"{first} - {second}"] = {
                    "mean": pair.mean,
                    "standard_error": pair.standard_error,
                    "won": pair.won,
                }
    return rows


def elsewhere(study: _Run, plans: dict[str, Plan]) -> dict[str, Any]:
    """The mixture's and the uniform plans at other numbers of steps and other lengths than they were calibrated at."""
    given, rows = study.request, {}
    cases = [(steps, given.frames) for steps in given.other_steps] + [(given.steps, n) for n in given.other_frames]
    named = {
        name: plan for name, plan in plans.items() if name.startswith(("video_mixture 0", "sparse_vdit", "uniform"))
    }
    for steps, frames in cases:
        replay = study.held_out(steps, frames)
        layout = layout_of_clips(study, frames)
        found = judge(replay, named, _MEASURES, layout=layout, num_steps=steps)
        rows[f"{steps} steps, {frames} frames"] = {
            name: {"density": variant.density, "psnr_db": variant.mean("psnr_db"), "ssim": variant.mean("ssim")}
            for name, variant in found.variants.items()
        }
    return rows


def layout_of_clips(study: _Run, frames: int) -> Any:
    """Tokens of a clip of so many frames."""
    from sparsesearch.layout import video_layout

    patch = study.bed.transformer.config.patch_size
    side = study.request.side
    return video_layout(frames // patch[0], side // patch[1], side // patch[2])


def provenance(device: str, command: Sequence[str]) -> dict[str, str]:
    """Device, versions and command line."""
    import diffusers

    where = torch.cuda.get_device_name() if torch.device(device).type == "cuda" else "CPU"
    return {
        "device": where,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "command": " ".join(command),
    }
