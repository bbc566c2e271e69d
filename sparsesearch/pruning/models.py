"""Loading models of any head for pruning: decoders, text encoders, vision models."""

from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, AutoModel, PreTrainedModel

from sparsesearch.errors import UnsupportedModelError
from sparsesearch.pruning.data import load_tokenizer
from sparsesearch.runtime.loading import load_model, locate


def load_prunable(source: str | Path, *, device: str = "cpu", dtype: str = "auto") -> tuple[PreTrainedModel, Any]:
    """A model in evaluation mode under the class its config names, and its tokenizer (None for vision models).

    Raises:
        ArtifactError: it is missing or incomplete.
        UnsupportedModelError: transformers does not know the architecture.
    """
    place = locate(source)
    if isinstance(place, Path) and place.suffix == ".gguf":
        return load_model(source, device=device, dtype=dtype)
    config = AutoConfig.from_pretrained(str(place))
    if any(name.endswith("ForCausalLM") for name in config.architectures or ()):
        return load_model(source, device=device, dtype=dtype)
    named = next(
        (getattr(transformers, name) for name in config.architectures or () if hasattr(transformers, name)), AutoModel
    )
    wanted = "float32" if dtype == "auto" and device == "cpu" else dtype
    try:
        model: PreTrainedModel = named.from_pretrained(str(place), dtype=wanted).to(device)
    except ValueError as error:
        raise UnsupportedModelError(f"{source}: transformers cannot load it: {str(error).splitlines()[0]}") from error
    model.train(False)
    return model, (None if model.main_input_name == "pixel_values" else load_tokenizer(place))
