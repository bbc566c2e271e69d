import pytest

from sparsesearch.cost.base import DecodeWork, UnitWork
from sparsesearch.cost.roofline import roofline
from sparsesearch.errors import SpecError


def test_dense_prefill_is_bound_by_arithmetic() -> None:
    """32k, 32 heads of 128: 8.80e12 FLOPs, hence 8.89 ms at the datasheet's 989.4 TFLOP/s."""
    group = UnitWork("dense", 32768, 32768, head_dim=128, query_heads=4)
    assert 8 * roofline("h100").unit_latency_s(group) == pytest.approx(8.89e-3, rel=1e-3)


def test_decoding_is_bound_by_bandwidth() -> None:
    """8 KV heads x 32k x 128 x K and V in bf16: 134 MB, hence 40.1 us at 3.35 TB/s and 28.0 us at 4.8 TB/s."""
    group = UnitWork("dense", 1, 32768, head_dim=128, query_heads=4)
    assert 8 * roofline("h100").unit_latency_s(group) == pytest.approx(40.1e-6, rel=2e-3)
    assert 8 * roofline("h200").unit_latency_s(group) == pytest.approx(28.0e-6, rel=2e-3)


def test_a_decoding_step_reads_every_kept_key_once() -> None:
    """8 KV heads x 32k x 128 x K and V in bf16 = 134 MB, 28.0 us at 4.8 TB/s; in fp8 half of that."""
    head = DecodeWork(32768, head_dim=128, query_heads=4)
    assert roofline("h200").decode_latency_s([head] * 8).sum() == pytest.approx(28.0e-6, rel=2e-3)
    small = DecodeWork(32768, head_dim=128, query_heads=4, dtype_bytes=1)
    assert roofline("h200").decode_latency_s([small] * 8).sum() == pytest.approx(14.0e-6, rel=2e-3)
    many = DecodeWork(32768, head_dim=128, query_heads=1024)  # as many queries as in prefill: bound by arithmetic
    assert roofline("h200").decode_latency_s([many])[0] == pytest.approx(4 * 128 * 1024 * 32768 / 989.4e12)


def test_half_the_tiles_take_half_the_time_until_bytes_bind() -> None:
    model = roofline("a100")
    full = UnitWork("tiles", 32768, 32768, head_dim=128, tiles=512 * 513 / 2, query_blocks=512)
    half = UnitWork("tiles", 32768, 32768, head_dim=128, tiles=512 * 513 / 4, query_blocks=512)
    few = UnitWork("tiles", 32768, 32768, head_dim=128, tiles=1, query_blocks=512)
    assert model.unit_latency_s(full) == pytest.approx(2 * model.unit_latency_s(half))
    assert model.unit_latency_s(few) > 1e-3 * model.unit_latency_s(full)  # queries and output remain


def test_only_known_element_sizes() -> None:
    single = UnitWork("dense", 4096, 4096, head_dim=128, dtype_bytes=4)
    half = UnitWork("dense", 4096, 4096, head_dim=128, dtype_bytes=2)
    assert roofline("l40s").unit_latency_s(single) > roofline("l40s").unit_latency_s(half)
    with pytest.raises(SpecError, match="2 or 4 bytes"):
        roofline("l40s").unit_latency_s(UnitWork("dense", 4096, 4096, head_dim=128, dtype_bytes=1))
