"""A plan inside a checkpoint's config.json, where `save_pretrained` keeps it: the object of a plan file, checksum included."""

import json
from pathlib import Path
from typing import Any

from sparsesearch.artifacts import read_text, stamped, unstamped
from sparsesearch.errors import ArtifactError
from sparsesearch.plan import FORMAT, SCHEMA_VERSION, Plan

CONFIG_KEY = "sparsesearch"
"""Where the config of a transformers model carries its plan."""
PRIVATE_CONFIG_KEY = f"_{CONFIG_KEY}"
"""Where the config of a diffusers model does."""


def embedded(plan: Plan) -> dict[str, Any]:
    """What a config carries."""
    return stamped(plan.to_dict(), format=FORMAT, schema_version=SCHEMA_VERSION)


def is_stamped(content: dict[str, Any]) -> bool:
    """Whether a config's plan has a checksum, so that an edited one is seen; those of older checkpoints have none."""
    return "format" in content


def read_embedded(content: dict[str, Any], *, source: str) -> Plan:
    """The plan that a config carries; `source` names it in messages.

    Raises:
        ArtifactError: it was edited, is of a newer major version, or a field is missing, unknown or inconsistent.
        SpecError: a rule is unknown or out of range.
    """
    if is_stamped(content):
        content = unstamped(content, source=source, format=FORMAT, schema_version=SCHEMA_VERSION)
    return Plan.from_dict(content, source=source)


def is_checkpoint(path: Path) -> bool:
    """Whether a path is the directory of a model."""
    return (path / "config.json").is_file()


def plan_of_checkpoint(directory: Path) -> Plan:
    """The plan that a checkpoint directory carries in its config.

    Raises:
        ArtifactError: it is no checkpoint, or carries none.
    """
    if not is_checkpoint(directory):
        raise ArtifactError(
            f"{directory} must be a plan file or a checkpoint with a plan, but has no config.json. Name the plan's file."
        )
    source = f"{directory}/config.json"
    try:
        config = json.loads(read_text(directory / "config.json"))
    except json.JSONDecodeError as error:
        raise ArtifactError(f"{source} must be JSON, but is damaged at line {error.lineno}.") from error
    found = next((config[key] for key in (CONFIG_KEY, PRIVATE_CONFIG_KEY) if isinstance(config.get(key), dict)), None)
    if found is None:
        raise ArtifactError(
            f"{source} must carry a plan under {CONFIG_KEY!r}, but does not. Make it with `sparsesearch apply`."
        )
    return read_embedded(found, source=source)
