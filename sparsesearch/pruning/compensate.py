"""Compensation: after a cut, refit every output projection so that the residual stream stays near the dense one. No training.

Layer by layer, in the order of the data flow: inputs come from the model as it is cut and refitted so far, targets from the dense model,
so errors of earlier layers are corrected rather than added up. One layer is in work at a time; only hidden states are kept.

Source: least-squares reconstruction as in He, Zhang, Sun 2017, arXiv:1707.06168, section 3.2; asymmetric targets (inputs of the compressed
model, outputs of the dense one) as in its section 3.2.3. Differs: the target also contains the drift of the residual stream.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsesearch.cut import Cut
from sparsesearch.pruning.moments import real_rows
from sparsesearch.pruning.quality import Batch, on_device
from sparsesearch.pruning.reconstruction import refit
from sparsesearch.runtime.shrink import Fitted, check_cut
from sparsesearch.runtime.sublayers import Layer, Layout, layers_of

Progress = Callable[[str, int, int], None]


@dataclass
class _Stream:
    """One batch on its way through the layers, in the dense and in the cut model."""

    batch: Batch
    kwargs: list[dict[str, Any]]
    dense: Tensor
    cut: Tensor


@dataclass(frozen=True)
class _Pass:
    """One run of one layer: its output, and per sublayer the input, output and residual of the output projection."""

    output: Tensor
    entering: dict[str, Tensor]
    leaving: dict[str, Tensor]
    residual: dict[str, Tensor]


@torch.no_grad()
def compensate(
    model: PreTrainedModel,
    cut: Cut,
    batches: Sequence[Batch],
    *,
    bias: bool = True,
    drift: float = 1.0,
    progress: Progress = lambda stage, done, total: None,
) -> dict[str, Fitted]:
    """Refit the output projections of the layers that a cut names. The model itself is as before afterwards.

    Args:
        model: dense, in evaluation mode.
        cut: what goes; a layer may be named without losing anything, to make up for the layers before it.
        batches: calibration data.
        bias: whether a projection may gain a bias that the stock architecture lacks.
        drift: how much of the distance between the dense and the cut residual stream each projection tries to make up for, 0 … 1.
        progress: called with (stage, done, total).

    Returns:
        Path of the output projection -> its new weights.

    Raises:
        PlanMismatchError: the cut was made for a model of other sizes.
    """
    layers = layers_of(model)
    check_cut(cut, layers)
    fitted: dict[str, Fitted] = {}
    if not cut.layers:
        return fitted
    first, last = min(cut.layers), max(cut.layers)
    streams = [_start(model, layers, batch, first) for batch in batches]
    for index in range(first, last + 1):
        progress("compensate", index - first, last + 1 - first)
        layer = layers[index]
        dense = [_run(layer, stream.dense, stream.kwargs[index]) for stream in streams]
        with installed(layer) as install:
            for kind, layout in layer.sublayers if index in cut.layers else ():
                new = _fit(layer, kind, _kept(cut, index, kind, layer), streams, dense, index, bias, drift)
                fitted[f"{layer.path}.{layout.out}"] = new
                install(layout, new)
            for stream, before in zip(streams, dense, strict=True):
                stream.cut = _run(layer, stream.cut, stream.kwargs[index]).output
                stream.dense = before.output
    progress("compensate", last + 1 - first, last + 1 - first)
    return fitted


def _fit(
    layer: Layer,
    kind: str,
    kept: Tensor,
    streams: list[_Stream],
    dense: list[_Pass],
    index: int,
    bias: bool,
    drift: float,
) -> Fitted:
    """Refit one output projection on what the cut model feeds it."""
    layout = dict(layer.sublayers)[kind]
    projection = layer.projection(layout.out)
    weight = projection.weight.detach()
    moments = _Moments(weight)
    for stream, before in zip(streams, dense, strict=True):
        now = _run(layer, stream.cut, stream.kwargs[index])
        target = before.leaving[kind] + drift * (before.residual[kind] - now.residual[kind])
        moments.add(real_rows(now.entering[kind], stream.batch), real_rows(target, stream.batch))
    return moments.fitted(weight, kept.to(weight.device), with_bias=bias or projection.bias is not None)


class _Moments:
    """Sums over tokens of inputs x and targets t, in fp64."""

    def __init__(self, weight: Tensor) -> None:
        outputs, inputs = weight.shape
        self.xx, self.tx, self.x, self.t = (
            torch.zeros(shape, dtype=torch.float64, device=weight.device)
            for shape in ((inputs, inputs), (outputs, inputs), (inputs,), (outputs,))
        )
        self.count = 0

    def add(self, x: Tensor, target: Tensor) -> None:
        x, target = x.float(), target.float()
        self.xx += (x.t() @ x).double()
        self.tx += (target.t() @ x).double()
        self.x += x.double().sum(0)
        self.t += target.double().sum(0)
        self.count += len(x)

    def fitted(self, weight: Tensor, kept: Tensor, *, with_bias: bool) -> Fitted:
        xx, tx, x, t = (part / self.count for part in (self.xx, self.tx, self.x, self.t))
        if not with_bias:
            return Fitted(refit(weight, kept, xx, tx).to(weight.dtype), None)
        new = refit(weight, kept, xx - torch.outer(x, x), tx - torch.outer(t, x))
        return Fitted(new.to(weight.dtype), (t - new @ x).to(weight.dtype))


def _kept(cut: Cut, index: int, kind: str, layer: Layer) -> Tensor:
    """Positions of the inputs of an output projection that stay."""
    own = cut.layers[index]
    if kind == "feed_forward":
        return torch.tensor(own.kept_channels, dtype=torch.long)
    return (
        torch.tensor(own.kept_heads, dtype=torch.long)[:, None] * layer.head_dim + torch.arange(layer.head_dim)
    ).flatten()


def _start(model: PreTrainedModel, layers: tuple[Layer, ...], batch: Batch, first: int) -> _Stream:
    """Run the model densely once; keep what enters the first cut layer, and every layer's other arguments."""
    kwargs: list[dict[str, Any]] = [{} for _ in layers]
    entering: list[Tensor] = []

    def hook(index: int) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def keep(module: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> None:
            names = inspect.signature(type(module).forward).parameters
            named = {**dict(zip(list(names)[1:], args, strict=False)), **given}
            hidden = named.pop("hidden_states")
            kwargs[index] = named
            if index == first:
                entering.append(hidden)

        return keep

    with ExitStack() as undo:
        for index, layer in enumerate(layers):
            handle = layer.module.register_forward_pre_hook(hook(index), with_kwargs=True)
            undo.callback(handle.remove)
        model.base_model(**on_device(batch, model), **({"use_cache": False} if "input_ids" in batch else {}))
    return _Stream(batch, kwargs, entering[0], entering[0])


def _run(layer: Layer, hidden: Tensor, kwargs: dict[str, Any]) -> _Pass:
    """Run a layer as it is now."""
    entering: dict[str, Tensor] = {}
    leaving: dict[str, Tensor] = {}
    normed: list[Tensor] = []

    def keep(kind: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            entering[kind], leaving[kind] = args[0], output

        return hook

    with ExitStack() as undo:
        for kind, layout in layer.sublayers:
            undo.callback(layer.projection(layout.out).register_forward_hook(keep(kind)).remove)
        if layer.feed_forward is not None:
            into = layer.projection(layer.feed_forward.into[0])
            undo.callback(into.register_forward_pre_hook(lambda _, args: normed.append(args[0])).remove)
        found = layer.module(hidden, **kwargs)
    output = found if isinstance(found, Tensor) else found[0]
    residual = {"attention": hidden}
    if layer.feed_forward is not None:
        residual["feed_forward"] = normed[0] if layer.feed_forward.post_norm else output - leaving["feed_forward"]
    return _Pass(output, entering, leaving, residual)


@contextmanager
def installed(layer: Layer) -> Iterator[Callable[[Layout, Fitted], None]]:
    """Lets fitted weights be put on the layer's projections; the dense ones come back at the end."""
    projections = [layer.projection(layout.out) for _, layout in layer.sublayers]
    saved = [(projection, projection.weight.data, projection.bias) for projection in projections]

    def put(layout: Layout, fitted: Fitted) -> None:
        projection = layer.projection(layout.out)
        projection.weight.data = fitted.weight
        if fitted.bias is not None:
            projection.register_parameter("bias", nn.Parameter(fitted.bias, requires_grad=False))

    try:
        yield put
    finally:
        for projection, weight, bias in saved:
            projection.weight.data = weight
            projection.register_parameter("bias", bias)
