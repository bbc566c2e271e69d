"""Files: the same content is the same bytes, nothing half-written appears, and anything off is refused by name."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsesearch import artifacts
from sparsesearch.artifacts import (
    atomic_file,
    canonical_json,
    file_schema,
    parse_json,
    read_json,
    read_text,
    require_writable,
    reserved,
    sha256_file,
    sha256_text,
    write_bytes,
    write_json,
)
from sparsesearch.errors import ArtifactError

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def _written(path: Path, **content: Any) -> Path:
    write_json(path, content, format="test.thing", schema_version="1.2")
    return path


def _read(path: Path, **changes: str) -> dict[str, Any]:
    return read_json(path, **{"format": "test.thing", "schema_version": "1.2", **changes})


@given(content=st.dictionaries(st.text().filter(lambda key: key not in ("format", "schema_version", "sha256")), JSON))
def test_json_comes_back_whatever_it_holds(tmp_path_factory: pytest.TempPathFactory, content: dict[str, Any]) -> None:
    path = tmp_path_factory.mktemp("json") / "thing.json"
    write_json(path, content, format="test.thing", schema_version="1.2")
    first = path.read_bytes()
    assert _read(path) == content
    write_json(path, dict(reversed(content.items())), format="test.thing", schema_version="1.2")
    assert path.read_bytes() == first, "order of keys does not matter"


def test_digests_agree(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_text("Λ-shape", encoding="utf-8")
    assert sha256_file(path) == sha256_text("Λ-shape")


def test_not_a_number_is_not_json() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json({"loss": float("nan")})


@pytest.mark.parametrize("position", range(0, 200, 13))
def test_every_single_edit_is_found(tmp_path: Path, position: int) -> None:
    path = _written(tmp_path / "thing.json", loss=0.25, names=["a", "b"])
    text = path.read_text()
    position %= len(text)
    edited = text[:position] + ("7" if text[position] != "7" else "8") + text[position + 1 :]
    path.write_text(edited)
    with pytest.raises(ArtifactError, match=r"thing\.json"):
        _read(path)


@pytest.mark.parametrize("kept", [0.0, 0.3, 0.7, 0.99])
def test_every_truncation_is_found(tmp_path: Path, kept: float) -> None:
    path = _written(tmp_path / "thing.json", loss=0.25)
    path.write_bytes(path.read_bytes()[: int(kept * (len(path.read_bytes()) - 2))])
    with pytest.raises(ArtifactError, match="breaks off"):
        _read(path)


def test_versions(tmp_path: Path) -> None:
    path = _written(tmp_path / "thing.json", loss=1)
    assert _read(path, schema_version="1.9") == {"loss": 1}, "a newer minor version reads an older one"
    assert _read(path, schema_version="1.0") == {"loss": 1}, "and the other way round, when the fields are known"
    with pytest.raises(ArtifactError, match=r"has schema_version 1\.2, but this sparsesearch reads 2\.0"):
        _read(path, schema_version="2.0")
    with pytest.raises(ArtifactError, match=r"must have format 'test\.other', but has 'test\.thing'"):
        _read(path, format="test.other")


def test_source_names_the_place_of_a_text() -> None:
    with pytest.raises(ArtifactError, match=r"^config\.json must be complete JSON"):
        parse_json("{", source="config.json", format="f", schema_version="1.0")


def test_reading_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="must exist"):
        read_text(tmp_path / "none")
    with pytest.raises(ArtifactError, match="is a folder"):
        read_text(tmp_path)
    (tmp_path / "file").write_bytes(b"ok \xff")
    with pytest.raises(ArtifactError, match="byte 3 is not"):
        read_text(tmp_path / "file")
    with pytest.raises(ArtifactError, match="must be readable"):
        read_text(tmp_path / "file" / "below")


def test_writing_replaces_whole_files_only(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "file"
    write_bytes(path, b"one")
    write_bytes(path, b"two")
    assert path.read_bytes() == b"two"
    assert os.listdir(path.parent) == ["file"]  # noqa: PTH208  names alone
    assert path.stat().st_mode & 0o777 == 0o644


def test_a_failure_inside_leaves_the_old_file_and_no_litter(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_bytes(path, b"old")
    with pytest.raises(KeyboardInterrupt), atomic_file(path) as file:  # noqa: PT012  the interruption is the point
        file.write(b"half")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("call", ["fsync", "chmod"])
def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    path = tmp_path / "file"
    write_bytes(path, b"old")

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(artifacts.os if call == "fsync" else artifacts.Path, call, full)
    with pytest.raises(ArtifactError, match=r"No space left on device; nothing was changed there\. Free space"):
        write_bytes(path, b"new")
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_files_schema_asks_for_the_stamps(tmp_path: Path) -> None:
    import jsonschema

    content = {"type": "object", "properties": {"loss": {"type": "number"}}, "additionalProperties": False}
    schema = file_schema(content, format="test.thing")
    stored = json.loads(_written(tmp_path / "thing.json", loss=1).read_text())
    jsonschema.validate(stored, schema)
    for stamp in ("format", "schema_version", "sha256"):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({key: value for key, value in stored.items() if key != stamp}, schema)


def test_a_place_is_tried_without_being_made(tmp_path: Path) -> None:
    require_writable(tmp_path / "new" / "folders" / "file.json")
    require_writable(tmp_path)
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    for below in ("file/x.json", "file/folder/x.json"):
        with pytest.raises(ArtifactError, match=r"file is a file\. Choose another folder with -o"):
            require_writable(tmp_path / below)


def test_a_folder_that_may_not_be_written_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artifacts.os, "access", lambda path, mode: Path(path) != tmp_path)  # root may write anywhere
    with pytest.raises(ArtifactError, match="may not be written"):
        require_writable(tmp_path / "file.json")


def test_a_folder_is_filled_by_one_run_at_a_time(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "profile"
    with reserved(folder):
        with pytest.raises(ArtifactError, match="one run at a time"), reserved(folder):
            pass
        (folder / "state.json").write_text("{}")
    with reserved(folder):
        assert [path.name for path in folder.iterdir()] == ["state.json"]


def test_a_reserved_folder_in_which_nothing_came_to_lie_is_gone_again(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), reserved(tmp_path / "profile"):
        raise KeyboardInterrupt
    assert not (tmp_path / "profile").exists()
    (tmp_path / "file").touch()
    with pytest.raises(ArtifactError, match="must be a folder, but is a file"), reserved(tmp_path / "file"):
        pass
