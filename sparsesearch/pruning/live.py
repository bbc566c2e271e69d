"""A cut on a live model: really narrower layers, and the model as it was afterwards."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from transformers import PreTrainedModel

from sparsesearch.cut import Cut
from sparsesearch.runtime.shrink import Fitted, shrink, sizes_of, sliced_weights
from sparsesearch.runtime.sublayers import layers_of


@contextmanager
def narrowed(model: PreTrainedModel, cut: Cut, fitted: Mapping[str, Fitted] | None = None) -> Iterator[None]:
    """Run a model with a cut, at its real speed and size; the dense modules come back when the block ends.

    Args:
        model: of the family and sizes the cut was made for.
        cut: what goes.
        fitted: compensated output projections by path.

    Raises:
        PlanMismatchError: the cut was made for a model of other sizes. Nothing has been touched then.
    """
    layers, known = layers_of(model), fitted or {}
    sizes, weights = sizes_of(cut, known, layers), sliced_weights(cut, known, layers)
    undo = shrink(model, sizes)
    try:
        parameters = dict(model.named_parameters())
        for name, values in weights.items():
            parameters[name].data.copy_(values)
            parameters[name].requires_grad_(False)
        yield
    finally:
        for restore in reversed(undo):
            restore()
