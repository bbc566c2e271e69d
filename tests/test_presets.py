"""What is shipped as data: every file loads, and the search spaces are what their papers say."""

import json
from pathlib import Path

import pytest
import yaml

from sparsesearch.check import baseline_variant
from sparsesearch.cost.table import CostTable
from sparsesearch.errors import SpecError
from sparsesearch.evaluate import Metrics
from sparsesearch.plan import Plan
from sparsesearch.presets import Room, preset_names, preset_path, preset_text
from sparsesearch.profiling.record import Profile
from sparsesearch.rules.sink_window import SinkWindow
from sparsesearch.search_space import SearchSpace

ROOMS: tuple[Room, ...] = ("search_spaces", "cost_models", "profiles", "models")
SPACES = preset_names("search_spaces")


def _files(*suffixes: str) -> list[Path]:
    found = []
    for room in ROOMS:
        for name in preset_names(room):
            path = preset_path(room, name)
            found += [file for file in (path.rglob("*") if path.is_dir() else [path]) if file.suffix in suffixes]
    return sorted(found)


@pytest.mark.parametrize("path", _files(".json", ".yaml", ".jsonl"), ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_shipped_file_loads(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    match path.suffix:
        case ".yaml":
            assert isinstance(yaml.safe_load(text), dict)
        case ".jsonl":
            assert all(json.loads(line)["text"] for line in text.splitlines())
        case _:
            content = json.loads(text)
            assert isinstance(content, dict)
            if content.get("format", "").startswith("sparsesearch."):
                _opened(path, content["format"])


def _opened(path: Path, artifact: str) -> None:
    """Read by the class it belongs to, checksum included."""
    match artifact.removeprefix("sparsesearch."):
        case "plan":
            Plan.load(path)
        case "metrics":
            Metrics.load(path)
        case "cost_model":
            CostTable.load(path)
        case "profile":
            Profile.load(path.parent)
        case "profile-state":
            pass
        case other:
            pytest.fail(f"{path}: nothing reads {other!r}")


def test_no_shipped_file_tells_of_the_machine_it_was_made_on() -> None:
    for path in _files(".json", ".yaml"):
        text = path.read_text(encoding="utf-8")
        assert not any(mark in text for mark in ("/home/", "/root/", "/work/", "/tmp/", "/Users/")), path


@pytest.mark.parametrize("name", SPACES)
def test_a_space_is_named_by_its_file_and_starts_with_dense(name: str) -> None:
    space = SearchSpace.load(name)
    assert space.name == name
    assert space.candidates[0].kind == "dense"
    assert len(set(space.labels)) == len(space.candidates)
    assert "arXiv:" in space.source or name in ("mixture", "video_mixture")


def test_mixture_holds_every_other_space() -> None:
    mixture = set(SearchSpace.load("mixture").labels)
    for name in SPACES:
        space = SearchSpace.load(name)
        if not any(rule.needs_layout for rule in space.candidates):  # video has a mixture of its own
            assert set(space.labels) <= mixture


def test_duo_attention_is_dense_or_streaming_per_kv_group() -> None:
    space = SearchSpace.load("duo_attention")
    assert space.unit == "kv_group"
    assert {rule.kind for rule in space.candidates} == {"dense", "sink_window"}
    assert {rule.sink for rule in space.candidates if isinstance(rule, SinkWindow)} == {64, 128}


def test_moa_has_one_family_whose_windows_may_grow() -> None:
    windows = [rule.window for rule in SearchSpace.load("moa").candidates if isinstance(rule, SinkWindow)]
    assert len(windows) == len(SearchSpace.load("moa").candidates) - 1
    assert any(window.b > 0 for window in windows)
    assert any(window.b == 0 for window in windows)


@pytest.mark.skipif("needle-7m-plan" not in preset_names("profiles"), reason="the gated plan is not shipped yet")
def test_the_gated_plan_belongs_to_its_metrics_and_model() -> None:
    plan = Plan.load(preset_path("profiles", "needle-7m-plan"))
    metrics = Metrics.load(preset_path("profiles", "needle-7m-metrics"))
    assert metrics.plans[baseline_variant(metrics, plan)] == plan.sha256
    assert metrics.model == plan.base_model.name_or_path == "needle-7m"


def test_names_are_sorted_and_lead_to_their_paths() -> None:
    for room in ROOMS:
        names = preset_names(room)
        assert names == sorted(names)
        assert all(preset_path(room, name).exists() for name in names)
        assert not any(name.startswith(("_", ".")) for name in names)


def test_unknown_names_get_a_hint() -> None:
    with pytest.raises(SpecError, match="Did you mean 'needle-7m'"):
        preset_path("models", "needle-8m")
    with pytest.raises(SpecError, match="Did you mean 'cost_models'"):
        preset_names("cost_model")  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="Use preset_path"):
        preset_text("models", "needle-7m")
