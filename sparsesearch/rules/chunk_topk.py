"""chunk_topk: keys in chunks that may follow the text's own borders; the best chunks of each query block, by length-normalised similarity."""

from typing import ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor

from sparsesearch.block_mask import BlockGrid, blocks_of
from sparsesearch.errors import SpecError
from sparsesearch.estimators import block_means, rows_per_block
from sparsesearch.rules.base import Law, LengthLaw, Rule
from sparsesearch.selection import top_k


class ChunkTopk(Rule):
    """Top-k tiles per query block by the best chunk that touches them; the first blocks and the diagonal are always in.

    A chunk c of n_c keys is represented by √n_c · mean(k in c), a query block by √n · mean(q): neither long nor short chunks are favoured.
    s[p, c] is their product; a tile scores the largest s of the chunks in it; row p keeps its ⌈keep(n_p)/block⌉ best tiles.
    Fixed chunks have `chunk` keys. Variable ones, as many as fixed ones at most, begin where neighbouring cells of `cell` keys differ most
    (1 - cosine of their means) and more than the cells on either side.

    Source: Xiong et al. 2025, DHSA, arXiv:2510.24606, sections 2.1-2.3 (query blocks of 128, chunks of 32 to 128, density 0.125). Differs:
    its borders come from a trained predictor, ours from key similarity; scores are upsampled to tiles, not to tokens.
    """

    source: ClassVar[str] = "DHSA, arXiv:2510.24606"
    dynamic: ClassVar[bool] = True
    kind: Literal["chunk_topk"] = "chunk_topk"
    keep: Law = Field(description="keys kept per query: a number, or {a, b} for a + b·(keys the row can see)")
    chunk: int = Field(64, ge=1, description="keys per chunk, or on average if variable")
    cell: int = Field(
        16, ge=1, description="borders lie on multiples of this many keys; must divide the tile and the chunk"
    )
    variable: bool = Field(False, description="whether chunks follow the keys' own borders")
    sink: int = Field(64, ge=0, description="tokens at the start that are always in")

    def select(
        self, grid: BlockGrid, q: Float[Tensor, "*unit S D"] | None = None, k: Float[Tensor, "*unit T D"] | None = None
    ) -> Bool[Tensor, "*unit M N"]:
        """Top-k tiles per row; ties go to the earlier block."""
        if q is None or k is None:
            raise SpecError("chunk_topk must be given this call's queries and keys; use it in prefill only.")
        if grid.block_tokens % self.cell or self.chunk % self.cell:
            raise SpecError(
                f"chunk_topk: cell must divide the tile of {grid.block_tokens} tokens and the chunk of {self.chunk}, but is {self.cell}."
            )
        reachable = grid.reachable(q.device)
        ids, chunks = self._chunks(k, grid)
        queries = block_means(q, grid, grid.q_start) * rows_per_block(grid.q_len, grid, grid.q_start, q.device).sqrt()
        scores = self._upsampled(queries @ chunks.transpose(-1, -2), ids, grid)
        always = grid.diagonal(q.device) | (grid.k_blocks(q.device) < blocks_of(self.sink, grid.block_tokens))
        scores = scores.masked_fill(always, torch.inf).masked_fill(~reachable, -torch.inf)
        return reachable & (top_k(scores, self.keep.row_blocks(grid, q.device)) | always)

    def _chunks(
        self, k: Float[Tensor, "*unit T D"], grid: BlockGrid
    ) -> tuple[Int[Tensor, "*unit cells"], Float[Tensor, "*unit C D"]]:
        """The chunk of each cell, and each chunk's representative; a chunk without cells is zero."""
        cells = BlockGrid(grid.kv_len, grid.kv_len, self.cell)
        means, sizes = block_means(k, cells, 0), rows_per_block(grid.kv_len, cells, 0, k.device)
        count = blocks_of(grid.kv_len, self.chunk)
        if self.variable:
            ids = chunk_starts(means, count).cumsum(-1) - 1
        else:
            ids = (torch.arange(cells.num_k_blocks, device=k.device) * self.cell // self.chunk).expand(means.shape[:-1])
        sums = F.pad((means.double() * sizes).cumsum(-2), (0, 0, 1, 0))
        tokens = F.pad(sizes.cumsum(0), (0, 0, 1, 0)).squeeze(-1)
        number = torch.arange(count, device=k.device).expand(*ids.shape[:-1], count).contiguous()
        first = torch.searchsorted(ids.contiguous(), number)
        last = torch.searchsorted(ids.contiguous(), number, right=True)
        column = (*means.shape[:-2], count, means.shape[-1])
        total = sums.gather(-2, last[..., None].expand(column)) - sums.gather(-2, first[..., None].expand(column))
        return ids, (total / (tokens[last] - tokens[first]).clamp(min=1)[..., None].sqrt()).float()

    def _upsampled(
        self, scores: Float[Tensor, "*unit M C"], ids: Int[Tensor, "*unit cells"], grid: BlockGrid
    ) -> Float[Tensor, "*unit M N"]:
        """Best chunk in each tile; a ragged last tile repeats its last cell."""
        per_tile = grid.block_tokens // self.cell
        best = None
        for place in range(per_tile):
            cell = torch.arange(place, grid.num_k_blocks * per_tile, per_tile, device=ids.device)
            own = ids.index_select(-1, cell.clamp(max=ids.shape[-1] - 1))
            found = scores.gather(-1, own.unsqueeze(-2).expand(*scores.shape[:-1], grid.num_k_blocks))
            best = found if best is None else torch.maximum(best, found)
        assert best is not None
        return best

    @classmethod
    def examples(cls) -> list[Self]:
        """One tile, the paper's density, variable chunks, chunks longer than a tile."""
        return [
            cls(keep=LengthLaw(a=1)),
            cls(keep=LengthLaw(b=0.125), chunk=32),
            cls(keep=LengthLaw(b=0.25), variable=True),
            cls(keep=LengthLaw(b=0.25), chunk=128, sink=0),
        ]


def chunk_starts(means: Float[Tensor, "*unit cells D"], count: int) -> Bool[Tensor, "*unit cells"]:
    """Whether a chunk begins at each cell: the first one, and at most count - 1 peaks of 1 - cosine between a cell and the one before it."""
    novelty = 1 - F.cosine_similarity(means[..., 1:, :], means[..., :-1, :], dim=-1)
    around = F.pad(novelty, (1, 1))  # equal cells, novelty 0, are no peak
    peak = (novelty > around[..., :-2]) & (novelty >= around[..., 2:])
    ranked = novelty.masked_fill(~peak, -torch.inf)
    return F.pad(top_k(ranked, count - 1) & peak, (1, 0), value=True)
