"""The reference for every criterion: the distance from dense with one sublayer cut and refitted, nothing else changed.

Layers before the cut give what they gave densely, so their outputs are kept and only the layers from the cut on run.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsesearch.pruning.compensate import installed
from sparsesearch.pruning.menus import Option
from sparsesearch.pruning.moments import SublayerStatistics
from sparsesearch.pruning.quality import Batch, mean_distance, output_rows
from sparsesearch.pruning.reconstruction import refit
from sparsesearch.runtime.shrink import Fitted
from sparsesearch.runtime.sublayers import Layer, layers_of


@dataclass(frozen=True)
class _Dense:
    """One batch, and what the dense model makes of it: rows (and whether they are logits), and every layer's output."""

    batch: Batch
    rows: tuple[Tensor, bool]
    outputs: list[Any]


class SingleCuts:
    """Measures changes to one layer at a time.

    Args:
        model: in evaluation mode, dense.
        batches: the sample to measure on; the outputs of all layers are kept, layers x tokens x hidden width.
    """

    @torch.no_grad()
    def __init__(self, model: PreTrainedModel, batches: Sequence[Batch]) -> None:
        self._model, self._layers = model, layers_of(model)
        self._dense = [self._run(batch) for batch in batches]

    @property
    def logits(self) -> bool:
        """Whether the distance is the KL divergence of logits."""
        return self._dense[0].rows[1]

    def distance(self, index: int) -> float:
        """Mean distance from dense with layer `index` as it is now; the layers before it must be dense."""
        total, count = 0.0, 0
        for dense in self._dense:
            rows = len(dense.rows[0])
            with _resumed(self._layers[:index], dense.outputs):
                total += mean_distance(self._model, [dense.batch], [dense.rows]) * rows
            count += rows
        return total / count

    def _run(self, batch: Batch) -> _Dense:
        outputs: list[Any] = []

        def keep(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            outputs.append(output)

        with ExitStack() as undo:
            for layer in self._layers:
                undo.callback(layer.module.register_forward_hook(keep).remove)
            return _Dense(batch, output_rows(self._model, batch), outputs)


@contextmanager
def _resumed(before: Sequence[Layer], outputs: Sequence[Any]) -> Iterator[None]:
    """Some first layers give what they gave, without running."""

    def given(output: Any) -> Callable[..., Any]:
        return lambda *args, **kwargs: output

    modules = [layer.module for layer in before]
    own = [module.__dict__.get("forward") for module in modules]
    try:
        for module, output in zip(modules, outputs, strict=False):
            module.forward = given(output)
        yield
    finally:
        for module, forward in zip(modules, own, strict=True):
            if forward is None:
                module.__dict__.pop("forward", None)
            else:
                module.forward = forward


def one_shot_fit(layer: Layer, kind: str, statistics: SublayerStatistics, kept: Tensor, *, bias: bool) -> Fitted:
    """Refit one projection on dense inputs alone: what the reconstruction criterion predicts the loss of."""
    projection = layer.projection(dict(layer.sublayers)[kind].out)
    weight = projection.weight.detach().double()
    moment, mean = statistics.second_moment, statistics.mean
    if not (bias or projection.bias is not None):
        new = refit(weight, kept, moment, weight @ moment)
        return Fitted(new.to(projection.weight), None)
    covariance = moment - torch.outer(mean, mean)
    new = refit(weight, kept, covariance, weight @ covariance)
    own = 0.0 if projection.bias is None else projection.bias.detach().double()
    return Fitted(new.to(projection.weight), (own + (weight - new) @ mean).to(projection.weight))


def measure_cut(
    cuts: SingleCuts,
    place: tuple[int, Layer, str],
    option: Option,
    statistics: SublayerStatistics,
    *,
    bias: bool,
) -> float:
    """Distance from dense with one option alone, refitted.

    Args:
        cuts: of the dense model.
        place: index of the layer, the layer, and `attention` or `feed_forward`.
        option: what goes.
        statistics: of the sublayer's output projection.
        bias: whether a mean that is taken away may go into a bias.
    """
    index, layer, kind = place
    count = layer.num_heads if kind == "attention" else layer.num_channels
    device = statistics.mean.device
    kept = torch.tensor(sorted(set(range(count)) - set(option.removed)), dtype=torch.long, device=device)
    if kind == "attention":
        kept = (kept[:, None] * layer.head_dim + torch.arange(layer.head_dim, device=device)).flatten()
    with installed(layer) as install:
        install(dict(layer.sublayers)[kind].out, one_shot_fit(layer, kind, statistics, kept, bias=bias))
        return cuts.distance(index)
