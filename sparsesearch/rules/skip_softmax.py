"""skip_softmax: tiles whose scores stay far below the largest score seen so far contribute nothing that survives the softmax."""

import math
from typing import ClassVar, Literal, Self

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from sparsesearch.block_mask import BlockGrid
from sparsesearch.errors import SpecError
from sparsesearch.estimators import tile_row_maxima
from sparsesearch.rules.base import Rule
from sparsesearch.step_blocks import StepBlocks


class SkipSoftmax(Rule):
    """Skip a tile when, in every one of its rows, the largest score lies more than ln(1/λ) below the largest one so far; λ = scale / N.

    With m[i, j] the largest score of query i in key block j, tile (p, j) is computed  iff  some row i of p has
    m[i, j] >= max_{j' <= j} m[i, j'] + ln λ. The diagonal is always computed. N is the prompt's length.

    Choosing needs every score, so this rule costs a product of all queries with all keys: it is here to judge and to convert plans of kernels
    that skip on the fly, where only the softmax and the product with V are saved.

    Source: Yuan et al. 2025, BLASST, arXiv:2512.12087, algorithm 1; NVIDIA Model Optimizer fits scale = a·exp(b·target sparsity), one pair
    per phase, and λ = scale / N. Differs: the tile is ours, not the kernel's.
    """

    source: ClassVar[str] = "BLASST, arXiv:2512.12087"
    dynamic: ClassVar[bool] = True
    decodes: ClassVar[bool] = True
    kind: Literal["skip_softmax"] = "skip_softmax"
    prefill_scale: float | None = Field(None, gt=0, description="λ·N in prefill; None leaves the prompt dense")
    decode_scale: float | None = Field(None, gt=0, description="λ·N in decoding; None leaves decoding dense")

    def select(
        self, grid: BlockGrid, q: Float[Tensor, "*unit S D"] | None = None, k: Float[Tensor, "*unit T D"] | None = None
    ) -> Bool[Tensor, "*#unit M N"]:
        """Tiles that some row cannot skip."""
        if q is None or k is None:
            raise SpecError("skip_softmax must be given this call's queries and keys.")
        reachable = grid.reachable(q.device)
        scale = self.decode_scale if grid.q_len == 1 else self.prefill_scale
        if scale is None:
            return reachable
        strips = []
        for maxima in tile_row_maxima(q, k, grid):
            behind = maxima - maxima.cummax(-1).values
            strips.append((behind >= math.log(scale / grid.law_len)).any(-2))
        return reachable & (torch.stack(strips, -2) | grid.diagonal(q.device))

    def keeps_all(self, grid: BlockGrid) -> bool:
        """A phase without a threshold."""
        return (self.decode_scale if grid.q_len == 1 else self.prefill_scale) is None

    def step_tiles(self, q: Float[Tensor, "B g size D"], blocks: StepBlocks) -> Bool[Tensor, "B g size N"]:
        """Blocks whose largest score comes near the largest one so far; every key is read to know them."""
        there = blocks.there()
        if self.decode_scale is None:
            return there.expand(*q.shape[:3], -1)
        maxima = blocks.maxima(q)
        near = maxima - maxima.cummax(-1).values >= (self.decode_scale / blocks.law_tokens.double()).log().float()
        return there & (near | (blocks.index == blocks.newest))

    @classmethod
    def examples(cls) -> list[Self]:
        """Prompt only, decoding only, both."""
        return [cls(prefill_scale=10), cls(decode_scale=10), cls(prefill_scale=100, decode_scale=0.5)]
