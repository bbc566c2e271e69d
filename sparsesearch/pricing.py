"""Prices: what every candidate costs in every unit, at the lengths and for the workloads that are asked for.

Costs at lengths that were not profiled: tiles and cached keys of static rules are counted at that length; the tiles of dynamic rules follow
their profiled density, straight in log-log between profiled lengths and bounded beyond them (`dynamic_density`). Seconds are of attention;
decoding is priced halfway through the generated tokens.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from sparsesearch.artifacts import read_text
from sparsesearch.block_mask import BlockGrid
from sparsesearch.cost import NAME_ONE
from sparsesearch.cost.base import CostModel, DecodeWork
from sparsesearch.cost.layer_calls import unit_work
from sparsesearch.cost.step_work import cached_tokens, head_works
from sparsesearch.errors import PlanMismatchError, SpecError
from sparsesearch.model_shapes import MODEL_SHAPES, ModelShape, model_shape, shape_of_config
from sparsesearch.plan import BaseModelInfo
from sparsesearch.presets import preset_names, preset_path
from sparsesearch.profiling.proxies import length_terms, profile_units
from sparsesearch.profiling.record import Profile
from sparsesearch.shapes import Granularity, Unit
from sparsesearch.workload import Workload


@dataclass(frozen=True)
class Pricer:
    """Prices the candidates of a profile.

    Attributes:
        profile: candidates, calibrated rules, and the tiles of dynamic ones.
        granularity: what a unit is.
        cost_model: needed for seconds alone.
        dtype_bytes: bytes per cached element.
    """

    profile: Profile
    granularity: Granularity
    cost_model: CostModel | None = None
    dtype_bytes: int = 2

    @cached_property
    def units(self) -> tuple[Unit, ...]:
        """The rows of every price."""
        return profile_units(self.profile, self.granularity)

    def is_extrapolated(self, length: int) -> bool:
        """Whether tiles of dynamic rules at this length are a law's and not counted."""
        return length not in self.profile.manifest.lengths and any(
            rule.dynamic for rule in self.profile.manifest.candidates
        )

    def tiles(self, length: int) -> Float[ndarray, "U C"]:
        """Computed tiles of a prompt of `length` tokens."""
        if length not in self._tiles:
            self._tiles[length] = self._counted_tiles(length)
        return self._tiles[length]

    @cached_property
    def _tiles(self) -> dict[int, Float[ndarray, "U C"]]:
        return {}

    def _counted_tiles(self, length: int) -> Float[ndarray, "U C"]:
        if length in self.profile.manifest.lengths:
            return length_terms(self.profile, length, self.granularity).tiles
        grid = self._grid(length)
        dense = float(grid.reachable().sum())
        heads = np.array([float(len(unit.heads)) for unit in self.units])
        columns = []
        for column, rule in enumerate(self.profile.manifest.candidates):
            if rule.dynamic:
                columns.append(self._dynamic_density(column, length) * heads * dense)
            elif rule.needs_calibration:
                columns.append(np.array([self._counted(unit, column, grid) for unit in self.units]))
            else:
                columns.append(heads * float(rule.select(grid).sum()))
        return np.stack(columns, 1)

    def kept_elements(self, length: int) -> Float[ndarray, "U C"]:
        """Cached elements of a KV group's keys after a prompt: kept tokens x head_dim."""
        grid = self._last_query(Workload(length))
        return self._per_unit([float(rule.kept_tokens(grid)) for rule in self.profile.manifest.candidates])

    def kv_bytes(self, workload: Workload) -> Float[ndarray, "U C"]:
        """Bytes of a KV group's keys and values after the last token, for the whole batch; with the bounds of blocks that a rule asks for."""
        grid = self._last_query(workload)
        held = self._per_unit([cached_tokens((rule,), grid) for rule in self.profile.manifest.candidates])
        return np.asarray(held * (2.0 * self.dtype_bytes * workload.batch))

    def ttft_s(self, workload: Workload) -> Float[ndarray, "U C"]:
        """Seconds of a unit's prefill attention for the whole batch."""
        grid, tiles, model = self._grid(workload.prompt_tokens), self.tiles(workload.prompt_tokens), self._model()
        works = [
            unit_work(rule, float(tiles[row, column]), grid, int(self._head_dim[row]), len(unit.heads), workload.batch)
            for row, unit in enumerate(self.units)
            for column, rule in enumerate(self.profile.manifest.candidates)
        ]
        return workload.batch * np.asarray(model.latency_s(works)).reshape(tiles.shape)

    def tpot_s(self, workload: Workload) -> Float[ndarray, "U C"]:
        """Seconds of a KV group's attention per decoding step of the whole batch, halfway through the generated tokens."""
        grid, rules = self._last_query(workload, halfway=True), self.profile.manifest.candidates
        sizes = [(len(unit.heads), int(size)) for unit, size in zip(self.units, self._head_dim, strict=True)]

        def works(heads: int, head_dim: int) -> list[DecodeWork]:
            each = {"head_dim": head_dim, "batch": workload.batch, "dtype_bytes": self.dtype_bytes}
            return [work for rule in rules for work in head_works((rule,) * heads, grid, **each)]

        seconds = {size: self._model().decode_latency_s(works(*size)) for size in set(sizes)}  # units repeat each other
        return np.stack([seconds[size] for size in sizes])

    def decode_calls_s(self) -> float:
        """Seconds of a decoding step's attention that no plan changes."""
        return self._model().decode_call_s * len(self.profile.manifest.base_model.modules)

    def _last_query(self, workload: Workload, *, halfway: bool = False) -> BlockGrid:
        """The last token against all before it; laws stay at the prompt's length while decoding."""
        generated = -(-workload.generate_tokens // 2) if halfway else workload.generate_tokens
        context = workload.prompt_tokens + generated
        return BlockGrid(
            1 if generated else context, context, self.profile.manifest.block_tokens, law_len=workload.prompt_tokens
        )

    def _per_unit(self, tokens: Sequence[float]) -> Float[ndarray, "U C"]:
        """Elements per unit that so many tokens have under each candidate."""
        return np.asarray(np.array(tokens)[None] * self._head_dim[:, None])

    def _dynamic_density(self, column: int, length: int) -> Float[ndarray, " U"]:
        known = sorted(self.profile.manifest.lengths)
        terms = [length_terms(self.profile, each, self.granularity).tiles for each in known]
        return dynamic_density(known, np.stack([each[:, column] / each[:, 0] for each in terms], 1), length)

    def _counted(self, unit: Unit, column: int, grid: BlockGrid) -> float:
        return float(sum(int(rule.select(grid).sum()) for rule in self.profile.rule_for(unit, column)))

    def _grid(self, length: int) -> BlockGrid:
        return BlockGrid(length, length, self.profile.manifest.block_tokens)

    @cached_property
    def _head_dim(self) -> Float[ndarray, " U"]:
        info = self.profile.manifest.base_model
        size = dict(zip(info.modules, info.head_dim, strict=True))
        return np.array([float(size[unit.module]) for unit in self.units])

    def _model(self) -> CostModel:
        if self.cost_model is None:
            raise SpecError(f"a budget in time must have a cost model. {NAME_ONE}")
        return self.cost_model


def dynamic_density(known: Sequence[int], density: Float[ndarray, "U P"], length: int) -> Float[ndarray, " U"]:
    """Density of a dynamic rule at a length that was not profiled, never below what is known to be possible.

    Between two profiled lengths: straight in log-log. Beyond the longest: the last slope, but none that rises or falls faster than 1/N (a
    fixed number of tokens per row); with one profiled length, constant. Below the shortest: 1/N, a fixed number of tokens, at most 1.
    """
    tokens, logs = np.log(np.array(known, dtype=float)), np.log(np.maximum(density, 1e-12))
    at = float(np.log(length))
    if at <= tokens[0]:
        return np.minimum(1.0, density[:, 0] * known[0] / length)
    if at >= tokens[-1]:
        if len(known) == 1:
            return density[:, -1]
        slope = np.clip((logs[:, -1] - logs[:, -2]) / (tokens[-1] - tokens[-2]), -1.0, 0.0)
        return np.asarray(np.exp(logs[:, -1] + slope * (at - tokens[-1])))
    right = int(np.searchsorted(tokens, at))
    part = (at - tokens[right - 1]) / (tokens[right] - tokens[right - 1])
    return np.asarray(np.exp(logs[:, right - 1] * (1 - part) + logs[:, right] * part))


def shape_of(base_model: BaseModelInfo, name: str | None = None) -> ModelShape | None:
    """The sizes of a profiled model: by the name of a shape, or from its own config where that is at hand; else None.

    Raises:
        SpecError: there is no shape of that name.
        PlanMismatchError: the named shape has other heads than the model.
    """
    base = base_model.name_or_path
    if name is None and base not in MODEL_SHAPES:
        folder = preset_path("models", base) if base in preset_names("models") else Path(base)
        if not (folder / "config.json").is_file():
            return None
        found = shape_of_config(json.loads(read_text(folder / "config.json")), base)
    else:
        found = model_shape(name or base)
    if replace(found.geometry, modules=base_model.modules) != base_model.geometry:
        raise PlanMismatchError(
            f"the shape {found.name} must have the heads of {base}, but has others. Name the model's own shape."
        )
    return found
