"""A GPU nobody has calibrated, from its sibling: what an H100 took, against what H200's micro-runs say of it.

The figures are of one H100 SXM 80 GB (torch 2.11.0+cu130, bf16, random data, 32 query and 8 KV heads, medians of short runs), of PyTorch's
cuDNN attention. The tables are of longer runs, at the clock that the power limit leaves, so short prompts were faster than they say.
"""

from types import SimpleNamespace

import pytest
import torch

from sparsesearch.cost import caveat, load_cost_model
from sparsesearch.cost.base import DecodeWork
from sparsesearch.cost.device.model import DeviceCostModel
from sparsesearch.cost.device.sibling import SIBLINGS, sibling_table
from sparsesearch.cost.roofline import DATASHEETS
from sparsesearch.cost.shipped import shipped_for
from sparsesearch.errors import SpecError
from tests.cost.device_tables import device_table

DENSE_TFLOP_PER_S = {(128, 8192): 588, (128, 32768): 612, (128, 131072): 563, (64, 8192): 434, (64, 32768): 460, (64, 131072): 461}  # fmt: skip
DECODE_S = {(1, 131072): 194e-6, (8, 32768): 366e-6, (32, 8192): 363e-6, (16, 32768): 699e-6}


def _h100() -> DeviceCostModel:
    model = load_cost_model("h100")
    assert isinstance(model, DeviceCostModel)
    return model


def test_dense_prompts_of_a_real_h100() -> None:
    errors = []
    for (head_dim, tokens), rate in DENSE_TFLOP_PER_S.items():
        predicted_s = _h100().own_dense_s(32 * tokens * (tokens + 1) / 2, head_dim)
        assert predicted_s is not None
        errors.append(abs(predicted_s * rate * 1e12 / (4 * head_dim * 32 * tokens**2 / 2) - 1))
    assert sum(errors) / len(errors) <= 0.07
    assert max(errors) <= 0.14  # 8k tokens at head_dim 128, before the power limit is met


@pytest.mark.parametrize(("batch", "tokens"), DECODE_S)
def test_decoding_on_a_real_h100(batch: int, tokens: int) -> None:
    """Both kernels read at the memory's rate here, so that they take alike; one sequence is ours to win."""
    predicted_s = _h100().decode_attention_s([DecodeWork(tokens, 128, 4, batch)] * 8)
    assert -0.08 <= predicted_s / DECODE_S[batch, tokens] - 1 <= 0.03


def test_bandwidth_of_a_real_h100() -> None:
    assert _h100().table.peaks.copy_bytes_per_s == pytest.approx(3.0e12, rel=0.03)


def test_what_memory_bounds_takes_longer_and_nothing_else() -> None:
    """Decoding and narrow products move bytes, wide products and tiles do not."""
    h200 = load_cost_model("h200")
    assert isinstance(h200, DeviceCostModel)
    slower = 4.8 / 3.35
    head = DecodeWork(131072, 128, 4, 8)
    assert _h100().decode_attention_s([head] * 8) / h200.decode_attention_s([head] * 8) == pytest.approx(
        slower, rel=0.05
    )
    assert 1.25 < _h100().linear_s(1, 14336, 4096) / h200.linear_s(1, 14336, 4096) < slower + 0.01
    assert _h100().linear_s(8192, 14336, 4096) == h200.linear_s(8192, 14336, 4096)
    assert _h100().pointwise_s("norm", 1e8) > h200.pointwise_s("norm", 1e8)
    assert [k.block_s for k in _h100().table.tiles] == [k.block_s for k in h200.table.tiles]
    assert _h100().table.memory_bytes == 80e9


def test_the_same_memory_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DATASHEETS, "twin", DATASHEETS["h200"])
    monkeypatch.setitem(SIBLINGS, "twin", "h200")
    table = device_table()
    twin = sibling_table(table, "twin")
    for part in ("peaks", "tiles", "decode", "linear", "pointwise", "skinny", "estimators", "permutation"):
        assert getattr(twin, part) == getattr(table, part), part


def test_it_says_that_nobody_measured_it() -> None:
    assert not _h100().measured
    assert _h100().name == load_cost_model("derived:h100").name == "derived:h100"
    assert "nobody has measured" in caveat("derived:h100")
    assert "lower bounds" in caveat("roofline:h100")
    assert caveat("h200") == caveat("cpu") == caveat(None) == ""
    with pytest.raises(SpecError, match="derived:h100"):
        load_cost_model("derived:h10")


@pytest.mark.parametrize(("product", "workers", "known"), [("NVIDIA H100 80GB HBM3", 132, "derived:h100"), ("NVIDIA H100 PCIe", 114, None), ("NVIDIA H200", 132, "h200"), ("NVIDIA A100-SXM4-80GB", 108, None)])  # fmt: skip
def test_the_model_of_the_device_at_hand(
    product: str, workers: int, known: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = SimpleNamespace(name=product, multi_processor_count=workers)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: found)
    model = shipped_for("cuda")
    assert (None if model is None else model.name) == known
