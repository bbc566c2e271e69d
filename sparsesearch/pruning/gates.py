"""Learned masks: gates on heads and channels, optimised on calibration data while every weight stays frozen.

A gate multiplies one head's or channel's entry into its output projection. It is a stretched, clipped logistic of a parameter with
noise (hard concrete), so it reaches 0 and 1 exactly; the loss is the distance from the dense output plus a Lagrangian that drives the
expected share of parameters to a target. The score of a head or channel is the log-odds of its gate being open.

Sources: Louizos, Welling, Kingma 2018, arXiv:1712.01312, section 2.2 (hard concrete); Xia, Zhong, Chen 2022, CoFi, arXiv:2204.00408, section
3.1 (gates on structures with a Lagrangian). Differs: weights are frozen, and the result only scores; the search decides.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsesearch.pruning.moments import no_parameter_gradients
from sparsesearch.pruning.quality import Batch, dense_rows, distance, output_rows
from sparsesearch.runtime.sublayers import Layer, layers_of

TEMPERATURE, LOW, HIGH = 2.0 / 3.0, -0.1, 1.1
LEARNING_RATE = 0.1
_OPEN_AT_START = 2.0


def learn_gates(
    model: PreTrainedModel,
    batches: Sequence[Batch],
    *,
    steps: int,
    target: float = 0.8,
    seed: int = 0,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> dict[tuple[int, str], Tensor]:
    """Optimise the gates.

    Args:
        model: in evaluation mode, dense; its weights stay as they are.
        batches: calibration data, taken in turn.
        steps: optimiser steps, one batch each.
        target: share of the gated parameters to end at.
        seed: of the noise.
        progress: called with (stage, done, total).

    Returns:
        (layer index, kind) -> log-odds of each head's or channel's gate; larger is more needed.
    """
    layers = layers_of(model)
    gates = {
        (index, kind): nn.Parameter(torch.full((_count(layer, kind),), _OPEN_AT_START, device=model.device))
        for index, layer in enumerate(layers)
        for kind, _ in layer.sublayers
    }
    weights = {key: _params_each(layers[key[0]], key[1]) for key in gates}
    total = sum(weights[key] * len(gate) for key, gate in gates.items())
    dense = dense_rows(model, list(batches))
    multipliers = nn.Parameter(torch.zeros(2, device=model.device))
    optimiser = torch.optim.Adam(list(gates.values()), lr=LEARNING_RATE)
    ascent = torch.optim.SGD([multipliers], lr=1.0, maximize=True)
    generator = torch.Generator(device=model.device).manual_seed(seed)
    with no_parameter_gradients(model, layers[0]), torch.enable_grad():
        for step in range(steps):
            progress("learn masks", step, steps)
            batch, (rows, logits) = batches[step % len(batches)], dense[step % len(batches)]
            drawn = {key: _drawn(gate, generator) for key, gate in gates.items()}
            with _gated(layers, drawn):
                loss = distance(rows, output_rows(model, batch)[0], logits=logits).mean()
            left = sum((weights[key] * _open(gate).sum() for key, gate in gates.items()), torch.zeros(())) / total
            # the target is approached over the first half of the steps
            excess = left - (1 - (1 - target) * min(1.0, 2 * (step + 1) / steps))
            whole = loss + multipliers[0] * excess + multipliers[1] * excess.square()
            optimiser.zero_grad()
            ascent.zero_grad()
            whole.backward()
            optimiser.step()
            ascent.step()
    progress("learn masks", steps, steps)
    return {key: gate.detach().double().cpu() for key, gate in gates.items()}


def _count(layer: Layer, kind: str) -> int:
    return layer.num_heads if kind == "attention" else layer.num_channels


def _params_each(layer: Layer, kind: str) -> float:
    """Parameters that go with one head (its share of keys and values included) or one channel."""
    layout = dict(layer.sublayers)[kind]
    return sum(layer.projection(name).weight.numel() for name in (*layout.into, layout.out)) / _count(layer, kind)


def _open(gate: Tensor) -> Tensor:
    """Probability that a gate is not exactly 0."""
    return torch.sigmoid(gate - TEMPERATURE * math.log(-LOW / HIGH))


def _drawn(gate: Tensor, generator: torch.Generator) -> Tensor:
    uniform = torch.rand(gate.shape, generator=generator, device=gate.device).clamp(1e-6, 1 - 1e-6)
    stretched = torch.sigmoid((uniform.logit() + gate) / TEMPERATURE) * (HIGH - LOW) + LOW
    return stretched.clamp(0, 1)


@contextmanager
def _gated(layers: tuple[Layer, ...], drawn: dict[tuple[int, str], Tensor]) -> Iterator[None]:
    """Multiply what enters the output projections."""

    def hook(gate: Tensor, width: int) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
        return lambda _, args: (args[0] * gate.repeat_interleave(width).to(args[0].dtype), *args[1:])

    with ExitStack() as undo:
        for (index, kind), gate in drawn.items():
            layer = layers[index]
            width = layer.head_dim if kind == "attention" else 1
            projection = layer.projection(dict(layer.sublayers)[kind].out)
            undo.callback(projection.register_forward_pre_hook(hook(gate, width)).remove)
        yield
