"""MInference: a JSON list over layers of {head: [type, vertical, slash, score]}.

`vertical_and_slash` counts single columns and diagonals, ours whole blocks of them: at equal numbers ours see at least as much near each
chosen line and choose fewer lines. `stream_llm` is a sink and a window. `block_sparse` keeps 100 blocks of 64 whatever its numbers say.
`flex_vertical_and_slash` holds [share, tokens] for columns and diagonals; the tokens are read as the least that is kept. Numbers beyond the
fourth entry are ignored by MInference and here.

vLLM and SGLang keep the same entries as {layer: {head: entry}} in `dual_chunk_attention_config.sparse_attention_config` of a model's config.json;
that file, or either part of it, is read too.
"""

import json
from pathlib import Path
from typing import Any

from sparsesearch.artifacts import write_bytes
from sparsesearch.exchange.target import Target, differences, inexpressible, malformed, read_json, tokens_of
from sparsesearch.plan import Plan
from sparsesearch.rules import LengthLaw, Rule
from sparsesearch.rules.flex_prefill import FlexPrefill
from sparsesearch.rules.pooled_topk import PooledTopk
from sparsesearch.rules.sink_window import SinkWindow
from sparsesearch.rules.vertical_slash import VerticalSlash

_FORMAT = "minference"
_BLOCKS_KEPT, _BLOCK = 100, 64
_UNSEARCHED = ["vertical_and_slash", 1000, 6096, 1]  # what MInference runs in heads its file leaves out
_CAN = "stream_llm, vertical_and_slash, flex_vertical_and_slash and block_sparse (100 blocks of 64) heads"


def read(path: Path, target: Target) -> Plan:
    """One rule per query head; a head that is left out runs MInference's default. Scores are kept in the provenance."""
    layers = _listed(read_json(path, format=_FORMAT))
    if not isinstance(layers, list) or not all(
        isinstance(layer, dict) and all(map(str.isdecimal, layer)) for layer in layers
    ):
        malformed(path, _FORMAT, "it must be a list over layers of {head: [type, vertical, slash, score]}")
    heads = target.base_model.num_heads
    own = [*heads, *[0] * len(layers)]
    target.check([max([own[i], *(int(head) + 1 for head in layer)]) for i, layer in enumerate(layers)], source=path)
    entries = [[layer.get(str(head), _UNSEARCHED) for head in range(n)] for layer, n in zip(layers, heads, strict=True)]
    rules = [[_rule(entry, path) for entry in layer] for layer in entries]
    scores = [[entry[3] if len(entry) > 3 else None for entry in layer] for layer in entries]
    return target.plan(rules, "query_head", format=_FORMAT, source=path, scores=scores, note=differences(__doc__))


def _listed(content: Any) -> Any:
    """A list over layers, also where vLLM's config keeps a table of them."""
    for part in ("dual_chunk_attention_config", "sparse_attention_config"):
        if isinstance(content, dict):
            content = content.get(part, content)
    if isinstance(content, dict) and content and set(content) == {str(layer) for layer in range(len(content))}:
        return [content[str(layer)] for layer in range(len(content))]
    return content


def write(plan: Plan, path: Path, length_tokens: int | None) -> None:
    """The same list; scores of a plan that came from such a file are written again, others are 1."""
    scores = plan.provenance.get("scores") if plan.provenance.get("converted_from") == _FORMAT else None
    layers = [
        {
            str(head): [
                *_entry(rule, f"{module}:{head}", length_tokens),
                1.0 if scores is None or scores[index][head] is None else scores[index][head],
            ]
            for head, rule in enumerate(plan.module_rules(module))
        }
        for index, module in enumerate(plan.base_model.modules)
    ]
    write_bytes(path, (json.dumps(layers, indent=1) + "\n").encode())


def _rule(entry: Any, path: Path) -> Rule:
    match entry:
        case ["vertical_and_slash", int(vertical), int(slash), *_]:
            return VerticalSlash(vertical=LengthLaw(a=vertical), slash=LengthLaw(a=slash))
        case ["stream_llm", int(sink), int(window), *_]:
            return SinkWindow(sink=sink, window=LengthLaw(a=window))
        case ["block_sparse", *_]:
            return PooledTopk(keep=LengthLaw(a=_BLOCKS_KEPT * _BLOCK), sink=0)
        case ["flex_vertical_and_slash", [float(share), int(least)], [float() as other, int()], *_] if share == other:
            return FlexPrefill(gamma=share, tau=0, min_budget=least, probe=64)
    malformed(path, _FORMAT, f"an entry must be [type, vertical, slash, score] of a known type, but is {entry!r}")


def _entry(rule: Rule, where: str, length_tokens: int | None) -> list[Any]:
    match rule:
        case VerticalSlash():
            numbers = [tokens_of(law, length_tokens, where, _FORMAT) for law in (rule.vertical, rule.slash)]
            return ["vertical_and_slash", *numbers]
        case SinkWindow():
            return ["stream_llm", rule.sink, tokens_of(rule.window, length_tokens, where, _FORMAT)]
        case PooledTopk() if tokens_of(rule.keep, length_tokens, where, _FORMAT) == _BLOCKS_KEPT * _BLOCK:
            return ["block_sparse", *_UNSEARCHED[1:3]]
        case FlexPrefill() if rule.tau == 0:
            return ["flex_vertical_and_slash", [rule.gamma, rule.min_budget], [rule.gamma, rule.min_budget]]
    inexpressible(where, rule, _FORMAT, _CAN)
