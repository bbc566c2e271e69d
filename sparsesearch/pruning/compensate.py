"""Compensation: after a cut, refit every projection so that the residual stream stays near the dense one. No training.

Layer by layer, in the order of the data flow: inputs come from the model as it is cut and refitted so far, targets from the dense model,
so errors of earlier layers are corrected rather than added up. Projections into a sublayer are fitted to give what they gave in the dense
model, the one out of it to bring the residual stream back. One layer is in work at a time; only hidden states are kept.

Source: least-squares reconstruction as in He, Zhang, Sun 2017, arXiv:1707.06168, section 3.2; asymmetric targets (inputs of the compressed
model, outputs of the dense one) as in its section 3.2.3. Differs: the target also contains the drift of the residual
stream, and the projections that lose no input are refitted too.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsesearch.cut import Cut
from sparsesearch.pruning.moments import real_rows
from sparsesearch.pruning.quality import Batch, on_device
from sparsesearch.pruning.regression import Regression
from sparsesearch.runtime.shrink import Fitted, check_cut
from sparsesearch.runtime.sublayers import Layer, layers_of

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
    """One run of one layer: its output, and of every projection the input and the output; per sublayer the residual stream it adds to."""

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
    inputs: bool = True,
    progress: Progress = lambda stage, done, total: None,
) -> dict[str, Fitted]:
    """Refit the projections of the layers that a cut names. The model itself is as before afterwards.

    Args:
        model: dense, in evaluation mode.
        cut: what goes; a layer may be named without losing anything, to make up for the layers before it.
        batches: calibration data; every fourth is set aside to choose the ridge of each fit.
        bias: whether an output projection may gain a bias that the stock architecture lacks.
        drift: how much of the distance between the dense and the cut residual stream each output projection tries to make up for, 0 … 1.
        inputs: whether the projections into a sublayer are refitted too, so that they answer the cut residual stream as they did the dense.
        progress: called with (stage, done, total).

    Returns:
        Path of the projection -> its new weights: all rows, and zero columns for removed inputs.

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
        dense = [replace(_run(layer, stream.dense, stream.kwargs[index]), entering={}) for stream in streams]
        with installed(layer) as install:
            for kind, layout in layer.sublayers if index in cut.layers else ():
                kept = _kept(cut, index, kind, layer)
                # nothing has drifted before the first projection of all, and nothing reads what an empty sublayer is given
                stages = ([layout.into] if inputs and len(kept) and fitted else []) + [(layout.out,)]
                for names in stages:
                    goal = _Goal(layer, index, kind, names, bias, drift)
                    for name, new in _fit(goal, kept, streams, dense).items():
                        fitted[f"{layer.path}.{name}"] = new
                        install(name, new)
            for stream, before in zip(streams, dense, strict=True):
                stream.cut = _run(layer, stream.cut, stream.kwargs[index]).output
                stream.dense = before.output
    progress("compensate", last + 1 - first, last + 1 - first)
    return fitted


@dataclass(frozen=True)
class _Goal:
    """Projections of one sublayer that are refitted together: those into it, or the one out of it."""

    layer: Layer
    index: int
    kind: str
    names: tuple[str, ...]
    bias: bool
    drift: float

    def outgoing(self) -> bool:
        return self.names == (dict(self.layer.sublayers)[self.kind].out,)


def _fit(goal: _Goal, kept: Tensor, streams: list[_Stream], dense: list[_Pass]) -> dict[str, Fitted]:
    """Refit projections on what the cut model feeds them."""
    layer, layout = goal.layer, dict(goal.layer.sublayers)[goal.kind]
    fits = {}
    for name in goal.names:
        projection = layer.projection(name)
        own_bias = projection.bias is not None
        fits[name] = Regression(projection.weight.detach(), with_bias=own_bias or (goal.bias and goal.outgoing()))
    # the residual stream before a feed-forward part that normalises first is known only when the layer is through
    until = None if goal.outgoing() and goal.kind == "feed_forward" and not layout.post_norm else goal.names
    for number, (stream, before) in enumerate(zip(streams, dense, strict=True)):
        now = _run(layer, stream.cut, stream.kwargs[goal.index], until=until)
        for name, regression in fits.items():
            target = before.leaving[name]
            if goal.outgoing():
                target = target + goal.drift * (before.residual[goal.kind] - now.residual[goal.kind])
            regression.add(number, real_rows(now.entering[name], stream.batch), real_rows(target, stream.batch))
    device = fits[goal.names[0]].weight.device
    return {
        name: regression.solve(
            kept.to(device) if goal.outgoing() else torch.arange(regression.weight.shape[1], device=device)
        )
        for name, regression in fits.items()
    }


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


class _Reached(Exception):
    """All that was asked of a layer is known."""


def _run(layer: Layer, hidden: Tensor, kwargs: dict[str, Any], *, until: Sequence[str] | None = None) -> _Pass:
    """Run a layer as it is now, or only until the inputs of the projections `until` are known; the output is then the input."""
    entering: dict[str, Tensor] = {}
    leaving: dict[str, Tensor] = {}

    def enter(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            entering[name] = args[0]
            if until is not None and entering.keys() >= set(until):
                raise _Reached

        return hook

    def leave(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            leaving[name] = output

        return hook

    output = hidden
    with ExitStack() as undo:
        for name in _projections(layer):
            undo.callback(layer.projection(name).register_forward_pre_hook(enter(name)).remove)
            undo.callback(layer.projection(name).register_forward_hook(leave(name)).remove)
        with suppress(_Reached):
            found = layer.module(hidden, **kwargs)
            output = found if isinstance(found, Tensor) else found[0]
    residual = {"attention": hidden}
    layout = layer.feed_forward
    if layout is not None and layout.post_norm and layout.into[0] in entering:
        residual["feed_forward"] = entering[layout.into[0]]
    elif layout is not None and layout.out in leaving:
        residual["feed_forward"] = output - leaving[layout.out]
    return _Pass(output, entering, leaving, residual)


def _projections(layer: Layer) -> list[str]:
    return [name for _, layout in layer.sublayers for name in (*layout.into, layout.out)]


@contextmanager
def installed(layer: Layer) -> Iterator[Callable[[str, Fitted], None]]:
    """Lets fitted weights be put on the layer's projections by name; the dense ones come back at the end."""
    projections = [layer.projection(name) for name in _projections(layer)]
    saved = [(projection, projection.weight.data, projection.bias) for projection in projections]

    def put(name: str, fitted: Fitted) -> None:
        projection = layer.projection(name)
        projection.weight.data = fitted.weight
        if fitted.bias is not None:
            projection.register_parameter("bias", nn.Parameter(fitted.bias, requires_grad=False))

    try:
        yield put
    finally:
        for projection, weight, bias in saved:
            projection.weight.data = weight
            projection.register_parameter("bias", bias)
