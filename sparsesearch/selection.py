"""Choosing the best entries of a row of scores: top-k and top-p, with ties that go to the earlier entry.

Budgets may differ from row to row and lie on the device; nothing here waits for the host, and no shape depends on the data. Small inputs are
ranked by a stable sort. Large ones on a GPU are not sorted: the score of the last entry that is kept is found bit by bit (32 counts over
the row), which needs no index tensor; at 32 heads x 2048 x 2048 tiles a sort would carry 1 GB of indices.
"""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

_SORT_ELEMENTS = 1 << 22  # above this, on a GPU, thresholds are bisected


def top_k(scores: Float[Tensor, "*rows N"], count: int | Int[Tensor, "*#rows 1"]) -> Bool[Tensor, "*rows N"]:
    """The `count` best entries of each row.

    Args:
        scores: no NaN; -inf marks entries that come last, and that are chosen all the same if the count reaches them.
        count: entries per row; more than N takes all.
    """
    scores = scores.float()
    if scores.is_cuda and scores.numel() > _SORT_ELEMENTS:
        return bisected_top_k(scores, count)
    return _ranks(scores) < count


def top_p(weights: Float[Tensor, "*rows N"], share: float, always: Bool[Tensor, "*#rows N"]) -> Bool[Tensor, "*rows N"]:
    """`always`, and the smallest set of best other entries of each row that brings its weight to `share` of the total.

    Args:
        weights: not negative.
        share: in (0, 1].
        always: entries that are in whatever they weigh; their weight counts first.
    """
    weights = weights.float()
    others = weights.masked_fill(always, 0.0)
    # a little less than asked for, lest rounding of the sums take in one more entry
    target = share * (1 - 1e-6) * weights.sum(-1, keepdim=True, dtype=torch.float64)
    target = target - (weights - others).sum(-1, keepdim=True, dtype=torch.float64)
    if weights.is_cuda and weights.numel() > _SORT_ELEMENTS:
        return bisected_top_p(others, target) | always
    ordered = others.sort(dim=-1, descending=True, stable=True).values.double()
    count = (ordered.cumsum(-1) - ordered < target).sum(-1, keepdim=True)
    return (_ranks(others) < count) | always


def bisected_top_k(scores: Float[Tensor, "*rows N"], count: int | Int[Tensor, "*#rows 1"]) -> Bool[Tensor, "*rows N"]:
    """`top_k` without sorting."""
    keys = _ordered_bits(scores)
    size = scores.shape[-1]
    wanted: int | Tensor = min(count, size) if isinstance(count, int) else count.clamp(max=size)
    last = _largest(keys, lambda mid: (keys >= mid).sum(-1, keepdim=True) >= wanted)
    return _down_to(keys, last, wanted - (keys > last).sum(-1, keepdim=True))


def bisected_top_p(weights: Float[Tensor, "*rows N"], target: Float[Tensor, "*rows 1"]) -> Bool[Tensor, "*rows N"]:
    """The smallest set of best entries whose weights, none negative, sum to `target`; without sorting."""
    keys = _ordered_bits(weights)

    def held(entries: Bool[Tensor, "*rows N"]) -> Float[Tensor, "*rows 1"]:
        return torch.where(entries, weights, 0.0).sum(-1, keepdim=True, dtype=torch.float64)

    last = torch.minimum(_largest(keys, lambda mid: held(keys >= mid) >= target), keys.amax(-1, keepdim=True))
    value = torch.where(keys == last, weights, 0.0).amax(-1, keepdim=True).double()
    missing = target - held(keys > last)
    return _down_to(keys, last, torch.where(value > 0, missing / value.clamp(min=1e-45), 0.0).ceil().long())


def _ranks(scores: Float[Tensor, "*rows N"]) -> Int[Tensor, "*rows N"]:
    """Place of each entry when its row is sorted, best first, equal entries in order."""
    return scores.argsort(dim=-1, descending=True, stable=True).argsort(-1)


def _ordered_bits(scores: Float[Tensor, "*rows N"]) -> Int[Tensor, "*rows N"]:
    """Integers that sort like the fp32 scores; both zeros are equal."""
    bits = (scores.float() + 0.0).view(torch.int32)
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def _largest(keys: Int[Tensor, "*rows N"], holds: Callable[[Tensor], Tensor]) -> Int[Tensor, "*rows 1"]:
    """The largest integer of each row for which `holds`, which is true of the smallest one and stays false once it is."""
    low = torch.full((*keys.shape[:-1], 1), -(1 << 31), dtype=torch.int64, device=keys.device)
    for bit in range(31, -1, -1):
        higher = low + (1 << bit)
        low = torch.where(holds(higher.int()), higher, low)
    return low.int()


def _down_to(
    keys: Int[Tensor, "*rows N"], last: Int[Tensor, "*rows 1"], ties: Int[Tensor, "*rows 1"]
) -> Bool[Tensor, "*rows N"]:
    """Entries above `last`, and the first `ties` of those equal to it."""
    equal = keys == last
    return (keys > last) | (equal & (equal.cumsum(-1, dtype=torch.int32) <= ties))
