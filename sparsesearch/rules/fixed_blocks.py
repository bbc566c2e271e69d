"""fixed_blocks: the tiles that carried most attention in calibration, frozen into a bitmap."""

import base64
import binascii
import zlib
from typing import ClassVar, Literal, Self

import numpy as np
import torch
from jaxtyping import Bool, Float
from pydantic import Field, field_validator
from torch import Tensor

from sparsesearch.block_mask import BlockGrid
from sparsesearch.errors import SpecError
from sparsesearch.rules.base import Rule


class FixedBlocks(Rule):
    """A calibrated bitmap of tiles, the same for every input.

    From the mean attention mass per tile of one unit, each row keeps its best ⌈keep·(p+1)⌉ tiles, the diagonal and block 0 included. At
    another length the bitmap is stretched: tile (p, j) of an M-row grid reads row ⌊p·R/M⌋, column ⌊j·R/M⌋ of the R-row bitmap.

    Sources: Zhao et al. 2025, PAROAttention, arXiv:2506.16054, section 3.2 (offline block masks); Wang et al. 2025, SparseD,
    arXiv:2509.24014 (head masks computed once). Differs: budget per row and not per head, so that no query is left without keys.
    """

    source: ClassVar[str] = "PAROAttention, arXiv:2506.16054; SparseD, arXiv:2509.24014"
    needs_calibration: ClassVar[bool] = True
    kind: Literal["fixed_blocks"] = "fixed_blocks"
    keep: float = Field(gt=0, le=1, description="share of each row's reachable tiles")
    bitmap: str | None = Field(None, description="zlib + base64 of the packed R x R bits; None in a search space")

    @field_validator("bitmap")
    @classmethod
    def _decodes(cls, value: str | None) -> str | None:
        return check_bitmap(value)

    def calibrated(self, mass: Float[Tensor, "N N"], grid: BlockGrid | None = None) -> Self:
        """Keep each row's heaviest tiles."""
        size = mass.shape[0]
        rows = torch.arange(size)[:, None]
        reachable = torch.arange(size) <= rows
        always = (torch.arange(size) == rows) | (torch.arange(size) == 0)
        order = mass.masked_fill(always, torch.inf).masked_fill(~reachable, -torch.inf)
        rank = order.argsort(dim=-1, descending=True, stable=True).argsort(-1)
        kept = reachable & ((rank < (self.keep * (rows + 1)).ceil()) | always)
        return self.model_copy(update={"bitmap": encode_bitmap(kept)})

    def select(
        self, grid: BlockGrid, q: Float[Tensor, "*unit S D"] | None = None, k: Float[Tensor, "*unit T D"] | None = None
    ) -> Bool[Tensor, "M N"]:
        """The bitmap, stretched to this grid."""
        if self.bitmap is None:
            raise SpecError("fixed_blocks must be calibrated before it can choose tiles: run `sparsesearch profile`.")
        bits = decode_bitmap(self.bitmap)
        size, blocks = bits.shape[0], -(-grid.law_len // grid.block_tokens)
        rows = (grid.q_blocks() * size // blocks).clamp(max=size - 1)
        columns = (grid.k_blocks() * size // blocks).clamp(max=size - 1)
        return grid.reachable() & (bits[rows, columns] | grid.diagonal() | (grid.k_blocks() == 0))

    @property
    def label(self) -> str:
        """Share and, once calibrated, eight digits that tell one bitmap from another."""
        if self.bitmap is None:
            return f"fixed_blocks(keep={self.keep:g})"
        return f"fixed_blocks(keep={self.keep:g},bitmap={zlib.crc32(self.bitmap.encode()):08x})"

    @classmethod
    def examples(cls) -> list[Self]:
        """Bitmaps of one row and of five."""
        return [
            cls(keep=1.0).calibrated(torch.ones(1, 1)),
            cls(keep=0.4).calibrated((torch.arange(25.0).view(5, 5) * 7) % 11),
        ]


def encode_bitmap(bits: Bool[Tensor, "R R"]) -> str:
    """Pack a square bitmap into text."""
    packed = np.packbits(bits.numpy())
    return f"{bits.shape[0]}:{base64.b64encode(zlib.compress(packed.tobytes(), 9)).decode()}"


def check_bitmap(text: str | None) -> str | None:
    """The text itself, if it is None or a bitmap.

    Raises:
        ValueError: it is no bitmap.
    """
    if text is not None:
        try:
            decode_bitmap(text)
        except (ValueError, zlib.error, binascii.Error) as error:
            raise ValueError("must be the zlib + base64 text of a square bitmap, as profiling writes it") from error
    return text


def decode_bitmap(text: str) -> Bool[Tensor, "R R"]:
    """Undo `encode_bitmap`."""
    size, _, body = text.partition(":")
    rows = int(size)
    packed = np.frombuffer(zlib.decompress(base64.b64decode(body, validate=True)), dtype=np.uint8)
    bits = np.unpackbits(packed, count=rows * rows).astype(bool)
    if rows < 1 or bits.size != rows * rows:
        raise ValueError(f"{rows} rows do not fit {packed.size} bytes")
    return torch.from_numpy(bits.reshape(rows, rows))
