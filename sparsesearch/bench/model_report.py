"""What a benchmark of a whole model found, as tables and as a figure."""

import math
from typing import Any

from sparsesearch.report.plot import Curve, Panel, plot

Table = tuple[str, list[str], list[list[object]]]
_SHOWN = {"dense": "dense", "dense_fused": "dense", "plan": "plan"}


def rows_of(record: dict[str, Any]) -> list[Table]:
    """Title, column names and rows of each table that has any."""
    prefill = _by_length(record)
    decode = [row for row in record["rows"] if row["phase"] == "decode"]
    tables: list[Table] = []
    if prefill:
        names = [
            "tokens",
            "dense (s)",
            "plan (s)",
            "predicted (s)",
            "speed-up",
            "of Amdahl bound",
            "density",
            "index / attention",
            "kv kept",
            "peak (GB)",
        ]
        keys = [
            "length",
            "dense_s",
            "plan_s",
            "predicted_s",
            "speedup",
            "bound_share",
            "density",
            "index_share",
            "kv_fraction",
        ]
        body = [[*(row.get(key) for key in keys), row["plan_peak_bytes"] / 1e9] for row in prefill]
        tables.append((f"{record['model']}: time to first token", names, body))
    captured = [row for row in prefill if "plan_graph_s" in row]
    if captured:
        names = ["tokens", "dense (s)", "plan (s)", "speed-up"]
        body = [
            [row["length"], row["dense_graph_s"], row["plan_graph_s"], row["dense_graph_s"] / row["plan_graph_s"]]
            for row in captured
        ]
        tables.append((f"{record['model']}: time to first token, both replayed from a CUDA graph", names, body))
    if decode:
        names = ["variant", "batch", "tokens/s", "ms/step", "predicted", "of byte bound", "GB/sequence", "peak (GB)"]
        body = [
            [_SHOWN[row["variant"]] + _way(row), row["batch"], row["tokens_per_s"], row["step_s"] * 1e3, _predicted_ms(row), row["bound_share"],
             row["cache_bytes_per_sequence"] / 1e9, row["peak_bytes"] / 1e9]
            for row in decode
        ]  # fmt: skip
        tables.append((f"{record['model']}: decoding, {decode[0]['tokens']} tokens in the cache", names, body))
    return tables


def _by_length(record: dict[str, Any]) -> list[dict[str, Any]]:
    return sorted((row for row in record["rows"] if row["phase"] == "prefill"), key=lambda row: int(row["length"]))


def _predicted_ms(row: dict[str, Any]) -> float | None:
    return row["predicted_s"] * 1e3 if "predicted_s" in row else None


def _way(row: dict[str, Any]) -> str:
    return ", fused" if row.get("fused") else ""


def figure(record: dict[str, Any]) -> str:
    """Speed-up of the first token over length, and tokens per second over batch, each beside its bound, as one SVG."""
    prefill = _by_length(record)
    decode = [row for row in record["rows"] if row["phase"] == "decode"]
    panels = []
    if prefill:
        lengths = [math.log2(row["length"] / 1024) for row in prefill]
        curves = [
            Curve(name, [(x, row["dense_s"] / row[key]) for x, row in zip(lengths, prefill, strict=True)])
            for name, key in (("dense (cuDNN)", "dense_s"), ("plan", "plan_s"), ("bound", "bound_s"))
        ]
        panels.append(Panel("Time to first token", "log2 of the prompt in k tokens", "speed-up", curves, zero_y=True))
    if decode:
        curves = []
        for variant, name in (("dense", "dense (cuDNN)"), ("dense_fused", "dense, fused"), ("plan", "plan")):
            own = sorted((row["batch"], row["tokens_per_s"]) for row in decode if row["variant"] == variant)
            curves += [Curve(name, own)] if own else []
        own = sorted({(row["batch"], row["batch"] / row["bound_s"]) for row in decode if row["variant"] == "plan"})
        curves += [Curve("bound", own)] if own else []
        panels.append(
            Panel(f"Decoding at {decode[0]['tokens']} tokens", "batch", "tokens per second", curves, zero_y=True)
        )
    return plot(panels, title=f"{record['model']} on {record['provenance']['device']}")
