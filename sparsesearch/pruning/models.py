"""Loading models of any head for pruning: decoders, text encoders, vision models."""

from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel

from sparsesearch.errors import UnsupportedModelError
from sparsesearch.pruning.data import load_tokenizer
from sparsesearch.runtime.loading import load_model, load_weights, locate
from sparsesearch.runtime.pruned_models import PREFIX, model_class


def load_prunable(
    source: str | Path, *, device: str = "cpu", dtype: str = "auto", with_plan: bool = True
) -> tuple[PreTrainedModel, Any]:
    """A model in evaluation mode under the class its config names, and its tokenizer (None where there is none).

    A language model that carries a plan runs it, unless `with_plan` is off.

    Raises:
        ArtifactError: it is missing or incomplete.
        UnsupportedModelError: transformers does not know the architecture.
    """
    place = locate(source)
    if isinstance(place, Path) and place.suffix == ".gguf":
        return load_model(source, device=device, dtype=dtype)
    config = AutoConfig.from_pretrained(str(place))
    if any(name.endswith("ForCausalLM") for name in config.architectures or ()):
        return load_weights(source, device=device, dtype=dtype, with_plan=with_plan), load_tokenizer(place)
    named = next((found for name in config.architectures or () if (found := _class_named(name, config))), AutoModel)
    wanted = "float32" if dtype == "auto" and device == "cpu" else dtype
    try:
        model: PreTrainedModel = named.from_pretrained(str(place), dtype=wanted).to(device)
    except ValueError as error:
        raise UnsupportedModelError(f"{source}: transformers cannot load it: {str(error).splitlines()[0]}") from error
    model.train(False)
    return model, (None if model.main_input_name == "pixel_values" else load_tokenizer(place))


def _class_named(name: str, config: PreTrainedConfig) -> Any:
    """A model class of transformers, or the pruned counterpart of one; None when neither knows it."""
    if config.model_type.startswith(PREFIX) and name.startswith("Sparse"):
        return model_class(config.model_type.removeprefix(PREFIX), name.removeprefix("Sparse"))
    return getattr(transformers, name, None)
