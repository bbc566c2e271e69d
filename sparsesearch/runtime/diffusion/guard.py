"""A mark in a model's config that plain diffusers refuses, so that a directory with a plan never runs dense in silence.

diffusers ignores private keys, hence our plan, unless `import sparsesearch` has wrapped its loaders. What it does not ignore is a
`quantization_config` of an unknown method: it stops and prints the method's name, which here says what to do. Our wrapped loader takes the
mark away before diffusers looks, and saving puts it back.
"""

from typing import Any

from sparsesearch.embedded_plan import PRIVATE_CONFIG_KEY

CONFIG_KEY = PRIVATE_CONFIG_KEY
"""Where a config carries its plan."""
METHOD = "sparsesearch (this model carries a sparse plan: run `import sparsesearch` before loading it)"
_QUANTIZATION, _INNER = "quantization_config", "inner"


def guarded(config: dict[str, Any]) -> dict[str, Any]:
    """The config with the mark if it carries a plan; the model's own quantization is kept inside the mark."""
    if CONFIG_KEY not in config or is_guarded(config):
        return config
    mark: dict[str, Any] = {"quant_method": METHOD}
    if config.get(_QUANTIZATION) is not None:
        mark[_INNER] = config[_QUANTIZATION]
    return {**config, _QUANTIZATION: mark}


def unguarded(config: dict[str, Any]) -> dict[str, Any]:
    """The config as it was before `guarded`."""
    if not is_guarded(config):
        return config
    rest = {key: value for key, value in config.items() if key != _QUANTIZATION}
    inner = config[_QUANTIZATION].get(_INNER)
    return rest if inner is None else {**rest, _QUANTIZATION: inner}


def is_guarded(config: dict[str, Any]) -> bool:
    """Whether plain diffusers would refuse it."""
    mark = config.get(_QUANTIZATION)
    return isinstance(mark, dict) and str(mark.get("quant_method", "")).startswith("sparsesearch")
