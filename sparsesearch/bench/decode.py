"""Decoding on a device: bytes of keys and values over time, ragged against uniform heads, beside the copy bandwidth of the same run.

The copy bandwidth is that of 4 GB, where starting and ending do not count. They do count for the tens of microseconds that a small cache
takes, so each size has two more rows: a copy of as many bytes (half read, half written), and a kernel that only reads them.

Every kernel is timed in CUDA graphs of as many calls as a decode step of a model has layers, one after the other and each on another cache:
a graph takes some microseconds to begin and to end, which a step pays once and not once per layer.

    python -m sparsesearch.bench.decode --json out.json [--shapes 32x4096,32x8192]
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from math import ceil
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sparsesearch.bench.predicted import shipped_costs
from sparsesearch.bench.timing import ceilings, provenance
from sparsesearch.bench.triton_read import read_both
from sparsesearch.cost.base import DecodeWork
from sparsesearch.cost.device.timing import event_times, repeated
from sparsesearch.kernels.decode import ragged_decode

SHAPES = ((1, 32768), (1, 131072), (8, 16384), (8, 32768), (16, 8192), (16, 16384), (32, 4096), (32, 8192))
"""Sequences, and keys of each."""
LAYERS = 32
"""Calls of a graph."""
L2_SIZES = 8
"""Calls take turns over caches that hold at least so many times what L2 does, so that next to nothing is read from L2."""


def run(
    *,
    shapes: Sequence[tuple[int, int]] = SHAPES,
    kept: Sequence[float] = (1.0, 0.5, 0.25),
    num_heads: int = 32,
    num_kv_heads: int = 8,
    head_dim: int = 128,
    budget_s: float = 0.1,
    command: list[str] | None = None,
    progress: Callable[[dict[str, Any]], None] = lambda record: None,
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
        progress: called with the record so far whenever a row is finished.
    """
    top = ceilings()
    rows: list[dict[str, Any]] = []
    found = {"format": "sparsesearch.bench.decode", "provenance": provenance(command), "ceilings": top, "rows": rows}

    def record(row: dict[str, Any]) -> None:
        row["bytes_per_s"] = row["bytes"] / row["seconds"]
        row["copy_share"] = row["bytes_per_s"] / top["copy_bytes_per_s"]
        rows.append(row)
        progress(found)

    for batch, length in shapes:
        _one_shape(batch, length, kept, num_heads, num_kv_heads, head_dim, budget_s, record)
        torch.cuda.empty_cache()
    return found


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

    fewest_bytes = min(kept) * batch * num_kv_heads * length * head_dim * 4
    copies = max(3, ceil(L2_SIZES * torch.cuda.get_device_properties(0).L2_cache_size / fewest_bytes))
    caches = [[normal(batch, num_kv_heads, length, head_dim) for _ in "kv"] for _ in range(copies)]
    q = normal(batch, num_heads, head_dim)
    starts = torch.arange(batch * num_kv_heads, device="cuda") * length

    def ragged(lens: Tensor, copy: int) -> None:
        k, v = (cache.view(-1, head_dim) for cache in caches[copy])
        ragged_decode(q, k, v, starts, lens, scale=head_dim**-0.5)

    def dense(copy: int) -> None:
        k, v = caches[copy]
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
            lens = lengths_of(kind, share, batch, num_kv_heads, length)
            seconds = _step_s(partial(ragged, lens), copies, budget_s)
            row = {"kernel": "ragged_decode", "lengths": kind, "kept": share, "bytes": int(lens.sum()) * head_dim * 4}
            if costs is not None:
                heads = [
                    DecodeWork(float(kept_keys), head_dim, num_heads // num_kv_heads) for kept_keys in lens.tolist()
                ]
                row["predicted_s"] = costs.decode_attention_s(heads)
            record(case | row | {"seconds": seconds})
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        seconds = _step_s(dense, copies, budget_s)
    row = {"kernel": "cudnn", "lengths": "uniform", "kept": 1.0, "bytes": batch * num_kv_heads * length * head_dim * 4}
    record(case | row | {"seconds": seconds})


def _step_s(call: Callable[[int], object], copies: int, budget_s: float) -> float:
    """Median time of one of the calls that a replay holds; `call` works on the cache of the given number."""
    for copy in range(copies):
        call(copy)
    replay = repeated(call, LAYERS, copies=copies)
    first = statistics.median(event_times(replay, 2))
    return statistics.median(event_times(replay, max(5, round(budget_s / first)))) / LAYERS


def _ceilings_of(caches: list[list[Tensor]], num_bytes: int, budget_s: float) -> Iterator[tuple[str, float]]:
    """Time to copy as many bytes (read and written) as the keys and values have, and time to read them only."""
    flat = [[tensor.view(-1).view(torch.int32) for tensor in cache] for cache in caches]
    half = num_bytes // 8  # numbers of four bytes, in the keys and in the values each

    def copy(number: int) -> None:
        torch.add(flat[number][0][:half], 0, out=flat[(number + 1) % len(flat)][1][:half])

    def read(number: int) -> None:
        keys, values = flat[number]
        read_both(keys[:half], values[:half])

    for kernel, work in (("copy", copy), ("read", read)):
        yield kernel, _step_s(work, len(flat), budget_s)


def lengths_of(kind: str, share: float, batch: int, num_kv_heads: int, length: int) -> Tensor:
    """Keys per pair; ragged ones have the same sum as uniform ones."""
    uniform = torch.full((batch, num_kv_heads), share * length)
    if kind == "ragged":
        spread = torch.linspace(0.25, 1.75, num_kv_heads)
        uniform = uniform * (spread if share <= 4 / 7 else 1 - (1 - share) * (2 - spread) / share)
    return uniform.clamp(1, length).round().int().flatten().cuda()


def _shapes_of(text: str) -> tuple[tuple[int, int], ...]:
    found = []
    for one in text.split(","):
        batch, length = (int(number) for number in one.split("x"))
        found.append((batch, length))
    return tuple(found)


def main() -> None:
    """Command line: all cases, a line of JSON per row on stderr, the record in a file, written again with every row: a run may be cut short."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True, help="where to write the record")
    parser.add_argument("--shapes", type=_shapes_of, default=SHAPES, help="such as 8x16384,32x4096: sequences x keys")

    given = parser.parse_args()

    def keep(record: dict[str, Any]) -> None:
        sys.stderr.write(json.dumps(record["rows"][-1]) + "\n")
        given.json.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")

    run(shapes=given.shapes, progress=keep)


if __name__ == "__main__":
    main()
