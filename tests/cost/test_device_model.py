"""The accelerator's cost model: its formula, its file, what lies between measured sizes."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sparsesearch.cost import load_cost_model
from sparsesearch.cost.base import CostModel, DecodeWork, UnitWork
from sparsesearch.cost.device.load import TileLoad
from sparsesearch.cost.device.model import DeviceCostModel
from sparsesearch.cost.device.table import DeviceTable, Points, rising
from sparsesearch.cost.device.tile_cases import TileCase
from sparsesearch.cost.device.tile_seconds import schedule_seconds
from sparsesearch.cost.layer_costs import LayerCosts
from sparsesearch.errors import ArtifactError, SpecError
from tests.cost.device_tables import device_table, tile_cost

MODEL = DeviceCostModel(device_table())
READ = 4e12


def load(blocks: tuple[float, ...], *, pieces: int = 0, traffic_bytes: float = 0.0) -> TileLoad:
    each = np.array(blocks)
    return TileLoad(np.ones(len(blocks)), each, 0 * each, int(pieces > 0), pieces, traffic_bytes, 0.0)


def test_the_busiest_worker_decides_while_power_does_not() -> None:
    cost = tile_cost(block_power_s=1e-12, tile_power_s=1e-12)
    assert schedule_seconds(cost, load((10, 10, 10, 10)), READ) == pytest.approx(3e-6 + 1e-6 + 15e-6, rel=1e-6)
    assert schedule_seconds(cost, load((10, 40, 10, 10)), READ) == pytest.approx(3e-6 + 1e-6 + 60e-6, rel=1e-6)


def test_power_decides_in_a_balanced_schedule() -> None:
    """All workers busy: 1.7 us per block beats the clock's 1.5; one busy worker among idle ones runs at the clock."""
    even = schedule_seconds(tile_cost(), load((100,) * 4), READ)
    assert even == pytest.approx(3e-6 + 170.5e-6, rel=0.05)
    alone = schedule_seconds(tile_cost(), load((100, 0, 0, 0)), READ)
    assert alone == pytest.approx(3e-6 + 151e-6, rel=1e-3)


def test_at_a_clock_that_is_known_power_does_not_count() -> None:
    schedule = TileCase("dense", 16384, 128).schedule(MODEL.workers, MODEL.kernel)
    heads = {"num_kv_heads": 8, "head_dim": 128}
    costs = DeviceCostModel(MODEL.table.model_copy(update={"boost_hz": 2e9}))
    cool, slow = (costs.attention_s(schedule, **heads, hz=hz) for hz in (2e9, 1.6e9))
    assert cool < costs.attention_s(schedule, **heads) < slow
    launch_s = tile_cost().launch_s
    assert slow - cool == pytest.approx(0.25 * (cool - launch_s), rel=0.05)  # but what merges cut tiles
    with pytest.raises(SpecError, match="clock it was measured at"):
        MODEL.attention_s(schedule, **heads, hz=2e9)


def test_cut_tiles_cost_a_merge_and_misses_cost_bandwidth() -> None:
    plain, cut = (schedule_seconds(tile_cost(), load((9, 9), pieces=pieces), READ) for pieces in (0, 6))
    assert cut - plain == pytest.approx(4e-6 + 6e-8)
    missing = schedule_seconds(tile_cost(), load((9, 9), traffic_bytes=1e9), READ)
    assert missing == pytest.approx(3e-6 + 1e9 / READ, rel=1e-6)


def test_it_is_a_cost_model_of_whole_layers_too() -> None:
    assert isinstance(MODEL, CostModel)
    assert isinstance(MODEL, LayerCosts)


def test_a_unit_is_its_share_of_the_layer() -> None:
    """32 dense heads through `unit_latency_s` add up to the replayed schedule, less its launch and its softened corner."""
    unit = UnitWork("dense", 16384, 16384, head_dim=128, query_heads=4)
    case = TileCase("dense", 16384, 128)
    whole = MODEL.attention_s(case.schedule(MODEL.workers, MODEL.kernel), num_kv_heads=8, head_dim=128)
    assert 8 * MODEL.unit_latency_s(unit) == pytest.approx(whole, rel=0.06)
    tiles = UnitWork("tiles", 16384, 16384, 128, 4, 4 * 128 * 129 / 2, 128, 128)
    assert MODEL.unit_latency_s(tiles) == pytest.approx(MODEL.unit_latency_s(unit), rel=0.01)


def test_small_blocks_cost_as_many_kernel_blocks_as_they_fill() -> None:
    """All 64-blocks of a head fill the same 128 x 64 kernel blocks as dense attention does."""
    rows = 4096 // 64
    work = UnitWork("tiles", 4096, 4096, 128, 1, rows * (rows + 1) / 2, rows, 64)
    schedule = TileCase("dense", 4096, 128, block_tokens=64, num_heads=1, num_kv_heads=1).schedule(
        MODEL.workers, "gluon"
    )
    kernel = tile_cost(128, 64)
    blocks = schedule.num_blocks * kernel.block_power_s + 32 * kernel.tile_power_s
    assert MODEL.unit_latency_s(work) == pytest.approx(blocks / 132, rel=1e-6)


def test_between_and_beyond_measured_head_sizes() -> None:
    assert MODEL.tile_kernel(128, 128) == tile_cost()
    middle = MODEL.tile_kernel(96, 128)
    assert tile_cost(64).block_s < middle.block_s < tile_cost(128).block_s
    assert MODEL.tile_kernel(256, 128).block_s == pytest.approx(2 * tile_cost().block_s)
    assert MODEL.tile_kernel(32, 64).block_s == pytest.approx(tile_cost(64, 64).block_s / 2)


def test_linear_layers_pass_through_their_points() -> None:
    assert MODEL.linear_s(64, 4096, 4096) == pytest.approx(1.5e-5)
    assert MODEL.linear_s(16384, 14336, 4096) == pytest.approx(2 * 1.5e-3)
    between = MODEL.linear_s(64, 8192, 4096)
    assert 1.5e-5 < between < 4.5e-5
    wide = [MODEL.linear_s(64, outputs, 4096) for outputs in (4096, 6144, 8192, 11008, 14336, 20000)]
    assert wide == sorted(wide)


def test_decoding_follows_its_bytes() -> None:
    head = DecodeWork(32768, 128, 4)
    assert MODEL.decode_attention_s([]) == 0.0
    points = Points(amounts=(1e6, 3e6), seconds=(1e-5, 2e-5))  # so much to start, so much per byte
    assert [points.affine_at(x) for x in (5e5, 1e6, 2e6, 3e6, 6e6)] == pytest.approx([1e-5, 1e-5, 1.5e-5, 2e-5, 4e-5])
    one_layer = MODEL.decode_attention_s([head] * 8)
    assert 1e-5 < one_layer < 2.6e-4
    more_pairs = [replace(head, kv_tokens=head.kv_tokens / 2, batch=2)] * 8
    cost = MODEL.table.decode[1]
    few, many = (curve.points.affine_at(8 * head.kv_bytes) for curve in cost.curves)  # of 8 and of 256 pairs
    assert one_layer == pytest.approx(few)
    assert MODEL.decode_attention_s(more_pairs) == pytest.approx(few * (many / few) ** (1 / 5))
    assert cost.at(1e8, 4) == cost.at(1e8, 8) < cost.at(1e8, 256) == cost.at(1e8, 512)
    assert MODEL.decode_attention_s([replace(head, batch=64)] * 8) == pytest.approx(8 * 64 * head.kv_bytes * 2.8e-13)
    assert MODEL.decode_latency_s([head]) == pytest.approx([head.kv_bytes * 2.5e-13 + 5e-8])


def test_few_heads_take_as_long_to_choose_as_the_measured_call() -> None:
    one, eight, sixteen = (MODEL.estimator_s("pooled_topk", 4096, heads) for heads in (1, 8, 16))
    assert one == eight == pytest.approx(1e-6)
    assert sixteen == pytest.approx(2 * eight)
    unit = UnitWork("tiles", 4096, 4096, 128, 2, 100.0, 32, 128)
    share = MODEL.unit_latency_s(replace(unit, estimator="pooled_topk")) - MODEL.unit_latency_s(unit)
    assert share == pytest.approx(eight / 4)


def test_points_level_noise_and_extrapolate() -> None:
    points = rising([(4.0, 3.0), (1.0, 1.0), (2.0, 4.0), (4.0, 4.2)])
    assert points == Points(amounts=(1.0, 2.0, 4.0), seconds=(1.0, 4.0, 4.0))
    assert [points.at(x) for x in (0.1, 1.0, 2**0.5, 8.0)] == pytest.approx([1.0, 1.0, 2.0, 8.0])
    with pytest.raises(ValueError, match="never fall"):
        Points(amounts=(1, 2), seconds=(2.0, 1.0))


def test_what_was_not_measured_is_refused() -> None:
    with pytest.raises(SpecError, match="2 bytes per element"):
        MODEL.unit_latency_s(UnitWork("dense", 128, 128, 64, dtype_bytes=4))
    with pytest.raises(SpecError, match="2 bytes per element"):
        MODEL.decode_latency_s([DecodeWork(1, 64, dtype_bytes=1)])
    with pytest.raises(SpecError, match="'pooled_topp' costs, but was calibrated without that rule"):
        MODEL.estimator_s("pooled_topp", 100, 1)
    with pytest.raises(SpecError, match="pointwise layer 'nrm'"):
        MODEL.pointwise_s("nrm", 1)


def test_round_trip_and_damage(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    device_table().save(path)
    assert load_cost_model(path) == DeviceCostModel(DeviceTable.load(path)) == MODEL
    path.write_text(path.read_text().replace("an accelerator", "another one"))
    with pytest.raises(ArtifactError, match="checksum"):
        load_cost_model(path)
    device_table().model_copy(update={"tiles": ()}).save(path)
    with pytest.raises(ArtifactError, match="sparsesearch calibrate"):
        load_cost_model(path)
