"""What every cost model must hold."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from sparsesearch.cost import CostModel, DecodeWork, UnitWork, caveat, cost_model_names, load_cost_model
from sparsesearch.errors import SpecError
from sparsesearch.scores import ScoreTable
from sparsesearch.shapes import Unit

BLOCK = 64


@pytest.fixture(params=cost_model_names())
def model(request: pytest.FixtureRequest) -> CostModel:
    return load_cost_model(request.param)


def work(model: CostModel, kind: str, tokens: int = 4096, density: float = 1.0, **changes: object) -> UnitWork:
    blocks = -(-tokens // BLOCK)
    base = UnitWork("dense", tokens, tokens, head_dim=64, block_tokens=BLOCK)
    tiles = density * blocks * (blocks + 1) / 2
    return replace(base, kind=kind, tiles=tiles, query_blocks=blocks, **changes)  # type: ignore[arg-type]


def test_names_and_protocol(model: CostModel) -> None:
    assert isinstance(model, CostModel)
    assert model.name in cost_model_names()
    assert model.device
    assert model.measured == (not caveat(model.name))


def test_never_falls_with_density(model: CostModel) -> None:
    for tokens in (1, 63, 1000, 4096, 50_000):
        for estimator in (None, "pooled_topk"):
            densities = (0.0, 0.001, 0.05, 0.3, 0.8, 1.0)
            seconds = [model.unit_latency_s(work(model, "tiles", tokens, d, estimator=estimator)) for d in densities]
            assert seconds == sorted(seconds)
            assert seconds[-1] > 0


@pytest.mark.parametrize("kind", ["dense", "tiles", "mean_value"])
def test_never_falls_with_length_and_grows_with_size(model: CostModel, kind: str) -> None:
    lengths = (1, 2, 63, 64, 65, 127, 129, 1000, 4096, 8191, 8193, 131_072)
    seconds = [model.unit_latency_s(work(model, kind, tokens)) for tokens in lengths]
    assert seconds == sorted(seconds)
    assert seconds[0] > 0
    sizes = [model.unit_latency_s(work(model, kind, head_dim=size)) for size in (16, 32, 48, 64, 96, 128, 256)]
    assert all(a < b for a, b in pairwise(sizes))
    base = work(model, kind)
    grouped = model.unit_latency_s(replace(base, query_heads=4, tiles=4 * base.tiles))
    assert model.unit_latency_s(base) < grouped <= 4.001 * model.unit_latency_s(base)


def test_decoding_grows_with_the_context(model: CostModel) -> None:
    contexts = (1, 64, 1000, 32_768, 1_000_000)
    seconds = [model.unit_latency_s(replace(work(model, "dense", n), q_len=1)) for n in contexts]
    assert seconds == sorted(seconds)
    assert seconds[-1] < model.unit_latency_s(work(model, "dense", contexts[-1]))


def test_an_estimator_costs_something_and_zero_costs_least(model: CostModel) -> None:
    static, dynamic = (work(model, "tiles", density=0.001, estimator=e) for e in (None, "vertical_slash"))
    assert model.unit_latency_s(dynamic) > model.unit_latency_s(static)
    zero = model.unit_latency_s(work(model, "zero"))
    assert 0 <= zero <= min(model.unit_latency_s(work(model, kind)) for kind in ("dense", "tiles", "mean_value"))


def test_vectorised_answers_are_the_same(model: CostModel) -> None:
    works = [work(model, kind, tokens) for kind in ("dense", "tiles", "zero") for tokens in (100, 5000)]
    assert model.latency_s(works).tolist() == [model.unit_latency_s(each) for each in works]
    assert model.latency_s([]).shape == (0,)


def test_dense_plan_is_one_and_slower_than_dense_is_seen_as_such(model: CostModel) -> None:
    """Dense is priced as SDPA: all tiles through the tile kernel cost at least as much."""
    units = (Unit("a", (0,)), Unit("a", (1,)))
    candidates = [work(model, "dense"), work(model, "tiles", density=1.0), work(model, "tiles", density=0.1)]
    cost = np.broadcast_to(model.latency_s(candidates)[None, :, None], (2, 3, 1))
    table = ScoreTable(
        units, ("dense", "all", "some"), (4096,), np.zeros((2, 3)), {"latency": cost}, 0, np.ones((2, 3), bool)
    )
    assert table.cost_of("latency", np.array([0, 0])).tolist() == [1.0]
    assert table.cost_of("latency", np.array([1, 1]))[0] > 0.99
    assert table.cost_of("latency", np.array([2, 2]))[0] < 0.5


def test_seconds_are_seconds(model: CostModel) -> None:
    seconds = model.unit_latency_s(work(model, "dense", 8192))
    low, high = (1e-3, 10.0) if model.name == "cpu" else (1e-6, 1e-3)
    assert low < seconds < high


def test_impossible_work_is_refused() -> None:
    with pytest.raises(SpecError, match="q_len <= kv_len"):
        UnitWork("dense", q_len=5, kv_len=4, head_dim=64)
    with pytest.raises(SpecError, match="kind must be one of"):
        UnitWork("sparse", q_len=1, kv_len=1, head_dim=64)  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="tiles not negative"):
        UnitWork("tiles", q_len=1, kv_len=1, head_dim=64, tiles=-1)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("roofline:h10", r"known GPU\. Did you mean 'h100'\?"),
        ("roofline:", "known GPU"),
        ("cpuu", r"Did you mean 'cpu'\?"),
        ("h100x", "shipped name or a .json file"),
    ],
)
def test_unknown_names_get_a_hint(name: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        load_cost_model(name)


def decode_seconds(model: CostModel, **changes: object) -> float:
    fields: dict[str, object] = {"kv_tokens": 4096, "head_dim": 64, "dtype_bytes": 4 if model.name == "cpu" else 2}
    return float(model.decode_latency_s([DecodeWork(**(fields | changes))])[0])  # type: ignore[arg-type]


def test_decoding_never_falls_with_keys_batch_heads_or_size(model: CostModel) -> None:
    for name, values in (
        ("kv_tokens", (0, 1, 63, 64, 4096, 4097, 1_000_000)),
        ("batch", (1, 2, 8, 33)),
        ("query_heads", (1, 2, 4, 8, 64, 512)),
        ("head_dim", (16, 32, 64, 80, 96, 128, 256)),
    ):
        seconds = [decode_seconds(model, **{name: value}) for value in values]
        assert seconds == sorted(seconds), name
        assert seconds[-1] > seconds[0], name
    assert model.decode_call_s >= 0


def test_decoding_is_linear_in_the_batch_and_answers_per_head(model: CostModel) -> None:
    assert decode_seconds(model, batch=8) == pytest.approx(8 * decode_seconds(model))
    dtype_bytes = 4 if model.name == "cpu" else 2
    works = [DecodeWork(tokens, 128, 4, 2, dtype_bytes) for tokens in (10, 4096, 10)]
    seconds = model.decode_latency_s(works)
    assert seconds.shape == (3,)
    assert seconds[0] == seconds[2] < seconds[1]
    assert model.decode_latency_s([]).shape == (0,)


def test_a_longer_decoding_context_takes_what_its_keys_take(model: CostModel) -> None:
    """Beyond the fixed part, twice the keys take twice the time."""
    short, middle, long = (decode_seconds(model, kv_tokens=n) for n in (100_000, 200_000, 400_000))
    assert (long - middle) == pytest.approx(2 * (middle - short), rel=1e-6)
    assert 1e-9 < (middle - short) / 100_000 * 1e3 < 1e-2


def test_impossible_decode_work_is_refused() -> None:
    with pytest.raises(SpecError, match="kv_tokens not negative"):
        DecodeWork(-1, 64)
    with pytest.raises(SpecError, match="sizes must be positive"):
        DecodeWork(1, 64, batch=0)
