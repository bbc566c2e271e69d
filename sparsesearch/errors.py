"""What can go wrong, and the exit code the command line gives for it.

Every message says what must hold, what was given, and what to do next. Only these errors are shown without a traceback: any other
exception is a defect of ours.
"""

from collections.abc import Iterable
from difflib import get_close_matches

from pydantic import ValidationError


class SparseSearchError(Exception):
    """Base of every error a user can cause. `exit_code` is what the command line returns."""

    exit_code = 1


class SpecError(SparseSearchError, ValueError):
    """A value, rule, search space, budget or file is not what it must be."""


class ArtifactError(SparseSearchError):
    """A file on disk is missing, truncated, edited, foreign, or of a newer major version."""


class UnsupportedModelError(SparseSearchError):
    """The model has attention that no rule can express; it is refused rather than run wrongly."""

    exit_code = 5


class PlanMismatchError(SparseSearchError):
    """The plan was made for another model, or the metrics are those of another plan."""

    exit_code = 5


class BudgetInfeasibleError(SparseSearchError):
    """No plan fits the budget; the message names the smallest feasible value."""

    exit_code = 3


class RegressionError(SparseSearchError):
    """`check` found that a plan's quality or speed has got worse than allowed, or healing only made a checkpoint worse."""

    exit_code = 4


class UnsupportedKernelError(SparseSearchError):
    """The backend that was asked for cannot serve this call; no other one is taken in silence."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Say which known names there are, and the nearest one first, for the end of an error message; nothing where there are none."""
    names = sorted(known)
    if not names:
        return ""
    close = get_close_matches(name, names, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"{hint} Known: {', '.join(names)}."


def _kind(value: object) -> str:
    return "empty" if value is None else f"a {type(value).__name__}"


def first_problem(error: ValidationError, known: Iterable[str] = ()) -> str:
    """What is wrong with the first field that pydantic refused, in our words; `known` are the fields there are."""
    first = error.errors()[0]
    field, message = ".".join(str(part) for part in first["loc"]), first["msg"]
    match first["type"]:
        case "extra_forbidden":
            return f"there is no {field!r}.{nearest(field, known)}" if known else f"there is no {field!r}."
        case "missing":
            return f"{field!r} must be given, but is missing."
        case "model_type" | "dict_type":
            return f"{field or 'the whole'} must be a mapping, but is {_kind(first['input'])}."
        case "value_error" | "assertion_error":
            return f"{field and field + ': '}{first['ctx']['error']}."
    must = message.replace("Input should be", "must be")
    return f"{field} {must}, but got {first['input']!r}."
