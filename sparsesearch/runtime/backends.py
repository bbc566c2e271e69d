"""Which kernel computes the chosen tiles: the one place where the runtime meets the kernels."""

from typing import Literal, get_args

from jaxtyping import Bool, Float
from torch import Tensor

from sparsesearch.block_mask import BlockGrid
from sparsesearch.errors import SpecError, nearest
from sparsesearch.kernels import reference
from sparsesearch.kernels.torch_gather import tile_attention_torch

Backend = Literal["auto", "torch", "reference"]


def checked_backend(name: str) -> Backend:
    """`name`, if it is a backend.

    Raises:
        SpecError: it is not.
    """
    for known in get_args(Backend):
        if name == known:
            return known  # type: ignore[no-any-return]
    raise SpecError(f"unknown backend {name!r}.{nearest(name, get_args(Backend))}")


def attend_tiles(
    q: Float[Tensor, "*unit S D"],
    k: Float[Tensor, "*unit T D"],
    v: Float[Tensor, "*unit T D"],
    tiles: Bool[Tensor, "*#unit M N"],
    grid: BlockGrid,
    *,
    scale: float,
    backend: Backend,
) -> Float[Tensor, "*unit S D"]:
    """Attention over the chosen tiles; `auto` takes `torch`."""
    match backend:
        case "torch" | "auto":
            return tile_attention_torch(q, k, v, tiles, grid, scale=scale)
        case "reference":
            return reference.tile_attention(q, k, v, tiles, grid, scale=scale)
