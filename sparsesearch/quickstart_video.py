"""The whole corridor on the embedded video model: profile, sensitivities, search, replay, held-out comparison, report."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sparsesearch.artifacts import require_unfinished, write_bytes
from sparsesearch.denoising.controls import best_uniform, permuted_plan
from sparsesearch.denoising.corridor import Accepted, Corridor
from sparsesearch.denoising.frames import save_frames
from sparsesearch.denoising.judge import judge
from sparsesearch.denoising.judgement import Judgement
from sparsesearch.denoising.replay import Replay
from sparsesearch.errors import SpecError
from sparsesearch.plan import Plan
from sparsesearch.presets import preset_path
from sparsesearch.profiling.denoising.request import StepsRequest
from sparsesearch.report.video import render_video
from sparsesearch.runtime.diffusion.export import export_diffusers
from sparsesearch.runtime.diffusion.live import describe_transformer
from sparsesearch.search_space import SearchSpace
from sparsesearch.testbed.model import MODEL, VideoBed, load_bed
from sparsesearch.testbed.sampling import (
    CALIBRATION_SEED,
    HELD_OUT_SEED,
    MODES,
    STEPS,
    Mode,
    Scenes,
    psnr_db,
    sample,
    scenes,
    ssim,
)

Progress = Callable[[str, int, int], None]
SHOWN_CLIPS = 4


@dataclass(frozen=True)
class Size:
    """How much is run.

    Attributes:
        calibration_clips: clips to profile and replay on.
        held_out_clips: clips to judge on.
        steps: denoising steps.
        ends: where ranges of steps end, as shares of the run.
        per_head: measure the sensitivity of every head; else of every layer.
        frames: of a clip.
        side: pixels of a clip.
        expected: how long it takes.
    """

    calibration_clips: int
    held_out_clips: int
    steps: int
    ends: tuple[float, ...]
    per_head: bool
    frames: int
    side: int
    expected: str


FULL = Size(4, 12, STEPS, (0.2, 0.5, 1.0), True, 16, 32, "about two minutes on an H100 or H200")
REDUCED = Size(
    1, 2, 4, (0.5, 1.0), False, 8, 16,
    "about a minute on two cores: reduced to clips of 8 frames of 16 x 16 pixels and 4 steps, far from what the model was trained on, "
    "so that its figures only show that everything runs",
)  # fmt: skip


@dataclass(frozen=True)
class VideoQuickstart:
    """What the run found.

    Attributes:
        plan: the accepted plan, with its held-out figures.
        judgement: `plan`, `uniform` (one rule for all heads) and `permuted` (the plan's rules on other heads).
        accepted: the replay that accepted the plan.
        size: how much was run.
    """

    plan: Plan
    judgement: Judgement
    accepted: Accepted
    size: Size

    def summary(self) -> dict[str, Any]:
        """The figures that `--json` prints."""
        variants = self.judgement.variants
        return {
            "density": {name: found.density for name, found in variants.items()},
            "psnr_db": {name: found.mean("psnr_db") for name, found in variants.items()},
            "ssim": {name: found.mean("ssim") for name, found in variants.items()},
            "plan_better_by_db": {
                name: {"mean": pair.mean, "standard_error": pair.standard_error, "won": pair.won}
                for name in variants
                if name != "plan"
                for pair in [self.judgement.paired("plan", name)]
            },
            "clips": self.size.held_out_clips,
            "steps": self.size.steps,
            "weighting": self.accepted.weighting,
            "gap": None if self.plan.certificate is None else self.plan.certificate.gap,
        }


def quickstart_video(
    out: Path,
    *,
    mode: Mode = "t2v",
    density: float = 0.5,
    space: str = "video_mixture",
    device: str | None = None,
    size: Size | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> VideoQuickstart:
    """Run the corridor into `out`, which must be new, empty, or left behind by an interrupted run, which goes on.

    Leaves `profile/`, `sparse_plan.json`, `patched/`, `judgement.json` with its frames, and `report.html`.

    Args:
        out: the folder.
        mode: text to video, or image to video.
        density: share of dense attention's tiles over all steps that the plan may compute.
        space: menu of candidates.
        device: a CUDA device by default where there is one.
        size: how much to run; FULL on a GPU and REDUCED on a CPU by default.
        progress: called with (stage, done, total).

    Raises:
        ArtifactError: `out` holds a finished run, or other files.
        SpecError: unknown mode.
        UnsupportedModelError: diffusers is not installed.
    """
    require_unfinished(
        out, {"profile", "sparse_plan.json", "patched", "judgement.json", "judgement.frames.safetensors"}
    )
    if mode not in MODES:
        raise SpecError(f"mode must be one of {', '.join(MODES)}, but got {mode!r}.")
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    chosen = size or size_for(place)
    bed = load_bed(place)
    corridor = _corridor(bed, mode, SearchSpace.load(space), chosen, out / "profile", progress)
    profile = corridor.profile(density=density, per_head=chosen.per_head, resume=True)
    accepted = corridor.search(profile, density)
    held = _scenes(bed, mode, chosen, held_out=True)
    replay = Replay.of(bed.transformer, lambda: sample(bed, held, steps=chosen.steps))
    plans = {
        "plan": accepted.plan,
        "uniform": best_uniform(profile, density, corridor.replay),
        "permuted": permuted_plan(accepted.plan, 0),
    }
    layout = profile.manifest.layout
    found = judge(replay, plans, {"psnr_db": psnr_db, "ssim": ssim}, layout=layout, num_steps=chosen.steps)
    quality = {
        measure: {name: v.mean(measure) for name, v in found.variants.items()} for measure in ("psnr_db", "ssim")
    }
    plan = accepted.plan.model_copy(update={"quality": quality})
    plan.save(out / "sparse_plan.json")
    export_diffusers({"": plan}, preset_path("models", MODEL), out / "patched", overwrite=True)
    found.save(out / "judgement.json")
    shown = replay.samples(plan)[:SHOWN_CLIPS]
    save_frames(out / "judgement.json", {"dense": replay.dense[:SHOWN_CLIPS], "plan": shown})
    facts = {"mode": mode, "clips": chosen.held_out_clips, "run": chosen.expected}
    write_bytes(out / "report.html", render_video(plan, found, replay.dense[:SHOWN_CLIPS], shown, facts=facts).encode())
    return VideoQuickstart(plan, found, accepted, chosen)


def size_for(device: str) -> Size:
    """The full run on a GPU, the reduced one on a CPU."""
    return REDUCED if torch.device(device).type == "cpu" else FULL


def _corridor(bed: VideoBed, mode: Mode, space: SearchSpace, size: Size, folder: Path, progress: Progress) -> Corridor:
    clips = _scenes(bed, mode, size, held_out=False)
    request = StepsRequest(
        describe_transformer(bed.transformer, MODEL),
        space,
        size.steps,
        ends=size.ends,
        calibration=f"{len(clips)} procedural clips, {mode}, seed {CALIBRATION_SEED}",
    )
    return Corridor(bed.transformer, lambda: sample(bed, clips, steps=size.steps), request, folder, progress)


def _scenes(bed: VideoBed, mode: Mode, size: Size, *, held_out: bool) -> Scenes:
    count = size.held_out_clips if held_out else size.calibration_clips
    seed = HELD_OUT_SEED if held_out else CALIBRATION_SEED
    return scenes(count, mode=mode, seed=seed, device=bed.device, frames=size.frames, side=size.side)
