"""What a model's layers take on a CPU besides attention: products by their rows, and norms, rotations, gates, residuals by their elements.

A product's rate depends on how many rows share the weights, and little on its widths: from 128 x 256 to 4096 x 1024 weights, within 10 % at
64 rows and more. So one curve over rows serves all shapes.
"""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from sparsesearch.cost.cpu_cases import Case
from sparsesearch.cost.table import LayerTable, PointwiseCost

WIDTHS = ((256, 256), (768, 256), (256, 768), (1024, 1024))
"""(outputs, inputs) of the products that are timed."""
WIDTH = 256
"""Of the pointwise layers'."""
HALF_HEAD = 16
"""Of the rotation."""


def layer_cases(rows: Sequence[int], generator: torch.Generator) -> list[Case]:
    """Products of every shape, and pointwise layers, at these numbers of rows."""
    products = [
        Case("linear", inputs, count, 1, partial(_product, torch.randn(outputs, inputs, generator=generator)))
        for outputs, inputs in WIDTHS
        for count in rows
    ]
    return products + [Case(name, WIDTH, count, 1, run) for name, run in POINTWISE.items() for count in rows]


def fit_layers(cases: Sequence[Case]) -> LayerTable:
    """The median rate over the shapes at each number of rows; a curve over elements for each pointwise layer."""
    rows = sorted({case.tokens for case in cases if case.group == "linear"})
    flop_s = []
    for count in rows:
        own = [case for case in cases if (case.group, case.tokens) == ("linear", count)]
        shapes = [outputs * inputs for outputs, inputs in WIDTHS]
        flop_s.append(
            float(np.median([case.taken_s / (2.0 * count * size) for case, size in zip(own, shapes, strict=True)]))
        )
    return LayerTable(
        rows=tuple(rows), flop_s=tuple(flop_s), pointwise={name: _curve(cases, name) for name in POINTWISE}
    )


def _curve(cases: Sequence[Case], name: str) -> PointwiseCost:
    own = sorted((case.tokens * case.head_dim, case.taken_s) for case in cases if case.group == name)
    elements, seconds = zip(*own, strict=True)
    return PointwiseCost(elements=elements, seconds=tuple(np.maximum.accumulate(seconds).tolist()))


def _product(weight: Float[Tensor, "outputs inputs"], x: Tensor, *_: Tensor) -> Tensor:
    return F.linear(x[0, 0], weight)


def _norm(x: Tensor, *_: Tensor) -> object:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * x[..., :1, :]


def _rotation(x: Tensor, cos: Tensor, sin: Tensor) -> object:
    heads, cos, sin = (each.unflatten(-1, (-1, 2 * HALF_HEAD)) for each in (x, cos, sin))
    return heads * cos + torch.cat((-heads[..., HALF_HEAD:], heads[..., :HALF_HEAD]), -1) * sin


def _gate(x: Tensor, up: Tensor, _: Tensor) -> object:
    return F.silu(x) * up


def _residual(x: Tensor, other: Tensor, _: Tensor) -> object:
    return x + other


def _transpose(x: Tensor, *_: Tensor) -> object:
    return x[0, 0].unflatten(-1, (-1, 2 * HALF_HEAD)).transpose(0, 1).contiguous()


POINTWISE: dict[str, Callable[[Tensor, Tensor, Tensor], object]] = {
    "norm": _norm,
    "rotation": _rotation,
    "gate": _gate,
    "residual": _residual,
    "transpose": _transpose,
}
"""As transformers computes them, by the names of `layer_parts`."""
