"""What `import sparsesearch` does to transformers: an attention function, its mask function, pruned model types, binding after loading."""

import functools
import warnings
from typing import Any

from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from sparsesearch.embedded_plan import read_embedded
from sparsesearch.runtime.attention import NAME, sparse_attention
from sparsesearch.runtime.configuration import implementation_of, plan_content
from sparsesearch.runtime.live import attach
from sparsesearch.runtime.mask_code import mask_code
from sparsesearch.runtime.pruned_models import register_configs

_WRAPPED = "_sparsesearch_wrapped"


def register() -> None:
    """Register under the name `sparsesearch`; a second call changes nothing."""
    AttentionInterface.register(NAME, sparse_attention)
    AttentionMaskInterface.register(NAME, mask_code)
    register_configs()
    original: Any = PreTrainedModel.from_pretrained.__func__  # type: ignore[attr-defined]
    if getattr(original, _WRAPPED, False):
        return

    @functools.wraps(original)
    def from_pretrained(cls: type[PreTrainedModel], *args: Any, **kwargs: Any) -> Any:
        result = original(cls, *args, **kwargs)
        bind_loaded(result[0] if isinstance(result, tuple) else result)
        return result

    setattr(from_pretrained, _WRAPPED, True)
    PreTrainedModel.from_pretrained = classmethod(from_pretrained)  # type: ignore[assignment]


def bind_loaded(model: PreTrainedModel) -> None:
    """Bind the plan that a checkpoint's config carries, unless the caller asked for another attention.

    Raises:
        PlanMismatchError: the plan names modules or heads that the model does not have.
    """
    content = plan_content(model.config)
    if content is None:
        return
    if NAME not in _names(implementation_of(model.config)):
        warnings.warn(
            f"{model.name_or_path or type(model).__name__} carries a sparse plan, but runs dense, because attn_implementation="
            f"{model.config._attn_implementation!r} was asked for.",
            stacklevel=3,
        )
        return
    attach(model, read_embedded(content, source=f"{model.name_or_path}: config.json: {NAME}"))


def _names(implementation: Any) -> set[str]:
    if isinstance(implementation, dict):
        return set().union(*(_names(value) for value in implementation.values()))
    return {implementation}
