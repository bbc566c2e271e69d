"""Two sweeps over a decoder's layers: forward, keeping what each layer received; back, carrying every loss's gradient through one layer at a time.

Memory: one layer's weights and graph, and K gradients of [S, hidden]; layer inputs wait wherever `Activations` keeps them. Time: one forward more
than a graph of the whole model takes. The gradients are the same: the chain rule, cut where hidden states pass from layer to layer.

Source: recomputation from stored boundaries, Chen et al. 2016, arXiv:1604.06174, section 4; here each layer is a segment and boundaries may lie on
disk.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sparsesearch.calibration import Sample
from sparsesearch.profiling.activations import Activations, Key
from sparsesearch.profiling.capture import AttentionCall, recorded
from sparsesearch.profiling.layer_stack import Entry, LayerStack
from sparsesearch.profiling.losses import Targets, head_gradients

Present = Callable[[int], AbstractContextManager[Any]]
OnCall = Callable[[int, Key, AttentionCall], None]
OnGradients = Callable[[int, Key, AttentionCall, Float[Tensor, "K S H D"]], None]
OnLayer = Callable[[int], None]


def always_present(layer: int) -> AbstractContextManager[Any]:
    """For models whose layers all have their weights."""
    return nullcontext()


@dataclass
class Sweeps:
    """Both sweeps over a set of sequences.

    Attributes:
        stack: the layers.
        samples: sequences by length and number.
        kept: where layer inputs and gradients wait.
        num_probes: Fisher probes per sequence.
        seeds: of each sequence's probes.
        present: a context in which a layer has its weights.
    """

    stack: LayerStack
    samples: dict[Key, Sample]
    kept: Activations
    num_probes: int
    seeds: dict[Key, int]
    present: Present = always_present
    _entries: dict[Key, Entry] = field(default_factory=dict)

    @property
    def num_layers(self) -> int:
        """How many there are."""
        return len(self.stack.layers)

    @contextmanager
    def open(self) -> Iterator[list[AttentionCall]]:
        """The model with recording attention, and every sequence before its first layer."""
        with recorded(self.stack.model) as calls:
            self._entries = {key: self.stack.enter(sample.input_ids) for key, sample in self.samples.items()}
            yield calls

    def forward(self, on_call: OnCall | None = None, on_layer: OnLayer | None = None) -> None:
        """Run every layer on every sequence and keep what it received; what is kept already is not made again."""
        keys = list(self.samples)
        if any(self.kept.has("gradient", layer, keys) for layer in range(self.num_layers + 1)):
            return
        with self.open() as calls, torch.no_grad():
            for key, entry in self._entries.items():
                self.kept.put("input", 0, key, entry.hidden)
            for layer in range(self.num_layers):
                if not self.kept.has("input", layer + 1, keys):
                    with self.present(layer):
                        for key in keys:
                            out = self.stack.run(layer, self._input(layer, key), self._entries[key])
                            call = calls.pop()
                            if on_call is not None:
                                on_call(layer, key, call)
                            self.kept.put("input", layer + 1, key, out)
                if on_layer is not None:
                    on_layer(layer)

    def backward(self, on_gradients: OnGradients, on_layer: OnLayer | None = None) -> None:
        """Carry the gradients of every loss from the head to the first layer, handing them out where attention ends."""
        keys = list(self.samples)
        with self.open() as calls:
            done = next((at for at in range(self.num_layers + 1) if self.kept.has("gradient", at, keys)), None)
            if done is None:
                self._head()
                done = self.num_layers
            for layer in reversed(range(done)):
                with self.present(layer):
                    for key in keys:
                        self._back(layer, key, calls, on_gradients)
                self.kept.drop("gradient", layer + 1, keys)
                self.kept.drop("input", layer, keys)
                if on_layer is not None:
                    on_layer(layer)

    def _head(self) -> None:
        vocab_size = int(self.stack.model.config.get_text_config().vocab_size)
        for key, sample in self.samples.items():
            hidden = self._input(self.num_layers, key)[0]
            found = head_gradients(
                self.stack.logits,
                hidden,
                Targets.of(sample.input_ids, sample.answer_mask),
                vocab_size,
                num_probes=self.num_probes,
                generator=torch.Generator(device=hidden.device).manual_seed(self.seeds[key]),
            )
            self.kept.put("gradient", self.num_layers, key, found)
            self.kept.drop("input", self.num_layers, [key])

    def _back(self, layer: int, key: Key, calls: list[AttentionCall], on_gradients: OnGradients) -> None:
        hidden = self._input(layer, key).detach().requires_grad_()
        with torch.enable_grad():
            out = self.stack.run(layer, hidden, self._entries[key])
        call = calls.pop()
        carried = self.kept.get("gradient", layer + 1, key, out.device)
        through, at_attention = [], []
        for index, gradient in enumerate(carried):
            more = index + 1 < len(carried)
            at_input, at_call = torch.autograd.grad(out, (hidden, call.out), gradient[None], retain_graph=more)
            through.append(at_input[0])
            at_attention.append(at_call[0].float())
        del out
        on_gradients(layer, key, call, torch.stack(at_attention))
        self.kept.put("gradient", layer, key, torch.stack(through))

    def _input(self, layer: int, key: Key) -> Float[Tensor, "1 S D"]:
        """What a layer receives, where the layer computes: accelerate's hooks move it further if need be."""
        return self.kept.get("input", layer, key, self.stack.device)
