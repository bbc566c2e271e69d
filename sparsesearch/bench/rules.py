"""How long choosing takes: every dynamic rule's index against dense attention of the same call. Run: python -m sparsesearch.bench.rules --json OUT."""

import argparse
import json
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sparsesearch.artifacts import canonical_json, sha256_text
from sparsesearch.bench.timing import median_s, provenance
from sparsesearch.block_mask import BlockGrid
from sparsesearch.rules import Rule, parse_rule, rule_kinds

LENGTHS = (32768, 131072)
NUM_HEADS, HEAD_DIM = 32, 128
CASES: tuple[tuple[int, dict[str, Any]], ...] = (
    (64, {"kind": "pooled_topk", "keep": {"b": 0.15}}),
    (64, {"kind": "vertical_slash", "vertical": {"b": 0.05}, "slash": {"b": 0.05}}),
    (64, {"kind": "antidiagonal", "mass": 0.9, "stride": 16}),
    (128, {"kind": "antidiagonal", "mass": 0.9, "stride": 16}),
    (128, {"kind": "flex_prefill", "gamma": 0.9}),
    (64, {"kind": "tree_topk", "keep": {"b": 0.15}, "queries": 4}),
    (64, {"kind": "chunk_topk", "keep": {"b": 0.15}, "chunk": 64}),
    (64, {"kind": "chunk_topk", "keep": {"b": 0.15}, "chunk": 64, "variable": True}),
    (64, {"kind": "bounds_topk", "keep": {"b": 0.15}, "prefill": True}),
    (64, {"kind": "token_rows", "tail": 0.1, "min_tokens": 1024}),
    (64, {"kind": "segment_topk", "keep": 0.15}),
    (64, {"kind": "skip_softmax", "prefill_scale": 1000.0}),
)


def run(
    *,
    lengths: tuple[int, ...] = LENGTHS,
    device: str = "cuda",
    progress: Callable[[dict[str, Any]], None] = lambda _: None,
) -> dict[str, Any]:
    """Time every case; queries are random walks, so that neighbours resemble each other as in a real model.

    Args:
        lengths: prompt lengths in tokens.
        device: cuda, or cpu to try the bench itself.
        progress: called with each row.

    Returns:
        The record: provenance and one row per case and length, with seconds, the share of dense attention's time, peak bytes, density.
    """
    rows = []
    for length in lengths:
        q, k, v = _inputs(length, device)
        dense_s = _dense_s(q, k, v, device)
        for block_tokens, data in CASES:
            rule = parse_rule(data, where="bench")
            row = {"rule": rule.label, "block_tokens": block_tokens, "length": length, "dense_s": dense_s}
            row |= _time(rule, BlockGrid(length, length, block_tokens), q[0] * HEAD_DIM**-0.5, k[0], device)
            progress(row)
            rows.append(row)
    body = {"format": "sparsesearch.bench.rules", "rows": rows, "num_heads": NUM_HEADS, "head_dim": HEAD_DIM}
    where = provenance() if device == "cuda" else {"device": device}
    return {**body, "provenance": where, "sha256": sha256_text(canonical_json(body))}


def untimed_kinds() -> set[str]:
    """Dynamic rules that choose for themselves, from queries and keys alone, and that no case covers."""
    choosing = {
        kind for kind, rule in rule_kinds().items() if rule.dynamic and not rule.reuses and not rule.needs_layout
    }
    return choosing - {data["kind"] for _, data in CASES} - {"dense_source"}  # which computes all tiles


def _inputs(length: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator(device).manual_seed(length)
    steps = torch.randn(3, 1, NUM_HEADS, length, HEAD_DIM, generator=generator, device=device, dtype=torch.bfloat16)
    mixed = 0.7 * steps + 0.7 * steps[..., ::64, :].repeat_interleave(64, -2)
    return mixed[0], mixed[1], mixed[2]


def _dense_s(q: Tensor, k: Tensor, v: Tensor, device: str) -> float | None:
    def dense() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    if device == "cpu":
        return None
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return median_s(dense, graph=False)


def _time(rule: Rule, grid: BlockGrid, q: Tensor, k: Tensor, device: str) -> dict[str, Any]:
    """Seconds of `select` replayed as a CUDA graph, which also proves that nothing waits for the host."""

    def choose() -> Tensor:
        return rule.select(grid, q, k)

    reachable = grid.reachable(device)
    density = float((choose() & reachable).float().mean() / reachable.float().mean())
    if device == "cpu":
        return {"density": density}
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with no_host_wait():
        choose()
    peak = torch.cuda.max_memory_allocated() - before
    return {"density": density, "seconds": median_s(choose, budget_s=0.1), "peak_bytes": peak}


@contextmanager
def no_host_wait() -> Iterator[None]:
    """Any operation that waits for the device raises."""
    try:
        with warnings.catch_warnings(action="ignore"):  # torch calls the mode a prototype
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def main() -> None:
    """Command line: all cases, a line of JSON per row on stderr, the whole record in a file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True, help="where to write the record")
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS))
    parser.add_argument("--device", default="cuda")
    given = parser.parse_args()

    def show(row: dict[str, Any]) -> None:
        sys.stderr.write(json.dumps(row) + "\n")

    record = run(lengths=tuple(given.lengths), device=given.device, progress=show)
    given.json.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
