"""Which model families of the installed transformers can be planned."""

import inspect
from functools import cache

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING


@cache
def supported_families() -> tuple[str, ...]:
    """`model_type` of every causal LM whose modelling file asks the AttentionInterface for its attention function.

    Read from the installed sources, so that the list is that of this release and not of ours.
    """
    found = []
    for config, model in MODEL_FOR_CAUSAL_LM_MAPPING.items():
        classes = model if isinstance(model, tuple | list) else (model,)
        module = inspect.getmodule(classes[0])
        if module is not None and "ALL_ATTENTION_FUNCTIONS.get_interface(" in inspect.getsource(module):
            found.append(str(config.model_type))
    return tuple(sorted(set(found)))
