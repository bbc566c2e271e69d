"""What the benchmarks of the kernels found, as tables and as a figure."""

from collections.abc import Iterable
from typing import Any

from sparsesearch.report.plot import Curve, Panel, plot

Table = tuple[str, list[str], list[list[object]]]


def attention_tables(rows: Iterable[dict[str, Any]]) -> list[Table]:
    """One table per head width and mask: time, R, TFLOP/s and error of each kernel, plan and length."""
    tables: list[Table] = []
    for key, own in _grouped(rows, "head_dim", "causal").items():
        head_dim, causal = key
        names = ["tokens", "plan", "density", "kernel", "ms", "R", "TFLOP/s", "of matmul", "fp64 error"]
        body = [
            [row["length"], row["plan"], row.get("density"), row["kernel"], row["seconds"] * 1e3, row.get("R"), row["tflop_per_s"],
             row["ceiling_share"], row.get("fp64_error")]
            if "seconds" in row
            else [row["length"], row["plan"], None, row["kernel"], row["error"], None, None, None, None]
            for row in own
        ]  # fmt: skip
        tables.append((f"head_dim {head_dim}, {'causal' if causal else 'full'}", names, body))
    return tables


def decode_tables(rows: Iterable[dict[str, Any]]) -> list[Table]:
    """Bytes of keys and values over time, and their share of the copy bandwidth."""
    names = ["batch", "tokens", "kernel", "lengths", "kept", "MB", "us", "TB/s", "of copy"]
    body: list[list[object]] = [
        [row["batch"], row["length"], row["kernel"], row["lengths"], row["kept"], row["bytes"] / 1e6, row["seconds"] * 1e6,
         row["bytes_per_s"] / 1e12, row["copy_share"]]
        for row in rows
    ]  # fmt: skip
    return [("Decoding: ragged against uniform keys", names, body)]


def attention_figure(runs: Iterable[dict[str, Any]], *, device: str) -> str:
    """Speed-up over the fastest dense kernel against density, causal, at 32k and 8k; the line is what a skipped block that costs nothing gives."""
    rows = [row for run in runs for row in run["rows"] if row["causal"] and row.get("R") and row["plan"] != "dense"]
    panels = []
    for length in (8192, 32768):
        curves = []
        for head_dim in (128, 64):
            for kernel, name in (("gluon", "ours"), ("flex", "FlexAttention")):
                own = [r for r in rows if (r["length"], r["head_dim"], r["kernel"]) == (length, head_dim, kernel)]
                points = sorted({round(row["density"], 3): 1 / (row["density"] * row["R"]) for row in own}.items())
                if points:
                    curves.append(Curve(f"{name}, head_dim {head_dim}", points))
        if curves:
            sparsest = min(point[0] for curve in curves for point in curve.points)
            ideal = [sparsest * (1 / sparsest) ** (step / 40) for step in range(41)]
            ideal = [x for x in ideal if x <= max(point[0] for curve in curves for point in curve.points)]
            curves.insert(0, Curve("1 / density", [(x, 1 / x) for x in ideal]))
            panels.append(Panel(f"{length // 1024}k tokens", "density", "speed-up over cuDNN", curves, log_y=True))
    return plot(panels, title=f"Prefill attention on {device}, bf16, 32 query / 8 KV heads, causal")


def _grouped(rows: Iterable[dict[str, Any]], *names: str) -> dict[tuple[Any, ...], list[dict[str, Any]]]:
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    return groups
