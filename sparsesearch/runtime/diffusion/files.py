"""What a directory of diffusers looks like; read without diffusers."""

import json
from pathlib import Path

from sparsesearch.artifacts import read_text


def is_diffusers_directory(path: Path) -> bool:
    """Whether a directory holds a diffusers pipeline, or one of its models."""
    if (path / "model_index.json").is_file():
        return True
    config = path / "config.json"
    if not config.is_file():
        return False
    try:
        return "_class_name" in json.loads(read_text(config))
    except json.JSONDecodeError:
        return False  # whoever loads it says what is wrong with it
