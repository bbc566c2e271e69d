"""Rules over frames, against the published formulas evaluated pair by pair."""

import math
from collections.abc import Callable

import pytest
import torch

from sparsesearch.block_mask import BlockGrid, density
from sparsesearch.errors import SpecError
from sparsesearch.layout import Layout, video_layout
from sparsesearch.order import Order, parse_order
from sparsesearch.rules import LengthLaw, Rule, parse_rule, rule_kinds
from sparsesearch.rules.calibrated_tiles import CalibratedTiles
from sparsesearch.rules.diagonal_band import DiagonalBand
from sparsesearch.rules.first_frames import FirstFrames
from sparsesearch.rules.neighbourhood import Neighbourhood, axis_mask
from sparsesearch.rules.radial_decay import RadialDecay
from sparsesearch.rules.stripes import Stripes
from sparsesearch.rules.union import Union

EXAMPLES = [rule for kind in rule_kinds().values() if kind.needs_layout for rule in kind.examples()]
LAYOUTS = [
    video_layout(1, 1, 1),
    video_layout(3, 5, 7),
    video_layout(4, 8, 8, text_first=13),
    video_layout(5, 9, 10, text_last=37),
    Layout.model_validate({"segments": [{"kind": "text", "shape": [5]}, {"kind": "image", "shape": [9, 14]}]}),
]
HUNYUAN, WAN, COG = (
    video_layout(33, 45, 80, text_last=256),
    video_layout(21, 45, 80),
    video_layout(11, 48, 85, text_first=226),
)
Keeps = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def grid_of(layout: Layout, block: int = 128) -> BlockGrid:
    return BlockGrid(layout.num_tokens, layout.num_tokens, block, causal=False, layout=layout)


def by_pairs(grid: BlockGrid, order: Order, keeps: Keeps, rows: list[int] | None = None) -> torch.Tensor:
    """Tiles with a kept pair, from a formula on coordinates; text dense; the own tile always. Only the given query blocks."""
    assert grid.layout is not None
    layout, block = grid.layout, grid.block_tokens
    permutation = order.permutation(layout)
    cells = layout.coordinates()[permutation]
    text = torch.tensor([segment.kind == "text" for segment in layout.segments])[layout.segment_of_token()[permutation]]
    column = torch.arange(grid.kv_len) // block
    out = []
    for row in range(grid.num_q_blocks) if rows is None else rows:
        mine = slice(row * block, (row + 1) * block)
        q, k = cells[mine, None], cells[None]
        both = (q[..., 0] >= 0) & (k[..., 0] >= 0)
        pair = (both & keeps(q, k)) | text[mine, None] | text[None]
        tiles = torch.zeros(grid.num_k_blocks, dtype=torch.bool).index_put((column[pair.any(0)],), torch.tensor(True))
        tiles[row] = True
        out.append(tiles)
    return torch.stack(out)


def check(rule: Rule, layout: Layout, keeps: Keeps, rows: list[int] | None = None, block: int = 128) -> None:
    grid = grid_of(layout, block)
    tiles = rule.select(grid)
    expected = by_pairs(grid, rule.token_order, keeps, rows)
    assert torch.equal(tiles if rows is None else tiles[rows], expected)


# ---- contract


@pytest.mark.parametrize("rule", EXAMPLES, ids=lambda rule: rule.label)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: str([s.shape for s in layout.segments]))
@pytest.mark.parametrize("block", [16, 64])
def test_choice_is_legal(rule: Rule, layout: Layout, block: int) -> None:
    grid = grid_of(layout, block)
    generator = torch.Generator().manual_seed(layout.num_tokens)
    q, k = torch.randn(2, 3, layout.num_tokens, 8, generator=generator)
    tiles = rule.select(grid, q, k)
    assert tiles.dtype == torch.bool
    assert tiles.shape[-2:] == (grid.num_q_blocks, grid.num_k_blocks)
    if rule.rest in ("zero", "mean_value"):
        assert not tiles.any()
        return
    if rule.token_order.by_content:  # the i-th query and the i-th key are different tokens
        assert tiles.any(-1).all()
    else:
        assert tiles.diagonal(dim1=-2, dim2=-1).all()
    permuted = layout.segment_of_token()[rule.token_order.permutation(layout)]
    text = [i for i, segment in enumerate(layout.segments) if segment.kind == "text"]
    for block_index in {int(place) // block for place in torch.isin(permuted, torch.tensor(text)).nonzero()[:, 0]}:
        assert tiles[..., block_index, :].all(), "text rows are dense"
        assert tiles[..., :, block_index].all(), "text columns are dense"
    assert 0 < density(tiles, grid) <= 1


@pytest.mark.parametrize("rule", EXAMPLES, ids=lambda rule: rule.label)
def test_round_trip_and_hash(rule: Rule) -> None:
    again = parse_rule(rule.model_dump(mode="json"), where="test")
    assert again == rule
    assert hash(again) == hash(rule)
    assert again.label == rule.label


def test_labels_are_unique() -> None:
    assert len({rule.label for rule in EXAMPLES}) == len(EXAMPLES)


@pytest.mark.parametrize("rule", EXAMPLES, ids=lambda rule: rule.label)
def test_without_a_layout_it_says_so(rule: Rule) -> None:
    q = torch.zeros(1, 256, 8)
    with pytest.raises(SpecError, match="layout"):
        rule.select(BlockGrid(256, 256, 64, causal=False), q, q)


# ---- formulas


def band(layout: Layout, order: Order, reach: int) -> Keeps:
    frames, height, width = layout.grid_shape
    place = order.grid_path(layout.grid_shape).argsort().view(frames, height, width)

    def keeps(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return (place[tuple(q.unbind(-1))] - place[tuple(k.unbind(-1))]).abs() < reach

    return keeps


@pytest.mark.parametrize("order", ["identity", "axes(hwf)", "tile(2,4,4)", "gilbert"])
@pytest.mark.parametrize("reach", [0, 1, 17, 100, 10_000])
@pytest.mark.parametrize("layout", LAYOUTS[1:], ids=lambda layout: str([s.shape for s in layout.segments]))
def test_band_is_its_formula(order: str, reach: int, layout: Layout) -> None:
    rule = DiagonalBand(reach=LengthLaw(a=reach), order=parse_order(order))
    check(rule, layout, band(layout, rule.order, reach), block=16)


@pytest.mark.parametrize(("layout", "share"), [(HUNYUAN, 0.25), (WAN, 0.3), (COG, 0.25)])
@pytest.mark.parametrize("order", ["identity", "axes(hwf)"])
def test_band_at_published_sizes(layout: Layout, share: float, order: str) -> None:
    """Sparse VideoGen: |i - j| < ⌊F(1 - √(1 - density))·P/128⌋·128, frame-major or token-major."""
    frames, height, width = layout.grid_shape
    reach = math.floor(frames * (1 - math.sqrt(1 - share)) * height * width / 128) * 128
    rule = DiagonalBand(reach=LengthLaw(a=reach), order=parse_order(order))
    check(rule, layout, band(layout, rule.order, reach), rows=[0, 7, grid_of(layout).num_q_blocks // 2])
    tiles = rule.select(grid_of(layout))
    assert density(tiles, grid_of(layout)) == pytest.approx(share, abs=0.02)


def natten(length: int, window: int, stride: int, dilation: int, causal: bool) -> torch.Tensor:
    """NATTEN's reference, token by token."""
    out = torch.zeros(length, length, dtype=torch.bool)
    for q in range(length):
        for k in range(length):
            group = q % dilation
            if group != k % dilation:
                continue
            q1, k1 = q // dilation, k // dilation
            size = length // dilation + (1 if group < length % dilation else 0)
            if causal:
                leader = min((q1 // stride) * stride + stride - 1, size - 1)
                out[q, k] = q1 >= k1 and leader - k1 < window
            else:
                leader = min((q1 // stride) * stride + stride // 2, size - 1)
                left, right = window // 2, window // 2 + (window % 2 - 1)
                centre = min(max(leader, left), size - 1 - right)
                out[q, k] = centre - left <= k1 <= centre + right
    return out


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window,stride,dilation", [(1, 1, 1), (3, 1, 1), (4, 1, 2), (6, 3, 1), (4, 4, 1), (5, 2, 3)])  # noqa: PT006
@pytest.mark.parametrize("length", [15, 16, 31])
def test_axis_mask_is_natten(length: int, window: int, stride: int, dilation: int, causal: bool) -> None:
    assert torch.equal(
        axis_mask(length, window, stride, dilation, causal=causal), natten(length, window, stride, dilation, causal)
    )


def gna(rule: Neighbourhood, layout: Layout) -> Keeps:
    full = [torch.ones(size, size, dtype=torch.bool) for size in layout.grid_shape]
    axes = [
        natten(size, w, s, d, bool(c)) if w else full[a]
        for a, (size, w, s, d, c) in enumerate(
            zip(layout.grid_shape, rule.window, rule.stride, rule.dilation, rule.causal, strict=True)
        )
    ]
    return lambda q, k: axes[0][q[..., 0], k[..., 0]] & axes[1][q[..., 1], k[..., 1]] & axes[2][q[..., 2], k[..., 2]]


@pytest.mark.parametrize("order", ["identity", "axes(hwf)", "tile(2,4,4)", "tile(0,2,2)", "gilbert"])
@pytest.mark.parametrize("layout", LAYOUTS[1:], ids=lambda layout: str([s.shape for s in layout.segments]))
@pytest.mark.parametrize(
    "parameters",
    [
        {"window": (3, 3, 3)},
        {"window": (1, 4, 5), "stride": (1, 2, 3)},
        {"window": (0, 2, 2), "dilation": (1, 2, 3)},
        {"window": (2, 0, 3), "causal": (1, 0, 1)},
    ],
)
def test_neighbourhood_is_its_formula(order: str, layout: Layout, parameters: dict[str, tuple[int, int, int]]) -> None:
    rule = Neighbourhood.model_validate({**parameters, "order": order})
    check(rule, layout, gna(rule, layout), block=16)


def test_gna_at_the_papers_shape() -> None:
    """GNA's HunyuanVideo case: 30 x 48 x 80 tokens, window 18 x 24 x 24, stride 16 x 8 x 8, 91 % sparse."""
    layout = video_layout(30, 48, 80)
    rule = Neighbourhood.model_validate({"window": "18x24x24", "stride": "16x8x8", "order": "tile(2,8,8)"})
    check(rule, layout, gna(rule, layout), rows=[0, 333, 899])
    assert density(rule.select(grid_of(layout)), grid_of(layout)) == pytest.approx(0.09, abs=0.003)


@pytest.mark.parametrize("frames", [1, 3])
@pytest.mark.parametrize("order", ["identity", "axes(hwf)", "tile(2,4,4)"])
def test_first_frames_is_its_formula(frames: int, order: str) -> None:
    rule = FirstFrames(frames=frames, order=parse_order(order))
    check(rule, LAYOUTS[3], lambda q, k: (k[..., 0] < frames).expand(len(q), -1), block=16)


def test_union_is_either() -> None:
    grid = grid_of(WAN)
    left, right = FirstFrames(), DiagonalBand(reach=LengthLaw(b=0.1))
    tiles = Union(left=left, right=right).select(grid)
    assert torch.equal(tiles, left.select(grid) | right.select(grid))
    assert Union(left=left, right=right).token_order == left.order


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"kind": "neighbourhood", "window": "2x2x2", "stride": "3x1x1"}, "stride <= window"),
        ({"kind": "neighbourhood", "window": "2x2x2", "dilation": "0x1x1"}, "at least 1"),
        ({"kind": "neighbourhood", "window": "2x2x2", "causal": "2x0x0"}, "0 or 1"),
        ({"kind": "diagonal_band", "reach": 3, "order": "axes(hhw)"}, "axes"),
        (
            {
                "kind": "union",
                "left": {"kind": "diagonal_band", "reach": 3, "order": "axes(hwf)"},
                "right": {"kind": "first_frames"},
            },
            "one order",
        ),
        ({"kind": "union", "left": {"kind": "zero"}, "right": {"kind": "dense"}}, "static rules over frames"),
    ],
)
def test_bad_rules_are_named(data: object, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        parse_rule(data, where="test")


@pytest.mark.parametrize("order", ["identity", "axes(hwf)", "tile(2,4,4)"])
@pytest.mark.parametrize("layout", LAYOUTS[1:], ids=lambda layout: str([s.shape for s in layout.segments]))
@pytest.mark.parametrize(
    "parameters",
    [
        {"time_width": 1, "space_width": 5},
        {"time_width": 1, "time_period": 2, "space_width": 3, "space_period": 11, "space_offset": 2},
        {"time_width": 2, "time_offset": -1, "space_width": 1},
    ],
)
def test_stripes_are_their_formula(order: str, layout: Layout, parameters: dict[str, int]) -> None:
    rule = Stripes.model_validate({**parameters, "order": order})
    t, h, w = rule.units(layout.grid_shape)
    patches = -(-layout.grid_shape[2] // w)

    def keeps(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        step = q[..., 0] // t - k[..., 0] // t
        space = q[..., 1] // h * patches + q[..., 2] // w - (k[..., 1] // h * patches + k[..., 2] // w)
        time_off, space_off = (step - rule.time_offset).abs(), (space - rule.space_offset).abs()
        if rule.time_period:
            time_off = time_off % rule.time_period
        if rule.space_period:
            space_off = space_off % rule.space_period
        return (time_off <= rule.time_width - 1) & (space_off <= rule.space_width - 1)

    check(rule, layout, keeps, block=16)


def test_stripes_at_the_papers_tiles() -> None:
    """PSA-Search on Wan: tiles of 3 x 8 x 16 tokens, three blocks of 128 each; 45 x 80 cuts into 6 x 5 patches."""
    rule = Stripes.model_validate(
        {"time_width": 1, "time_period": 3, "space_width": 2, "space_period": 5, "order": "tile(3,8,16)"}
    )

    def keeps(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        space = [x[..., 1] // 8 * 5 + x[..., 2] // 16 for x in (q, k)]
        return ((q[..., 0] // 3 - k[..., 0] // 3).abs() % 3 == 0) & ((space[0] - space[1]).abs() % 5 <= 1)

    check(rule, WAN, keeps, rows=[0, 100, 589])


def radial(rule: RadialDecay, layout: Layout) -> Keeps:
    frames, height, width = layout.grid_shape
    size = height * width
    widths = []
    for distance in range(frames):  # the public mask code, pair of frames by pair of frames
        if distance <= 1:
            widths.append(float(size))
            continue
        unit = 2 ** size.bit_length() / 2 ** distance.bit_length()
        split = int(rule.floor / unit) if unit < rule.floor else 1
        widths.append(max(unit * rule.decay, rule.floor) if distance % split == 0 else -1.0)
    table = torch.tensor(widths)

    def keeps(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        apart = ((q[..., 1] - k[..., 1]) * width + q[..., 2] - k[..., 2]).abs()
        near = apart <= table[(q[..., 0] - k[..., 0]).abs().clamp(max=frames - 1)]  # text is -1
        return near | (k[..., 0] == 0) if rule.first_frame else near

    return keeps


@pytest.mark.parametrize("rule", RadialDecay.examples(), ids=lambda rule: rule.label)
@pytest.mark.parametrize("layout", LAYOUTS[1:], ids=lambda layout: str([s.shape for s in layout.segments]))
def test_radial_is_its_formula(rule: RadialDecay, layout: Layout) -> None:
    check(rule, layout, radial(rule, layout), block=16)


@pytest.mark.parametrize(("layout", "decay", "reported"), [(HUNYUAN, 0.95, 0.270), (WAN, 0.2, 0.262)])
def test_radial_at_published_sizes(layout: Layout, decay: float, reported: float) -> None:
    """Its code, which drops thin tiles, computes .270 and .262 of the video tiles; covering every kept pair costs a little more."""
    rule = RadialDecay(decay=decay, first_frame=decay == 0.2)
    check(rule, layout, radial(rule, layout), rows=[0, 100, 400])
    video = video_layout(*layout.grid_shape)
    assert reported < density(rule.select(grid_of(video)), grid_of(video)) < reported + 0.06


def test_calibrated_tiles_keep_the_heaviest() -> None:
    layout = video_layout(2, 4, 8)  # 4 blocks of 16
    mass = torch.tensor([[1.0, 9, 2, 0], [0, 0, 0, 5], [7, 8, 0, 0], [0.1, 0.2, 0.3, 0.0]])
    grid = grid_of(layout, 16)
    drawn = {
        scope: [
            "".join(".#"[int(t)] for t in row)
            for row in CalibratedTiles(keep=0.5, scope=scope).calibrated(mass, grid).select(grid)
        ]
        for scope in ("row", "head", "column")
    }
    assert drawn["row"] == ["##..", ".#.#", ".##.", "..##"]
    assert drawn["head"] == ["##..", ".#.#", "###.", "...#"]  # 8 tiles: the diagonal and the 4 heaviest others
    assert drawn["column"] == ["##..", "##..", "###.", "##.#"]


def test_calibration_does_not_spend_its_share_on_text() -> None:
    layout = video_layout(2, 4, 8, text_last=16)
    grid = grid_of(layout, 16)
    mass = torch.rand(5, 5, generator=torch.Generator().manual_seed(0))
    mass[:, 4] = 10.0
    tiles = CalibratedTiles(keep=0.4).calibrated(mass, grid).select(grid)
    assert tiles[:4, :4].sum(1).tolist() == [2, 2, 2, 2]
    assert tiles[:, 4].all()


@pytest.mark.parametrize("order", ["identity", "axes(hwf)", "tile(2,4,4)", "tile(0,2,2)"])
def test_calibrated_tiles_at_another_length(order: str) -> None:
    """A bitmap made from a geometric mask, carried to twice the frames, is that mask at the new length where blocks nest."""
    short, long = video_layout(4, 8, 8), video_layout(8, 8, 8)
    rule = CalibratedTiles(keep=0.3, order=parse_order(order)).calibrated(
        torch.rand(16, 16, generator=torch.Generator().manual_seed(1)), grid_of(short, 16)
    )
    same, other = rule.select(grid_of(short, 16)), rule.select(grid_of(long, 16))
    assert density(other, grid_of(long, 16)) == pytest.approx(density(same, grid_of(short, 16)), abs=0.06)
    middle = long.coordinates()[rule.order.permutation(long)][7::16]
    scaled = torch.stack([(2 * middle[:, 0] + 1) * 4 // 16, middle[:, 1], middle[:, 2]], 1)
    token = (scaled[:, 0] * 8 + scaled[:, 1]) * 8 + scaled[:, 2]
    block = rule.order.inverse(short)[token] // 16
    assert torch.equal(other, same[block][:, block] | torch.eye(32, dtype=torch.bool))


def test_uncalibrated_tiles_say_so() -> None:
    with pytest.raises(SpecError, match="profile"):
        CalibratedTiles(keep=0.3).select(grid_of(WAN))
