"""Each rule against its paper's formula, written out naively: loops over positions, no blocks reshaped, no thresholds bisected."""

import math

import pytest
import torch
from torch import Tensor

from sparsesearch.block_mask import BlockGrid, density
from sparsesearch.errors import SpecError
from sparsesearch.rules import LengthLaw
from sparsesearch.rules.antidiagonal import Antidiagonal
from sparsesearch.rules.bounds_topk import BoundsTopk
from sparsesearch.rules.chunk_topk import ChunkTopk, chunk_starts
from sparsesearch.rules.flex_prefill import FlexPrefill, jensen_shannon_distance
from sparsesearch.rules.power_lags import PowerLags
from sparsesearch.rules.segment_topk import SegmentTopk
from sparsesearch.rules.skip_softmax import SkipSoftmax
from sparsesearch.rules.strided_shards import StridedShards, paper_offset
from sparsesearch.rules.token_rows import TokenRows
from sparsesearch.rules.tree_topk import TreeTopk
from sparsesearch.rules.tri_shape import TriShape

GRIDS = [BlockGrid(256, 256, 32), BlockGrid(300, 300, 32), BlockGrid(90, 333, 32), BlockGrid(1, 200, 32)]


def tensors(grid: BlockGrid, seed: int = 0, sharp: float = 1.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(grid.q_len, 16, generator=generator) * sharp
    return q, torch.randn(grid.kv_len, 16, generator=generator)


def block(grid: BlockGrid, index: int) -> range:
    """Key positions of a block."""
    return range(index * grid.block_tokens, min((index + 1) * grid.block_tokens, grid.kv_len))


def query_rows(grid: BlockGrid, index: int) -> list[int]:
    """Rows of q that lie in an absolute query block."""
    return [position - grid.q_start for position in block(grid, index) if position >= grid.q_start]


def best(scores: dict[int, float], count: int) -> set[int]:
    """Keys of the `count` largest values; earlier keys win ties."""
    return set(sorted(scores, key=lambda key: (-scores[key], key))[:count])


def most(weights: dict[int, float], share: float, always: set[int]) -> set[int]:
    """`always` and the best others until `share` of the total is reached."""
    chosen, target = set(always), share * sum(weights.values())
    for key in sorted(weights, key=lambda key: (-weights[key], key)):
        if sum(weights[c] for c in chosen) >= target * (1 - 1e-6):
            break
        chosen.add(key)
    return chosen


def row_blocks(law: LengthLaw, grid: BlockGrid, row: int) -> int:
    return max(1, math.ceil(law.tokens(min(grid.kv_len, (row + 1) * grid.block_tokens)) / grid.block_tokens))


def as_sets(tiles: Tensor, grid: BlockGrid) -> dict[int, set[int]]:
    return {grid.first_q_block + i: set(row.nonzero()[:, 0].tolist()) for i, row in enumerate(tiles)}


def attention(q: Tensor, k: Tensor, grid: BlockGrid) -> Tensor:
    scores = q.double() @ k.double().T
    future = torch.arange(grid.kv_len) > torch.arange(grid.q_start, grid.kv_len)[:, None]
    return scores.masked_fill(future, -torch.inf).softmax(-1)


# --- static geometry -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_heads", [4, 32])
def test_shards_are_those_of_dkernel(num_heads: int) -> None:
    """keep = q >= k & ((q - k) < local | (k + h·step) % stride == 0), in blocks."""
    grid, local, stride = BlockGrid(64 * 40, 64 * 40, 64), 4, 16
    step = max(1, stride // num_heads)
    for head in range(num_heads):
        rule = StridedShards(local=LengthLaw(a=64 * local), stride=stride, offset=paper_offset(head, num_heads, stride))
        expected = [
            [q >= k and (q - k < local or (k + head * step) % stride == 0) for k in range(40)] for q in range(40)
        ]
        assert rule.select(grid).tolist() == expected


@pytest.mark.parametrize(("length", "share"), [(8192, 0.282), (32768, 0.120), (131072, 0.077)])
def test_density_of_shards_with_16_local_blocks(length: int, share: float) -> None:
    """The mean over a period of heads."""
    grid = BlockGrid(length, length, 64)
    rules = [StridedShards(local=LengthLaw(a=1024), stride=16, offset=offset) for offset in range(16)]
    shares = [density(rule.select(grid), grid) for rule in rules]
    assert sum(shares) / 16 == pytest.approx(share, abs=2e-3)


def test_forgotten_keys_of_a_shard_are_never_needed_again() -> None:
    """Below the diagonal, row r + 1 holds no block that row r lacks: the cache may drop it."""
    tiles = StridedShards(local=LengthLaw(a=192), stride=5, offset=2).select(BlockGrid(2048, 2048, 64))
    for row in range(1, 31):
        assert not (tiles[row + 1, :row] & ~tiles[row, :row]).any()


@pytest.mark.parametrize("last", [1, 64, 100])
def test_tri_shape_is_a_window_whose_last_queries_see_everything(last: int) -> None:
    """Row by row; and so does whatever is generated after the prompt, whose length stays the law's."""
    rule, length = TriShape(window=LengthLaw(a=128), last=last), 64 * 10 + 5
    tiles = rule.select(BlockGrid(length, length, 64))
    for q in range(11):
        asks = 64 * (q + 1) > length - last
        assert tiles[q].tolist() == [k <= q and (q - k < 2 or k < 1 or asks) for k in range(11)]
    assert rule.select(BlockGrid(1, length + 200, 64, law_len=length)).all()


def test_power_lags_of_the_paper() -> None:
    grid = BlockGrid(256 * 30, 256 * 30, 256)
    tiles = PowerLags().select(grid)
    for q in range(30):
        expected = [k <= q and (q - k < 5 or k < 1 or (q - k) in (8, 16)) for k in range(30)]
        assert tiles[q].tolist() == expected


@pytest.mark.parametrize(("length", "share"), [(8192, 0.407), (32768, 0.138), (131072, 0.043)])
@pytest.mark.parametrize("block_tokens", [64, 256])
def test_density_of_power_lags(length: int, share: float, block_tokens: int) -> None:
    """Of the causal area; tiles smaller than a segment leave a little more of the diagonal's future out."""
    grid = BlockGrid(length, length, block_tokens)
    assert density(PowerLags().select(grid), grid) == pytest.approx(share, abs=6e-4 if block_tokens == 256 else 0.015)


def test_power_lags_reach_every_key_in_log_many_layers() -> None:
    tiles = PowerLags(segment=64, window=1, sink=0).select(BlockGrid(64 * 64, 64 * 64, 64)).float()
    reach = torch.linalg.matrix_power(tiles, 6)
    assert (reach.tril() > 0).sum() == 64 * 65 // 2


# --- dynamic estimators ----------------------------------------------------------------------------------------------------------------


def antidiagonal_sets(rule: Antidiagonal, grid: BlockGrid, q: Tensor, k: Tensor) -> dict[int, set[int]]:
    stride, found = rule.stride, {}
    zero = torch.zeros(q.shape[-1])

    def query(position: int) -> Tensor:
        return q[position - grid.q_start] if grid.q_start <= position < grid.kv_len else zero

    def key(position: int) -> Tensor:
        return k[position] if position < grid.kv_len else zero

    for p in range(grid.first_q_block, grid.num_k_blocks):
        weights = dict.fromkeys(range(p + 1), 0.0)
        for a in sorted({position // stride for position in block(grid, p) if position >= grid.q_start}):
            visible = range((p + 1) * grid.block_tokens // stride)
            scores = torch.tensor(
                [
                    float(sum(query(a * stride + stride - 1 - i) @ key(b * stride + i) for i in range(stride))) / stride
                    if b <= a
                    else -math.inf
                    for b in visible
                ]
            )
            for b, mass in enumerate(scores.softmax(0).tolist()):
                weights[b * stride // grid.block_tokens] += mass
        found[p] = most(weights, rule.mass, {0, p})
    return found


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize(
    "rule", [Antidiagonal(mass=0.6, stride=8), Antidiagonal(mass=0.9)], ids=lambda rule: rule.label
)
def test_antidiagonal_sums(rule: Antidiagonal, grid: BlockGrid) -> None:
    q, k = tensors(grid, sharp=2.0)
    assert as_sets(rule.select(grid, q, k), grid) == antidiagonal_sets(rule, grid, q, k)


def test_antidiagonal_strips_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    grid, rule = BlockGrid(1000, 1000, 64), Antidiagonal(mass=0.7)
    q, k = tensors(grid, sharp=2.0)
    whole = rule.select(grid, q, k)
    monkeypatch.setattr("sparsesearch.estimators._STRIP_ELEMENTS", 1)
    assert torch.equal(rule.select(grid, q, k), whole)


def test_antidiagonal_stride_must_divide_the_tile() -> None:
    grid = BlockGrid(64, 64, 64)
    with pytest.raises(SpecError, match="stride must divide the tile of 64 tokens, but is 24"):
        Antidiagonal(mass=0.9, stride=24).select(grid, *tensors(grid))


def flex_sets(rule: FlexPrefill, grid: BlockGrid, q: Tensor, k: Tensor) -> tuple[bool, dict[int, set[int]]]:
    floor, last = math.ceil(rule.min_budget / grid.block_tokens), min(rule.probe, grid.q_len)
    mass = attention(q, k, grid)[-last:]
    columns = {j: float(mass[:, list(block(grid, j))].sum()) for j in range(grid.num_k_blocks)}
    diagonals = dict.fromkeys(range(grid.num_k_blocks), 0.0)
    for row, position in enumerate(range(grid.kv_len - last, grid.kv_len)):
        for j in range(position // grid.block_tokens + 1):
            diagonals[position // grid.block_tokens - j] += float(mass[row, list(block(grid, j))].sum())
    pooled = torch.stack([k[list(block(grid, j))].mean(0) for j in range(grid.num_k_blocks)])
    estimate = (q[-last:].mean(0) @ pooled.T).softmax(0)
    true = torch.tensor(list(columns.values())) / sum(columns.values())
    trusted = float(jensen_shannon_distance(estimate, true)) < rule.tau
    column = most(columns, rule.gamma, best(columns, floor) | {0})
    diagonal = most(diagonals, rule.gamma, best(diagonals, floor) | {0})
    found, weights, always = {}, {}, set()
    for p in range(grid.first_q_block, grid.num_k_blocks):
        found[p] = {j for j in range(p + 1) if j in column or p - j in diagonal}
        row = (q[query_rows(grid, p)].mean(0) @ pooled[: p + 1].T).softmax(0).tolist()
        weights |= {p * 1000 + j: weight for j, weight in enumerate(row)}
        always |= {p * 1000 + j for j in best(dict(enumerate(row)), floor) | {0, p}}
    if trusted:
        chosen = most(weights, rule.gamma, always)
        found = {p: {j for j in range(p + 1) if p * 1000 + j in chosen} for p in found}
    return trusted, found


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize(
    "rule", [*FlexPrefill.examples(), FlexPrefill(gamma=0.5, tau=0.25, min_budget=32)], ids=lambda r: r.label
)
def test_flex_prefill_algorithms(rule: FlexPrefill, grid: BlockGrid) -> None:
    q, k = tensors(grid, seed=1, sharp=0.7)
    assert as_sets(rule.select(grid, q, k), grid) == flex_sets(rule, grid, q, k)[1]


def test_flex_prefill_decides_per_head_at_run_time() -> None:
    """A head whose keys are alike within blocks is described by pooled scores; one with a lone hot key is not."""
    grid = BlockGrid(512, 512, 64)
    generator = torch.Generator().manual_seed(0)
    smooth = torch.randn(8, 1, 16, generator=generator).expand(8, 64, 16).reshape(512, 16)
    spiky = torch.zeros(512, 16)
    spiky[100, 0] = 60.0
    query = torch.ones(512, 16) * 0.5
    rule = FlexPrefill(gamma=0.6, min_budget=0, probe=64)
    choices = [flex_sets(rule, grid, query, keys)[0] for keys in (smooth, spiky)]
    assert choices == [True, False]
    tiles = rule.select(grid, query.expand(2, 512, 16), torch.stack([smooth, spiky]))
    assert [as_sets(t, grid) for t in tiles] == [flex_sets(rule, grid, query, keys)[1] for keys in (smooth, spiky)]
    assert tiles[1, 2:, 1].all(), "the column of the hot key"


def test_jensen_shannon_distance() -> None:
    p, q = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    assert float(jensen_shannon_distance(p, q)) == pytest.approx(math.sqrt(math.log(2)))
    assert float(jensen_shannon_distance(p, p)) == 0.0


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_bounds_are_bounds_and_rank_the_blocks(grid: BlockGrid) -> None:
    rule = BoundsTopk(keep=LengthLaw(a=96), sink=32, prefill=True)
    q, k = tensors(grid, seed=2)
    expected = {}
    for p in range(grid.first_q_block, grid.num_k_blocks):
        query = q[query_rows(grid, p)].mean(0)
        bounds = {}
        for j in range(p + 1):
            keys = k[list(block(grid, j))]
            bounds[j] = float(torch.maximum(query * keys.amin(0), query * keys.amax(0)).sum())
            assert bounds[j] >= float((keys @ query).max()) - 1e-5
        bounds |= {0: math.inf, p: math.inf}
        expected[p] = best(bounds, 3) | {0, p}
    assert as_sets(rule.select(grid, q, k), grid) == expected


def test_quest_leaves_the_prompt_dense_and_decodes_by_bounds() -> None:
    rule = BoundsTopk(keep=LengthLaw(a=64), sink=0)
    prompt, step = BlockGrid(200, 200, 32), BlockGrid(1, 201, 32, law_len=200)
    assert torch.equal(rule.select(prompt, *tensors(prompt)), prompt.reachable())
    k = torch.zeros(201, 16)
    k[70, 0] = 5.0
    tiles = rule.select(step, torch.eye(16)[:1], k)
    assert tiles.nonzero()[:, 1].tolist() == [2, 6]


def tree_sets(rule: TreeTopk, grid: BlockGrid, q: Tensor, k: Tensor) -> dict[int, set[int]]:
    """The descent, one row at a time, range by range."""
    side, found = grid.block_tokens, {}
    top = side
    while top < rule.root:
        top *= 2
    for p in range(grid.first_q_block, grid.num_k_blocks):
        rows = query_rows(grid, p)
        voters = q[[rows[(2 * r + 1) * len(rows) // (2 * rule.queries)] for r in range(rule.queries)]]
        budget = row_blocks(rule.keep, grid, p)
        window = math.ceil(rule.window / side)
        always = {j for j in range(p + 1) if p - j < window or j < math.ceil(rule.sink / side)}
        ranges, size = list(range(0, (p + 1) * side, top)), top
        while True:
            scores, kept = {}, set()
            for start in ranges:
                if any(start <= j * side < start + size for j in always):
                    kept.add(start)
                else:
                    middle = min(start + size // 2, grid.kv_len - 1)
                    scores[start] = float((voters @ k[middle]).max())
            kept |= best(scores, math.ceil(budget * side / size))
            if size == side:
                break
            size //= 2
            ranges = [s for start in sorted(kept) for s in (start, start + size) if s < (p + 1) * side]
        found[p] = {start // side for start in kept}
    return found


@pytest.mark.parametrize("grid", [*GRIDS, BlockGrid(1500, 1500, 32)], ids=str)
@pytest.mark.parametrize(
    "rule",
    [
        TreeTopk(keep=LengthLaw(a=64), root=256, sink=32, window=64),
        TreeTopk(keep=LengthLaw(b=0.3), root=128, sink=0, window=1, queries=1),
        TreeTopk(keep=LengthLaw(a=96), root=32, sink=64, window=1, queries=3),
    ],
    ids=lambda rule: rule.label,
)
def test_tree_is_the_descent(rule: TreeTopk, grid: BlockGrid) -> None:
    q, k = tensors(grid, seed=3)
    assert as_sets(rule.select(grid, q, k), grid) == tree_sets(rule, grid, q, k)


def chunk_sets(rule: ChunkTopk, grid: BlockGrid, q: Tensor, k: Tensor, starts: list[int]) -> dict[int, set[int]]:
    chunks = [range(a, b) for a, b in zip(starts, [*starts[1:], grid.kv_len], strict=True)]
    found = {}
    for p in range(grid.first_q_block, grid.num_k_blocks):
        query = q[query_rows(grid, p)]
        query = query.mean(0) * math.sqrt(len(query))
        similarity = [float(query @ k[list(c)].mean(0)) * math.sqrt(len(c)) for c in chunks]
        scores = {
            j: max(s for s, c in zip(similarity, chunks, strict=True) if set(c) & set(block(grid, j)))
            for j in range(p + 1)
        }
        always = {p} | {j for j in range(p + 1) if j < math.ceil(rule.sink / grid.block_tokens)}
        scores |= dict.fromkeys(always, math.inf)
        found[p] = best(scores, row_blocks(rule.keep, grid, p)) | always
    return found


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("chunk", [16, 32, 48, 128])
def test_fixed_chunks(grid: BlockGrid, chunk: int) -> None:
    rule = ChunkTopk(keep=LengthLaw(b=0.4), chunk=chunk, sink=32)
    q, k = tensors(grid, seed=4)
    assert as_sets(rule.select(grid, q, k), grid) == chunk_sets(rule, grid, q, k, list(range(0, grid.kv_len, chunk)))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_variable_chunks_begin_at_the_sharpest_changes(grid: BlockGrid) -> None:
    rule = ChunkTopk(keep=LengthLaw(b=0.4), chunk=48, variable=True, sink=0)
    q, k = tensors(grid, seed=5)
    cells = [k[i : i + 16].mean(0) for i in range(0, grid.kv_len, 16)]
    novelty = [1 - float(torch.cosine_similarity(a, b, dim=0)) for a, b in zip(cells[1:], cells[:-1], strict=True)]
    padded = [0.0, *novelty, 0.0]
    peaks = {i + 1: v for i, v in enumerate(novelty) if v > padded[i] and v >= padded[i + 2]}
    starts = sorted({0} | {16 * cell for cell in best(peaks, math.ceil(grid.kv_len / 48) - 1)})
    assert as_sets(rule.select(grid, q, k), grid) == chunk_sets(rule, grid, q, k, starts)


def test_variable_chunks_find_planted_borders() -> None:
    means = torch.zeros(12, 4)
    means[:5, 0], means[5:8, 1], means[8:, 2] = 1.0, 1.0, 1.0
    assert chunk_starts(means, 4).nonzero()[:, 0].tolist() == [0, 5, 8]
    assert chunk_starts(means, 2).sum() == 2


def test_chunks_lie_on_cells() -> None:
    grid = BlockGrid(64, 64, 64)
    with pytest.raises(SpecError, match="cell must divide the tile of 64 tokens and the chunk of 40, but is 16"):
        ChunkTopk(keep=LengthLaw(a=64), chunk=40).select(grid, *tensors(grid))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize(
    "rule", [TokenRows(tail=0.3, min_tokens=64, probe=32), TokenRows(tail=0.05, min_tokens=1, window=1)]
)
def test_token_rows(rule: TokenRows, grid: BlockGrid) -> None:
    q, k = tensors(grid, seed=6, sharp=2.0)
    mass = attention(q, k, grid)[-min(rule.probe, grid.q_len) :].sum(0)
    blocks = range(grid.num_k_blocks)
    share = {j: float(mass[list(block(grid, j))].sum() / mass.sum()) for j in blocks}
    always = {0} | {j for j in blocks if block(grid, j).stop > grid.kv_len - rule.window}
    candidates = sorted((j for j in blocks if j not in always), key=lambda j: share[j] / len(block(grid, j)))
    keep = grid.num_k_blocks
    held = 0.0
    for j in candidates:
        held += share[j]
        keep -= held < rule.tail
    keep = max(keep, math.ceil(rule.min_tokens / grid.block_tokens))
    stays = best({j: math.inf if j in always else share[j] / len(block(grid, j)) for j in blocks}, keep) | always
    expected = {
        p: {j for j in stays if j <= p} if p in stays else set() for p in range(grid.first_q_block, grid.num_k_blocks)
    }
    assert as_sets(rule.select(grid, q, k), grid) == expected


def test_token_rows_drop_whole_blocks_of_queries() -> None:
    grid = BlockGrid(512, 512, 64)
    q, k = torch.zeros(512, 16), torch.zeros(512, 16)
    q[-64:, 0], k[130:180, 0], k[:, 1] = 8.0, 4.0, 1.0
    tiles = TokenRows(tail=0.2, min_tokens=64).select(grid, q, k)
    assert tiles.any(-1).nonzero()[:, 0].tolist() == [0, 2, 7]


@pytest.mark.parametrize("decay", [0.0, 0.5, 1.0, 2.0])
def test_segment_budget_falls_and_its_total_is_kept(decay: float) -> None:
    grid = BlockGrid(64 * 64, 64 * 64, 64)
    rule = SegmentTopk(keep=0.3, decay=decay)
    share = rule.row_blocks(grid, "cpu")[:, 0] / torch.arange(1, 65)
    total = float((share * torch.arange(1, 65)).sum() / (64 * 65 / 2))
    assert total <= 0.3 + 1e-9 + 64 / (64 * 65 / 2) * (decay > 0), "one tile a row is the least"
    if decay == 0:
        assert total == pytest.approx(0.3, abs=64 / (64 * 65 / 2))
    by_segment = share.view(8, 8).amax(-1)
    assert (by_segment[:-1] >= by_segment[1:] - 1 / 40).all(), "but for rounding to whole tiles"


def test_segment_topk_looks_only_into_the_best_segments() -> None:
    grid = BlockGrid(1024, 1024, 64)
    q, k = torch.zeros(1024, 16), torch.zeros(1024, 16)
    q[:, 0] = 1.0
    k[320:384, 0] = 1.0  # block 5, in segment 1 of four blocks
    k[512:576, 0] = 3.0  # block 8, in segment 2
    last = {
        count: as_sets(SegmentTopk(keep=0.25, decay=0, segment=256, segments=count).select(grid, q, k), grid)[15]
        for count in (0, 1)
    }
    assert last == {0: {0, 1, 8, 15}, 1: {0, 5, 8, 15}}


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_skip_softmax_is_the_kernels_test(grid: BlockGrid) -> None:
    """The online softmax, row by row: a block is skipped where no row's maximum comes near its running maximum."""
    rule = SkipSoftmax(prefill_scale=20.0, decode_scale=40.0)
    threshold = math.log((40.0 if grid.q_len == 1 else 20.0) / grid.kv_len)
    q, k = tensors(grid, seed=7)
    expected = {}
    for p in range(grid.first_q_block, grid.num_k_blocks):
        running, expected[p] = dict.fromkeys(query_rows(grid, p), -math.inf), {p}
        for j in range(p + 1):
            for row in running:
                seen = [float(q[row] @ k[i]) for i in block(grid, j) if i <= row + grid.q_start]
                running[row] = max([running[row], *seen])
                if seen and max(seen) >= running[row] + threshold:
                    expected[p].add(j)
    assert as_sets(rule.select(grid, q, k), grid) == expected
