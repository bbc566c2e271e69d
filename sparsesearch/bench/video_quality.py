"""Quality of plans on the embedded video model by true sampling of held-out clips: our menus and searches, Sparse-vDiT's, SVG's, controls.

Everything is chosen on calibration clips; held-out clips only judge. PSNR is to dense sampling from the same noise.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from time import perf_counter
from typing import Any

from sparsesearch.bench.video_quality_request import BARS_DB, WITH_RESTS, QualityRequest
from sparsesearch.bench.video_quality_rows import OURS, paired_rows, provenance, search_row
from sparsesearch.denoising.controls import best_uniform, permuted_plan
from sparsesearch.denoising.corridor import Accepted, Corridor
from sparsesearch.denoising.judge import judge
from sparsesearch.denoising.judgement import Judgement, Variant
from sparsesearch.denoising.ranges import ends_of, find_ranges, spread_sensitivity
from sparsesearch.denoising.replay import Replay
from sparsesearch.denoising.threshold import find_threshold_plan
from sparsesearch.errors import BudgetInfeasibleError
from sparsesearch.layout import Layout, video_layout
from sparsesearch.plan import Plan
from sparsesearch.profiling.denoising.record import DenoisingProfile
from sparsesearch.profiling.denoising.request import StepsRequest
from sparsesearch.runtime.diffusion.live import describe_transformer
from sparsesearch.search_space import SearchSpace
from sparsesearch.testbed.model import MODEL, VideoBed, load_bed
from sparsesearch.testbed.sampling import (
    CALIBRATION_SEED,
    HELD_OUT_SEED,
    Scenes,
    psnr_db,
    sample,
    scenes,
    ssim,
)

_DRAWS = 3
_MEASURES = {"psnr_db": psnr_db, "ssim": ssim}


Progress = Callable[[str, int, int], None]


@dataclass
class _Study:
    """One mode's study, budget after budget."""

    request: QualityRequest
    progress: Progress
    seconds: dict[str, float] = field(default_factory=dict)
    searches: dict[str, Accepted] = field(default_factory=dict)
    infeasible: dict[str, str] = field(default_factory=dict)
    plans: dict[str, Plan] = field(default_factory=dict)
    variants: dict[str, Variant] = field(default_factory=dict)

    @cached_property
    def bed(self) -> VideoBed:
        return load_bed(self.request.device)

    @cached_property
    def spaces(self) -> dict[str, SearchSpace]:
        found = {name: SearchSpace.load(name) for name in ("sparse_vdit", "svg")}
        whole = SearchSpace.load(OURS)
        static = tuple(rule for rule in whole.candidates if not (rule.dynamic or rule.adds_rest))
        found[OURS] = replace(whole, candidates=static)
        if len(static) < len(whole.candidates):
            found[WITH_RESTS] = whole
        return {name: space for name, space in found.items() if name in self.request.menus or name == OURS}

    @cached_property
    def corridor(self) -> Corridor:
        """Over all menus, in the request's ranges of steps."""
        given = self.request
        menu = {rule.label: rule for space in reversed(self.spaces.values()) for rule in space.candidates}
        every = replace(self.spaces[OURS], name="+".join(self.spaces), candidates=tuple(menu.values()))
        clips = self.scenes(CALIBRATION_SEED, given.calibration_clips)
        request = StepsRequest(
            describe_transformer(self.bed.transformer, MODEL),
            every,
            given.steps,
            ends=given.ends,
            calibration=f"{len(clips)} procedural clips, {given.mode}, seed {CALIBRATION_SEED}",
        )
        sampler = partial(sample, self.bed, clips, steps=given.steps)
        return Corridor(self.bed.transformer, sampler, request, given.folder, self.progress)

    @cached_property
    def profile(self) -> DenoisingProfile:
        corridor = self.corridor
        with self.timed("profile"):
            corridor.errors("dense")
        with self.timed("sensitivities"):
            density = min(self.request.densities)
            return corridor.profile(density=density, per_head=self.request.per_head, resume=True)

    @cached_property
    def sliced(self) -> DenoisingProfile:
        """Our menu in many slices of steps, bitmaps those of the whole run."""
        count = min(self.request.slices, self.request.steps)
        ends = tuple((place + 1) / count for place in range(count))
        changes: dict[str, Any] = {"space": self.spaces[OURS], "ends": ends, "captured_per_range": 1, "bitmaps": "run"}
        with self.timed("profile of slices"):
            found = replace(self.corridor, request=replace(self.corridor.request, **changes)).errors("slices")
            return spread_sensitivity(self.profile, found)

    @cached_property
    def held_out(self) -> Replay:
        """The judge at the calibrated number of steps and length."""
        return self.replay(self.request.steps, self.request.frames)

    def replay(self, steps: int, frames: int) -> Replay:
        """The judge on held-out clips."""
        held = self.scenes(HELD_OUT_SEED, self.request.held_out_clips, frames)
        return Replay.of(self.bed.transformer, partial(sample, self.bed, held, steps=steps))

    def scenes(self, seed: int, count: int, frames: int | None = None) -> Scenes:
        given = self.request
        length = frames or given.frames
        return scenes(count, mode=given.mode, seed=seed, device=self.bed.device, frames=length, side=given.side)

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the wall time to the stage's."""
        start = perf_counter()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + perf_counter() - start

    def measure(self, density: float) -> dict[str, Variant]:
        """Every plan and control of one budget, judged."""
        plans: dict[str, Plan] = {}
        for menu in self.spaces:
            self._search(plans, menu, density)
        if "sparse_vdit" in self.spaces:
            plans[f"sparse_vdit by threshold {density}"] = find_threshold_plan(
                self.profile, density, space=self.spaces["sparse_vdit"]
            )
        plans[f"uniform {density}"] = best_uniform(self.profile, density, self.corridor.replay)
        if f"{OURS} {density}" in plans:
            for draw in range(_DRAWS):
                plans[f"permuted {density} #{draw}"] = permuted_plan(plans[f"{OURS} {density}"], draw)
        with self.timed("held-out sampling"):
            layout = self.profile.manifest.layout
            found = judge(self.held_out, plans, _MEASURES, layout=layout, num_steps=self.request.steps).variants
        for name, plan in plans.items():
            plan.save(self.request.folder / "plans" / f"{name.replace(',', '').replace(' ', '_')}.json")
        self.plans |= plans
        self.variants |= found
        return found

    def _search(self, plans: dict[str, Plan], menu: str, density: float) -> None:
        """One menu at one budget; ours also in the other ways, and the best of all ways by its replay."""
        given, corridor, space, profile = self.request, self.corridor, self.spaces[menu], self.profile
        other_ways = menu == OURS and density == min(given.densities)
        tries = 0 if menu == "svg" else given.evaluations
        ways: dict[str, Accepted] = {}
        try:
            with self.timed("search"):
                ways[menu] = corridor.search(profile, density, space=space, evaluations=tries)
        except BudgetInfeasibleError as error:
            self.infeasible[f"{menu} {density}"] = str(error)
            return
        if other_ways and given.again:
            with self.timed("search under the plan"):
                ways[f"{menu}, again"] = corridor.search_again(
                    profile, density, ways[menu], space=space, evaluations=tries
                )
        if other_ways and given.slices:
            ways[f"{menu}, ranges by DP"] = self._by_dp(density)
        if len(ways) > 1:
            ways[f"{menu}, best"] = min(ways.values(), key=lambda way: min(way.log10_error.values()))
        self.searches |= {f"{name} {density}": way for name, way in ways.items()}
        plans |= {f"{name} {density}": way.plan for name, way in ways.items()}

    def _by_dp(self, density: float) -> Accepted:
        """Our menu with as many ranges of steps, but chosen by interval DP on slices and then profiled with bitmaps of their own."""
        given, sliced = self.request, self.sliced
        solution = find_ranges(sliced, density, max_ranges=len(given.ends))
        request = replace(self.corridor.request, space=self.spaces[OURS], ends=ends_of(sliced, solution))
        corridor = replace(self.corridor, request=request, dense=self.corridor.replay.dense)
        with self.timed("search in ranges by DP"):
            found = spread_sensitivity(self.profile, corridor.errors(f"ranges-{density}"))
            return corridor.search(found, density, evaluations=given.evaluations)

    def elsewhere(self) -> dict[str, Any]:
        """Plans at other numbers of steps and other lengths than they were calibrated at."""
        given, rows = self.request, {}
        kept = tuple(
            f"{name} {density}" for density in given.densities for name in (OURS, WITH_RESTS, "sparse_vdit", "uniform")
        )
        named = {name: plan for name, plan in self.plans.items() if name in kept}
        for steps, frames in [(n, given.frames) for n in given.other_steps] + [
            (given.steps, n) for n in given.other_frames
        ]:
            layout = self._layout(frames)
            with self.timed("held-out sampling elsewhere"):
                found = judge(self.replay(steps, frames), named, _MEASURES, layout=layout, num_steps=steps)
            rows[f"{steps} steps, {frames} frames"] = {
                name: {"density": variant.density, "psnr_db": variant.mean("psnr_db"), "ssim": variant.mean("ssim")}
                for name, variant in found.variants.items()
            }
        return rows

    def _layout(self, frames: int) -> Layout:
        time, height, width = self.bed.transformer.config.patch_size
        side = self.request.side
        return video_layout(frames // time, side // height, side // width)


def run(
    request: QualityRequest,
    *,
    command: Sequence[str] = (),
    progress: Progress = lambda *_: None,
    on_variant: Callable[[str, Variant], None] = lambda *_: None,
) -> dict[str, Any]:
    """Profile, search, judge; the record that the command writes.

    Args:
        request: what to measure.
        command: recorded as the command line.
        progress: called with (stage, done, total).
        on_variant: called with every judged plan, budget after budget.
    """
    study = _Study(request, progress)
    for density in request.densities:
        for name, variant in study.measure(density).items():
            on_variant(name, variant)
    elsewhere = study.elsewhere()
    manifest = study.profile.manifest
    found = Judgement(num_steps=request.steps, layout=manifest.layout, variants=study.variants)
    return {
        "format": "sparsesearch.bench.video-quality",
        "provenance": provenance(request.device, command),
        "model": MODEL,
        "mode": request.mode,
        "steps": request.steps,
        "calibration": manifest.calibration,
        "held_out": f"{request.held_out_clips} other clips, seed {HELD_OUT_SEED}",
        "ranges": [list(place) for place in manifest.ranges],
        "candidates": len(manifest.candidates),
        "unit": "PSNR to dense in dB, one value per clip; density over all steps",
        "seconds": {stage: round(taken, 1) for stage, taken in study.seconds.items()},
        "variants": {name: variant.model_dump(mode="json") for name, variant in found.variants.items()},
        "paired_db": paired_rows(found, request.densities),
        "searches": {name: search_row(way) for name, way in study.searches.items()},
        "infeasible": study.infeasible,
        "elsewhere": elsewhere,
        "bars_db": {str(density): bars for density, bars in BARS_DB[request.mode].items()},
    }
