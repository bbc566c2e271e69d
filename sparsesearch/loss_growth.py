"""Losses at lengths that nobody profiled: in proportion to what a candidate leaves out there.

    loss(N) = loss(N₀) · skipped(N) / skipped(N₀),   N₀ the longest profiled length, never less than loss(N₀)

What a query needs may lie anywhere before it, so a window that leaves out three times the share of tiles loses about three times as much. On
needle-7m the losses of all heads under fixed windows of 128 to 768 tokens, of text and at answers, are at 2048 tokens 0.5 to 1.6 times what this
says from 1024, and 1.1 to 12.6 times those at 1024 (3 sequences of 1024, 12 of 2048). A candidate that left nothing
out wherever it was profiled has no loss to start from, and may not be chosen where it leaves something out.
"""

from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from sparsesearch.block_mask import BlockGrid
from sparsesearch.pricing import Pricer
from sparsesearch.profiling.record import Profile
from sparsesearch.workload import Workload

NEAR = 1.25
"""A length counts as profiled up to this multiple of the longest one that was."""

ROUNDING = 1e-9


def beyond(profile: Profile, lengths: Iterable[int]) -> tuple[int, ...]:
    """Those of some lengths that are far longer than what was profiled, in order."""
    return tuple(sorted({length for length in lengths if length > NEAR * max(profile.manifest.lengths)}))


def prefill_growth(pricer: Pricer, lengths: Sequence[int]) -> Float[ndarray, "U C"]:
    """By what losses are multiplied for prompts of these lengths: 1 without any, inf where nothing is known of a candidate."""
    return _growth([_skipped_tiles(pricer, length) for length in (max(pricer.profile.manifest.lengths), *lengths)])


def decode_growth(pricer: Pricer, workloads: Sequence[Workload]) -> Float[ndarray, "U C"]:
    """The same for what is decoded last, where a candidate leaves out the keys that a token does not read, cached or not."""
    profiled = Workload(max(pricer.profile.manifest.lengths))
    return _growth([_skipped_keys(pricer, workload) for workload in (profiled, *workloads)])


def _growth(skipped: Sequence[Float[ndarray, "U C"]]) -> Float[ndarray, "U C"]:
    known = skipped[0]
    most = np.max(skipped, axis=0)
    grown = np.divide(most, known, out=np.ones_like(known), where=known > ROUNDING)
    return np.where((known <= ROUNDING) & (most > ROUNDING), np.inf, grown)


def _skipped_tiles(pricer: Pricer, length: int) -> Float[ndarray, "U C"]:
    tiles = pricer.tiles(length)
    return np.asarray(1.0 - tiles / tiles[:, :1])


def _skipped_keys(pricer: Pricer, workload: Workload) -> Float[ndarray, "U C"]:
    context = workload.last_context_tokens
    grid = BlockGrid(1, context, pricer.profile.manifest.block_tokens, law_len=workload.prompt_tokens)
    read = np.array([float(rule.step_tokens(grid)) for rule in pricer.profile.manifest.candidates])
    return np.tile(1.0 - read / context, (len(pricer.units), 1))
