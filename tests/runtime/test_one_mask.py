"""A layer's static heads in one masked call, as where gradients flow on a GPU, against one rule at a time."""

from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from sparsesearch.plan import Plan, cyclic_plan
from sparsesearch.rules import Rule, parse_rule
from sparsesearch.runtime import attention
from sparsesearch.runtime.fingerprint import describe
from sparsesearch.runtime.live import apply

DROPS = (
    {"kind": "sink_window", "sink": 16, "window": 32},
    {"kind": "dense"},
    {"kind": "tri_shape", "sink": 16, "window": 16, "last": 16},
    {"kind": "sink_window", "sink": 0, "window": 16},
)


def mixed(model: PreTrainedModel, *more: dict[str, object]) -> Plan:
    """Heads of every layer take the rules in turn."""
    rules: list[Rule] = [parse_rule(rule, where="test") for rule in (*DROPS, *more)]
    plan = cyclic_plan(describe(model, "tiny"), rules[:1], block_tokens=16, lengths_tokens=(63,))
    labels = [rule.label for rule in rules]
    turns = {
        module: tuple(labels[(3 * head + layer) % len(labels)] for head in range(len(names)))
        for layer, (module, names) in enumerate(plan.assignments.items())
    }
    return plan.model_copy(update={"rules": {rule.label: rule for rule in rules}, "assignments": turns})


@pytest.mark.parametrize("length", [1, 63])
@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize("more", [(), ({"kind": "zero"},)])
def test_one_call_equals_one_rule_at_a_time(
    tiny: Callable[..., PreTrainedModel],
    monkeypatch: pytest.MonkeyPatch,
    length: int,
    padding: int,
    more: tuple[dict[str, object], ...],
) -> None:
    """Logits and gradients, beside a head whose rule stands in for what it drops."""
    model = tiny("llama")
    ids = torch.arange(2 * (length + padding)).view(2, -1) % 61
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    calls: list[int] = []
    together = attention.attend_static
    monkeypatch.setattr(attention, "attend_static", lambda *given: calls.append(len(given[0])) or together(*given))

    def run() -> list[torch.Tensor]:
        model.zero_grad()
        logits = model(input_ids=ids, attention_mask=mask).logits
        logits.square().sum().backward()
        return [logits.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    with apply(model, mixed(model, *more)):
        alone = run()
        assert not calls
        monkeypatch.setattr(attention, "masks_pay", lambda *_: True)
        whole = run()
    for one, other in zip(alone, whole, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()))
    assert calls, "nothing went through one call"
    assert max(calls) > 1
