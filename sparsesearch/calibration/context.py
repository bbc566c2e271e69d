"""The longest sequence a model can read."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from sparsesearch.errors import SpecError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def check_context(config: "PreTrainedConfig", lengths: Iterable[int]) -> None:
    """Refuse sequences beyond the model's positions: what attention does there says nothing about how the model is used.

    Raises:
        SpecError: a length in tokens exceeds the configuration's `max_position_embeddings`.
    """
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    longest = max(lengths)
    if context is not None and longest > context:
        raise SpecError(
            f"lengths must be at most {context} tokens, the context of this model, but got {longest}. Ask for shorter ones."
        )
