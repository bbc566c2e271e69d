"""The profiling run of a diffusion transformer: calibrate templates, then score every candidate, at a few steps of true sampling.

The model samples as ever; a probe on its attention sees queries, keys and values as they pass and keeps only sums, so memory does not grow
with steps, layers or sequences.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from safetensors.torch import save
from torch import Tensor

from sparsesearch.artifacts import sha256_file, write_bytes
from sparsesearch.block_mask import BlockGrid
from sparsesearch.errors import SpecError
from sparsesearch.layout import Layout
from sparsesearch.order import Order
from sparsesearch.plan import Plan, uniform_plan
from sparsesearch.profiling.denoising.menu import FlatCall, OrderGroup, video_grid
from sparsesearch.profiling.denoising.observe import Observer, Progress, Sampler, real_tokens, silent
from sparsesearch.profiling.denoising.record import DenoisingProfile, StepsManifest
from sparsesearch.profiling.denoising.request import StepsRequest
from sparsesearch.profiling.denoising.rest_errors import RestErrors, must_run
from sparsesearch.profiling.denoising.tile_errors import tile_errors, tile_masses
from sparsesearch.profiling.record import provenance_versions
from sparsesearch.profiling.shards import ShardStore
from sparsesearch.rules import Rule
from sparsesearch.rules.dense import Dense
from sparsesearch.rules.taylor_rest import TaylorRest
from sparsesearch.runtime.denoisers import projections_of
from sparsesearch.runtime.diffusion.attention import LayerCall

MOST_MASS_BYTES = 32e9
Calibrated = dict[str, tuple[dict[str, tuple[Rule, ...]], ...]]


def profile_transformer(
    model: Any,
    sampler: Sampler,
    request: StepsRequest,
    out: Path,
    *,
    plan: Plan | None = None,
    scheduler: Any = None,
    resume: bool = False,
    progress: Progress = silent,
) -> DenoisingProfile:
    """Profile a diffusers transformer, or a masked diffusion language model, into a directory.

    Args:
        model: in evaluation mode, with no plan applied; a language model as a `MaskedDenoiser`.
        sampler: samples the calibration inputs through it.
        request: model, candidates, steps.
        out: the profile directory; one shard per captured step is kept until the end, so `resume` loses at most one step.
        plan: run this plan while profiling, so that errors are measured on the activations it really meets.
        scheduler: of the model's pipeline, where that does not tell the step itself.
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
    study = _Study(model, request, store, Observer(model, sampler, request, running, store.folder, progress, scheduler))
    with store.in_work():
        calibrated = study.calibrate()
        return study.score(calibrated, None if plan is None else plan.sha256)


@dataclass
class _Study:
    """One profiling run."""

    model: Any
    request: StepsRequest
    store: ShardStore
    observer: Observer

    @property
    def layout(self) -> Layout:
        """Tokens of the sequences; known once they were seen."""
        assert self.observer.layout is not None
        return self.observer.layout

    def calibrate(self) -> Calibrated:
        """Turn the space's templates into one rule per range and head, from the mean attention mass."""
        templates = [rule for rule in self.request.space.candidates if rule.needs_calibration]
        orders = tuple(dict.fromkeys(rule.token_order for rule in templates))
        if not orders:
            return {}

        def masses(seen: LayerCall) -> dict[str, Tensor]:
            self._check_mass_bytes(len(orders))
            flat = FlatCall.of(seen)
            found = {}
            for order in orders:
                q, k, _ = flat.ordered(order)
                mass = tile_masses(
                    q, k, scale=seen.scale, block_tokens=self.request.space.block_tokens, real_tokens=real_tokens(seen)
                )
                found[f"{order}"] = mass.view(*seen.q.shape[:2], *mass.shape[1:]).mean(0)
            return found

        shards = self.observer.shards("masses", masses)
        modules, grid = self.request.base_model.modules, video_grid(self.layout, self.request.space.block_tokens)
        calibrated: dict[str, list[dict[str, tuple[Rule, ...]]]] = {rule.label: [] for rule in templates}
        every = tuple(step for steps in self.request.captured for step in steps)
        for steps in (every,) if self.request.bitmaps == "run" else self.request.captured:
            for rule in templates:
                table = {}
                for module in modules:
                    mass = torch.stack([shards[step][f"{module}/{rule.token_order}"] for step in steps]).mean(0)
                    table[module] = tuple(rule.calibrated(head, grid) for head in mass)
                calibrated[rule.label].append(table)
        repeated = len(self.request.captured) if self.request.bitmaps == "run" else 1
        return {label: tuple(tables) * repeated for label, tables in calibrated.items()}

    def _check_mass_bytes(self, num_orders: int) -> None:
        """Masses of all tiles of all heads are held for every captured step; refuse before hours are spent on what cannot be held."""
        request = self.request
        blocks = video_grid(self.layout, request.space.block_tokens).num_q_blocks
        steps = sum(len(captured) for captured in request.captured)
        needed = 4.0 * blocks**2 * request.base_model.geometry.total_heads * num_orders * steps
        if needed > MOST_MASS_BYTES:
            raise SpecError(
                f"calibrated bitmaps need the mass of every tile, {needed / 1e9:.0f} GB for {blocks} x {blocks} tiles of "
                f"{request.base_model.geometry.total_heads} heads in {num_orders} orders at {steps} steps, but at most "
                f"{MOST_MASS_BYTES / 1e9:.0f} GB are held. Take a space without them, such as video_geometric, or larger blocks."
            )

    def score(self, calibrated: Calibrated, plan_sha256: str | None) -> DenoisingProfile:
        """Errors of all candidates at every captured step."""
        weights = projections_of(self.model)
        place_of = {step: place for place, steps in enumerate(self.request.captured) for step in steps}
        chosen: dict[tuple[int, str], list[OrderGroup]] = {}
        candidates = self.request.space.candidates

        def rules_of(index: int, seen: LayerCall, step: int) -> Sequence[Rule]:
            if not candidates[index].needs_calibration:
                return (candidates[index],) * seen.q.shape[1]
            return calibrated[candidates[index].label][place_of[step]][seen.path]

        lengths = [end - first for first, end in self.request.ranges]
        captured = {step: lengths[place] for step, place in place_of.items()}
        rests = RestErrors(candidates, rules_of, captured, self.request.space.block_tokens)

        def errors(seen: LayerCall) -> dict[str, Tensor]:
            assert seen.call.step is not None
            key = (place_of[seen.call.step[0]], seen.path)
            if key not in chosen:
                chosen[key] = self._groups(*key, calibrated, seen.q.shape[1], str(seen.q.device))
            return self._errors(seen, chosen[key], weights[seen.path], rests)

        shards = self.observer.shards("errors", errors, rests.before)
        return self._merge(shards, calibrated, plan_sha256)

    def _groups(self, place: int, module: str, calibrated: Calibrated, heads: int, device: str) -> list[OrderGroup]:
        """Candidates by order, with the tiles of the static ones."""
        grid = video_grid(self.layout, self.request.space.block_tokens)
        by_order: dict[Order, list[int]] = {}
        for index, rule in enumerate(self.request.space.candidates):
            if not must_run(rule):
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
            groups.append(OrderGroup(order, indices, masks, grid))
        return groups

    def _errors(
        self, seen: LayerCall, groups: list[OrderGroup], weight: Float[Tensor, "O HD"], rests: RestErrors
    ) -> dict[str, Tensor]:
        """Relative error [H, C] and tiles [H, C] of one call, mean over its sequences."""
        batch, heads, _tokens, size = seen.q.shape
        flat, rules = FlatCall.of(seen), self.request.space.candidates
        per_head = weight.float().view(-1, heads, size)
        gram = torch.einsum("ohd,ohe->hde", per_head, per_head)
        real = real_tokens(seen)
        q_real, k_real, v_real = (x[:, :, :real] for x in (seen.q, seen.k, seen.v))
        dense = F.scaled_dot_product_attention(q_real, k_real, v_real, scale=seen.scale)
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
                query_blocks=subset, terms=[_terms(rules[index]) for index in group.indices], real_tokens=real,
            )  # fmt: skip
            scored = 1.0 if subset is None else group.grid.num_q_blocks / len(subset)
            relative = found.error.view(batch, heads, -1) * scored / norm[:, None, None]
            error[:, group.indices] = relative.mean(0)
            for place, index in enumerate(group.indices):
                levels = rules[index].levels_of(masks[:, place], group.grid)
                tiles[:, index] = rules[index].work(levels, group.grid).view(batch, heads).mean(0)
        for index, rule in enumerate(rules):
            if rule.rest == "mean_value":
                delta = v_real.float().mean(2, keepdim=True) - dense.float()
                wrong = torch.einsum("bhtd,hde,bhte->bh", delta, gram, delta)
                error[:, index] = (wrong / norm[:, None]).mean(0)
        if rests.indices:
            error[:, rests.indices], tiles[:, rests.indices] = rests.errors(seen, dense, gram, norm)
        return {"error": error, "tiles": tiles}

    def _query_blocks(self, grid: BlockGrid) -> Tensor | None:
        count = self.request.query_blocks
        if count is None or count >= grid.num_q_blocks:
            return None
        return torch.linspace(0, grid.num_q_blocks - 1, count).round().long()

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
            bitmaps=request.bitmaps,
            calibration=request.calibration,
            base_plan_sha256=plan_sha256,
            versions=provenance_versions(),
            scores_sha256=sha256_file(self.store.folder / "scores.safetensors"),
        )
        profile = DenoisingProfile(self.store.folder, manifest, **tensors)
        profile.save_manifest(self.store.folder)
        self.store.clear()
        return profile


def _terms(rule: Rule) -> int | None:
    """What stands for the tiles that a candidate does not compute, as `tile_errors` takes it."""
    return rule.terms if isinstance(rule, TaylorRest) else None
