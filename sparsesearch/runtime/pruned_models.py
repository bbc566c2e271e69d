"""Model types of pruned checkpoints: stock classes whose layers shrink to the widths in their config.

Only the small configuration classes are made at import. The model classes follow when the first such config is: `AutoModel…` reads a
config before it looks for a model class.
"""

from typing import Any

import transformers
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto import modeling_auto

from sparsesearch.errors import ArtifactError
from sparsesearch.runtime.shrink import LayerSizes, shrink

ATTRIBUTE = "sparsesearch_cut"
PREFIX = "sparsesearch_"
FAMILIES = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "mistral": "Mistral", "bert": "Bert", "vit": "ViT"}
_HEADS = (
    "AutoModel", "AutoModelForCausalLM", "AutoModelForSequenceClassification", "AutoModelForTokenClassification", "AutoModelForMaskedLM",
    "AutoModelForQuestionAnswering", "AutoModelForImageClassification",
)  # fmt: skip
_CONFIGS: dict[str, type[PreTrainedConfig]] = {}


class Shrunk:
    """A mixin: after the stock constructor, layers take the widths of `config.sparsesearch_cut`."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]  # the stock model's
        shrink(self, read_sizes(config))  # type: ignore[arg-type]  # mixed into nn.Module


def config_class(model_type: str) -> type[PreTrainedConfig] | None:
    """Our configuration class for a stock model type; None when that family cannot be exported with a width per layer."""
    return _CONFIGS.get(PREFIX + model_type)


def pruned_config(base: PreTrainedConfig, sizes: dict[int, LayerSizes]) -> PreTrainedConfig:
    """A stock model's config as that of a pruned one."""
    kind = _CONFIGS[PREFIX + base.model_type]
    content: dict[str, Any] = {
        key: value for key, value in base.to_dict().items() if key not in ("model_type", "architectures")
    }
    content[ATTRIBUTE] = {"layers": {str(index): vars(size) for index, size in sizes.items()}}
    return kind(**content)


def read_sizes(config: PreTrainedConfig) -> dict[int, LayerSizes]:
    """The widths in a config.

    Raises:
        ArtifactError: they are missing or malformed.
    """
    content = getattr(config, ATTRIBUTE, None)
    try:
        return {int(index): LayerSizes(**size) for index, size in content["layers"].items()}  # type: ignore[index]
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise ArtifactError(
            f"config.json of a {config.model_type} model must give its widths under {ATTRIBUTE!r}, but got {content!r}. "
            "Make the checkpoint again with `sparsesearch apply`."
        ) from error


def model_class(model_type: str, stock_name: str) -> Any:
    """The pruned counterpart of a stock model class, such as `LlamaForCausalLM`."""
    _register_models(model_type)
    return globals()[f"Sparse{stock_name}"]


def register_configs() -> None:
    """Make our model types known to `AutoConfig`; a second call changes nothing."""
    for model_type, name in FAMILIES.items():
        if PREFIX + model_type in _CONFIGS:
            continue
        made = _config(model_type, getattr(transformers, f"{name}Config"))
        globals()[made.__name__] = _CONFIGS[made.model_type] = made
        AutoConfig.register(made.model_type, made)


def _config(model_type: str, stock: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    def __post_init__(self: Any, **kwargs: Any) -> None:
        stock.__post_init__(self, **kwargs)
        _register_models(model_type)

    content = {"model_type": PREFIX + model_type, "__module__": __name__, "__post_init__": __post_init__}
    return type(f"Sparse{stock.__name__}", (stock,), content)


def _register_models(model_type: str) -> None:
    """Make the classes of one family and tell the `Auto` classes."""
    config = _CONFIGS[PREFIX + model_type]
    stock_config = config.__mro__[1]
    for head in _HEADS:
        auto = getattr(modeling_auto, head)
        stock = auto._model_mapping.get(stock_config, None)
        if stock is None or config in auto._model_mapping:
            continue
        name = f"Sparse{stock.__name__}"
        if name not in globals():
            globals()[name] = type(name, (Shrunk, stock), {"config_class": config, "__module__": __name__})
        auto.register(config, globals()[name])
