"""The text that every Python has, and specs that join several sources."""

import json
import sysconfig

import pytest

from sparsesearch.calibration import stdlib
from sparsesearch.calibration.sources import documents
from sparsesearch.errors import SpecError

MODULE = '"""First of {name}."""\nclass A:\n    """Second."""\n    def f(self):\n        """Third."""\n'


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A standard library of six modules, one of which is a test, one no Python and one without docstrings."""
    for name in ("b/c", "a", "test/d", "e", "g", "b/tests/f"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / f"{name}.py").write_text(MODULE.format(name=name))
    (tmp_path / "template.py").write_text("class {name}:\n")
    (tmp_path / "bare.py").write_text("x = '\\d'\n")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    stdlib.stdlib_documents.cache_clear()
    yield tmp_path
    stdlib.stdlib_documents.cache_clear()


def test_docstrings_of_modules_in_the_order_of_their_names_and_then_the_reference(library):
    found = stdlib.stdlib_documents()
    assert list(found[:4]) == [f"First of {name}.\n\nSecond.\n\nThird." for name in ("a", "b/c", "e", "g")]
    assert sum(map(len, found[4:])) > 100_000, "the language reference"


def test_splits_share_no_document(library):
    parts = [list(documents("stdlib", split)) for split in ("calibration", "heldout")]
    assert len(parts[0]) >= 2 * len(parts[1]) > 0
    assert not set(parts[0]) & set(parts[1])


def test_joined_sources_give_the_documents_of_each(library, tmp_path):
    own = tmp_path / "own.jsonl"
    own.write_text("".join(json.dumps({"text": f"document {i}"}) + "\n" for i in range(8)))
    for split in ("calibration", "heldout"):
        parts = [list(documents(spec, split)) for spec in ("stdlib", str(own), f"stdlib+{own}")]
        assert parts[2] == parts[0] + parts[1]
    with pytest.raises(SpecError, match="'txet'"):
        list(documents("txet+stdlib", "heldout"))
    odd = tmp_path / "a+b.jsonl"
    odd.write_text(own.read_text())
    assert list(documents(str(odd), "heldout")) == ["document 3", "document 7"], "a file of that name is one source"
