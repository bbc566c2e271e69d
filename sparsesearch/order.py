"""Orders of tokens: in which sequence the block grid counts them. A rule states its order; heads that share one share the permutation.

As text, in rules, search spaces and plans:

    identity         the model's own order
    axes(hwf)        the image or video with its last-named axis fastest; six of them
    tile(t,h,w)      boxes of t frames x h rows x w columns, one after another; 0 takes the whole axis
    gilbert          a space-filling curve: neighbours in the sequence are neighbours on the grid

One more, `KMeans`, follows the content and not the grid, so rules with a geometry cannot take it; `rules.cluster_mass` has it.

Every order but the identity puts the image or video segment first and the other segments behind it, in their own sequence. A permutation
lists, for each place, the token of the model's order that stands there: `x.index_select(-2, order.permutation(layout))`.
"""

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations
from typing import Annotated, Any

import torch
from jaxtyping import Int
from pydantic import BeforeValidator, GetJsonSchemaHandler, PlainSerializer
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema
from torch import Tensor

from sparsesearch.errors import SpecError
from sparsesearch.layout import Layout
from sparsesearch.space_filling import gilbert_path

AXES = tuple("".join(axes) for axes in permutations("fhw"))
_PATTERN = r"^(identity|axes\([fhw]{3}\)|tile\(\d+,\d+,\d+\)|gilbert)$"


@dataclass(frozen=True)
class Order(ABC):
    """How the tokens are laid out before blocks are counted. Equal orders are one permutation."""

    def permutation(self, layout: Layout, device: torch.device | str = "cpu") -> Int[Tensor, " T"]:
        """Token of the model's order at each place. Shared between calls: do not write to it.

        Raises:
            SpecError: the layout has no image or video segment, or more than one (identity takes any).
        """
        return _permutation(self, layout, str(device))

    def inverse(self, layout: Layout, device: torch.device | str = "cpu") -> Int[Tensor, " T"]:
        """Place of each token of the model's order."""
        return _inverse(self, layout, str(device))

    @property
    def by_content(self) -> bool:
        """Whether queries and keys decide; `permutation` is then only where they start from: the grid first, other segments behind it."""
        return False

    @property
    def is_identity(self) -> bool:
        """Whether nothing moves, on any layout."""
        return isinstance(self, Identity)

    @abstractmethod
    def grid_path(self, shape: tuple[int, int, int]) -> Int[Tensor, " T"]:
        """Frame-major index of the grid's tokens, in this order."""


@dataclass(frozen=True)
class Identity(Order):
    """The model's own order."""

    def grid_path(self, shape: tuple[int, int, int]) -> Int[Tensor, " T"]:
        """Frame-major."""
        return _frame_major(shape).flatten()

    def __str__(self) -> str:
        return "identity"


@dataclass(frozen=True)
class Axes(Order):
    """The grid flattened with its axes in another sequence; "hwf" lists all frames of one position side by side.

    Sources: Xi et al. 2025, Sparse VideoGen, arXiv:2502.01776, section 4.3 (token-major layout); Zhao et al. 2025, PAROAttention,
    arXiv:2506.16054, section 3.2 (six permutations).
    """

    axes: str

    def __post_init__(self) -> None:
        if self.axes not in AXES:
            raise SpecError(f"axes(...) must be one of {', '.join(AXES)}, but got {self.axes!r}.")

    def grid_path(self, shape: tuple[int, int, int]) -> Int[Tensor, " T"]:
        """Transpose, flatten."""
        return _frame_major(shape).permute(*("fhw".index(axis) for axis in self.axes)).flatten()

    def __str__(self) -> str:
        return f"axes({self.axes})"


@dataclass(frozen=True)
class Tile(Order):
    """Boxes of tokens one after another, frame-major over boxes and inside them.

    Whole boxes come first and the ones cut at the end of an axis after them, so that a box of `block_tokens` tokens is a block wherever the
    sizes do not divide. Source: Zhang et al. 2025, STA, arXiv:2502.04507, section 3.2 (tile-wise flattening); DraftAttention,
    arXiv:2505.14708 (per-frame tiles of 8 x 16 are tile(1,8,16)). Differs: cut boxes last, no divisibility needed.
    """

    frames: int
    height: int
    width: int

    def grid_path(self, shape: tuple[int, int, int]) -> Int[Tensor, " T"]:
        """Sort by (cut or whole, box, place in box)."""
        sides = [size if side == 0 else min(side, size) for side, size in zip(self.sides, shape, strict=True)]
        axes = torch.meshgrid(*(torch.arange(size) for size in shape), indexing="ij")
        cut = torch.zeros(shape, dtype=torch.bool)
        box = place = torch.zeros(shape, dtype=torch.long)
        for axis, side, size in zip(axes, sides, shape, strict=True):
            cut |= (axis // side + 1) * side > size
            box = box * -(-size // side) + axis // side
            place = place * side + axis % side
        volume = sides[0] * sides[1] * sides[2]
        key = (cut * (int(box.max()) + 1) + box) * volume + place
        return key.flatten().argsort(stable=True)

    @property
    def sides(self) -> tuple[int, int, int]:
        """Tokens per axis of a box; 0 is the whole axis."""
        return self.frames, self.height, self.width

    def __str__(self) -> str:
        return f"tile({self.frames},{self.height},{self.width})"


@dataclass(frozen=True)
class Gilbert(Order):
    """A generalised Hilbert curve through the grid.

    Sources: Cerveny 2018, gilbert (curves over boxes of any size); used by Rectified SpaAttn, arXiv:2511.19835, and PSA, arXiv:2512.04025.
    """

    def grid_path(self, shape: tuple[int, int, int]) -> Int[Tensor, " T"]:
        """The curve's cells as frame-major indices."""
        cells = gilbert_path(shape)
        return (cells[:, 0] * shape[1] + cells[:, 1]) * shape[2] + cells[:, 2]

    def __str__(self) -> str:
        return "gilbert"


@dataclass(frozen=True)
class KMeans(Order):
    """Tokens of the grid by cluster, queries and keys each by their own: the i-th query and the i-th key are different tokens.

    Source: Yang et al. 2025, Sparse VideoGen2, arXiv:2505.18875, section 4.1 (semantic-aware permutation; 100 to 400 query and 500 to 1000 key
    clusters).
    """

    query_clusters: int
    key_clusters: int

    def __post_init__(self) -> None:
        if min(self.query_clusters, self.key_clusters) < 1:
            raise SpecError(f"kmeans(m,n) must have at least 1 cluster of each, but got {self}.")

    @property
    def by_content(self) -> bool:
        """Yes."""
        return True

    def grid_path(self, shape: tuple[int, int, int]) -> Int[Tensor, " T"]:
        """Frame-major; clusters come on top."""
        return _frame_major(shape).flatten()

    def __str__(self) -> str:
        return f"kmeans({self.query_clusters},{self.key_clusters})"


IDENTITY = Identity()
TOKEN_MAJOR = Axes("hwf")


def parse_order(text: str) -> Order:
    """Read an order's text.

    Raises:
        SpecError: it is none of those at the top of this module.
    """
    compact = text.replace(" ", "")
    if re.fullmatch(_PATTERN, compact) is None:
        raise SpecError(
            f"an order must be identity, axes(hwf) or another permutation, tile(t,h,w) or gilbert, but got {text!r}."
        )
    name, _, arguments = compact.rstrip(")").partition("(")
    match name:
        case "axes":
            return Axes(arguments)
        case "tile":
            return Tile(*(int(side) for side in arguments.split(",")))
        case "gilbert":
            return Gilbert()
    return IDENTITY


def _as_order(value: Any) -> Any:
    return parse_order(value) if isinstance(value, str) else value


class _OrderSchema:
    @staticmethod
    def __get_pydantic_json_schema__(_: CoreSchema, __: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {"type": "string", "pattern": _PATTERN, "description": "identity, axes(hwf), tile(t,h,w) or gilbert"}


AnyOrder = Annotated[Order, BeforeValidator(_as_order), PlainSerializer(str), _OrderSchema]


def _frame_major(shape: tuple[int, int, int]) -> Int[Tensor, "F H W"]:
    return torch.arange(shape[0] * shape[1] * shape[2]).view(shape)


@lru_cache(maxsize=64)
def _permutation(order: Order, layout: Layout, device: str) -> Int[Tensor, " T"]:
    tokens = torch.arange(layout.num_tokens)
    if not order.is_identity:
        start, path = layout.grid_start, order.grid_path(layout.grid_shape)
        tokens = torch.cat([path + start, tokens[:start], tokens[start + len(path) :]])
    return tokens.to(device)


@lru_cache(maxsize=64)
def _inverse(order: Order, layout: Layout, device: str) -> Int[Tensor, " T"]:
    return _permutation(order, layout, "cpu").argsort().to(device)
