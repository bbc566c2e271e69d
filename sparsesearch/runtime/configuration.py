"""Where a plan and its attention implementation live in a transformers config, composite configs included."""

from typing import Any

from transformers import PretrainedConfig

from sparsesearch.runtime.attention import NAME

Implementation = str | dict[str, Any]


def plan_content(config: PretrainedConfig) -> dict[str, Any] | None:
    """The plan that a config carries, as plain content; also one carried by a part (a text model inside a multimodal one)."""
    content = getattr(config, NAME, None)
    if isinstance(content, dict):
        return content
    parts = [getattr(config, name, None) for name in config.sub_configs]
    found = [plan_content(part) for part in parts if part is not None]
    return next((content for content in found if content is not None), None)


def implementation_of(config: PretrainedConfig) -> Implementation:
    """The attention implementation of a config; of a composite one, a mapping as `set_attn_implementation` takes it."""
    parts = {name: getattr(config, name, None) for name in config.sub_configs}
    inner = {name: implementation_of(part) for name, part in parts.items() if part is not None}
    own = config._attn_implementation
    return {"": own, **inner} if inner else own


def sparse_implementation(config: PretrainedConfig, attending: list[PretrainedConfig]) -> Implementation:
    """Like `implementation_of`, with ours for the configs in `attending` and everything else as it is."""
    parts = {name: getattr(config, name, None) for name in config.sub_configs}
    inner = {name: sparse_implementation(part, attending) for name, part in parts.items() if part is not None}
    own = NAME if any(config is one for one in attending) else config._attn_implementation
    return {"": own, **inner} if inner else own


def json_implementation(implementation: Implementation) -> Implementation:
    """As config.json wants it: a name, or a name per part that runs ours, so that every other part stays at its default."""
    if isinstance(implementation, str):
        return implementation
    inner = {key: json_implementation(value) for key, value in implementation.items() if key}
    kept = {key: value for key, value in inner.items() if isinstance(value, dict) or value == NAME}
    return {"": NAME, **kept} if implementation.get("") == NAME else kept
