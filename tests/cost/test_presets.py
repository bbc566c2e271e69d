from pathlib import Path

import pytest

from sparsesearch.errors import SpecError
from sparsesearch.presets import preset_names, preset_path, preset_text


def test_names_paths_and_text() -> None:
    assert "needle-7m" in preset_names("models")
    assert (preset_path("models", "needle-7m") / "config.json").is_file()
    assert "cpu" in preset_names("cost_models")
    assert preset_path("cost_models", "cpu") == Path(preset_path("cost_models", "cpu"))
    assert '"sparsesearch.cost_model"' in preset_text("cost_models", "cpu")
    for room in ("search_spaces", "cost_models", "profiles", "models"):
        assert preset_names(room) == sorted(preset_names(room))  # type: ignore[arg-type]
        assert not any(name.startswith(("_", ".")) for name in preset_names(room))  # type: ignore[arg-type]


def test_unknown_names_get_a_hint() -> None:
    with pytest.raises(SpecError, match="Did you mean 'needle-7m'"):
        preset_path("models", "needle-8m")
    with pytest.raises(SpecError, match="Did you mean 'cost_models'"):
        preset_names("cost_model")  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="Use preset_path"):
        preset_text("models", "needle-7m")
