"""Models with random weights and plans of a stated cost: what an end-to-end benchmark needs when only sizes matter."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from sparsesearch.errors import BudgetInfeasibleError
from sparsesearch.model_shapes import ModelShape
from sparsesearch.plan import BaseModelInfo, Plan
from sparsesearch.rules.base import LengthLaw, Rule
from sparsesearch.rules.dense import Dense
from sparsesearch.rules.pooled_topk import PooledTopk
from sparsesearch.rules.sink_window import SinkWindow
from sparsesearch.rules.vertical_slash import VerticalSlash

WINDOW_SHARE = 0.03
"""Share of the prompt that a streaming KV head keeps."""


def random_model(
    shape: ModelShape, *, device: str, dtype: torch.dtype = torch.bfloat16, max_tokens: int | None = None
) -> PreTrainedModel:
    """A model of that shape, its weights drawn on the device (seed 0), in evaluation mode."""
    settings: dict[str, Any] = shape.config_settings()
    settings["max_position_embeddings"] = max(shape.max_tokens, max_tokens or 0)
    config = AutoConfig.for_model(shape.model_type, **settings)
    with (
        torch.random.fork_rng(devices=[torch.device(device)] if device.startswith("cuda") else []),
        torch.device(device),
    ):
        torch.manual_seed(0)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.train(False)
    return model


def mixture_plan(info: BaseModelInfo, *, density: float, kv_fraction: float, block_tokens: int = 128) -> Plan:
    """A plan per KV group that computes about `density` of the tiles and keeps about `kv_fraction` of the cache at every length.

    Most KV heads stream (64 tokens of sink, a window of 3 % of the prompt); the others keep all keys and choose tiles in prefill, by turns with
    vertical_slash and pooled_topk. Like DuoAttention's split of heads (Xiao et al. 2024, arXiv:2410.10819) with MInference's dynamic rules
    (Jiang et al. 2024, arXiv:2407.02490) in the retrieval heads. What it really computes and keeps is measured beside it.

    Raises:
        BudgetInfeasibleError: streaming heads alone cost more.
    """
    groups = sum(info.num_kv_heads)
    streaming = 2 * WINDOW_SHARE - WINDOW_SHARE**2  # density of a causal window
    share = (kv_fraction - WINDOW_SHARE) / (1 - WINDOW_SHARE)
    if share <= 0 or density <= streaming:
        raise BudgetInfeasibleError(
            f"density > {streaming:.3f} and kv_fraction > {WINDOW_SHARE} must hold for this mixture, but got {density} and {kv_fraction}."
        )
    retrieving = min(groups, max(1, int(share * groups)))
    own = min(1.0, (density - streaming * (1 - retrieving / groups)) * groups / retrieving)
    stream = SinkWindow(sink=64, window=LengthLaw(b=WINDOW_SHARE))
    chosen: tuple[Rule, ...] = (
        VerticalSlash(vertical=LengthLaw(b=own / 2), slash=LengthLaw(b=own / 2 / (1 - own / 2))),
        PooledTopk(keep=LengthLaw(b=own)),
    )
    if own >= 1:
        chosen = (Dense(), Dense())
    assignments, number = {}, 0
    for path, heads, kv_heads in zip(info.modules, info.num_heads, info.num_kv_heads, strict=True):
        rules: list[Rule] = []
        for _ in range(kv_heads):  # spread evenly over the layers
            before, after = (count * retrieving // groups for count in (number, number + 1))
            rules += [chosen[after % 2] if after > before else stream] * (heads // kv_heads)
            number += 1
        assignments[path] = tuple(rule.label for rule in rules)
    return Plan(
        base_model=info,
        block_tokens=block_tokens,
        unit="kv_group",
        lengths_tokens=(4096, 131072),
        rules={rule.label: rule for rule in (stream, *chosen)},
        assignments=assignments,
    )
