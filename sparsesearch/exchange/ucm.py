"""UCM (unified-cache-management, GSA on device; its RALS tool writes these files): per layer dense, top-k in decoding, or reuse.

A layer is dense (rollback) if `vllm_hash_attention_rollback_layers` names it, or its `top_k_ratio_per_layer` is 1. Others keep
`vllm_hash_attention_topk` tokens of every decoded step, or that ratio of the prompt; a layer marked in `vllm_hash_attention_skip_layers`
takes the choice of the last layer that made one (or of the layer that `top_k_index_reuse` names). UCM ranks blocks by Hamming distance of hashed
keys and decides once per layer; this plan ranks them by min-max bounds (Quest) and decides per query head. Prefill is dense in both.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sparsesearch.artifacts import write_bytes
from sparsesearch.errors import SpecError
from sparsesearch.exchange.target import Target, differences, inexpressible, malformed, read_json, tokens_of
from sparsesearch.plan import Plan
from sparsesearch.rules import LengthLaw, Rule
from sparsesearch.rules.bounds_topk import BoundsTopk
from sparsesearch.rules.dense import Dense
from sparsesearch.rules.reuse import Reuse

_FORMAT = "ucm"
_CHUNK = 128
_LIST = "vllm_hash_attention_"


def read(path: Path, target: Target) -> Plan:
    """One rule per layer.

    Raises:
        SpecError: a layer reuses a choice that no earlier layer makes.
    """
    content = read_json(path, format=_FORMAT)
    if not isinstance(content, dict) or not isinstance(content.get("top_k_ratio_per_layer"), list):
        malformed(path, _FORMAT, "it must hold a list `top_k_ratio_per_layer`")
    heads = target.base_model.num_heads
    layers = len(content["top_k_ratio_per_layer"])
    target.check([*heads[:layers], *[0] * (layers - len(heads))], source=path)
    try:
        rules = [[rule] * count for rule, count in zip(_rules(content), heads, strict=True)]
    except ValueError as error:
        raise SpecError(f"{path}: {error}. Clear its mark in skip_layers or top_k_index_reuse.") from error
    return target.plan(rules, "kv_group", format=_FORMAT, source=path, note=differences(__doc__), content=content)


def write(plan: Plan, path: Path, length_tokens: int | None) -> None:
    """Ratio and budget of every layer; a plan that still is what such a file said gives that file back."""
    layers = [set(plan.module_rules(module)) for module in plan.base_model.modules]
    for module, rules in zip(plan.base_model.modules, layers, strict=True):
        if len(rules) > 1:
            raise SpecError(
                f"{module}: {_FORMAT} decides per layer, but the heads of this one follow {len(rules)} rules."
            )
    chosen = [rule for rules in layers for rule in rules]
    last: int | None = None
    for layer, (module, rule) in enumerate(zip(plan.base_model.modules, chosen, strict=True)):
        match rule:
            case Dense():
                pass
            case BoundsTopk(prefill=False):
                last = layer
            case Reuse(heads=None, decode=True) if rule.layer == last:
                pass
            case _:
                can = "dense layers, decode-time top-k (bounds_topk with a dense prompt), and reuse of the last such layer by decoded tokens"
                inexpressible(module, rule, _FORMAT, can)
    known = plan.provenance.get("content") if plan.provenance.get("converted_from") == _FORMAT else None
    content = known if known is not None and _rules(known) == chosen else _content(plan, chosen, length_tokens)
    write_bytes(path, (json.dumps(content, indent=4) + "\n").encode())


def _dense_layers(content: dict[str, Any]) -> set[int]:
    ratios = content["top_k_ratio_per_layer"]
    return {layer for layer, ratio in enumerate(ratios) if ratio == 1} | set(
        content.get(f"{_LIST}rollback_layers") or []
    )


def _rules(content: dict[str, Any]) -> list[Rule]:
    """The rule of each layer; ValueError where one reuses what nobody chose."""
    dense, tokens = _dense_layers(content), content.get(f"{_LIST}topk")
    sink = content.get("chunk_size", _CHUNK) * sum(block >= 0 for block in content.get("must_select_blocks") or [])
    rules: list[Rule] = []
    for layer, (ratio, skips, named) in enumerate(_entries(content)):
        choosing = [number for number, rule in enumerate(rules) if isinstance(rule, BoundsTopk)]
        if layer in dense:
            rules.append(Dense())
        elif named != -1 or skips:
            source = named if named != -1 else choosing[-1] if choosing else None
            if source not in choosing:
                raise ValueError(
                    f"layer {layer} reuses the choice of {'no layer' if source is None else f'layer {source}'}, which makes none"
                )
            rules.append(Reuse(layer=source, decode=True))
        else:
            rules.append(BoundsTopk(keep=LengthLaw(a=tokens or 0, b=0 if tokens else ratio), sink=sink))
    return rules


def _entries(content: dict[str, Any]) -> Iterator[tuple[float, bool, int]]:
    """Per layer its ratio, whether it is marked to skip, and whose choice it names."""
    ratios = content["top_k_ratio_per_layer"]
    lists = ((content.get(f"{_LIST}skip_layers"), False), (content.get("top_k_index_reuse"), -1))
    return zip(ratios, *(given or [default] * len(ratios) for given, default in lists), strict=True)


def _content(plan: Plan, rules: list[Rule], length_tokens: int | None) -> dict[str, Any]:
    """A new file for rules that are dense or decode by bounds."""
    model, sparse = plan.base_model, [rule for rule in rules if isinstance(rule, BoundsTopk)]
    tokens = {tokens_of(rule.keep, length_tokens, "a layer", _FORMAT) for rule in sparse if rule.keep.a}
    sinks = {rule.sink for rule in sparse}
    if len(tokens) > 1 or len(sinks) > 1 or (tokens and any(rule.keep.a == 0 for rule in sparse)):
        raise SpecError(
            f"{_FORMAT} has one sink, and either one token budget for all layers or a ratio per layer, but the plan has budgets "
            f"{sorted({str(rule.keep) for rule in sparse})} and sinks {sorted(sinks)}."
        )
    content: dict[str, Any] = {
        "model_name": model.name_or_path,
        "is_mla": False,
        "hash_weight_type": "random",
        "num_hidden_layers": len(rules),
        "chunk_size": _CHUNK,
        "chunk_repre_method": "max",
        "head_dim": model.head_dim[0],
        "hash_bits": model.head_dim[0],
        "top_k_ratio_per_layer": [
            1 if isinstance(rule, Dense) else getattr(rule, "keep", LengthLaw()).b or 0.5 for rule in rules
        ],
        "top_k_index_reuse": [-1] * len(rules),
        "must_select_blocks": [*range(-(-max(sinks, default=_CHUNK) // _CHUNK)), -2, -1],
    }
    if any(isinstance(rule, Reuse) for rule in rules) or tokens:
        content[f"{_LIST}skip_layers"] = [isinstance(rule, Reuse) for rule in rules]
    if tokens:
        content[f"{_LIST}topk"] = max(tokens)
        content[f"{_LIST}rollback_layers"] = [layer for layer, rule in enumerate(rules) if isinstance(rule, Dense)]
    return content
