"""The fused decoding step: its products' law, who is priced by it, and that the runtime fuses just these."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from sparsesearch.cost import load_cost_model
from sparsesearch.cost.device.fused import fit_skinny, skinny_seconds
from sparsesearch.cost.device.model import DeviceCostModel
from sparsesearch.cost.device.table import Correction, ShortLayers, SkinnyCost
from sparsesearch.cost.layer_parts import FUSED_MODEL_TYPES, decode_rest_s, fused_widths, is_fused, linear_widths
from sparsesearch.cost.predict import predict
from sparsesearch.cost.roofline import roofline
from sparsesearch.errors import SpecError
from sparsesearch.kernels import skinny_tiling
from sparsesearch.model_shapes import model_shape
from sparsesearch.runtime.fused_layers import recognise
from sparsesearch.workload import Workload
from tests.cost.device_tables import device_table

SHAPE = model_shape("llama3-8b")
ONE = SkinnyCost(rows=1, columns=8, step_columns=1024, launch_s=2e-6, column_s=1e-9, byte_s=2e-13)
SIXTEEN = ONE.model_copy(update={"rows": 16, "columns": 64, "step_columns": 128, "launch_s": 4e-6})
COSTS = DeviceCostModel(
    device_table(
        skinny=(ONE, SIXTEEN),
        fused_layer_s=Correction(amounts=(1, 16), values=(1e-6, 5e-6)),
        fused_start_s=Correction(amounts=(1,), values=(3e-6,)),
        decode_step_s=Correction(amounts=(1,), values=(1e-5,)),
    )
)


def test_a_product_walks_its_lines_or_reads_its_weights() -> None:
    assert skinny_seconds(ONE, 8, 1 << 20, 2) == pytest.approx(2e-6 + (1 << 20) * 1e-9, rel=1e-6)
    assert skinny_seconds(ONE, 1 << 20, 1024, 2) == pytest.approx(2e-6 + 2 * (1 << 30) * 2e-13, rel=1e-6)
    assert skinny_seconds(ONE, 8, 1025, 2) == skinny_seconds(ONE, 8, 2048, 2)  # the last step is a whole one
    corner = 2e-6 + 1024e-9 * 2 ** (1 / 8)
    assert skinny_seconds(ONE, 2500, 1024, 2) == pytest.approx(corner, rel=1e-6)


def test_the_law_is_found_again() -> None:
    widths = [(n, k) for n in (1024, 2048, 4096) for k in (2048, 4096, 14336)]
    rows = [{"m": 1, "n": n, "k": k, "seconds": skinny_seconds(ONE, n, k, 2)} for n, k in widths]
    (found,), errors = fit_skinny(rows, 2, 4e12)
    assert (found.rows, found.columns, found.step_columns) == (1, 8, 1024)
    assert errors["skinny_max"] < 0.02
    assert skinny_seconds(found, 3072, 8192, 2) == pytest.approx(skinny_seconds(ONE, 3072, 8192, 2), rel=0.02)
    assert fit_skinny([], 2, 4e12) == ((), {})


def test_a_disturbed_product_tells_nothing() -> None:
    rows = [
        {"m": 1, "n": n, "k": 4096, "seconds": skinny_seconds(ONE, n, 4096, 2), "spread": 0.01} for n in (1024, 4096)
    ]
    disturbed = rows[0] | {"seconds": 4 * rows[0]["seconds"], "spread": 0.54}
    assert fit_skinny([*rows, disturbed], 2, 4e12) == fit_skinny(rows, 2, 4e12)
    (alone,), _ = fit_skinny([disturbed], 2, 4e12)
    assert skinny_seconds(alone, 1024, 4096, 2) == pytest.approx(disturbed["seconds"], rel=0.02)


def test_a_fused_step_is_its_products_and_what_they_leave_out() -> None:
    fused = COSTS.fused
    assert fused is not None
    assert fused.most_rows == 16
    assert fused.product_s(2, 4096, 4096) == skinny_seconds(
        SIXTEEN, 4096, 4096, 2
    )  # the next larger one that was measured
    layer_s = sum(fused.product_s(1, *width) for width in fused_widths(SHAPE)) + 1e-6
    head_s = fused.product_s(1, SHAPE.vocab_size, SHAPE.hidden_size)
    assert decode_rest_s(SHAPE, COSTS, batch=1) == pytest.approx(32 * layer_s + head_s + 1.3e-5)
    assert decode_rest_s(SHAPE, COSTS, batch=1, fused=True) == decode_rest_s(SHAPE, COSTS, batch=1)
    assert decode_rest_s(SHAPE, COSTS, batch=1, fused=False) > decode_rest_s(SHAPE, COSTS, batch=1)
    assert sum(n * k for n, k in fused_widths(SHAPE)) == sum(n * k for n, k in linear_widths(SHAPE))


def test_the_turn_between_two_steps_is_priced_but_where_steps_are_timed_alone() -> None:
    costs = DeviceCostModel(
        COSTS.table.model_copy(update={"decode_turn_s": Correction(amounts=(1, 16), values=(2e-5, 4e-5))})
    )
    for fused in (True, False):
        rest_s = {turn: decode_rest_s(SHAPE, costs, batch=16, fused=fused, turn=turn) for turn in (True, False)}
        assert rest_s[True] - rest_s[False] == pytest.approx(4e-5)
        assert rest_s[False] == decode_rest_s(SHAPE, COSTS, batch=16, fused=fused)


def test_short_layers_show_the_launches_that_long_ones_hide() -> None:
    assert COSTS.fused is not None
    short = ShortLayers(
        weight_bytes=1e6, long_weight_bytes=1e8, seconds=Correction(amounts=(1, 16), values=(4e-6, 9e-6))
    )
    fused = replace(COSTS.fused, short=short)
    assert [short.share(size) for size in (1.0, 1e6, 1e7, 1e8, 1e9)] == pytest.approx([1.0, 1.0, 0.5, 0.0, 0.0])
    assert fused.layer_s(1, 1e5) == pytest.approx(4e-6)
    assert fused.layer_s(16, 1e7) == pytest.approx(7e-6)
    assert fused.layer_s(1, 1e9) == COSTS.fused.layer_s(1, 1e5) == pytest.approx(1e-6)


def test_who_is_priced_by_it() -> None:
    assert is_fused(SHAPE, COSTS, 16)
    assert not is_fused(SHAPE, COSTS, 17)
    assert not is_fused(replace(SHAPE, model_type="gemma3"), COSTS, 1)
    for costs in (DeviceCostModel(device_table()), roofline("h100")):
        assert not is_fused(SHAPE, costs, 1)
        with pytest.raises(SpecError, match="must know the fused decoding step"):
            decode_rest_s(SHAPE, costs, batch=1, fused=True)
    for batch, fused in ((1, True), (32, False)):
        assert predict(None, SHAPE, Workload(8192, 100, batch), COSTS).fused_step is fused
    assert not predict(None, SHAPE, Workload(8192), COSTS).fused_step


@pytest.mark.parametrize("model_type", sorted(FUSED_MODEL_TYPES))
def test_the_runtime_fuses_these_models(model_type: str) -> None:
    sizes = {
        "num_hidden_layers": 1,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 2,
        "vocab_size": 64,
    }
    config = AutoConfig.for_model(model_type, **sizes, num_key_value_heads=1, head_dim=16, sliding_window=None)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    assert len(recognise(model).layers) == 1


def test_the_shipped_table_knows_every_way_of_cutting() -> None:
    model = load_cost_model("h200")
    assert isinstance(model, DeviceCostModel)
    known = {(cost.rows, cost.columns, cost.step_columns) for cost in model.table.skinny}
    ways = {
        1: (*skinny_tiling.ONE_ROW, *skinny_tiling.ONE_SHORT_ROW),
        8: skinny_tiling.EIGHT_ROWS,
        16: skinny_tiling.SIXTEEN_ROWS,
    }
    shipped = {(rows, tiling.columns, tiling.inner) for rows, own in ways.items() for _, tiling in own}
    assert known == shipped
    assert model.table.fit["skinny_mape"] <= 0.05
    fused = model.fused
    assert fused is not None
    seconds = [fused.product_s(rows, 28672, 4096) for rows in (1, 8, 16)]
    assert np.all(np.array(seconds) > 2 * 28672 * 4096 / 4.8e12)  # never faster than the datasheet's memory
