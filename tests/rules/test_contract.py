"""Every rule keeps the contract, on odd shapes too. A new rule is tested by having `examples()`."""

import pytest
import torch

from sparsesearch.block_mask import BlockGrid, density, expand
from sparsesearch.errors import SpecError
from sparsesearch.kernels.reference import tile_attention
from sparsesearch.rules import Rule, parse_rule, rule_kinds
from sparsesearch.rules.reuse import Reuse
from sparsesearch.step_blocks import StepBlocks, page_tables, update_bounds

EXAMPLES = [rule for kind in rule_kinds().values() if not kind.needs_layout for rule in kind.examples()]
STATIC = [rule for rule in EXAMPLES if not rule.dynamic]
DYNAMIC = [rule for rule in EXAMPLES if rule.dynamic and not rule.reuses]  # those that choose by themselves
SHAPES = [(1, 1), (63, 63), (64, 64), (65, 65), (200, 200), (1, 130), (37, 200), (130, 513)]


def select(rule: Rule, grid: BlockGrid, heads: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(grid.q_len * 1000 + grid.kv_len)
    q = torch.randn(heads, grid.q_len, 16, generator=generator)
    k = torch.randn(heads, grid.kv_len, 16, generator=generator)
    if isinstance(rule, Reuse):  # the only rule that does not choose by itself
        left = torch.rand(heads, grid.num_q_blocks, grid.num_k_blocks, generator=generator) < 0.3
        return rule.select(grid, q, k, left=left)
    return rule.select(grid, q, k)


@pytest.mark.parametrize("rule", EXAMPLES, ids=lambda rule: rule.label)
@pytest.mark.parametrize(("q_len", "kv_len"), SHAPES)
@pytest.mark.parametrize("block_tokens", [32, 64])
def test_choice_is_legal(rule: Rule, q_len: int, kv_len: int, block_tokens: int) -> None:
    grid = BlockGrid(q_len, kv_len, block_tokens)
    tiles = select(rule, grid)
    assert tiles.dtype == torch.bool
    assert tiles.shape[-2:] == (grid.num_q_blocks, grid.num_k_blocks)
    assert tiles.shape[:-2] in ((3,), (1,), ())
    assert not (tiles & ~grid.reachable()).any(), "a rule may not look into the future"
    if rule.rest == "drop":
        computed = tiles.any(-1)
        assert torch.equal(tiles.diagonal(grid.first_q_block, -2, -1), computed), "a computed row sees itself"
        assert rule.skips_rows or computed.all(), "every row is computed"
        assert 0 < density(tiles, grid) <= 1
    else:
        assert not tiles.any()
    assert 0 <= rule.kept_tokens(grid) <= grid.kv_len


@pytest.mark.parametrize("rule", STATIC, ids=lambda rule: rule.label)
def test_static_choice_does_not_depend_on_chunks(rule: Rule) -> None:
    whole = expand(select(rule, BlockGrid(333, 333, 64)), BlockGrid(333, 333, 64))
    for start in (1, 64, 100, 332):
        chunk = BlockGrid(333 - start, 333, 64)
        assert torch.equal(expand(select(rule, chunk), chunk), whole[start:])


@pytest.mark.parametrize("rule", DYNAMIC, ids=lambda rule: rule.label)
@pytest.mark.parametrize(("q_len", "kv_len"), [(200, 200), (130, 513), (1, 130)])
def test_batched_heads_choose_as_each_would_alone(rule: Rule, q_len: int, kv_len: int) -> None:
    grid = BlockGrid(q_len, kv_len, 64)
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 3, q_len, 16, generator=generator)
    k = torch.randn(2, 3, kv_len, 16, generator=generator)
    together = rule.select(grid, q, k).expand(2, 3, grid.num_q_blocks, grid.num_k_blocks)
    for row in range(2):
        for head in range(3):
            assert torch.equal(rule.select(grid, q[row, head], k[row, head]), together[row, head])


@pytest.mark.parametrize("rule", [rule for rule in DYNAMIC if rule.decodes], ids=lambda rule: rule.label)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_chooses_as_a_call_of_one_query(rule: Rule, dtype: torch.dtype) -> None:
    """Two caches with room for 300 tokens of which 257 and 64 are there, bounds kept token by token; two query heads per KV head."""
    block, room, lengths, laws = 64, 300, (257, 64), (200, 50)
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 3, 2, 16, generator=generator).to(dtype)
    keys = torch.randn(2, 3, room, 16, generator=generator).to(dtype)
    low, high = torch.zeros(2, 2, 3, 5, 16, dtype=dtype).unbind(0)
    for token in range(max(lengths)):
        position = torch.tensor([min(token, length - 1) for length in lengths])
        update_bounds(low, high, keys[torch.arange(2), :, position], position, block)
    position = torch.tensor(lengths)[:, None, None, None] - 1
    blocks = StepBlocks(position, torch.tensor(laws)[:, None, None, None], block, 5, keys, low, high)
    tiles = rule.step_tiles(q, blocks)
    left = rule.step_left(tiles, q, blocks)
    table, lens = page_tables(tiles.flatten(1, 2), position.flatten(), block)
    for row, (length, law) in enumerate(zip(lengths, laws, strict=True)):
        grid = BlockGrid(1, length, block, law)
        known = keys[row, :, None, :length].expand(-1, 2, -1, -1)
        expected = rule.select(grid, q[row][:, :, None], known)[..., 0, :].expand(3, 2, -1)
        assert torch.equal(tiles[row, ..., : grid.num_k_blocks], expected)
        assert not tiles[row, ..., grid.num_k_blocks :].any()
        kept = rule.left_behind(expected[..., None, :], grid, q[row][:, :, None], known)[..., 0, :]
        assert torch.equal(left[row, ..., : grid.num_k_blocks], kept)
        for pair, chosen in enumerate(expected.flatten(0, 1), 6 * row):
            pages = chosen.nonzero()[:, 0]
            assert torch.equal(table[pair, : len(pages)].long(), pages)
            assert int(lens[pair]) == int(expand(chosen[None], grid).sum())


OTHERS = [rule for rule in DYNAMIC if type(rule).step_tiles is Rule.step_tiles]


@pytest.mark.parametrize("rule", OTHERS, ids=lambda rule: rule.label)
def test_other_rules_choose_nothing_in_a_step(rule: Rule) -> None:
    assert not rule.decodes
    with pytest.raises(SpecError, match="chooses nothing for a decoded token"):
        rule.step_tiles(torch.zeros(1, 1, 1, 4), StepBlocks(*torch.zeros(2, 1, 1, 1, 1, dtype=torch.int64), 64, 1))


@pytest.mark.parametrize("rule", DYNAMIC, ids=lambda rule: rule.label)
def test_equal_scores_are_settled_by_position(rule: Rule) -> None:
    """Nothing to tell tiles apart: the same choice every time, in every head."""
    grid = BlockGrid(300, 300, 64)
    q = k = torch.zeros(2, 300, 16)
    tiles = rule.select(grid, q, k).expand(2, grid.num_q_blocks, grid.num_k_blocks)
    assert torch.equal(tiles[0], tiles[1])
    assert torch.equal(rule.select(grid, q, k).expand_as(tiles), tiles)


@pytest.mark.parametrize("rule", [rule for rule in DYNAMIC if not rule.decodes], ids=lambda rule: rule.label)
def test_dynamic_rules_need_queries_and_keys(rule: Rule) -> None:
    with pytest.raises(SpecError, match=f"{rule.kind} must be given this call's queries and keys"):
        rule.select(BlockGrid(64, 64, 64))


@pytest.mark.parametrize("rule", [rule for rule in STATIC if rule.rest == "drop"], ids=lambda rule: rule.label)
def test_kept_tokens_suffice_for_decoding(rule: Rule) -> None:
    for length in (1, 63, 64, 65, 300, 640):
        step = BlockGrid(1, length, 64, law_len=length)
        visible = int(expand(select(rule, step), step).sum())
        assert visible <= rule.kept_tokens(step)


@pytest.mark.parametrize("rule", EXAMPLES, ids=lambda rule: rule.label)
def test_round_trip_and_hash(rule: Rule) -> None:
    again = parse_rule(rule.model_dump(mode="json"), where="test")
    assert again == rule
    assert hash(again) == hash(rule)
    assert again.label == rule.label


def test_labels_are_unique() -> None:
    assert len({rule.label for rule in EXAMPLES}) == len(EXAMPLES)


@pytest.mark.parametrize("kind", rule_kinds().values(), ids=lambda kind: kind.kind_name())
def test_documented(kind: type[Rule]) -> None:
    assert kind.__doc__
    assert "Source" in kind.__doc__
    assert "arXiv" in kind.source


@pytest.mark.parametrize("rule", EXAMPLES, ids=lambda rule: rule.label)
def test_output_is_finite(rule: Rule) -> None:
    grid = BlockGrid(130, 130, 64)
    q, k, v = torch.randn(3, 3, 130, 16, generator=torch.Generator().manual_seed(0)).unbind(0)
    tiles = select(rule, grid)
    assert tile_attention(q, k, v, tiles, grid, scale=0.25, rest=rule.rest).isfinite().all()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"kind": "dens"}, "Did you mean 'dense'"),
        ({"kind": "sink_window"}, "window"),
        ({"kind": "sink_window", "window": 64, "sinks": 1}, "sinks"),
        ({"kind": "sink_window", "window": 64, "sink": -1}, "sink"),
        ({"kind": "sink_window", "window": {"b": 2}}, "less than or equal to 1"),
        ({"kind": "fixed_blocks", "keep": 0.5, "bitmap": "3:nonsense"}, "bitmap"),
        ("dense", "mapping"),
    ],
)
def test_bad_rules_are_named(data: object, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        parse_rule(data, where="file.yaml, candidates[0]")
