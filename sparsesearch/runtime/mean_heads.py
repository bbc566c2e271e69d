"""Heads that attend to everything alike: they compute no tile, and what a launch left in their place is overwritten."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from sparsesearch.kernels.reference import running_mean
from sparsesearch.kernels.schedule import Span as Place
from sparsesearch.kernels.triton_running_mean import put_running_means
from sparsesearch.rules.base import Rule


class MeanHeads:
    """The heads of a call that follow mean_value.

    Args:
        rules: one per query head.
        num_kv_heads: of the call.
        device: where it runs.
    """

    def __init__(self, rules: Sequence[Rule], num_kv_heads: int, device: torch.device) -> None:
        group = len(rules) // num_kv_heads
        self._heads: dict[int, list[int]] = {}
        for head, rule in enumerate(rules):
            if rule.rest == "mean_value":
                self._heads.setdefault(head // group, []).append(head)
        filled = [(members + [-1] * group)[:group] for members in self._heads.values()]
        self._kv_heads = torch.tensor(list(self._heads), dtype=torch.int32, device=device)
        self._members = torch.tensor(filled, dtype=torch.int32, device=device)

    def put(self, out: Float[Tensor, "B H S D"], v: Float[Tensor, "B G T D"], places: tuple[Place, ...]) -> None:
        """Overwrite these heads; a batch of whole causal sequences at once."""
        if not self._heads:
            return
        grid = places[0].grid
        whole = places == tuple(Place(grid, row, 0, 0) for row in range(len(v)))
        if whole and grid.causal and (grid.q_len, grid.kv_len) == (out.shape[2], v.shape[2]) and out.stride(-1) == 1:
            put_running_means(v if v.stride(-1) == 1 else v.contiguous(), self._kv_heads, self._members, out)
            return
        for place in places:
            rows = out[place.batch, :, place.q_offset : place.q_offset + place.grid.q_len]
            values = v[place.batch, :, place.k_offset : place.k_offset + place.grid.kv_len]
            for kv_head, members in self._heads.items():
                mean = running_mean(values[kv_head], place.grid).to(out.dtype)
                for head in members:
                    rows[head] = mean
