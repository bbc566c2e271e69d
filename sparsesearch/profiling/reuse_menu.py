"""What layers may run when an earlier layer's selection may be reused: candidates, sources and emitters of a profile."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from sparsesearch.block_mask import BlockGrid
from sparsesearch.errors import SpecError
from sparsesearch.profiling.record import Profile
from sparsesearch.rules import LengthLaw, Rule
from sparsesearch.rules.dense_source import DenseSource
from sparsesearch.search_space import SearchSpace

ReuseUnit = Literal["layer", "kv_group"]
KEEPS = (0.1, 0.25)
"""Shares of each row that a dense layer leaves behind unless more is said."""


@dataclass(frozen=True)
class ReuseMenu:
    """What a layer may run, and what of it may be reused.

    Attributes:
        profile: candidates, calibrated templates and geometry.
        sources: rules beyond the profile's that layers may run in order to be reused, such as `dense_source`.
        emitters: places in `rules` of the dynamic rules that may be reused.
        span: layers that a selection may be carried on; bounds the pairs that are measured.
        unit: what decides, see the module.
    """

    profile: Profile
    sources: tuple[Rule, ...]
    emitters: tuple[int, ...]
    span: int
    unit: ReuseUnit

    def __post_init__(self) -> None:
        info = self.profile.manifest.base_model
        if self.span < 1 or not self.emitters:
            raise SpecError(
                "a reuse must be able to span at least one layer and to name an emitter. Raise --span or give --emitters."
            )
        for place in self.emitters:
            if not self.rules[place].dynamic or self.rules[place].reuses or self.rules[place].rest != "drop":
                raise SpecError(
                    f"an emitter must be a dynamic rule that chooses by itself, but {self.rules[place].label} is not."
                )
        if len(set(zip(info.num_heads, info.num_kv_heads, strict=True))) != 1:
            raise SpecError(
                "index reuse must find the same number of heads in every layer, but this model's layers differ."
            )

    @property
    def rules(self) -> tuple[Rule, ...]:
        """The whole menu: the profile's candidates, then the sources."""
        return (*self.profile.manifest.candidates, *self.sources)

    @property
    def num_layers(self) -> int:
        """Attention modules."""
        return len(self.profile.manifest.base_model.modules)

    @property
    def num_groups(self) -> int:
        """KV heads per layer."""
        return self.profile.manifest.base_model.num_kv_heads[0]

    @property
    def group_size(self) -> int:
        """Query heads per KV head."""
        return self.profile.manifest.base_model.num_heads[0] // self.num_groups

    def pairs(self, target: int) -> list[int]:
        """Source layers of a layer."""
        return list(range(max(0, target - self.span), target))


def reuse_menu(
    profile: Profile,
    keeps: Sequence[float] | None = None,
    *,
    span: int,
    unit: ReuseUnit,
    space: SearchSpace | None = None,
    max_emitters: int = 6,
) -> ReuseMenu:
    """The menu of a profile: its candidates, dense layers that leave a share `keep` of each row, and its own dynamic rules as emitters.

    Args:
        profile: whose candidates may be run.
        keeps: shares of each row; the first is the emitter of the published objectives. None: what the profile's own `dense_source` candidates
            keep, such as those of the space `hylra`, or else `KEEPS`.
        span: see `ReuseMenu`.
        unit: see `ReuseMenu`.
        space: only these of the profile's candidates.
        max_emitters: dynamic candidates beyond the dense sources that may be reused; evenly spaced over the profile's, since each is scored
            for every pair of layers.

    Raises:
        SpecError: the space has rules that were not profiled.
    """
    if space is not None:
        kept = {0, *profile.indices(space.candidates)}
        manifest = profile.manifest
        candidates = tuple(rule for place, rule in enumerate(manifest.candidates) if place in kept)
        profile = Profile(profile.folder, manifest.model_copy(update={"candidates": candidates}))
    known = profile.manifest.candidates
    wanted = [DenseSource(keep=LengthLaw(b=keep), sink=profile.manifest.block_tokens) for keep in keeps or KEEPS]
    if keeps is None:
        wanted = [rule for rule in known if isinstance(rule, DenseSource)] or wanted
    sources = tuple(rule for rule in wanted if rule not in known)
    rules = (*known, *sources)
    longest = BlockGrid(max(profile.manifest.lengths), max(profile.manifest.lengths), profile.manifest.block_tokens)
    choosing = [rule.dynamic and not rule.reuses and not rule.keeps_all(longest) for rule in known]
    dynamic = [place for place, rule in enumerate(known) if choosing[place] and rule not in wanted]
    if len(dynamic) > max_emitters:
        dynamic = [dynamic[round(step)] for step in np.linspace(0, len(dynamic) - 1, max_emitters)]
    return ReuseMenu(profile, sources, tuple([rules.index(rule) for rule in wanted] + dynamic), span, unit)
