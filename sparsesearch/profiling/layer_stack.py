"""A decoder's layers, run one at a time: what profiling needs so that no more than one layer's graph is ever held."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsesearch.errors import UnsupportedModelError

Layer = Callable[..., Any]
_PROBE_TOKENS = 5


@dataclass
class Entry:
    """One sequence before the first layer.

    Attributes:
        hidden: what the first layer receives, [1 S D].
        arguments: what each layer is called with besides its hidden states: masks, rotary angles.
    """

    hidden: Float[Tensor, "1 S D"]
    arguments: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(repr=False)


class LayerStack:
    """The layers between a model's embedding and its head, each a function of the previous one's result and of nothing later.

    The model's own code does everything else: `enter` runs it with layers that only take notes, `logits` with layers that hand on rows of our
    choice. So every architecture that chains its layers plainly works, whatever it does before and after them.

    Attributes:
        model: in evaluation mode.
        layers: in order.
        device: where tokens go in.
    """

    def __init__(self, model: PreTrainedModel, prefix: str, count: int, *, tuples: bool) -> None:
        self.model = model
        self.layers = [model.get_submodule(f"{prefix}.{index}") for index in range(count)]
        self.prefix = prefix
        self._tuples = tuples

    @classmethod
    def of(cls, model: PreTrainedModel, modules: Sequence[str], *, weights: bool = True) -> "LayerStack | None":
        """The stack that holds the attention modules, one per layer; None where the layers are no plain chain.

        Args:
            model: the model.
            modules: paths of its attention modules, in order.
            weights: whether all layers have their weights; then the chain is also run beside the model on a few tokens.
        """
        prefix = _prefix(modules)
        if prefix is None:
            return None
        for tuples in (False, True):
            stack = cls(model, prefix, len(modules), tuples=tuples)
            if stack._chains() and (not weights or stack._agrees()):
                return stack
        return None

    @property
    def device(self) -> torch.device:
        """Where the embedding computes."""
        embedding: nn.Module = self.model.get_input_embeddings()
        hook = getattr(embedding, "_hf_hook", None)  # accelerate's, which brings weights and inputs where they compute
        device = getattr(hook, "execution_device", None)
        return next(embedding.parameters()).device if device is None else torch.device(device)

    @torch.no_grad()
    def enter(self, input_ids: Int[Tensor, " S"]) -> Entry:
        """Run everything before the layers.

        Raises:
            UnsupportedModelError: the layers are no chain for this input.
        """
        seen: list[tuple[Tensor, tuple[Any, ...], dict[str, Any]]] = []

        def note(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            seen.append((hidden, args, kwargs))
            return self._result(hidden)

        with self._replaced([note] * len(self.layers)), _last_row(self.model):
            self.model(input_ids=input_ids[None].to(self.device), use_cache=False)
        if len(seen) != len(self.layers) or any(a[0] is not b[0] for a, b in pairwise(seen)):
            raise UnsupportedModelError(
                f"the layers of {type(self.model).__name__} must each take what the one before returns, but do not."
            )
        return Entry(seen[0][0], [(args, kwargs) for _, args, kwargs in seen])

    def run(self, layer: int, hidden: Float[Tensor, "1 S D"], entry: Entry) -> Float[Tensor, "1 S D"]:
        """One layer."""
        args, kwargs = entry.arguments[layer]
        found = self.layers[layer](hidden, *args, **kwargs)
        out: Tensor = found[0] if isinstance(found, tuple) else found
        return out

    def logits(self, rows: Float[Tensor, "R D"]) -> Float[Tensor, "R V"]:
        """What the model makes of R rows of the last layer's result; differentiable."""

        def pass_on(hidden: Tensor, *_: Any, **__: Any) -> Any:
            return self._result(hidden)

        def insert(*_: Any, **__: Any) -> Any:
            return self._result(rows[None])

        ids = torch.ones(1, len(rows), dtype=torch.long, device=self.device)
        with self._replaced([pass_on] * (len(self.layers) - 1) + [insert]):
            logits: Tensor = self.model(input_ids=ids, use_cache=False).logits
        return logits[0]

    def _result(self, hidden: Tensor) -> Any:
        return (hidden,) if self._tuples else hidden

    @contextmanager
    def _replaced(self, forwards: Sequence[Layer]) -> Iterator[None]:
        """Layers that run other code; `forward` of the instance, which accelerate's hooks also set, is put back."""
        before = [layer.__dict__.get("forward") for layer in self.layers]
        try:
            for layer, forward in zip(self.layers, forwards, strict=True):
                layer.__dict__["forward"] = forward
            yield
        finally:
            for layer, own in zip(self.layers, before, strict=True):
                if own is None:
                    del layer.__dict__["forward"]
                else:
                    layer.__dict__["forward"] = own

    def _chains(self) -> bool:
        try:
            self.enter(self._probe())
        except (UnsupportedModelError, AttributeError, IndexError, TypeError, ValueError, RuntimeError):
            return False  # layers that return something else than this stack's `_result`
        return True

    @torch.no_grad()
    def _agrees(self) -> bool:
        """Whether the chain gives the model's own logits."""
        ids = self._probe()
        entry = self.enter(ids)
        hidden = entry.hidden
        for layer in range(len(self.layers)):
            hidden = self.run(layer, hidden, entry)
        truth: Tensor = self.model(input_ids=ids[None], use_cache=False).logits[0]
        found = self.logits(hidden[0])
        return found.shape == truth.shape and torch.allclose(
            found, truth, rtol=1e-2, atol=1e-3 * float(truth.abs().max())
        )

    def _probe(self) -> Int[Tensor, " 5"]:
        return torch.arange(1, 1 + _PROBE_TOKENS, device=self.device)


def _prefix(modules: Sequence[str]) -> str | None:
    """What stands before the layer's number in every path, if the numbers count up from 0."""
    first = modules[0].split(".")
    for place, part in enumerate(first):
        if part == "0":
            prefix = ".".join(first[:place])
            if all(path.split(".")[: place + 1] == [*first[:place], str(index)] for index, path in enumerate(modules)):
                return prefix
    return None


@contextmanager
def _last_row(model: PreTrainedModel) -> Iterator[None]:
    """Only the last position reaches the output embedding: S x V logits that nobody reads are not made."""
    embedding = model.get_output_embeddings()
    if not isinstance(embedding, nn.Module):
        yield
        return
    handle = embedding.register_forward_pre_hook(lambda _, args: (args[0][:, -1:], *args[1:]))
    try:
        yield
    finally:
        handle.remove()
