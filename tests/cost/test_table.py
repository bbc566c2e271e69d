from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sparsesearch.cost import load_cost_model
from sparsesearch.cost.base import DecodeWork, UnitWork
from sparsesearch.cost.calibrate import calibrate
from sparsesearch.cost.cpu_cases import CPU_TIME, WALL, Grid, all_cases, clock, estimators
from sparsesearch.cost.cpu_fit import fitted
from sparsesearch.cost.table import CostTable, Curve, DecodeCost, LayerTable, PointwiseCost, TableCostModel, TileCost
from sparsesearch.errors import ArtifactError, SpecError


def table() -> CostTable:
    curves = tuple(Curve(head_dim=d, tokens=(100, 1000), seconds=(1e-4 * d, 1e-2 * d)) for d in (32, 128))
    return CostTable(
        name="test",
        device="a processor",
        backend="torch",
        dtype_bytes=4,
        dense=curves,
        mean_value=curves,
        estimators={"pooled_topk": curves},
        tiles=(
            TileCost(head_dim=32, block_tokens=64, call_s=1.0, row_s=0.1, tile_s=0.01),
            TileCost(head_dim=32, block_tokens=16, call_s=5.0, row_s=0.1, tile_s=0.01),
        ),
        decode=(
            DecodeCost(head_dim=32, head_s=1.0, key_s=0.001),
            DecodeCost(head_dim=128, head_s=1.0, key_s=0.016),
        ),
        fit={"held_out_tiles_mape": 0.0},
        provenance={},
    )


DENSE = UnitWork("dense", 1000, 1000, head_dim=32, dtype_bytes=4)
TILES = UnitWork("tiles", 640, 640, head_dim=32, tiles=40, query_blocks=10, query_heads=2, dtype_bytes=4)


def test_curves_pass_through_their_points_and_extrapolate() -> None:
    model = TableCostModel(table())
    assert model.unit_latency_s(DENSE) == pytest.approx(0.32, rel=1e-2)  # n(n + 1) / 2 pairs, not n² / 2
    assert model.unit_latency_s(replace(DENSE, head_dim=128)) == pytest.approx(1.28, rel=1e-2)
    assert model.unit_latency_s(replace(DENSE, head_dim=64)) == pytest.approx(0.64, rel=1e-2)
    assert model.unit_latency_s(replace(DENSE, head_dim=256)) == pytest.approx(2.56, rel=1e-2)
    longer = replace(DENSE, q_len=4000, kv_len=4000)
    assert model.unit_latency_s(longer) == pytest.approx(16 * 0.32, rel=1e-2)
    assert model.unit_latency_s(replace(DENSE, query_heads=3)) == pytest.approx(3 * model.unit_latency_s(DENSE))


def test_products_cost_their_operations_at_the_rate_of_their_rows() -> None:
    pointwise = PointwiseCost(elements=(100, 10_000), seconds=(1e-6, 1e-5))
    layers = LayerTable(rows=(1, 64, 1024), flop_s=(1e-10, 2e-11, 1e-11), pointwise={"norm": pointwise})
    model = TableCostModel(table().model_copy(update={"layers": layers}))
    assert model.prices_layers
    assert model.linear_s(64, 300, 200) == pytest.approx(2 * 64 * 300 * 200 * 2e-11)
    assert model.linear_s(4096, 300, 200) == pytest.approx(2 * 4096 * 300 * 200 * 1e-11), (
        "as fast as the most rows measured"
    )
    seconds = [model.linear_s(rows, 300, 200) for rows in (1, 2, 63, 64, 65, 500, 1023, 1024, 1025, 9000)]
    assert seconds == sorted(seconds)
    assert [model.pointwise_s("norm", n) for n in (1, 100, 1000, 10_000, 40_000)] == pytest.approx(
        [1e-6, 1e-6, 10**-5.5, 1e-5, 4e-5]
    )
    assert not TableCostModel(table()).prices_layers
    with pytest.raises(SpecError, match="must know more than attention"):
        TableCostModel(table()).linear_s(64, 300, 200)


def test_tiles_follow_the_line_and_scale_with_the_block() -> None:
    model = TableCostModel(table())
    assert model.unit_latency_s(TILES) == pytest.approx(2 * 1.0 + 20 * 0.1 + 40 * 0.01)
    doubled = replace(TILES, block_tokens=128)
    assert model.unit_latency_s(doubled) == pytest.approx(2 * 1.0 + 20 * 0.2 + 40 * 0.04)
    assert model.unit_latency_s(replace(TILES, block_tokens=16)) == pytest.approx(2 * 5.0 + 20 * 0.1 + 40 * 0.01)


def test_decoding_is_per_query_head_and_sequence() -> None:
    work = DecodeWork(kv_tokens=1000, head_dim=32, query_heads=2, batch=3, dtype_bytes=4)
    between = replace(work, head_dim=64)
    assert TableCostModel(table()).decode_latency_s([work, between]) == pytest.approx([12.0, 6 * (2 * 17) ** 0.5])
    with pytest.raises(SpecError, match="4 bytes per element"):
        TableCostModel(table()).decode_latency_s([replace(work, dtype_bytes=2)])


def test_what_was_not_measured_is_refused() -> None:
    model = TableCostModel(table())
    with pytest.raises(SpecError, match="4 bytes per element"):
        model.unit_latency_s(replace(DENSE, dtype_bytes=2))
    with pytest.raises(SpecError, match=r"what 'pooled_topp' costs.*sparsesearch calibrate -o FILE"):
        model.unit_latency_s(replace(TILES, estimator="pooled_topp"))


def test_round_trip_and_damage(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    table().save(path)
    assert CostTable.load(path) == table()
    assert load_cost_model(path) == load_cost_model(str(path))
    path.write_text(path.read_text().replace("a processor", "another one"))
    with pytest.raises(ArtifactError, match="checksum"):
        load_cost_model(path)
    with pytest.raises(ArtifactError, match="must exist"):
        load_cost_model(tmp_path / "absent.json")
    table().model_copy(update={"tiles": ()}).save(path)
    with pytest.raises(ArtifactError, match="sparsesearch calibrate"):
        load_cost_model(path)


def test_a_falling_curve_is_refused() -> None:
    with pytest.raises(ValueError, match="never fall"):
        Curve(head_dim=32, tokens=(1, 2), seconds=(2.0, 1.0))


def test_one_thread_is_timed_by_its_own_clock_and_several_by_the_wall(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert clock() is CPU_TIME
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert clock() is WALL
    assert (CPU_TIME.typical([1.0, 2.0, 9.0]), WALL.typical([1.0, 2.0, 9.0])) == (2.0, 1.0)


def test_quick_calibration(tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    threads = torch.get_num_threads()
    model = calibrate(quick=True, out=tmp_path / "cpu.json", progress=lambda *state: seen.append(state))
    assert torch.get_num_threads() == threads
    assert load_cost_model(tmp_path / "cpu.json") == model
    assert seen == sorted(seen)
    assert seen[-1][1] == seen[-1][2] > 0
    assert {"processor", "held_out_tiles_mape", "rounds"} <= set(model.summary())
    assert {"pooled_topk", "vertical_slash"} <= set(model.table.estimators)
    assert {"processor", "cores", "threads", "torch", "rounds", "dtype"} <= set(model.table.provenance)
    assert {"held_out_tiles_mape", "held_out_dense_mape", "tiles_mape"} <= set(model.table.fit)
    assert [cost.head_dim for cost in model.table.decode] == [32, 64]
    assert model.step_choices == {"bounds_topk", "skip_softmax"}
    sparse = UnitWork("tiles", 4096, 4096, head_dim=64, tiles=200, query_blocks=64, dtype_bytes=4)
    dense = UnitWork("dense", 4096, 4096, head_dim=64, dtype_bytes=4)
    assert 0 < model.unit_latency_s(sparse) < model.unit_latency_s(dense)


def test_a_call_pays_its_bookkeeping_once_and_a_unit_its_share() -> None:
    plain = TableCostModel(table())
    tiles = tuple(cost.model_copy(update={"group_s": 3.0, "launch_s": 0.2}) for cost in plain.table.tiles)
    calls = {"pooled_topk": (Curve(head_dim=32, tokens=(100, 1000), seconds=(0.7, 0.7)),)}
    booked = TableCostModel(plain.table.model_copy(update={"tiles": tiles, "estimator_calls": calls}))
    assert booked.call_latency_s(TILES) == pytest.approx(plain.call_latency_s(TILES) + 3.0 + 10 * 0.2)
    chosen = replace(TILES, estimator="pooled_topk")
    assert booked.call_latency_s(chosen) == pytest.approx(plain.call_latency_s(chosen) + 3.0 + 10 * 0.2 + 0.7)
    each = replace(TILES, query_heads=1, tiles=20)
    four = replace(TILES, query_heads=4, tiles=80)
    assert booked.unit_latency_s(each) == pytest.approx(booked.call_latency_s(four) / 4)
    assert booked.call_latency_s(TILES) < 2 * booked.call_latency_s(each)
    assert plain.call_latency_s(TILES) == pytest.approx(2 * plain.unit_latency_s(each))


def test_bookkeeping_is_found_in_calls_of_one_head_and_of_four() -> None:
    truth = TileCost(head_dim=32, block_tokens=64, group_s=3e-4, launch_s=1e-5, call_s=2e-5, row_s=4e-6, tile_s=1e-5)
    shapes = Grid((128, 256), (128, 256), (512, 1024), (128, 256, 512), (32,), (64,), (768,), (256,))
    cases = all_cases(shapes, torch.Generator().manual_seed(0))
    for case in cases:
        case.taken_s = 1e-3 if case.work is None else 1e-3 * case.work.query_heads
        if case.work is not None and case.work.kind == "tiles":
            work = case.work
            case.taken_s = truth.seconds(heads=work.query_heads, rows=work.query_blocks, tiles=work.tiles)
        if case.group in estimators():
            case.taken_s = 5e-4 + 1e-5 * case.heads
        case.seconds = [case.taken_s]
    found = fitted(cases, shapes, torch.float32, {})
    (cost,) = found.tiles
    for name in ("group_s", "launch_s", "call_s", "row_s", "tile_s"):
        assert getattr(cost, name) == pytest.approx(getattr(truth, name), rel=1e-3), name
    assert not found.step_choices, "one length is no curve"
    assert found.estimators["pooled_topk"][0].seconds == pytest.approx((1e-5, 1e-5))
    assert found.estimator_calls["pooled_topk"][0].seconds == pytest.approx((5e-4, 5e-4))
