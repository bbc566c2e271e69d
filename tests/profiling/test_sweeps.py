"""Layer-by-layer sweeps give what one graph of the whole model gives, for every architecture."""

from dataclasses import fields
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from sparsesearch.calibration import Sample
from sparsesearch.profiling import losses
from sparsesearch.profiling.activations import InMemory, OnDisk
from sparsesearch.profiling.layer_inputs import layer_inputs, swept_input
from sparsesearch.profiling.layer_scores import LayerInput
from sparsesearch.profiling.layer_stack import LayerStack
from sparsesearch.profiling.run import frozen
from sparsesearch.profiling.sweeps import Sweeps
from sparsesearch.runtime.fingerprint import describe

KEY = (70, 0)


def sample(answers: bool = True) -> Sample:
    mask = torch.zeros(KEY[0], dtype=torch.bool)
    mask[[20, 21, -2, -1]] = answers
    return Sample(torch.randint(0, 64, (KEY[0],), generator=torch.Generator().manual_seed(3)), mask, "tests")


def swept(model: PreTrainedModel, stack: LayerStack, one: Sample, kept: InMemory | OnDisk) -> dict[int, LayerInput]:
    found: dict[int, LayerInput] = {}
    with frozen(model):
        sweeps = Sweeps(stack, {KEY: one}, kept, 3, {KEY: 11})
        sweeps.forward()
        sweeps.backward(lambda layer, key, call, gradients: found.update({layer: swept_input(call, gradients, one)}))
    return found


def same(found: LayerInput, truth: LayerInput) -> None:
    for field in fields(LayerInput):
        a, b = getattr(found, field.name), getattr(truth, field.name)
        if isinstance(b, torch.Tensor) and b.is_floating_point():
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max()), msg=field.name)
        elif isinstance(b, torch.Tensor):
            assert torch.equal(a, b)
        else:
            assert a == b


@pytest.mark.parametrize("answers", [True, False])
@pytest.mark.parametrize("chunk", [1 << 28, 64 * 16])
def test_sweeps_equal_one_graph(
    any_tiny: PreTrainedModel, answers: bool, chunk: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stack = LayerStack.of(any_tiny, describe(any_tiny, "tiny").modules)
    assert stack is not None
    ids = torch.arange(30)[None]
    with torch.no_grad():
        before = any_tiny(ids).logits
    one = sample(answers)
    with frozen(any_tiny):
        truth = layer_inputs(any_tiny, one, num_probes=3, seed=11)
    found = swept(any_tiny, stack, one, InMemory())
    assert sorted(found) == [0, 1]
    for layer, inputs in enumerate(truth):
        same(found[layer], inputs)
    # in chunks, labels are drawn from another stream: what draws nothing still agrees
    monkeypatch.setattr(losses, "CHUNK_LOGITS", chunk)
    monkeypatch.setattr(losses, "LEAST_ROWS", 16)
    again = swept(any_tiny, stack, one, OnDisk(tmp_path / "kept"))
    for layer, inputs in enumerate(truth):
        for name in ("q", "k", "v", "answer", "answer_ce"):
            a, b = getattr(again[layer], name), getattr(inputs, name)
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max()), msg=name)
    with torch.no_grad():
        assert torch.equal(any_tiny(ids).logits, before), "sweeps leave no trace"


def test_a_chain_that_is_none_is_refused(any_tiny: PreTrainedModel) -> None:
    """A layer that looks past its own input, here at a number that the first layer left, disagrees with the model."""
    modules = describe(any_tiny, "tiny").modules
    layers = any_tiny.get_submodule(modules[0].split(".0.")[0])
    seen: list[torch.Tensor] = []

    def remember(module: torch.nn.Module, args: tuple[torch.Tensor, ...], output: object) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)  # type: ignore[arg-type]

    def add(module: torch.nn.Module, args: tuple[torch.Tensor, ...], output: object) -> object:
        extra = len(seen) * torch.linspace(-1, 1, 32)
        return (output[0] + extra, *output[1:]) if isinstance(output, tuple) else output + extra  # type: ignore[operator]

    layers[0].register_forward_hook(remember)  # type: ignore[index, operator]
    layers[1].register_forward_hook(add)  # type: ignore[index, operator]
    assert LayerStack.of(any_tiny, modules) is None
    assert LayerStack.of(any_tiny, tuple(reversed(modules))) is None
