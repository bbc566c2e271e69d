"""What is shipped as data: every file loads, and the search spaces are what their papers say."""

import json
from pathlib import Path

import pytest
import yaml

from sparsesearch.check import baseline_variant
from sparsesearch.cost.device.table import DeviceTable
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
        case "device_cost_model":
            DeviceTable.load(path)
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


def test_mixture_holds_the_spaces_it_includes() -> None:
    mixture = SearchSpace.load("mixture")
    included = yaml.safe_load(preset_text("search_spaces", "mixture"))["include"]
    assert included
    for name in included:
        assert set(SearchSpace.load(name).labels) <= set(mixture.labels)


PAPERS = {
    "strided_shards": [f"strided_shards(local=1024,stride=16,offset={offset})" for offset in range(16)],
    "power_attention": ["power_lags(segment=256,window=5,sink=1)"],
    "flex_prefill": [
        f"flex_prefill(gamma={gamma},tau=0.1,min_budget={floor},probe=128)"
        for gamma in (0.9, 0.95)
        for floor in (512, 1024)
    ],
    "xattention": ["antidiagonal(mass=0.9,stride=8)", "antidiagonal(mass=0.9,stride=16)"],
    "hip": ["tree_topk(keep=2048,root=1024,sink=256,window=1024,queries=4)"],
    "dhsa": [
        f"chunk_topk(keep=0.125N,chunk={chunk},cell=16,variable={variable},sink=64)"
        for chunk in (32, 64, 128)
        for variable in (False, True)
    ],
    "hylra": ["dense_source(keep=2048,sink=64)"],
    "quest": [f"bounds_topk(keep={budget},sink=64,prefill=False)" for budget in (256, 512, 1024, 2048, 4096)],
    "tri_shape": ["tri_shape(sink=64,window=128,last=128)", "tri_shape(sink=64,window=0.5N,last=128)"],
    "token_sparse": ["token_rows(tail=0.005,min_tokens=1024,window=64,probe=64)"],
    "duo_attention": ["sink_window(sink=128,window=256)", "sink_window(sink=64,window=256)"],
    "minference": [
        "sink_window(sink=1024,window=4096)",
        *(
            f"vertical_slash(vertical={v},slash={s},probe=64)"
            for v, s in ((64, 2048), (128, 1792), (512, 1536), (3008, 256))
        ),
        "pooled_topk(keep=6400,sink=64)",
    ],
    "minference_released": [
        "sink_window(sink=100,window=800)",
        *(
            f"vertical_slash(vertical={v},slash={s},probe=64)"
            for v, s in ((30, 800), (100, 750), (100, 800), (500, 700), (3500, 100), (1000, 4096), (1000, 6096))
        ),
        "pooled_topk(keep=6400,sink=0)",
    ],
}


@pytest.mark.parametrize("name", PAPERS)
def test_a_space_holds_its_papers_own_configuration(name: str) -> None:
    assert set(PAPERS[name]) <= set(SearchSpace.load(name).labels)


def test_moa_grid_is_that_of_the_paper() -> None:
    """Six offsets between -2048 and 8192, nine slopes between 0 and 1, beside a sink of 64."""
    rules = [rule for rule in SearchSpace.load("moa_grid").candidates if isinstance(rule, SinkWindow)]
    laws = {(rule.window.a, rule.window.b) for rule in rules}
    assert laws == {(-2048 + 2048 * i, j / 8) for i in range(6) for j in range(9)}
    assert {rule.sink for rule in rules} == {64}


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
