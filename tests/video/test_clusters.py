"""k-means clusters and partitions of the grid: VMoBA's chunks and SVG2's clusters, against their formulas written out."""

import math

import pytest
import torch

from sparsesearch.block_mask import BlockGrid
from sparsesearch.clustering import k_means
from sparsesearch.errors import SpecError
from sparsesearch.kernels.ordered import StepMemory, attend
from sparsesearch.kernels.reference import masked_attention
from sparsesearch.layout import Layout, video_layout
from sparsesearch.order import IDENTITY, KMeans, Order, Tile
from sparsesearch.plan import BaseModelInfo, cyclic_plan
from sparsesearch.rules import Rule, parse_rule
from sparsesearch.rules.cluster_mass import ClusterMass
from sparsesearch.rules.dense import Dense
from sparsesearch.rules.partition_gate import PartitionGate
from sparsesearch.rules.taylor_rest import TaylorRest

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SCALE = 0.25


def grid_of(layout: Layout, block: int = 16) -> BlockGrid:
    return BlockGrid(layout.num_tokens, layout.num_tokens, block, causal=False, layout=layout)


def tensors(layout: Layout, heads: int, kv_heads: int, batch: int = 2) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(layout.num_tokens)
    return [
        torch.randn(batch, count, layout.num_tokens, 16, generator=generator).to(DEVICE) * 2
        for count in (heads, kv_heads, kv_heads)
    ]


# ---- k-means


@pytest.mark.parametrize(("rows", "count"), [(1, 1), (1, 5), (63, 7), (200, 16)])
def test_k_means_is_lloyds_algorithm(rows: int, count: int) -> None:
    x = torch.randn(2, 3, rows, 5, generator=torch.Generator().manual_seed(rows))
    found = k_means(x, count, iterations=4)
    count = min(count, rows)
    for a in range(2):
        for b in range(3):
            one = x[a, b].double()
            centres = one[[(2 * c + 1) * rows // (2 * count) for c in range(count)]].clone()
            for _ in range(5):
                labels = torch.cdist(one, centres).argmin(1)
                for c in range(count):
                    if (labels == c).any():
                        centres[c] = one[labels == c].mean(0)
            assert torch.equal(found.labels[a, b], labels)
            assert torch.allclose(found.centres[a, b].double(), centres, atol=1e-5)
            assert found.sizes[a, b].tolist() == [int((labels == c).sum()) for c in range(count)]


def test_k_means_finds_what_is_apart() -> None:
    """Groups far from one another, mixed; each group starts with a centre of its own."""
    group = torch.arange(120) % 4
    x = torch.eye(4)[group][None] * 20 + torch.randn(1, 120, 4, generator=torch.Generator().manual_seed(0))
    start = (torch.eye(4) * 15)[None]
    found = k_means(x, 4, iterations=3, start=start)
    assert torch.equal(found.labels[0], group)
    assert torch.equal(found.labels[0][found.order[0]], group.sort(stable=True).values)


# ---- cluster_mass


def kept_pairs(rule: ClusterMass, q: torch.Tensor, k: torch.Tensor, grid: BlockGrid) -> tuple[torch.Tensor, ...]:
    """Labels of queries and keys, and which pairs of clusters are kept: sorted by hand."""
    queries, keys = rule.clusters(grid, q, k)
    weight = (queries.centres.double() @ keys.centres.double().T + keys.sizes.log()).softmax(-1)
    kept = torch.zeros(weight.shape, dtype=torch.bool)
    for c in range(len(weight)):
        order, total = weight[c].argsort(descending=True, stable=True).tolist(), 0.0
        for place, d in enumerate(order):
            if place >= math.ceil(rule.keep * len(order)) and total >= rule.mass:
                break
            kept[c, d] = True
            total += float(weight[c, d])
    return queries.labels, keys.labels, kept


@pytest.mark.parametrize(
    "layout",
    [
        video_layout(1, 1, 1),
        video_layout(3, 3, 7),
        video_layout(4, 6, 7, text_first=13),
        video_layout(3, 6, 7, text_last=5),
    ],
)
@pytest.mark.parametrize("kv_heads", [2, 1])
def test_clusters_through_the_runtime(layout: Layout, kv_heads: int) -> None:
    """A query sees a key iff some pair of clusters that both their tiles hold is kept, or one of the tiles holds text."""
    grid = grid_of(layout)
    rules = (ClusterMass(keep=0.1, mass=0.6, query_clusters=5, key_clusters=9), Dense())
    q, k, v = tensors(layout, 2, kv_heads)
    result = attend(q, k, v, grid, rules, scale=SCALE)
    start, tokens = layout.grid_start, layout.segments[layout.grid_index].tokens
    front = rules[0].token_order.permutation(layout)
    assert front[:tokens].tolist() == list(range(start, start + tokens))
    for batch in range(2):
        one_q, one_k, one_v = (x[batch, 0].cpu()[front] for x in (q, k, v))
        q_labels, k_labels, kept = kept_pairs(rules[0], one_q * SCALE, one_k, grid)
        q_sorted = torch.cat([q_labels.argsort(stable=True), torch.arange(tokens, layout.num_tokens)])
        k_sorted = torch.cat([k_labels.argsort(stable=True), torch.arange(tokens, layout.num_tokens)])
        seen = torch.zeros(layout.num_tokens, layout.num_tokens, dtype=torch.bool)
        for p in range(grid.num_q_blocks):
            rows = q_sorted[16 * p : 16 * p + 16]
            for j in range(grid.num_k_blocks):
                columns = k_sorted[16 * j : 16 * j + 16]
                text = bool((rows >= tokens).any() or (columns >= tokens).any())
                mine, theirs = q_labels[rows[rows < tokens]].unique(), k_labels[columns[columns < tokens]].unique()
                if text or bool(kept[mine][:, theirs].any()):
                    seen[rows[:, None], columns] = True
        expected = masked_attention(one_q, one_k, one_v, seen, scale=SCALE)[0]
        assert torch.allclose(result[batch, 0].cpu()[front], expected, atol=2e-5)
    dense = torch.nn.functional.scaled_dot_product_attention(
        q[:, 1:], k[:, kv_heads - 1 :], v[:, kv_heads - 1 :], scale=SCALE
    )
    assert torch.allclose(result[:, 1:], dense, atol=2e-5)


def test_clusters_of_structured_keys_need_fewer_tiles() -> None:
    """Tokens of 8 kinds, mixed over the video, each attending to its own: by cluster a part of the tiles holds nearly all the mass."""
    layout = video_layout(4, 8, 16)
    grid, generator = grid_of(layout, 16), torch.Generator().manual_seed(0)
    kind = torch.eye(16)[torch.randint(8, (512,), generator=generator)]
    k = (kind * 6 + 0.3 * torch.randn(1, 1, 512, 16, generator=generator)).to(DEVICE)
    q, v = k.flip(-2), torch.randn(1, 1, 512, 16, generator=generator).to(DEVICE)
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=SCALE)
    memory = StepMemory(chosen={})
    rule = ClusterMass(keep=0.01, mass=0.9, query_clusters=16, key_clusters=16)
    found = attend(q, k, v, grid, (rule,), scale=SCALE, memory=memory)
    assert memory.chosen is not None
    (chosen,) = memory.chosen.values()
    assert float(chosen.all_levels().float().mean()) < 0.4
    spread = attend(q, k, v, grid, (parse_rule({"kind": "pooled_mass", "keep": 0.4}, where="test"),), scale=SCALE)
    assert float((found - dense).square().mean()) < 0.02 * float((spread - dense).square().mean())


def test_later_steps_start_from_the_centres_before() -> None:
    layout = video_layout(4, 8, 8)
    grid, rule = grid_of(layout), ClusterMass(keep=0.3, query_clusters=6, key_clusters=6, iterations=3)
    q, k, v = tensors(layout, 1, 1, batch=1)
    memory = StepMemory()
    attend(q, k, v, grid, (rule,), scale=SCALE, memory=memory)
    (first,) = memory.clusters.values()
    attend(q, k, v, grid, (rule,), scale=SCALE, memory=memory)
    (second,) = memory.clusters.values()
    expected = k_means(q[:, 0] * SCALE, 6, iterations=2, start=first[0].centres)
    assert torch.equal(second[0].labels, expected.labels)


def test_kept_choices_keep_their_places() -> None:
    layout = video_layout(4, 8, 8)
    grid, rule = grid_of(layout), ClusterMass(keep=0.3, query_clusters=6, key_clusters=6)
    q, k, v = tensors(layout, 1, 1, batch=1)
    memory = StepMemory(chosen={})
    first = attend(q, k, v, grid, (rule,), scale=SCALE, memory=memory)
    assert torch.equal(attend(q, k, v, grid, (rule,), scale=SCALE, memory=memory), first)
    assert memory.chosen is not None
    (chosen,) = memory.chosen.values()
    assert chosen.q_places is not None
    assert torch.equal(chosen.q_places[0, 0].sort().values, torch.arange(256, device=DEVICE))


def test_a_rest_over_clustered_blocks() -> None:
    """Keys equal within every block of the sorted sequence: pooled tails are exact, in an order that only the run knows."""
    layout = video_layout(4, 8, 8)
    grid, generator = grid_of(layout), torch.Generator().manual_seed(0)
    kinds = torch.randn(16, 16, generator=generator) * 2
    k = kinds[torch.randperm(256, generator=generator) % 16][None, None].to(DEVICE)
    q, v = torch.randn(2, 1, 1, 256, 16, generator=generator).to(DEVICE)
    rule = TaylorRest(of=ClusterMass(keep=0.2, by="block", query_clusters=4, key_clusters=64, iterations=30), terms=0)
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=SCALE)
    found = attend(q, k, v, grid, (rule,), scale=SCALE)
    assert torch.allclose(found, dense, atol=1e-5)
    with pytest.raises(SpecError, match="by: block"):
        parse_rule({"kind": "taylor_rest", "of": {"kind": "cluster_mass", "keep": 0.1}}, where="test")


def test_kmeans_is_an_order_by_content() -> None:
    order = KMeans(3, 4)
    assert order.by_content
    assert not IDENTITY.by_content
    assert str(order) == "kmeans(3,4)"
    layout = video_layout(2, 2, 2, text_first=3)
    assert order.permutation(layout).tolist() == [3, 4, 5, 6, 7, 8, 9, 10, 0, 1, 2]
    with pytest.raises(SpecError, match="at least 1 cluster"):
        KMeans(0, 4)
    with pytest.raises(SpecError, match="order"):
        parse_rule({"kind": "diagonal_band", "reach": 64, "order": "kmeans(3,4)"}, where="test")


# ---- partition_gate


@pytest.mark.parametrize("order", [IDENTITY, Tile(0, 4, 4), Tile(2, 4, 8)])
@pytest.mark.parametrize("scope", ["head", "row"])
@pytest.mark.parametrize(
    "layout", [video_layout(4, 8, 8), video_layout(4, 8, 8, text_last=24), video_layout(3, 5, 7, text_first=9)]
)
def test_gate_keeps_the_most_similar_pairs(order: Order, scope: str, layout: Layout) -> None:
    """Pairs sorted by hand, best first, until their similarity reaches the share; the own chunk first."""
    grid, rule = (
        grid_of(layout),
        PartitionGate.model_validate({"share": 0.4, "chunk": 64, "scope": scope, "order": str(order)}),
    )
    there = order.permutation(layout)
    q, k = (x[0, 0].cpu()[there] for x in tensors(layout, 1, 1)[:2])
    tiles = rule.select(grid, q[None], k[None])[0]
    kinds = [segment.kind for segment in layout.segments]
    text = torch.tensor([kinds[int(s)] == "text" for s in layout.segment_of_token()[there]])
    clear = [j for j in range(grid.num_k_blocks) if not text[16 * j : 16 * j + 16].any()]
    chunks = [[j for j in clear if j // 4 == c] for c in range(-(-grid.num_k_blocks // 4))]
    gate = torch.full((grid.num_q_blocks, len(chunks)), -torch.inf)
    for p in clear:
        for c, members in enumerate(chunks):
            if members:
                tokens = torch.cat([torch.arange(16 * j, min(16 * j + 16, layout.num_tokens)) for j in members])
                gate[p, c] = q[16 * p : 16 * p + 16].mean(0) @ k[tokens].mean(0)
    real = gate > -torch.inf
    scaled = torch.where(real, (gate - gate[real].min()) / (gate[real].max() - gate[real].min()), torch.zeros(()))
    expected = torch.zeros_like(tiles)
    lines = [[(p, c) for p in clear for c in range(len(chunks)) if real[p, c]]]
    if scope == "row":
        lines = [[(p, c) for c in range(len(chunks)) if real[p, c]] for p in clear]
    for line in lines:
        held, target = 0.0, 0.4 * sum(float(scaled[pair]) for pair in line)
        for p, c in sorted(line, key=lambda pair: (pair[1] != pair[0] // 4, -float(scaled[pair]))):
            if c != p // 4 and held >= target:
                break
            held += float(scaled[p, c])
            expected[p, 4 * c : 4 * c + 4] = True
    for j in range(grid.num_k_blocks):
        if j not in clear:
            expected[j] = True
            expected[:, j] = True
        expected[j, j] = True
    assert torch.equal(tiles, expected)


def test_partitions_take_turns_over_layers() -> None:
    info = BaseModelInfo(
        name_or_path="tiny", model_type="wan", modules=("a", "b", "c", "d"), num_heads=(2,) * 4, num_kv_heads=(2,) * 4, head_dim=(8,) * 4
    )  # fmt: skip
    rules: list[Rule] = [PartitionGate(share=0.25, order=order) for order in (IDENTITY, Tile(0, 4, 4), Tile(4, 4, 4))]
    plan = cyclic_plan(info, rules, block_tokens=64, lengths_tokens=(256,))
    assert [plan.rule(module, 1) for module in info.modules] == [*rules, rules[0]]
