"""sparsesearch: calibration -> Profile, search space -> candidates, device -> CostModel; ScoreTable -> search -> Plan -> apply -> report.

Importing it registers the attention implementation `sparsesearch` with transformers, so that `from_pretrained` runs the plan which a patched
checkpoint carries. It touches nothing else.
"""

from typing import TYPE_CHECKING, Any

from sparsesearch.runtime.registration import register

if TYPE_CHECKING:
    from sparsesearch.plan import Plan
    from sparsesearch.runtime.fingerprint import describe
    from sparsesearch.runtime.live import AppliedPlan, apply
    from sparsesearch.runtime.prepare import sparse_cache

__all__ = ["AppliedPlan", "Plan", "apply", "describe", "sparse_cache"]

_HOMES = {
    "AppliedPlan": "runtime.live",
    "Plan": "plan",
    "apply": "runtime.live",
    "describe": "runtime.fingerprint",
    "sparse_cache": "runtime.prepare",
}

register()


def __getattr__(name: str) -> Any:
    """Import public names on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module 'sparsesearch' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"sparsesearch.{_HOMES[name]}"), name)
