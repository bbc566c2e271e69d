"""MoA: {"alphas": [[…]], "betas": [[…]]}, a window α + β·N per query head beside a sink of 64 tokens.

MoA rounds α and β·N down to blocks of 64, this plan rounds their sum up, so a window is never shorter and at most one block longer.
"""

import json
from pathlib import Path
from typing import Any

from sparsesearch.artifacts import write_bytes
from sparsesearch.exchange.target import Target, differences, inexpressible, malformed, read_json
from sparsesearch.plan import Plan
from sparsesearch.rules import LengthLaw, Rule
from sparsesearch.rules.dense import Dense
from sparsesearch.rules.sink_window import SinkWindow

_FORMAT = "moa"
_SINK = 64


def read(path: Path, target: Target) -> Plan:
    """One window per query head; α = 0, β = 1 is dense."""
    content = read_json(path, format=_FORMAT)
    match content:
        case {"alphas": [*alphas], "betas": [*betas]} if _shape(alphas) == _shape(betas) is not None:
            target.check(_shape(alphas) or [], source=path)
        case _:
            malformed(
                path, _FORMAT, "it must hold `alphas` and `betas`, equally long lists over layers and heads of numbers"
            )
    rules = [[_rule(a, b, path) for a, b in zip(*layer, strict=True)] for layer in zip(alphas, betas, strict=True)]
    return target.plan(rules, "query_head", format=_FORMAT, source=path, note=differences(__doc__))


def write(plan: Plan, path: Path, length_tokens: int | None) -> None:
    """α and β of every head; laws stay laws, so no length is needed."""
    laws = [
        [_law(rule, f"{module}:{head}") for head, rule in enumerate(plan.module_rules(module))]
        for module in plan.base_model.modules
    ]
    content = {
        "alphas": [[_number(law.a) for law in layer] for layer in laws],
        "betas": [[law.b for law in layer] for layer in laws],
    }
    write_bytes(path, (json.dumps(content) + "\n").encode())


def _shape(rows: list[Any]) -> list[int] | None:
    """Entries per row, or None where some row is no list of numbers."""
    if not all(isinstance(row, list) and all(isinstance(x, int | float) for x in row) for row in rows):
        return None
    return [len(row) for row in rows]


def _rule(alpha: float, beta: float, path: Path) -> Rule:
    if not 0 <= beta <= 1:
        malformed(path, _FORMAT, f"betas must lie in [0, 1], but one is {beta}")
    return Dense() if (alpha, beta) == (0, 1) else SinkWindow(sink=_SINK, window=LengthLaw(a=alpha, b=beta))


def _law(rule: Rule, where: str) -> LengthLaw:
    if isinstance(rule, Dense):
        return LengthLaw(a=0, b=1)
    if isinstance(rule, SinkWindow) and rule.sink == _SINK:
        return rule.window
    inexpressible(where, rule, _FORMAT, f"windows a + b·N beside a sink of {_SINK} tokens, and dense heads")


def _number(value: float) -> int | float:
    return int(value) if value == int(value) else value
