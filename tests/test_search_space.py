"""Search spaces: grids, includes, digests, and what a wrong file is told."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsesearch.errors import ArtifactError, SpecError
from sparsesearch.rules import LengthLaw
from sparsesearch.rules.sink_window import SinkWindow
from sparsesearch.search_space import SearchSpace

HEAD = "name: test\nsource: tests\ndescription: none\nunit: query_head\n"


def parse(candidates: str, head: str = HEAD) -> SearchSpace:
    return SearchSpace.parse(f"{head}candidates:\n{candidates}", where="test.yaml")


def test_a_list_is_an_axis_of_the_grid_also_inside_a_law() -> None:
    space = parse("  - {kind: sink_window, sink: [0, 64], window: {a: [-64, 128], b: [0.25, 0.5]}}")
    assert space.candidates[0].kind == "dense"
    windows = set(space.candidates[1:])
    assert windows == {
        SinkWindow(sink=sink, window=LengthLaw(a=a, b=b)) for sink in (0, 64) for a in (-64, 128) for b in (0.25, 0.5)
    }
    assert len(space.candidates) == 9


def test_numbers_and_laws_share_an_axis() -> None:
    space = parse("  - {kind: sink_window, sink: 64, window: [64, {b: 0.5}]}")
    assert [str(rule.window) for rule in space.candidates[1:] if isinstance(rule, SinkWindow)] == ["64", "0.5N"]


def test_dense_comes_first_once_and_repeats_are_dropped() -> None:
    space = parse("  - {kind: zero}\n  - {kind: dense}\n  - {kind: zero}\n  - {kind: sink_window, sink: 0, window: 64}")
    assert space.labels == ("dense", "zero", "sink_window(sink=0,window=64)")


def test_included_spaces_come_first() -> None:
    space = parse("  - {kind: zero}", HEAD + "include: [duo_attention]\n")
    assert space.labels == (*SearchSpace.load("duo_attention").labels, "zero")


@given(st.lists(st.sampled_from([64, 128, 192, 256]), min_size=1, max_size=4, unique=True))
def test_the_digest_is_of_tiles_and_candidates_alone(windows: list[int]) -> None:
    line = f"  - {{kind: sink_window, sink: 64, window: {windows}}}"
    space = parse(line)
    assert parse(line, HEAD.replace("none", "other words")).sha256 == space.sha256
    assert parse(line, HEAD + "block_tokens: 32\n").sha256 != space.sha256
    assert parse(line + "\n  - {kind: zero}").sha256 != space.sha256
    assert len(space.candidates) == 1 + len(windows)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "the whole must be a mapping, but is empty"),
        ("- 1", "the whole must be a mapping, but is a list"),
        ("name: [", r"must be YAML, but breaks off or is damaged at line \d"),
        (HEAD, "'candidates' must be given, but is missing"),
        (HEAD + "candidates: []\nunits: 3\n", r"there is no 'units'\. Did you mean 'unit'"),
        (HEAD.replace("query_head", "head") + "candidates: []\n", "unit must be 'query_head' or 'kv_group', but got"),
        (HEAD + "block_tokens: 20\ncandidates: []\n", "block_tokens must be a multiple of 16, but got 20"),
        (HEAD + "candidates: [dense]\n", r"candidates\.0 must be a mapping"),
        (HEAD + "candidates:\n  - {window: 64}\n", r"candidates\[0\]: a rule must be a mapping with `kind`"),
        (HEAD + "candidates:\n  - {kind: sink_windw, window: 64}\n", r"Did you mean 'sink_window'\?"),
        (HEAD + "candidates:\n  - {kind: sink_window}\n", r"candidates\[0\], sink_window: 'window' must be given"),
        (
            HEAD + "candidates:\n  - {kind: sink_window, window: {b: [0.5, 2]}}\n",
            r"window\.b must be less than or equal",
        ),
        (HEAD + "include: [test]\ncandidates: []\n", "include must name other spaces, but names 'test' itself"),
        (HEAD + "include: [mixtur]\ncandidates: []\n", "unknown search space 'mixtur'.*Did you mean 'mixture'"),
    ],
)
def test_a_wrong_file_is_told_what_and_where(text: str, sentence: str) -> None:
    with pytest.raises(SpecError, match=sentence) as caught:
        SearchSpace.parse(text, where="test.yaml")
    assert str(caught.value).startswith(("test.yaml", "unknown search space"))


def test_a_yaml_file_is_loaded_by_path(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(HEAD + "candidates:\n  - {kind: zero}\n")
    assert SearchSpace.load(str(path)).labels == ("dense", "zero")
    with pytest.raises(ArtifactError, match="must exist"):
        SearchSpace.load(str(tmp_path / "none.yaml"))


def test_yaml_may_not_build_objects() -> None:
    with pytest.raises(SpecError, match="must be YAML"):
        SearchSpace.parse("!!python/object/apply:os.getcwd []", where="test.yaml")


def test_tiles_of_another_side() -> None:
    space = SearchSpace.load("moa")
    larger = space.in_blocks_of(128)
    assert (larger.block_tokens, larger.candidates) == (128, space.candidates)
    assert larger.sha256 != space.sha256
    for side in (100, 8, 512):
        with pytest.raises(SpecError, match="multiple of 16"):
            space.in_blocks_of(side)
