"""What one new token per sequence reads from a static ragged cache: the arguments of the decoding kernel, kept on the device.

KV heads whose query heads agree are read once for all of them. Where they do not (a plan made per query head), each query head of that KV
head reads the blocks of its own rule; which ones those are is tabulated for every block that decoding can reach. Query heads whose rule decodes
choose their blocks at every token.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sparsesearch.block_mask import BlockGrid
from sparsesearch.errors import UnsupportedModelError
from sparsesearch.kernels.cache_ops import gathered_decode
from sparsesearch.kernels.decode import ragged_decode
from sparsesearch.rules.base import Rule
from sparsesearch.rules.dense import Dense
from sparsesearch.rules.mean_value import MeanValue
from sparsesearch.runtime.binding import LayerBinding, evicting_rule
from sparsesearch.runtime.device_decode import visible_blocks
from sparsesearch.runtime.static_regions import Layout
from sparsesearch.runtime.step_choices import Choosers
from sparsesearch.step_blocks import StepSelection

_MOST_TABLE_BYTES = 1 << 28
_PER_ROW = ("sums", "tables", "whole", "open", "first_block", "low", "high", "laws", "budgets")


class Queries:
    """How the query heads of one layer read, whatever the sequences; made once per layer and device.

    Attributes:
        size: query heads per KV head.
        mean_kv: KV heads that keep nothing but a running sum of their values.
        mean_heads: their query heads.
        choosers: query heads that choose for every token.
        mixed_heads: the other query heads of the KV heads where not all read the same.
        mixed_on_device: the same.
        alike: int32 [G], 1 for the other KV heads.
        scored: per mixed head, whether scores count.
    """

    def __init__(self, binding: LayerBinding, num_kv_heads: int, device: torch.device) -> None:
        rules = binding.kept_by
        self.num_kv_heads, self.size = num_kv_heads, len(rules) // num_kv_heads
        groups = [rules[head : head + self.size] for head in range(0, len(rules), self.size)]
        means = [head for head, own in enumerate(groups) if isinstance(evicting_rule(own), MeanValue)]
        mixed = [head for head, own in enumerate(groups) if not evicting_rule(own) and not all(map(_reads_all, own))]
        self.mean_kv, self.mean_heads = (torch.tensor(heads, device=device) for heads in (means, self._heads(means)))
        self.choosers = Choosers(binding, num_kv_heads, device)
        self.mixed_heads = [head for head in self._heads(mixed) if not rules[head].decodes]
        self.mixed_on_device = torch.tensor(self.mixed_heads, device=device)
        self.alike = torch.tensor([head not in mixed for head in range(num_kv_heads)], device=device).int()
        # a mean of values is attention whose scores are all equal
        self.scored = torch.tensor([[rules[head].rest != "mean_value"] for head in self.mixed_heads], device=device)
        self.has_means, self.has_mixed, self.num_means = bool(means), bool(self.mixed_heads), len(means)

    def _heads(self, kv_heads: Sequence[int]) -> list[int]:
        return [head * self.size + member for head in kv_heads for member in range(self.size)]


class Reads:
    """Tensors of one layer, P = B·G pairs of sequence and KV head.

    Attributes:
        queries: how its query heads read.
        layout: where its rows lie.
        lens: int32 [P], rows the newest token sees.
        sums: fp64 [B, n, D], sum of the values of the n KV heads that follow mean_value.
        low: [B, n, blocks, D], smallest value of each channel per block, of the n KV heads whose bounds a rule asks for.
        high: largest, likewise.
        laws: int64 [B], the prompts' lengths.
        budgets: int32 [B, r], blocks that a token reads under each rule that ranks them by bounds.
        left: what this layer chose for the newest tokens, where later layers reuse it.
        taken: what the layers whose choice this one reuses have left.
    """

    def __init__(self, queries: Queries, layout: Layout, like: Float[Tensor, "rows D"], max_tokens: int) -> None:
        self.queries, self.layout, head_dim = queries, layout, like.shape[1]
        batch, device = layout.batch, layout.device
        self.lens = torch.zeros(batch * layout.num_kv_heads, dtype=torch.int32, device=device)
        self.sums = torch.zeros(batch, queries.num_means, head_dim, dtype=torch.float64, device=device)
        self.tables = self.whole = self.open = self.first_block = torch.zeros(batch, 0, device=device)
        blocks = -(-max_tokens // layout.block_tokens)
        self.low, self.high = (like.new_zeros(batch, len(queries.choosers.bounded), blocks, head_dim) for _ in range(2))
        self.laws = torch.zeros(batch, dtype=torch.int64, device=device)
        self.budgets = queries.choosers.budgets(self.laws, layout.block_tokens)
        self.left = self._empty_selection() if queries.choosers.leaves else None
        self.taken: list[StepSelection] = []
        self._repeated: list[tuple[Tensor, Tensor]] | None = None

    def _empty_selection(self) -> StepSelection:
        num_heads = self.queries.num_kv_heads * self.queries.size
        return StepSelection(self.batch, num_heads, self.low.shape[2], self.layout.device)

    @property
    def batch(self) -> int:
        """Sequences."""
        return self.layout.batch

    def tabulate(
        self, binding: LayerBinding, law_tokens: Int[Tensor, " B"], counts: Sequence[int], max_tokens: int
    ) -> None:
        """List the blocks that query heads of mixed KV heads read, for every block in which a new token can lie.

        Raises:
            UnsupportedModelError: the lists would take more memory than they save.
        """
        laws, heads = tuple(law_tokens.clamp(min=1).tolist()), tuple(self.queries.mixed_heads)
        if self.queries.choosers.some:
            device = self.layout.device
            self.laws.copy_(binding.remembered(("laws", laws, device), lambda: torch.tensor(laws, device=device)))
            self.budgets.copy_(self.queries.choosers.budgets(self.laws, self.layout.block_tokens))
        if not self.queries.has_mixed:
            return
        key = ("tables", heads, laws, tuple(counts), max_tokens, self.layout.device)
        made: tuple[Tensor, ...] = binding.remembered(
            key, lambda: _tables(binding, heads, laws, counts, max_tokens, self.layout.device)
        )
        # rows may be reordered in place
        self.tables, self.whole, self.open, self.first_block = (tensor.clone() for tensor in made)
        self.block_tokens = binding.block_tokens

    def attend(
        self,
        q: Float[Tensor, "B H D"],
        v: Float[Tensor, "B G D"],
        keys: Float[Tensor, "rows D"],
        values: Float[Tensor, "rows D"],
        seen: Int[Tensor, " P"],
        scale: float,
        kernel: bool,
    ) -> Float[Tensor, "B H D"]:
        """Output for the newest tokens, which are in their places; `v` are their values."""
        heads, lens = self.queries, self.lens
        if heads.choosers.all:
            return self._chosen(q, keys, values, seen, scale, kernel)
        if heads.has_mixed or heads.choosers.some:
            lens = (lens.view(-1, heads.num_kv_heads) * heads.alike).flatten()
        out = _read(q, keys, values, self.layout.start, lens, None, scale, 1, kernel)
        if heads.choosers.some:
            out.index_copy_(1, heads.choosers.heads, self._chosen(q, keys, values, seen, scale, kernel))
        if not (heads.has_mixed or heads.has_means):  # a launch here would keep the next product from starting early
            return out
        tokens = seen.view(q.shape[0], -1)[:, 0].long()
        if heads.has_mixed:
            out.index_copy_(1, heads.mixed_on_device, self._mixed(q, keys, values, tokens - 1, scale, kernel))
        if heads.has_means:
            self.sums.add_(v.index_select(1, heads.mean_kv))
            mean = (self.sums / tokens[:, None, None]).to(out.dtype)
            out.index_copy_(1, heads.mean_heads, mean.repeat_interleave(heads.size, 1))
        return out

    def _chosen(
        self, q: Tensor, keys: Tensor, values: Tensor, seen: Int[Tensor, " P"], scale: float, kernel: bool
    ) -> Float[Tensor, "B h D"]:
        choosers = self.queries.choosers
        budgets = self.budgets if kernel else None
        if self._repeated:
            table, lens = self._repeated[0]
        else:
            table, lens = choosers.tables(
                q, keys, self.low, self.high, seen, self.laws, self.layout, scale, self.left, self.taken, budgets
            )
        if self._repeated == []:
            self._repeated.append((table, lens))
        start = self.layout.start.view(q.shape[0], -1).index_select(1, choosers.kv_heads).flatten()
        own = q if choosers.all else q.index_select(1, choosers.heads)
        return _read(own, keys, values, start, lens, table, scale, self.layout.block_tokens, kernel)

    def next_bounds(self, seen: Int[Tensor, " P"]) -> Int[Tensor, " n"]:
        """Rows of the bounds, all of them in a line, that the next token of each sequence changes."""
        count, blocks = self.low.shape[1:3]
        block = seen.view(self.batch, -1)[:, :1].long() // self.layout.block_tokens
        pairs = torch.arange(self.batch * count, device=self.low.device).view(self.batch, count)
        return (pairs * blocks + block.clamp(max=blocks - 1)).flatten()

    def _mixed(
        self, q: Tensor, keys: Tensor, values: Tensor, position: Int[Tensor, " B"], scale: float, kernel: bool
    ) -> Float[Tensor, "B h D"]:
        turn = (position // self.block_tokens - self.first_block).clamp(0, self.tables.shape[1] - 1)
        heads, row = self.queries, torch.arange(q.shape[0], device=q.device)
        lens = self.whole[row, turn] + self.open[row, turn] * (position % self.block_tokens + 1)[:, None]
        start = self.layout.start.view(q.shape[0], -1).index_select(1, heads.mixed_on_device // heads.size)
        table = self.tables[row, turn].flatten(0, 1)
        own = q.index_select(1, heads.mixed_on_device) * heads.scored.to(q.dtype)
        return _read(own, keys, values, start.flatten(), lens.flatten().int(), table, scale, self.block_tokens, kernel)

    def add_values(self, row: int, v: Float[Tensor, "G s D"]) -> None:
        """Count the values of a prompt's tokens."""
        if self.queries.has_means:
            self.sums[row] += v.index_select(0, self.queries.mean_kv).double().sum(1)

    def bound(self, keys: Float[Tensor, "rows D"], counts: Sequence[tuple[int, int]]) -> None:
        """Work out the bounds of some sequences' blocks anew; `counts` are (sequence, tokens)."""
        self.queries.choosers.fill(self.low, self.high, keys, self.layout, counts)

    def put_means(
        self, output: Float[Tensor, "B H S D"], v: Float[Tensor, "B G S D"], news: Sequence[tuple[int, Any]]
    ) -> None:
        """Overwrite the heads that follow mean_value in a call that continues a prompt; `news` are (row, span)."""
        heads = self.queries
        for row, span in news if heads.has_means else ():
            new = v[row].index_select(0, heads.mean_kv)[:, span.q_slots].double()
            counts = torch.arange(span.grid.q_start + 1, span.grid.kv_len + 1, device=v.device)[:, None]
            mean = (self.sums[row][:, None] + new.cumsum(1)) / counts
            for place, head in enumerate(heads.mean_heads.tolist()):
                output[row, head, span.q_slots] = mean[place // heads.size].to(output.dtype)

    def addresses(self) -> list[int]:
        """Where the tensors lie."""
        own = [getattr(self, name).data_ptr() for name in ("lens", *_PER_ROW)]
        selections = [*self.taken, *([self.left] if self.left is not None else [])]
        others = self.layout.start, *self.layout.limits, *(selection.tiles for selection in selections)
        return own + [x.data_ptr() for x in others]

    def choose_rows(self, index: Int[Tensor, " b"], layout: Layout) -> None:
        """Let row i be what row index[i] was; addresses stay if the batch does."""
        same, batch = layout.batch == self.batch, self.batch
        for name in ("lens", *_PER_ROW):
            ours: Tensor = getattr(self, name)
            new = ours.view(batch, -1)[index].view(len(index) * (len(ours) // batch), *ours.shape[1:])
            if same:
                ours.copy_(new)
            else:
                setattr(self, name, new)
        self.layout = layout
        if self.left is not None and not same:
            self.left.tiles = self._empty_selection().tiles


@contextmanager
def same_choices(layers: Sequence[Reads]) -> Iterator[None]:
    """Inside, heads choose for one token only once and read the same again: for ways to compute a step that round differently.

    A choice may tip over by rounding, after which results say nothing of each other.
    """
    for reads in layers:
        reads._repeated = []
    try:
        yield
    finally:
        for reads in layers:
            reads._repeated = None


def _tables(
    binding: LayerBinding,
    heads: Sequence[int],
    laws: Sequence[int],
    counts: Sequence[int],
    max_tokens: int,
    device: torch.device,
) -> tuple[Tensor, ...]:
    """Blocks that each head reads [B, turns, h, n], the keys in those that are full, whether one is being filled, and the first turn's block."""
    block, first = binding.block_tokens, [count // binding.block_tokens for count in counts]
    turns = max((max_tokens - 1) // block - own + 1 for own in first)
    flat = [
        visible_blocks(binding.kept_by[head], BlockGrid(1, (own + turn) * block + 1, block, law))
        for own, law in zip(first, laws, strict=True)
        for turn in range(turns)
        for head in heads
    ]
    longest = max(len(blocks) for blocks in flat)
    if 4 * longest * len(flat) > _MOST_TABLE_BYTES:
        raise UnsupportedModelError(
            f"{binding.path}: query heads of one KV head must follow one rule where a static cache is to hold {max_tokens} tokens: the "
            "blocks that each may read would fill too much memory. Make the plan with --unit kv_group, or use a dynamic cache."
        )
    shape = len(counts), turns, len(heads)
    ends = torch.tensor([int(blocks[-1]) if len(blocks) else -1 for blocks in flat]).view(shape)
    is_open = (ends == torch.tensor(first)[:, None, None] + torch.arange(turns)[:, None]).int()
    whole = (torch.tensor([len(blocks) for blocks in flat]).view(shape) - is_open) * block
    tables = torch.nn.utils.rnn.pad_sequence(flat, batch_first=True).view(*shape, longest)
    return tables.to(device), whole.to(device), is_open.to(device), torch.tensor(first, device=device)


def _reads_all(rule: Rule) -> bool:
    return (rule.dynamic and not rule.decodes) or isinstance(rule, Dense)


def _read(
    q: Tensor, keys: Tensor, values: Tensor, start: Tensor, lens: Tensor, table: Tensor | None, scale: float, page: int, kernel: bool
) -> Tensor:  # fmt: skip
    q = q.contiguous()
    if kernel:
        return ragged_decode(q, keys, values, start, lens, scale=scale, table=table, page_tokens=page)[0]
    out: Tensor = gathered_decode(q, keys, values, start, lens, table, scale, page)
    return out
