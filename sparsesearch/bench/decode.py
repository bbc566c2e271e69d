"""Decoding on a device: bytes of keys and values over time, ragged against uniform heads, beside the copy bandwidth of the same run.

The copy bandwidth is that of 4 GB, where starting and ending do not count. They do count for the tens of microseconds that a small cache
takes, so each size has two more rows: a copy of as many bytes (half read, half written), and a kernel that only reads them.

    python -m sparsesearch.bench.decode --json out.json
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sparsesearch.bench.predicted import shipped_costs
from sparsesearch.bench.timing import ceilings, median_s, provenance
from sparsesearch.bench.triton_read import read_both
from sparsesearch.cost.base import DecodeWork
from sparsesearch.kernels.decode import ragged_decode

CACHE_COPIES = 3
"""Replays rotate among so many caches, so that none is read from L2."""


def run(
    *,
    shapes: Sequence[tuple[int, int]] = ((1, 32768), (1, 131072), (8, 16384), (8, 32768), (16, 16384)),
    kept: Sequence[float] = (1.0, 0.5, 0.25),
    num_heads: int = 32,
    num_kv_heads: int = 8,
    head_dim: int = 128,
    budget_s: float = 0.1,
    command: list[str] | None = None,
    progress: Callable[[dict[str, Any]], None] = lambda row: None,
) -> dict[str, Any]:
    """Time uniform and ragged caches of equal bytes, and cuDNN on the uniform dense one.

    Args:
        shapes: (batch, keys per sequence).
        kept: mean share of keys kept. Ragged: the heads of each sequence keep between a quarter and seven quarters of that.
        num_heads: query heads.
        num_kv_heads: KV heads.
        head_dim: bf16.
        budget_s: device time per case.
        command: recorded as the command line.
        progress: called with each finished row.
    """
    top = ceilings()
    rows: list[dict[str, Any]] = []

    def record(row: dict[str, Any]) -> None:
        row["bytes_per_s"] = row["bytes"] / row["seconds"]
        row["copy_share"] = row["bytes_per_s"] / top["copy_bytes_per_s"]
        rows.append(row)
        progress(row)

    for batch, length in shapes:
        _one_shape(batch, length, kept, num_heads, num_kv_heads, head_dim, budget_s, record)
        torch.cuda.empty_cache()
    return {"format": "sparsesearch.bench.decode", "provenance": provenance(command), "ceilings": top, "rows": rows}


def _one_shape(
    batch: int,
    length: int,
    kept: Sequence[float],
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    budget_s: float,
    record: Callable[[dict[str, Any]], None],
) -> None:
    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device="cuda", dtype=torch.bfloat16)

    caches = [[normal(batch, num_kv_heads, length, head_dim) for _ in "kv"] for _ in range(CACHE_COPIES)]
    q = normal(batch, num_heads, head_dim)
    starts = torch.arange(batch * num_kv_heads, device="cuda") * length

    def ragged(lens: Tensor) -> None:
        for k, v in caches:
            ragged_decode(q, k.view(-1, head_dim), v.view(-1, head_dim), starts, lens, scale=head_dim**-0.5)

    def dense() -> None:
        for k, v in caches:
            F.scaled_dot_product_attention(q[:, :, None], k, v, enable_gqa=True)

    case = {"batch": batch, "length": length}
    costs = shipped_costs()
    for share in kept:
        num_bytes = round(share * batch * num_kv_heads * length) * head_dim * 4
        for kernel, seconds in _ceilings_of(caches, num_bytes, budget_s):
            record(
                case | {"kernel": kernel, "lengths": "uniform", "kept": share, "bytes": num_bytes, "seconds": seconds}
            )
    for share in kept:
        for kind in ("uniform", "ragged"):
            lens = _lengths(kind, share, batch, num_kv_heads, length)
            seconds = median_s(partial(ragged, lens), budget_s=budget_s) / CACHE_COPIES
            row = {"kernel": "ragged_decode", "lengths": kind, "kept": share, "bytes": int(lens.sum()) * head_dim * 4}
            if costs is not None:
                heads = [
                    DecodeWork(float(kept_keys), head_dim, num_heads // num_kv_heads) for kept_keys in lens.tolist()
                ]
                row["predicted_s"] = costs.decode_attention_s(heads)
            record(case | row | {"seconds": seconds})
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        seconds = median_s(dense, budget_s=budget_s) / CACHE_COPIES
    row = {"kernel": "cudnn", "lengths": "uniform", "kept": 1.0, "bytes": batch * num_kv_heads * length * head_dim * 4}
    record(case | row | {"seconds": seconds})


def _ceilings_of(caches: list[list[Tensor]], num_bytes: int, budget_s: float) -> Iterator[tuple[str, float]]:
    """Time to copy as many bytes (read and written) as the keys and values have, and time to read them only."""
    flat = [k.view(-1).view(torch.int32) for k, _ in caches], [v.view(-1).view(torch.int32) for _, v in caches]
    half = num_bytes // 8  # numbers of four bytes, in the keys and in the values each

    def copy() -> None:
        for source, target in zip(flat[0], flat[1][1:] + flat[1][:1], strict=True):
            torch.add(source[:half], 0, out=target[:half])

    def read() -> None:
        for keys, values in zip(*flat, strict=True):
            read_both(keys[:half], values[:half])

    for kernel, work in (("copy", copy), ("read", read)):
        yield kernel, median_s(work, budget_s=budget_s) / CACHE_COPIES


def _lengths(kind: str, share: float, batch: int, num_kv_heads: int, length: int) -> Tensor:
    """Keys per pair; ragged ones have the same sum as uniform ones."""
    uniform = torch.full((batch, num_kv_heads), share * length)
    if kind == "ragged":
        spread = torch.linspace(0.25, 1.75, num_kv_heads)
        uniform = uniform * (spread if share <= 4 / 7 else 1 - (1 - share) * (2 - spread) / share)
    return uniform.clamp(1, length).round().int().flatten().cuda()


def main() -> None:
    """Command line: all cases, a line of JSON per row on stderr, the whole record in a file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True, help="where to write the record")

    def show(row: dict[str, Any]) -> None:
        sys.stderr.write(json.dumps(row) + "\n")

    given = parser.parse_args()
    given.json.write_text(json.dumps(run(progress=show), indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
