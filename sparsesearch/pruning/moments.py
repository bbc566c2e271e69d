"""One calibration pass: second moments of what enters every output projection, and how much the output minds what leaves it."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsesearch.pruning.quality import Batch, output_rows, own_loss, probe_scalars, token_mask
from sparsesearch.runtime.sublayers import Layer, layers_of

Progress = Callable[[str, int, int], None]


@dataclass
class SublayerStatistics:
    """Of one output projection with I inputs and O outputs, over all calibration tokens; fp64.

    Attributes:
        second_moment: mean of x xᵀ over tokens.
        mean: mean of x.
        sensitivity: F, so that a change δ of the output costs ½ E[δᵀ F δ] per item (tokens taken as independent).
        fisher: per probe and sample, Σ_n x·(Wᵀ g): the signed effect of taking an input away.
        taylor: per sample, the same with the gradient of the model's own loss.
        items: items behind each sample, to which `fisher` and `taylor` are sums.
    """

    second_moment: Float[Tensor, "I I"]
    mean: Float[Tensor, " I"]
    sensitivity: Float[Tensor, "O O"]
    fisher: Float[Tensor, "P I"]
    taylor: Float[Tensor, "N I"]
    items: int


def collect(
    model: PreTrainedModel,
    batches: Sequence[Batch],
    *,
    num_probes: int = 4,
    seed: int = 0,
    progress: Progress = lambda stage, done, total: None,
) -> dict[str, SublayerStatistics]:
    """Run every batch forward and its probes backward.

    Args:
        model: in evaluation mode, dense.
        batches: of one or more items; padding tokens do not count.
        num_probes: Fisher probes per batch.
        seed: of the probes.
        progress: called with (stage, done, total).

    Returns:
        Path of the output projection -> its statistics.
    """
    layers = layers_of(model)
    outs = {
        f"{layer.path}.{layout.out}": layer.projection(layout.out) for layer in layers for _, layout in layer.sublayers
    }
    sums = {path: _Sums(module) for path, module in outs.items()}
    items = tokens = 0
    with no_parameter_gradients(model, layers[0]):
        for index, batch in enumerate(batches):
            progress("calibrate pruning", index, len(batches))
            generator = torch.Generator(device=model.device).manual_seed(seed + index)
            with _kept_io(outs) as seen, torch.enable_grad():
                rows, logits = output_rows(model, batch)
                scalars = probe_scalars(rows, logits=logits, num_probes=num_probes, generator=generator)
                scalars.append(own_loss(rows, batch, logits=logits))
                ends = [end for path in outs for end in seen[path]]
                for number, scalar in enumerate(scalars):
                    found = torch.autograd.grad(scalar, ends, retain_graph=number + 1 < len(scalars))
                    for path, into, out in zip(outs, found[::2], found[1::2], strict=True):
                        sums[path].add_gradients(seen[path][0], into, out, batch, last=number == num_probes)
            for path in outs:
                tokens_here = sums[path].add_inputs(seen[path][0], batch)
            tokens, items = tokens + tokens_here, items + len(rows)
    progress("calibrate pruning", len(batches), len(batches))
    return {path: own.finished(tokens, items, num_probes) for path, own in sums.items()}


class _Sums:
    """Running sums of one projection."""

    def __init__(self, projection: nn.Linear) -> None:
        inputs, outputs, device = projection.in_features, projection.out_features, projection.weight.device
        self.moment = torch.zeros(inputs, inputs, dtype=torch.float64, device=device)
        self.total = torch.zeros(inputs, dtype=torch.float64, device=device)
        self.outer = torch.zeros(outputs, outputs, dtype=torch.float64, device=device)
        self.signed: list[Tensor] = []
        self.first_order: list[Tensor] = []

    def add_inputs(self, x: Tensor, batch: Batch) -> int:
        rows = real_rows(x.detach(), batch).float()
        self.moment += (rows.t() @ rows).double()
        self.total += rows.double().sum(0)
        return len(rows)

    def add_gradients(self, x: Tensor, into: Tensor, out: Tensor, batch: Batch, *, last: bool) -> None:
        # the gradient at the input is Wᵀ g already
        effect = (real_rows(x.detach(), batch).float() * real_rows(into, batch).float()).sum(0).double()
        if last:
            self.first_order.append(effect)
        else:
            g = real_rows(out, batch).float()
            self.signed.append(effect)
            self.outer += (g.t() @ g).double()

    def finished(self, tokens: int, items: int, num_probes: int) -> SublayerStatistics:
        return SublayerStatistics(
            second_moment=self.moment / tokens,
            mean=self.total / tokens,
            # Σ over tokens of ½ E_r[(g·δ)²] per item = ½ tr(F E[δδᵀ]) with F = (tokens / items) · mean of g gᵀ
            sensitivity=self.outer / (items * num_probes),
            fisher=torch.stack(self.signed),
            taylor=torch.stack(self.first_order),
            items=items,
        )


def real_rows(x: Tensor, batch: Batch) -> Tensor:
    """Tokens of a batch as rows, padding left out."""
    mask = token_mask(batch)
    return x.flatten(0, -2) if mask is None else x[mask.to(x.device)]


@contextmanager
def _kept_io(outs: dict[str, nn.Linear]) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Inputs and outputs of the projections, for one forward."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(path: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            seen[path] = (args[0], output)

        return hook

    with ExitStack() as undo:
        for path, module in outs.items():
            undo.callback(module.register_forward_hook(keep(path)).remove)
        yield seen


@contextmanager
def no_parameter_gradients(model: PreTrainedModel, first: Layer) -> Iterator[None]:
    """No parameter needs a gradient; what enters the first layer does, so that every activation is part of the graph."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]

    def start(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if not torch.is_grad_enabled():
            return args, kwargs
        if args:
            return (args[0].requires_grad_(), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": kwargs["hidden_states"].requires_grad_()}

    for parameter, _ in flags:
        parameter.requires_grad_(False)
    handle = first.module.register_forward_pre_hook(start, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
