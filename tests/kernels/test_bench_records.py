"""The committed measurements: readable, complete, and consistent with themselves."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from sparsesearch_cli.main import app
from typer.testing import CliRunner

from sparsesearch.bench.attention import PLANS, plan_rules
from sparsesearch.bench.kernel_report import attention_figure, attention_tables, decode_tables
from sparsesearch.bench.products import shapes_of
from sparsesearch.block_mask import BlockGrid
from sparsesearch.kernels.schedule import Span, TileShape, Workers, schedule_of_rules

GOLDEN = Path(__file__).parents[1] / "golden"


def prefill_rows() -> list[dict[str, Any]]:
    (run,) = json.loads((GOLDEN / "attention_h200.json").read_text())["runs"]
    rows: list[dict[str, Any]] = run["rows"]
    return rows


def test_attention_record_counts_what_the_schedule_counts() -> None:
    record = json.loads((GOLDEN / "attention_h200.json").read_text())
    assert record["format"] == "sparsesearch.bench.attention"
    assert {"device", "torch", "triton", "cudnn", "command"} <= set(record["provenance"])
    rows = prefill_rows()
    assert not [row for row in rows if "error" in row]
    for row in rows:
        if row["kernel"] != "gluon" or row["length"] > 8192:
            continue
        spans = (Span(BlockGrid(row["length"], row["length"], 128, causal=row["causal"])),)
        rules = plan_rules(row["plan"], 32, row["length"])
        schedule = schedule_of_rules(
            rules, spans, num_kv_heads=8, shape=TileShape(128, 128), workers=Workers(132, 62914560.0)
        )
        assert row["blocks"] == schedule.num_blocks
        assert row["density"] == pytest.approx(schedule.density, rel=1e-4)
        flop = 4 * row["blocks"] * 128 * 128 * row["head_dim"]
        assert row["tflop_per_s"] == pytest.approx(flop / row["seconds"] / 1e12, rel=1e-3)


def test_every_plan_was_measured_against_the_fastest_dense_kernel() -> None:
    rows = prefill_rows()
    for head_dim in (64, 128):
        for length in (4096, 8192, 32768, 65536, 131072):
            here = [r for r in rows if (r["head_dim"], r["length"], r["causal"]) == (head_dim, length, True)]
            dense_s = next(r["seconds"] for r in here if r["kernel"] == "cudnn")
            ours = {r["plan"]: r for r in here if r["kernel"] == "gluon"}
            assert set(ours) == set(PLANS)
            for row in ours.values():
                assert row["R"] == pytest.approx(
                    row["seconds"] / (row["density"] * row.get("dense_s", dense_s)), rel=1e-3
                )


def test_errors_are_within_twice_those_of_cudnn() -> None:
    rows = prefill_rows()
    dense = [row for row in rows if row["plan"] == "dense"]
    cudnn = {(r["head_dim"], r["length"], r["causal"]): r["fp64_error"] for r in dense if r["kernel"] == "cudnn"}
    assert len(cudnn) == 16
    for row in rows:
        if row["kernel"] == "gluon":
            assert 0 < row["fp64_error"] <= 2 * cudnn[row["head_dim"], row["length"], row["causal"]]


def test_memcheck_found_nothing_in_any_kernel() -> None:
    """And racecheck, cut off, nothing but the word by which Triton wakes its warps (see sanitize.py)."""
    record = json.loads((GOLDEN / "sanitizer_h200.json").read_text())
    tools = {row["tool"]: row for row in record["rows"]}
    assert tools["memcheck"]["finished"]
    assert "0 errors" in tools["memcheck"]["summary"]
    assert set(tools["racecheck"]["kernels"]) == {"hopper_attention"}


def test_decode_record_is_complete() -> None:
    record = json.loads((GOLDEN / "decode_h200.json").read_text())
    copy = record["ceilings"]["copy_bytes_per_s"]
    for row in record["rows"]:
        assert row["copy_share"] == pytest.approx(row["bytes"] / row["seconds"] / copy, rel=1e-3)


def test_products_of_one_row_are_faster_than_cublas() -> None:
    """And of 8 rows where lines are few; of 8 and 16 rows elsewhere as fast within 6 %."""
    record = json.loads((GOLDEN / "products_h200.json").read_text())
    times = {(row["lines"], row["inner"], row["rows"], row["kernel"]): row["seconds"] for row in record["rows"]}
    shapes = shapes_of("llama3-8b")
    assert len(times) == 2 * 3 * len(shapes)
    for *shape, rows in ((*shape, rows) for shape in shapes for rows in (1, 8, 16)):
        most = 1.0 if rows == 1 else 1.06
        assert times[*shape, rows, "skinny"] <= most * times[*shape, rows, "cublas"]
    assert all(row["error"] <= 2**-7 for row in record["rows"] if row["kernel"] == "skinny")


def test_record_as_tables_and_figure() -> None:
    record = json.loads((GOLDEN / "attention_h200.json").read_text())
    tables = attention_tables(record["runs"][0]["rows"])
    assert [title for title, _, _ in tables] == [
        f"head_dim {size}, {mask}" for size in (128, 64) for mask in ("causal", "full")
    ]
    for _, columns, body in tables:
        assert all(len(row) == len(columns) for row in body)
    failed = {
        "head_dim": 64,
        "causal": True,
        "length": 1,
        "plan": "dense",
        "kernel": "flex",
        "error": "RuntimeError: x",
    }
    assert "RuntimeError: x" in attention_tables([failed])[0][2][0]
    figure = attention_figure(record["runs"], device="NVIDIA H200")
    assert figure.count("32k tokens") >= 1
    assert "FlexAttention, head_dim 64" in figure
    decode = json.loads((GOLDEN / "decode_h200.json").read_text())["rows"]
    (_, columns, body) = decode_tables(decode)[0]
    assert len(body) == len(decode)
    assert all(len(row) == len(columns) for row in body)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU answers")
@pytest.mark.parametrize("command", ["attention", "decode"])
def test_a_kernel_bench_without_a_gpu_says_so(command: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["bench", command, "-o", str(tmp_path / "out.json")])
    assert done.exit_code == 1
    assert "must be a GPU that torch can use" in done.stderr
    assert not list(tmp_path.iterdir())
