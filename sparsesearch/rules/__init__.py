"""The rules: one file each. Adding a file adds a rule everywhere; nothing else needs an edit."""

import importlib
import pkgutil
from typing import Any

from pydantic import ValidationError

from sparsesearch.errors import SpecError, first_problem, nearest
from sparsesearch.rules.base import LengthLaw, Rule

for _module in sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("base")):
    importlib.import_module(f"{__name__}.{_module}")  # no try/except: a broken rule must be loud

__all__ = ["LengthLaw", "Rule", "parse_rule", "rule_kinds"]


def rule_kinds() -> dict[str, type[Rule]]:
    """Every rule class by its kind, sorted."""
    return dict(sorted(Rule.registry.items()))


def parse_rule(data: Any, *, where: str) -> Rule:
    """Make a rule of a mapping such as `{"kind": "sink_window", "sink": 64, "window": 256}`.

    Args:
        data: the mapping.
        where: file and key, for messages.

    Raises:
        SpecError: the kind is unknown, a parameter is missing, unknown or out of range.
    """
    if not isinstance(data, dict) or "kind" not in data:
        raise SpecError(f"{where}: a rule must be a mapping with `kind`, but got {data!r}.")
    kinds = rule_kinds()
    if data["kind"] not in kinds:
        raise SpecError(f"{where}: unknown rule kind {data['kind']!r}.{nearest(str(data['kind']), kinds)}")
    try:
        return kinds[data["kind"]].model_validate(data)
    except ValidationError as error:
        parameters = kinds[data["kind"]].model_fields
        raise SpecError(f"{where}, {data['kind']}: {first_problem(error, parameters)}") from error
