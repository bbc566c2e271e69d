"""A model's description from its configuration alone: no weights are read."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from sparsesearch.errors import SpecError
from sparsesearch.plan import BaseModelInfo
from sparsesearch.runtime.fingerprint import describe
from sparsesearch.runtime.loading import locate


def describe_config(source: str, *, revision: str | None = None, trust_remote_code: bool = False) -> BaseModelInfo:
    """Attention modules and head counts of the model that `source` configures; its weights are not fingerprinted.

    Args:
        source: hub id, local directory, or an embedded model's name.
        revision: branch, tag or commit of a hub model.
        trust_remote_code: run code that the repository ships.

    Raises:
        SpecError: there is no configuration to read (a GGUF file, or no model at all).
        UnsupportedModelError: its attention has something that no rule can express.
    """
    if source.endswith(".gguf"):
        raise SpecError(
            f"a model must have a config.json to be described without weights, but {source} is a GGUF file."
        )
    try:
        config = AutoConfig.from_pretrained(locate(source), revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise SpecError(f"{source} must be a model with a config.json, but: {str(error).splitlines()[0]}") from error
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    return describe(model.eval(), source)
