"""sparsesearch: calibration -> Profile, search space -> candidates, device -> CostModel; ScoreTable -> search -> Plan -> apply -> report.

Importing it registers the attention implementation `sparsesearch` with transformers, so that `from_pretrained` runs the plan which a patched
checkpoint carries; likewise for diffusers, as soon as that is imported. It touches nothing else. With SPARSESEARCH_REGISTER=later in the environment, as
under the command line, that waits until something imports `sparsesearch.runtime`, for transformers takes seconds to import.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparsesearch.plan import Plan
    from sparsesearch.runtime.decode_step import DecodeStep
    from sparsesearch.runtime.diffusion.live import apply_diffusers
    from sparsesearch.runtime.export import export
    from sparsesearch.runtime.fingerprint import describe
    from sparsesearch.runtime.live import AppliedPlan, apply
    from sparsesearch.runtime.loading import load_model
    from sparsesearch.runtime.prepare import sparse_cache
    from sparsesearch.runtime.verify import verify

__all__ = [
    "AppliedPlan",
    "DecodeStep",
    "Plan",
    "apply",
    "apply_diffusers",
    "describe",
    "export",
    "load_model",
    "sparse_cache",
    "verify",
]

_HOMES = {
    "AppliedPlan": "runtime.live",
    "DecodeStep": "runtime.decode_step",
    "Plan": "plan",
    "apply": "runtime.live",
    "apply_diffusers": "runtime.diffusion.live",
    "describe": "runtime.fingerprint",
    "export": "runtime.export",
    "load_model": "runtime.loading",
    "sparse_cache": "runtime.prepare",
    "verify": "runtime.verify",
}

if os.environ.get("SPARSESEARCH_REGISTER") != "later":
    import_module("sparsesearch.runtime")


def __getattr__(name: str) -> Any:
    """Import public names on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module 'sparsesearch' has no attribute {name!r}")
    return getattr(import_module(f"sparsesearch.{_HOMES[name]}"), name)
