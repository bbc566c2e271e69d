"""The model card of a patched checkpoint."""

import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from sparsesearch.cut import Cut
from sparsesearch.plan import Plan

_USAGE = """import sparsesearch  # without it, loading fails
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("this directory")
"""


def model_card(plan: Plan, base_card: Path, command: str | None, *, model_type: str | None = None) -> str:
    """Markdown with base model, budget, rules, quality, command line and versions.

    Args:
        plan: the plan.
        base_card: README of the base model; its licence is carried over.
        command: command line that made the checkpoint.
        model_type: of a pruned checkpoint with a width per layer; None for any other.
    """
    base = plan.base_model.name_or_path
    front = {"base_model": base, "library_name": "transformers", "tags": ["sparse-attention", "sparsesearch"]}
    front |= {key: value for key, value in _front_matter(base_card).items() if key.startswith("license")}
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=True)}---",
        *(_attention_text(base) if plan.pruning is None else _pruned_text(plan, plan.pruning, model_type)),
        *_section("Budget", ("metric", "bound", "predicted (tokens: share of dense)"), _budget_rows(plan)),
        *_section("Rules", ("kind", "query heads"), [(kind, count) for kind, count in plan.kind_counts().items()]),
        *_section("Quality", ("metric", "variant", "value"), _quality_rows(plan)),
        "## Provenance",
        f"Plan `{plan.sha256[:12]}`, tiles of {plan.block_tokens} tokens, searched at {', '.join(map(str, plan.lengths_tokens))} tokens.",
        f"```\n{command or 'sparsesearch.runtime.export.export(…)'}\n```",
        ", ".join(f"{name} {_version(name)}" for name in ("sparsesearch", "transformers", "torch")) + ".",
    ]
    return "\n\n".join(parts) + "\n"


def _attention_text(base: str) -> list[str]:
    return [
        f"# {Path(base).name} with a sparse attention plan",
        f"The weights of `{base}`, unchanged; `config.json` carries a plan that says which attention work each head skips.",
        f"```python\n{_USAGE}```",
        'Pass `attn_implementation="sdpa"` to run it dense.',
    ]


def _pruned_text(plan: Plan, cut: Cut, model_type: str | None) -> list[str]:
    heads = sum(len(layer.removed_heads) for layer in cut.layers.values())
    channels = sum(len(layer.removed_channels) for layer in cut.layers.values())
    refitted = "refitted by least squares" if cut.compensation else "unchanged"
    base, usage = plan.base_model.name_or_path, _USAGE
    if model_type is None and set(plan.kind_counts()) <= {"dense"}:
        usage = _USAGE.replace("import sparsesearch  # without it, loading fails\n", "")
    return [
        f"# {Path(base).name}, pruned",
        f"`{base}` without {heads} query heads and {channels} FFN channels; the other weights are {refitted}.",
        f"```python\n{usage}```",
    ]


def _section(title: str, header: tuple[str, ...], rows: list[tuple[Any, ...]]) -> list[str]:
    if not rows:
        return []
    lines = [header, ("---",) * len(header), *rows]
    return [f"## {title}", "\n".join(f"| {' | '.join(_cell(cell) for cell in line)} |" for line in lines)]


def _budget_rows(plan: Plan) -> list[tuple[Any, ...]]:
    return [
        (budget.metric, budget.bound, ", ".join(f"{length}: {share:.4g}" for length, share in budget.predicted.items()))
        for budget in plan.budgets
    ]


def _quality_rows(plan: Plan) -> list[tuple[Any, ...]]:
    rows: list[tuple[Any, ...]] = []
    for metric, values in plan.quality.items():
        if isinstance(values, dict):
            rows += [(metric, variant, value) for variant, value in values.items()]
        else:
            rows.append((metric, "plan", values))
    return rows


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value)


def _front_matter(card: Path) -> dict[str, Any]:
    """The YAML head of a model card, if it has a readable one."""
    if not card.is_file():
        return {}
    text = card.read_text(encoding="utf-8", errors="replace")
    if not text.startswith("---\n"):
        return {}
    try:
        content = yaml.safe_load(text[4:].partition("\n---")[0])
    except yaml.YAMLError:
        return {}
    return content if isinstance(content, dict) else {}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "(not installed)"
