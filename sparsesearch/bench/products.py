"""Products of few rows on a device: the fused step's kernel beside cuBLAS, over weights of many layers, so that none is read from L2.

python -m sparsesearch.bench.products --json out.json                   what ships
python -m sparsesearch.bench.products --tilings --json out.json         what else was considered
python -m sparsesearch.bench.products --model qwen3-4b --json out.json  another model's products
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsesearch.bench.timing import ceilings, median_s, provenance
from sparsesearch.kernels import triton_skinny
from sparsesearch.kernels.skinny_tiling import Tiling, tiling_for
from sparsesearch.model_shapes import model_shape

CONSIDERED = {
    1: (Tiling(4, 2048, 3, 4, 0), Tiling(8, 1024, 4, 4, 0), Tiling(8, 1024, 4, 4, 16), Tiling(16, 512, 4, 4, 0)),
    8: (Tiling(16, 256, 6, 1, 0), Tiling(16, 256, 6, 1, 16), Tiling(32, 256, 4, 2, 0), Tiling(32, 512, 3, 2, 0)),
    16: (Tiling(16, 512, 4, 1, 16), Tiling(32, 256, 4, 4, 0), Tiling(64, 128, 4, 4, 0), Tiling(128, 128, 4, 4, 0)),
}
"""Tilings for up to so many rows."""
_WEIGHT_BYTES = 1 << 30


def shapes_of(model: str) -> tuple[tuple[int, int], ...]:
    """(lines of weights, inner columns) of a named model: queries with keys and values, output, gate with up, down, and the vocabulary.

    Raises:
        SpecError: no such model.
    """
    shape = model_shape(model)
    heads = shape.num_heads * shape.head_dim
    both = heads + 2 * shape.num_kv_heads * shape.head_dim
    hidden, wide = shape.hidden_size, shape.intermediate_size
    return (both, hidden), (hidden, heads), (2 * wide, hidden), (hidden, wide), (shape.vocab_size, hidden)


def run(
    *,
    shapes: Sequence[tuple[int, int]],
    rows: Sequence[int] = (1, 8, 16),
    tilings: bool = False,
    budget_s: float = 0.05,
    command: list[str] | None = None,
    progress: Callable[[dict[str, Any]], None] = lambda row: None,
) -> dict[str, Any]:
    """Time each product, cuBLAS first; share is that of the time in which the copy bandwidth moves the weights.

    Args:
        shapes: (lines of weights, inner columns), bf16.
        rows: of the input; keys of `CONSIDERED` if these are tried.
        tilings: all that were considered, or else the one that ships.
        budget_s: device time per case.
        command: recorded as the command line.
        progress: called with each finished row.
    """
    top, found = ceilings(), []
    for lines, inner in shapes:
        for row in _one_shape(lines, inner, rows, tilings, budget_s):
            row["copy_share"] = 2 * lines * inner / top["copy_bytes_per_s"] / row["seconds"]
            found.append(row)
            progress(row)
        torch.cuda.empty_cache()
    return {"format": "sparsesearch.bench.products", "provenance": provenance(command), "ceilings": top, "rows": found}


def _one_shape(lines: int, inner: int, rows: Sequence[int], tilings: bool, budget_s: float) -> Iterator[dict[str, Any]]:
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device="cuda", dtype=torch.bfloat16, generator=generator)

    weights = [normal(lines, inner) for _ in range(max(2, _WEIGHT_BYTES // (2 * lines * inner)))]
    for count in rows:
        x, out = normal(count, inner), normal(count, lines)

        def cublas(x: Tensor = x) -> None:
            for weight in weights:
                F.linear(x, weight)

        case = {"lines": lines, "inner": inner, "rows": count}
        yield case | {"kernel": "cublas", "seconds": median_s(cublas, budget_s=budget_s) / len(weights)}
        for tiling in CONSIDERED[count] if tilings else (tiling_for(lines, inner, count),):

            def ours(tiling: Tiling = tiling, x: Tensor = x, out: Tensor = out) -> None:
                for weight in weights:
                    triton_skinny.launch(x, weight, None, None, None, None, 0.0, False, out, out, out, tiling)

            ours()
            error = _error(out, x, weights[-1])
            seconds = median_s(ours, budget_s=budget_s) / len(weights)
            yield case | {"kernel": "skinny", "tiling": vars(tiling), "seconds": seconds, "error": error}


def _error(out: Tensor, x: Tensor, weight: Tensor) -> float:
    """Largest distance from the product in fp32, over its largest value."""
    exact = x.float() @ weight.float().T
    return float((out.float() - exact).abs().max() / exact.abs().max())


def main() -> None:
    """Command line: a line of JSON per row on stderr, the whole record in a file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="llama3-8b", help="whose shapes, by name")
    parser.add_argument("--json", type=Path, required=True, help="where to write the record")
    parser.add_argument(
        "--tilings", action="store_true", help="try the tilings that were considered, not only the one that ships"
    )

    def show(row: dict[str, Any]) -> None:
        sys.stderr.write(json.dumps(row) + "\n")

    given = parser.parse_args()
    command = ["python -m sparsesearch.bench.products", *sys.argv[1:]]
    record = run(shapes=shapes_of(given.model), tilings=given.tilings, command=command, progress=show)
    given.json.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
