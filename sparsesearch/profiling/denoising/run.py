"""The profiling run of a diffusion transformer: calibrate templates, then score every candidate, at a few steps of true sampling.

The model samples as ever; a probe on its attention sees queries, keys and values as they pass and keeps only sums, so memory does not grow
with steps, layers or sequences.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from safetensors.torch import load_file, save
from torch import Tensor

from sparsesearch.artifacts import sha256_file, write_bytes
from sparsesearch.block_mask import BlockGrid
from sparsesearch.errors import SpecError
from sparsesearch.layout import Layout
from sparsesearch.order import Order
from sparsesearch.plan import BaseModelInfo, Plan, uniform_plan
from sparsesearch.profiling.denoising.record import DenoisingProfile, StepsManifest
from sparsesearch.profiling.denoising.tile_errors import tile_errors, tile_masses
from sparsesearch.profiling.record import provenance_versions
from sparsesearch.profiling.shards import ShardStore
from sparsesearch.rules import Rule
from sparsesearch.rules.dense import Dense
from sparsesearch.runtime.diffusion.attention import LayerCall
from sparsesearch.runtime.diffusion.live import apply_to_transformer, output_weights
from sparsesearch.search_space import SearchSpace

Sampler = Callable[[], Tensor]
"""Samples from the calibration inputs through the model under study and returns the final latents, one row per sequence."""
Progress = Callable[[str, int, int], None]
Calibrated = dict[str, tuple[dict[str, tuple[Rule, ...]], ...]]


def silent(stage: str, done: int, total: int) -> None:
    """The default progress callback."""


@dataclass(frozen=True)
class StepsRequest:
    """What to profile.

    Attributes:
        base_model: the transformer.
        space: candidates.
        num_steps: denoising steps that the sampler takes.
        ends: where ranges of steps end, as shares of the run; the last is 1.
        captured_per_range: steps to look at in each range, evenly spaced.
        calibration: a name of the calibration inputs, for the record and for resuming.
        query_blocks: score so many query blocks, evenly spaced, instead of all; for sequences of 100,000 tokens.
    """

    base_model: BaseModelInfo
    space: SearchSpace
    num_steps: int
    ends: tuple[float, ...] = (0.2, 0.5, 1.0)
    captured_per_range: int = 2
    calibration: str = "unnamed"
    query_blocks: int | None = None

    @property
    def ranges(self) -> tuple[tuple[int, int], ...]:
        """First and end step of each range."""
        ends = [round(share * self.num_steps) for share in self.ends]
        if sorted(set(ends)) != ends or ends[0] < 1 or ends[-1] != self.num_steps:
            raise SpecError(
                f"ends must ascend to 1 with a step in every range, but are {self.ends} of {self.num_steps}."
            )
        return tuple(zip([0, *ends[:-1]], ends, strict=True))

    @property
    def captured(self) -> tuple[tuple[int, ...], ...]:
        """Steps to look at, per range."""
        count = self.captured_per_range
        return tuple(
            tuple(sorted({first + (2 * i + 1) * (end - first) // (2 * count) for i in range(count)}))
            for first, end in self.ranges
        )

    def fingerprint(self, plan: Plan | None) -> dict[str, Any]:
        """The fields a resumed run must repeat."""
        return {
            "model": self.base_model.model_dump(mode="json", exclude={"name_or_path"}),
            "space": self.space.sha256,
            "captured": [list(steps) for steps in self.captured],
            "num_steps": self.num_steps,
            "calibration": self.calibration,
            "query_blocks": self.query_blocks,
            "plan": None if plan is None else plan.sha256,
            "versions": provenance_versions(),
        }


def profile_transformer(
    model: Any,
    sampler: Sampler,
    request: StepsRequest,
    out: Path,
    *,
    plan: Plan | None = None,
    resume: bool = False,
    progress: Progress = silent,
) -> DenoisingProfile:
    """Profile a diffusers transformer into a directory.

    Args:
        model: in evaluation mode, with no plan applied.
        sampler: samples the calibration inputs through it.
        request: model, candidates, steps.
        out: the profile directory; one shard per captured step is kept until the end, so `resume` loses at most one step.
        plan: run this plan while profiling, so that errors are measured on the activations it really meets.
        resume: continue instead of refusing a directory that holds a profile.
        progress: called with (stage, done, total).

    Raises:
        ArtifactError: `out` is taken, or was begun with another request.
        SpecError: the space has no candidate but dense, or the sampler took other steps than said.
    """
    store = ShardStore.open(out, request.fingerprint(plan), resume=resume)
    if (out / "profile.json").exists():
        return DenoisingProfile.load(out)
    running = plan or uniform_plan(
        request.base_model, Dense(), block_tokens=request.space.block_tokens, lengths_tokens=(1,)
    )
    study = _Study(model, sampler, request, running, store, progress)
    calibrated = study.calibrate()
    return study.score(calibrated, None if plan is None else plan.sha256)


@dataclass
class _Study:
    """One profiling run."""

    model: Any
    sampler: Sampler
    request: StepsRequest
    running: Plan
    store: ShardStore
    progress: Progress
    layout: Layout | None = None

    def calibrate(self) -> Calibrated:
        """Turn the space's templates into one rule per range and head, from the mean attention mass."""
        templates = [rule for rule in self.request.space.candidates if rule.needs_calibration]
        orders = tuple(dict.fromkeys(rule.token_order for rule in templates))
        if not orders:
            return {}

        def masses(seen: LayerCall) -> dict[str, Tensor]:
            flat = _Flat.of(seen)
            found = {}
            for order in orders:
                q, k, _ = flat.ordered(order)
                mass = tile_masses(q, k, scale=seen.scale, block_tokens=self.request.space.block_tokens)
                found[f"{order}"] = mass.view(*seen.q.shape[:2], *mass.shape[1:]).mean(0)
            return found

        shards = self._observe("masses", masses)
        assert self.layout is not None
        modules, grid = self.request.base_model.modules, _grid(self.layout, self.request.space.block_tokens)
        calibrated: dict[str, list[dict[str, tuple[Rule, ...]]]] = {rule.label: [] for rule in templates}
        for steps in self.request.captured:
            for rule in templates:
                table = {}
                for module in modules:
                    mass = torch.stack([shards[step][f"{module}/{rule.token_order}"] for step in steps]).mean(0)
                    table[module] = tuple(rule.calibrated(head, grid) for head in mass)
                calibrated[rule.label].append(table)
        return {label: tuple(tables) for label, tables in calibrated.items()}

    def score(self, calibrated: Calibrated, plan_sha256: str | None) -> DenoisingProfile:
        """Errors of all candidates at every captured step."""
        weights = output_weights(self.model)
        place_of = {step: place for place, steps in enumerate(self.request.captured) for step in steps}
        chosen: dict[tuple[int, str], list[_OrderGroup]] = {}

        def errors(seen: LayerCall) -> dict[str, Tensor]:
            assert seen.call.step is not None
            assert self.layout is not None
            key = (place_of[seen.call.step[0]], seen.path)
            if key not in chosen:
                chosen[key] = self._groups(*key, calibrated, seen.q.shape[1], str(seen.q.device))
            return self._errors(seen, chosen[key], weights[seen.path])

        shards = self._observe("errors", errors)
        assert self.layout is not None
        return self._merge(shards, calibrated, plan_sha256)

    def _groups(self, place: int, module: str, calibrated: Calibrated, heads: int, device: str) -> "list[_OrderGroup]":
        """Candidates by order, with the tiles of the static ones."""
        assert self.layout is not None
        grid = _grid(self.layout, self.request.space.block_tokens)
        by_order: dict[Order, list[int]] = {}
        for index, rule in enumerate(self.request.space.candidates):
            by_order.setdefault(rule.token_order, []).append(index)
        groups = []
        for order, indices in by_order.items():
            masks: list[Tensor | Rule] = []
            for index in indices:
                rule = self.request.space.candidates[index]
                if rule.dynamic:
                    masks.append(rule)
                elif rule.needs_calibration:
                    own = calibrated[rule.label][place][module]
                    masks.append(torch.stack([one.select(grid) for one in own]).to(device))
                else:
                    masks.append(rule.select(grid).to(device).expand(heads, -1, -1))
            groups.append(_OrderGroup(order, indices, masks, grid))
        return groups

    def _errors(self, seen: LayerCall, groups: "list[_OrderGroup]", weight: Float[Tensor, "O HD"]) -> dict[str, Tensor]:
        """Relative error [H, C] and tiles [H, C] of one call, mean over its sequences."""
        batch, heads, _tokens, size = seen.q.shape
        flat, rules = _Flat.of(seen), self.request.space.candidates
        per_head = weight.float().view(-1, heads, size)
        gram = torch.einsum("ohd,ohe->hde", per_head, per_head)
        dense = F.scaled_dot_product_attention(seen.q, seen.k, seen.v, scale=seen.scale)
        whole = F.linear(dense.transpose(1, 2).flatten(2).float(), weight.float())
        norm = whole.square().sum((1, 2))
        error = torch.zeros(heads, len(rules), device=seen.q.device)
        tiles = torch.zeros(heads, len(rules), device=seen.q.device)
        subset = self._query_blocks(groups[0].grid)
        for group in groups:
            q, k, v = flat.ordered(group.order)
            masks = group.tiles(q, k, batch, seen.scale)
            found = tile_errors(
                q, k, v, masks, gram.repeat(batch, 1, 1), scale=seen.scale, block_tokens=group.grid.block_tokens,
                query_blocks=subset,
            )  # fmt: skip
            scored = 1.0 if subset is None else group.grid.num_q_blocks / len(subset)
            relative = found.error.view(batch, heads, -1) * scored / norm[:, None, None]
            error[:, group.indices] = relative.mean(0)
            tiles[:, group.indices] = masks.sum((-1, -2)).float().view(batch, heads, -1).mean(0)
        for index, rule in enumerate(rules):
            if rule.rest == "mean_value":
                delta = seen.v.float().mean(2, keepdim=True) - dense.float()
                wrong = torch.einsum("bhtd,hde,bhte->bh", delta, gram, delta)
                error[:, index] = (wrong / norm[:, None]).mean(0)
        return {"error": error, "tiles": tiles}

    def _query_blocks(self, grid: BlockGrid) -> Tensor | None:
        count = self.request.query_blocks
        if count is None or count >= grid.num_q_blocks:
            return None
        return torch.linspace(0, grid.num_q_blocks - 1, count).round().long()

    def _observe(self, name: str, measure: Callable[[LayerCall], dict[str, Tensor]]) -> dict[int, dict[str, Tensor]]:
        """Sample once and measure every layer at the captured steps that have no shard yet; then the shards of all of them."""
        steps = [step for captured in self.request.captured for step in captured]
        paths = {step: self.store.folder / "shards" / name / f"{step:04d}.safetensors" for step in steps}
        last = self.request.base_model.modules[-1]
        sums: dict[int, dict[str, list[Tensor]]] = {}
        missing = {step for step in steps if not paths[step].exists()}
        taken: set[int] = set()

        def probe(seen: LayerCall) -> None:
            if seen.call.step is None or seen.call.step[1] != self.request.num_steps:
                raise SpecError(
                    f"the sampler must take the {self.request.num_steps} steps of the request and tell them, but the call says {seen.call.step}."
                )
            self.layout = seen.call.layout
            step = seen.call.step[0]
            if step not in missing or seen.call.key_lengths is not None:
                return
            for key, value in measure(seen).items():
                sums.setdefault(step, {}).setdefault(f"{seen.path}/{key}", []).append(value)
            if seen.path == last:
                taken.add(step)
                self.progress(name, len(steps) - len(missing) + len(taken), len(steps))
            for done in [other for other in sums if other != step]:  # the loop has moved on
                self._write(paths[done], sums.pop(done))

        if missing or self.layout is None:
            with apply_to_transformer(self.model, self.running, allow_other_weights=True) as applied:
                applied.probe(probe)
                self.sampler()
            for step in list(sums):
                self._write(paths[step], sums.pop(step))
            if missing - taken:
                raise SpecError(
                    f"the sampler must take steps {sorted(missing)}, but never came to {sorted(missing - taken)}; prompts must be unpadded."
                )
        return {step: load_file(path) for step, path in paths.items()}

    def _write(self, path: Path, sums: dict[str, list[Tensor]]) -> None:
        means = {key: torch.stack(values).mean(0).cpu().contiguous() for key, values in sums.items()}
        write_bytes(path, save(means))

    def _merge(
        self, shards: dict[int, dict[str, Tensor]], calibrated: Calibrated, plan_sha256: str | None
    ) -> DenoisingProfile:
        modules, request = self.request.base_model.modules, self.request

        def table(field: str) -> Float[Tensor, "R L H C"]:
            return torch.stack(
                [
                    torch.stack(
                        [torch.stack([shards[s][f"{module}/{field}"] for s in steps]).mean(0) for module in modules]
                    )
                    for steps in request.captured
                ]
            )

        tensors = {
            "error": table("error"),
            "tiles": table("tiles"),
            "sensitivity": torch.ones(len(request.ranges), len(modules), max(request.base_model.num_heads)),
        }
        write_bytes(self.store.folder / "scores.safetensors", save(tensors))
        assert self.layout is not None
        manifest = StepsManifest(
            base_model=request.base_model,
            layout=self.layout,
            space=request.space.name,
            space_sha256=request.space.sha256,
            block_tokens=request.space.block_tokens,
            num_steps=request.num_steps,
            ranges=request.ranges,
            captured=request.captured,
            candidates=request.space.candidates,
            calibrated=calibrated,
            calibration=request.calibration,
            base_plan_sha256=plan_sha256,
            versions=provenance_versions(),
            scores_sha256=sha256_file(self.store.folder / "scores.safetensors"),
        )
        profile = DenoisingProfile(self.store.folder, manifest, **tensors)
        profile.save_manifest(self.store.folder)
        self.store.clear()
        return profile


@dataclass(frozen=True)
class _OrderGroup:
    """Candidates that share an order of tokens."""

    order: Order
    indices: list[int]
    masks: "Sequence[Tensor | Rule]"
    grid: BlockGrid

    def tiles(self, q: Tensor, k: Tensor, batch: int, scale: float) -> Bool[Tensor, "U C M N"]:
        """Tiles per (sequence, head) pair; dynamic rules look at the pairs' own queries and keys."""
        found = []
        for mask in self.masks:
            if isinstance(mask, Rule):
                own = mask.select(self.grid, q.unflatten(0, (batch, -1)) * scale, k.unflatten(0, (batch, -1)))
                found.append(own.to(q.device).flatten(0, 1))
            else:
                found.append(mask.repeat(batch, 1, 1))
        return torch.stack(found, 1)


@dataclass(frozen=True)
class _Flat:
    """Queries, keys and values of one call as (sequence, head) pairs."""

    q: Float[Tensor, "U T D"]
    k: Float[Tensor, "U T D"]
    v: Float[Tensor, "U T D"]
    layout: Layout

    @classmethod
    def of(cls, seen: LayerCall) -> "_Flat":
        return cls(seen.q.flatten(0, 1), seen.k.flatten(0, 1), seen.v.flatten(0, 1), seen.call.layout)

    def ordered(self, order: Order) -> tuple[Tensor, Tensor, Tensor]:
        if order.is_identity:
            return self.q, self.k, self.v
        index = order.permutation(self.layout, self.q.device)
        return self.q.index_select(1, index), self.k.index_select(1, index), self.v.index_select(1, index)


def _grid(layout: Layout, block_tokens: int) -> BlockGrid:
    tokens = layout.num_tokens
    return BlockGrid(tokens, tokens, block_tokens, causal=False, layout=layout)
