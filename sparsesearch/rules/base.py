"""The contract of a rule: how one unit attends.

A rule is one file `sparsesearch/rules/<kind>.py` holding one frozen pydantic class whose `kind` equals the file name. Everything else
follows from the class: parsing of plans and search spaces, the listings, the README table, the contract tests.
"""

import math
from abc import abstractmethod
from collections.abc import Hashable
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from jaxtyping import Bool, Float, Int, Int16
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from torch import Tensor

from sparsesearch.block_mask import BlockGrid, blocks_of
from sparsesearch.errors import SpecError
from sparsesearch.order import IDENTITY, Order
from sparsesearch.step_blocks import StepBlocks

Rest = Literal["drop", "zero", "mean_value", "pooled", "taylor", "rectified", "cached"]


class LengthLaw(BaseModel):
    """A number of tokens that grows with the sequence: tokens(N) = max(a + b·N, 0).

    It may exceed N: a window of 256 given after a prompt of 3 tokens is still 256 while decoding.

    Source: Fu et al. 2024, MoA, arXiv:2406.14909, section 3.1 (elastic rules). In YAML a bare number is the constant law.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    a: float = Field(0.0, description="tokens at length 0; may be negative")
    b: float = Field(0.0, ge=0, le=1, description="tokens per token of sequence")

    def tokens(self, length: int) -> int:
        """The law at a sequence of `length` tokens."""
        return math.floor(max(self.a + self.b * length, 0.0) + 1e-9)

    def blocks(self, grid: BlockGrid) -> int:
        """The law in whole blocks, rounded up, at the grid's law length."""
        return blocks_of(self.tokens(grid.law_len), grid.block_tokens)

    def row_blocks(self, grid: BlockGrid, device: torch.device | str = "cpu") -> Int[Tensor, "M 1"]:
        """The law in whole blocks for each query block, at the number of keys that row can see; at least 1.

        Computed on the device, so that nothing waits for the host.
        """
        seen = ((grid.q_blocks(device) + 1) * grid.block_tokens).clamp(max=grid.kv_len)
        seen = seen if grid.causal else torch.full_like(seen, grid.kv_len)
        return self.blocks_at(seen, grid.block_tokens).clamp(min=1)

    def blocks_at(self, lengths: Int[Tensor, "*any"], block_tokens: int) -> Int[Tensor, "*any"]:
        """The law in whole blocks, rounded up, at lengths that lie on a device."""
        tokens = ((self.a + self.b * lengths.double()).clamp(min=0) + 1e-9).floor().long()
        return (tokens + block_tokens - 1) // block_tokens

    def __str__(self) -> str:
        if self.b == 0:
            return f"{self.a:g}"
        return f"{self.a:g}+{self.b:g}N" if self.a else f"{self.b:g}N"


def _as_law(value: Any) -> Any:
    return {"a": value} if isinstance(value, int | float) and not isinstance(value, bool) else value


Law = Annotated[LengthLaw, BeforeValidator(_as_law)]


class Rule(BaseModel):
    """How one unit attends: which tiles each query block computes, and what stands for the rest.

    Class attributes (the rest of the contract):
        kind: equals the file name.
        source: the paper, with arXiv number.
        dynamic: the choice needs this call's queries and keys; such a rule acts in prefill, and decoding is dense unless `decodes`.
        decodes: a dynamic rule that also chooses for a call of one query; it has `step_tiles` too.
        reads_bounds: whether `step_tiles` asks for the bounds of blocks, which a cache must then keep.
        skips_rows: some query blocks may compute no tile; their output is 0, and the residual stream carries those tokens on.
        rest: what stands for the tiles that are not computed. `drop` renormalises over the chosen ones; `zero` and `mean_value` replace
            the unit's whole output (no tile is computed): by nothing, or by the running mean of the values. The others add a term to the
            chosen tiles' output: `pooled` keys in the same softmax, `taylor` with their first-order term, `rectified` weights and `cached`
            differences; see the rules of those names and `kernels.rest_terms`.
        reuses: the choice is another head's; `select` takes it as `left`, so the rule runs inside a plan only.
        needs_calibration: a template in a search space; profiling turns it into one rule per unit with `calibrated`.
        needs_layout: the choice speaks of text and frames: `grid.layout` must be given, and its policy is obeyed. Such a rule has a field
            `order`; everything it is given and returns (tiles, q, k, masses) is in that order.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    source: ClassVar[str]
    dynamic: ClassVar[bool] = False
    decodes: ClassVar[bool] = False
    reads_bounds: ClassVar[bool] = False
    skips_rows: ClassVar[bool] = False
    rest: ClassVar[Rest] = "drop"
    reuses: ClassVar[bool] = False
    needs_calibration: ClassVar[bool] = False
    needs_layout: ClassVar[bool] = False
    kind: str

    registry: ClassVar[dict[str, type["Rule"]]] = {}

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        if cls.model_fields["kind"].is_required():
            return  # a base of several rules
        file = cls.__module__.rsplit(".", 1)[-1]
        if cls.kind_name() != file:
            raise TypeError(f"{cls.__name__}.kind must equal its file name {file!r}, but is {cls.kind_name()!r}.")
        if file in Rule.registry:
            raise TypeError(f"{file}.py must hold one rule, but also defines {cls.__name__}.")
        Rule.registry[file] = cls

    @property
    def token_order(self) -> Order:
        """The order of tokens over which the rule's blocks are counted; the model's own unless the rule has a field `order`."""
        order = getattr(self, "order", IDENTITY)
        assert isinstance(order, Order)
        return order

    @property
    def replaces_output(self) -> bool:
        """Whether the rule computes no tile, because something else is the unit's whole output."""
        return self.rest in ("zero", "mean_value")

    @property
    def adds_rest(self) -> bool:
        """Whether a term is added to the computed tiles' output."""
        return self.rest != "drop" and not self.replaces_output

    @property
    def ready(self) -> bool:
        """Whether the rule can choose: not a template that waits for its calibration."""
        return not self.needs_calibration or getattr(self, "bitmap", None) is not None

    @classmethod
    def kind_name(cls) -> str:
        """The value of `kind`, which names the rule in YAML and JSON."""
        return str(cls.model_fields["kind"].default)

    @abstractmethod
    def select(
        self, grid: BlockGrid, q: Float[Tensor, "*unit S D"] | None = None, k: Float[Tensor, "*unit T D"] | None = None
    ) -> Bool[Tensor, "*#unit M N"]:
        """The tiles to compute; a subset of `grid.reachable()` that holds the diagonal of every row.

        Rows are empty only where `rest` replaces the whole output, or where the rule `skips_rows`.

        A static rule ignores q and k and returns [M, N]. A dynamic rule needs both and returns one choice per leading index of q: keys
        are repeated to the query heads, both are rotated, and q carries the softmax scale, so that q·k is the score.
        """

    @property
    def ballot(self) -> Hashable | None:
        """What `votes` depend on besides the call: rules of one kind and equal ballots differ in their budgets only. None: `select` says it all.

        Scoring many such rules on one call counts the votes once; `select` is `chosen` by `votes`.
        """
        return None

    def votes(
        self, grid: BlockGrid, q: Float[Tensor, "*unit S D"], k: Float[Tensor, "*unit T D"]
    ) -> tuple[Tensor, ...]:
        """What a dynamic rule with a ballot chooses from."""
        raise NotImplementedError(f"{self.kind_name()} has no ballot")

    def chosen(self, grid: BlockGrid, *votes: Tensor) -> Bool[Tensor, "*unit M N"]:
        """The tiles that votes lead to."""
        raise NotImplementedError(f"{self.kind_name()} has no ballot")

    def step_tiles(self, q: Float[Tensor, "B g size D"], blocks: StepBlocks) -> Bool[Tensor, "B g size N"]:
        """What `select` chooses for one new token per sequence, without asking the host where that token is; the newest block is in.

        Args:
            q: its queries, `size` per KV head, with the softmax scale.
            blocks: what there is to choose among.

        Raises:
            SpecError: the rule does not choose in decoding.
        """
        raise SpecError(f"{self.kind_name()} chooses nothing for a decoded token: its heads are dense there.")

    def step_left(
        self, tiles: Bool[Tensor, "B g size N"], q: Float[Tensor, "B g size D"], blocks: StepBlocks
    ) -> Bool[Tensor, "B g size N"]:
        """`left_behind` for one new token per sequence: the same tiles by default."""
        return tiles

    def levels(
        self, grid: BlockGrid, q: Float[Tensor, "*unit S D"] | None = None, k: Float[Tensor, "*unit T D"] | None = None
    ) -> Int16[Tensor, "*#unit M N"]:
        """How each tile is seen: 1 key by key, n as the means of n neighbouring keys each, 0 not at all. Tiles at 1 are those of `select`."""
        return self.levels_of(self.select(grid, q, k), grid)

    def levels_of(self, tiles: Bool[Tensor, "*unit M N"], grid: BlockGrid) -> Int16[Tensor, "*unit M N"]:
        """The levels that follow from the tiles of `select`, where these say it all."""
        return tiles.short()

    def work(
        self, levels: Int16[Tensor, "*unit M N"], grid: BlockGrid, steps: int | None = None
    ) -> Float[Tensor, "*unit"]:
        """What a unit computes per call, in tiles: a tile seen through means of n keys is 1/n of one.

        `steps` is the length of the range of denoising steps over which the rule holds, where that matters.
        """
        return torch.where(levels > 0, 1.0 / levels.clamp(min=1), 0.0).sum((-1, -2))

    def keeps_all(self, grid: BlockGrid) -> bool:
        """Whether a dynamic rule computes every reachable tile of this grid whatever the queries and keys are.

        A law a + b·N says so at short lengths: below a, choosing costs more than it saves, and the runtime then runs the head dense.
        """
        return False

    def left_behind(
        self,
        tiles: Bool[Tensor, "*#unit M N"],
        grid: BlockGrid,
        q: Float[Tensor, "*unit S D"],
        k: Float[Tensor, "*unit T D"],
    ) -> Bool[Tensor, "*#unit M N"]:
        """What a dynamic rule that chose `tiles` leaves for later layers to reuse: the same tiles by default."""
        return tiles

    def source_head(self, head: int) -> tuple[int, int] | None:
        """Layer (index of the attention module) and query head whose selection query head `head` runs; None: it chooses by itself."""
        return None

    def calibrated(self, mass: Float[Tensor, "N N"], grid: BlockGrid | None = None) -> Self:
        """The rule for one unit whose mean attention mass per tile (rows sum to the queries in them) is `mass`; itself by default.

        `mass` is in the rule's order; `grid`, if given, is the one it was measured on.
        """
        return self

    def kept_tokens(self, grid: BlockGrid) -> int:
        """Most keys that decoding from this grid can still reach, hence must be cached; the sequence's length by default."""
        return grid.kv_len

    def step_tokens(self, grid: BlockGrid) -> int:
        """Keys that a query head reads for the only query of `grid`; the most it may read, where the data decide. All it keeps by default."""
        return self.kept_tokens(grid)

    @classmethod
    @abstractmethod
    def examples(cls) -> list[Self]:
        """A few legal instances with their parameters' range covered; the contract tests run over them."""

    @property
    def label(self) -> str:
        """Short name, unique per content: `sink_window(sink=64,window=0.25N)`."""
        own = self.model_dump(exclude={"kind"}, exclude_defaults=False)
        parts = ",".join(f"{name}={short(getattr(self, name))}" for name in own)
        return f"{self.kind}({parts})" if parts else self.kind


def short(value: object) -> str:
    """A parameter in a label."""
    return f"{value:g}" if isinstance(value, float) else str(value)
