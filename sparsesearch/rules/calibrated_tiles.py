"""calibrated_tiles: the tiles that carried most attention in calibration, in an order of the video, for attention that is not causal."""

import math
import zlib
from typing import ClassVar, Literal, Self

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field, field_validator
from torch import Tensor

from sparsesearch.block_mask import BlockGrid
from sparsesearch.errors import SpecError
from sparsesearch.order import IDENTITY, TOKEN_MAJOR, AnyOrder, Tile
from sparsesearch.rules.base import Rule
from sparsesearch.rules.fixed_blocks import check_bitmap, decode_bitmap, encode_bitmap
from sparsesearch.rules.neighbourhood import Triple
from sparsesearch.tile_cover import complete, dense_pairs, layout_of, path_interval


class CalibratedTiles(Rule):
    """A bitmap of the heaviest tiles of one head, the same for every input; the diagonal is always in.

    scope row: each row its ⌈keep·n⌉ heaviest tiles; head: the ⌈keep·n²⌉ heaviest of the whole map, so that flat rows get fewer; column: the
    ⌈keep·n⌉ key blocks with most mass, for every row (vertical stripes). n counts blocks; tiles that the layout makes dense come on top and
    are not ranked if the grid of the calibration is known.

    At another length a block reads the calibrated block that holds the token at its middle token's share of each axis.

    Sources: Zhao et al. 2025, PAROAttention, arXiv:2506.16054, section 3.2 (offline block masks per head after a permutation); Wang et al.
    2025, SparseD, arXiv:2509.24014 (masks computed once, per row); Sparse-vDiT, arXiv:2506.03065 (vertical stripes). Differs: a budget
    instead of a threshold, so that the density is known.
    """

    source: ClassVar[str] = "PAROAttention, arXiv:2506.16054; SparseD, arXiv:2509.24014"
    needs_layout: ClassVar[bool] = True
    needs_calibration: ClassVar[bool] = True
    kind: Literal["calibrated_tiles"] = "calibrated_tiles"
    keep: float = Field(gt=0, le=1, description="share of the tiles")
    scope: Literal["row", "head", "column"] = Field("row", description="what the share is counted over")
    order: AnyOrder = IDENTITY
    bitmap: str | None = Field(None, description="zlib + base64 of the packed R x R bits; None in a search space")
    shape: Triple | None = Field(None, description="frames x rows x columns of the calibration; None if unknown")

    @field_validator("bitmap")
    @classmethod
    def _decodes(cls, value: str | None) -> str | None:
        return check_bitmap(value)

    def calibrated(self, mass: Float[Tensor, "N N"], grid: BlockGrid | None = None) -> Self:
        """Keep the heaviest tiles."""
        mass, size = mass.double().cpu(), mass.shape[0]
        shape = None
        if grid is not None:
            mass = mass.masked_fill(dense_pairs(grid, self.order), -1.0)
            shape = layout_of(grid, self.kind).grid_shape
        count = max(1, math.ceil(self.keep * size - 1e-9))
        diagonal = torch.eye(size, dtype=torch.bool)
        match self.scope:
            case "row":
                kept = _top(mass.masked_fill(diagonal, torch.inf), count)
            case "head":
                whole = mass.masked_fill(diagonal, torch.inf).flatten()
                kept = _top(whole, max(size, math.ceil(self.keep * size * size - 1e-9))).view(size, size)
            case "column":
                kept = _top(mass.clamp(min=0).sum(0), count).expand(size, size) | diagonal
        return self.model_copy(update={"bitmap": encode_bitmap(kept), "shape": shape})

    def select(
        self, grid: BlockGrid, q: Float[Tensor, "*unit S D"] | None = None, k: Float[Tensor, "*unit T D"] | None = None
    ) -> Bool[Tensor, "M N"]:
        """The bitmap, carried over to this grid."""
        layout_of(grid, self.label)
        if self.bitmap is None:
            raise SpecError("calibrated_tiles must be calibrated before it can choose tiles: profile the model first.")
        bits = decode_bitmap(self.bitmap)
        source = self._source_blocks(grid, bits.shape[0])
        return complete(bits[source[grid.first_q_block :, None], source], grid, self.order)

    def _source_blocks(self, grid: BlockGrid, size: int) -> Int[Tensor, " N"]:
        """For each block of the grid, the row of the bitmap that speaks for it."""
        layout = layout_of(grid, self.label)
        blocks = torch.arange(grid.num_k_blocks)
        if self.shape is None or self.shape == layout.grid_shape:
            return blocks * size // grid.num_k_blocks if size != grid.num_k_blocks else blocks
        first, last = path_interval(grid, self.order)
        tokens = layout.segments[layout.grid_index].tokens
        middle = ((first + last) // 2).clamp(0, tokens - 1)
        path = self.order.grid_path(layout.grid_shape)[middle]
        _, height, width = layout.grid_shape
        cells = (path // (height * width), path // width % height, path % width)
        there = torch.zeros_like(path)
        for cell, new, old in zip(cells, layout.grid_shape, self.shape, strict=True):
            there = there * old + (2 * cell + 1) * old // (2 * new)
        place = self.order.grid_path(self.shape).argsort()[there]
        start = layout.grid_start if self.order.is_identity else 0
        source = ((place + start) // grid.block_tokens).clamp(max=size - 1)
        return torch.where(first <= last, source, size - 1)

    @property
    def label(self) -> str:
        """Share, scope and order and, once calibrated, eight digits that tell one bitmap from another."""
        parts = f"keep={self.keep:g},scope={self.scope},order={self.order}"
        if self.bitmap is not None:
            parts += f",bitmap={zlib.crc32(f'{self.bitmap}{self.shape}'.encode()):08x}"
        return f"{self.kind}({parts})"

    @classmethod
    def examples(cls) -> list[Self]:
        """Every scope, several orders."""
        mass = (torch.arange(49.0).view(7, 7) * 11) % 17
        return [
            cls(keep=1.0).calibrated(torch.ones(1, 1)),
            cls(keep=0.4, order=TOKEN_MAJOR).calibrated(mass),
            cls(keep=0.3, scope="head", order=Tile(2, 4, 4)).calibrated(mass),
            cls(keep=0.2, scope="column").calibrated(mass),
        ]


def _top(scores: Float[Tensor, "*rows N"], count: int) -> Bool[Tensor, "*rows N"]:
    """The `count` best entries of each row; ties go to the earlier one."""
    order = scores.argsort(dim=-1, descending=True, stable=True)
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, order[..., :count], True)
