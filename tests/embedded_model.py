"""The embedded model for tests of judging, and plans of `dense` and `zero` put on it by hooks: an exact, independent way to apply them."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import sparsesearch
from sparsesearch.plan import BaseModelInfo, Plan
from sparsesearch.rules.base import Rule
from sparsesearch.rules.dense import Dense
from sparsesearch.rules.zero import Zero

FOLDER = Path(sparsesearch.__file__).parent / "presets" / "models" / "needle-7m"
INFO = BaseModelInfo(
    name_or_path="needle-7m",
    model_type="llama",
    modules=tuple(f"model.layers.{layer}.self_attn" for layer in range(8)),
    num_heads=(8,) * 8,
    num_kv_heads=(4,) * 8,
    head_dim=(32,) * 8,
)


@lru_cache
def embedded() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """needle-7m in fp32, and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(FOLDER)


def plan_of(rules: dict[tuple[int, int], Rule], **more: Any) -> Plan:
    """(layer, head) -> rule; dense elsewhere."""
    named = {rule.label: rule for rule in (Dense(), *rules.values())}
    return Plan.model_validate(
        {
            "base_model": INFO,
            "block_tokens": 64,
            "unit": "query_head",
            "lengths_tokens": (256, 512),
            "rules": named,
            "assignments": {
                module: tuple(rules.get((layer, head), Dense()).label for head in range(8))
                for layer, module in enumerate(INFO.modules)
            },
            **more,
        }
    )


def silencing(*heads: tuple[int, int]) -> Plan:
    """Zero for the given (layer, head)s."""
    return plan_of(dict.fromkeys(heads, Zero()))


@contextmanager
def silence(model: PreTrainedModel, plan: Plan) -> Iterator[None]:
    """Apply a plan of `dense` and `zero`: what a zero head would hand to the output projection is multiplied by 0."""
    with ExitStack() as undo:
        for module, head, rule in plan.heads():
            if isinstance(rule, Zero):
                projection = model.get_submodule(module).o_proj
                undo.callback(projection.register_forward_pre_hook(_zero(head)).remove)
            else:
                assert isinstance(rule, Dense), f"this way to apply knows dense and zero only, not {rule.kind}"
        yield


def _zero(head: int) -> Any:
    def hook(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        kept = args[0].clone()
        kept[..., head * 32 : (head + 1) * 32] = 0
        return (kept,)

    return hook
