"""Where text comes from: the shipped documentation, Python's own, a local file, a dataset of the hub; and its cutting into two disjoint splits."""

import importlib
import json
from collections.abc import Iterable, Iterator
from importlib.resources import files
from itertools import chain, islice
from pathlib import Path
from typing import Any

from sparsesearch.artifacts import read_text
from sparsesearch.calibration.samples import Split
from sparsesearch.calibration.stdlib import stdlib_documents
from sparsesearch.errors import ArtifactError, SpecError, nearest

BUILT_IN = {
    "text": "plain documentation text that ships with sparsesearch",
    "stdlib": "docstrings and language reference of the Python that runs; text+stdlib joins both, text+FILE a file of your own",
    "tasks:NAMES:FORMAT": "long-context tasks in turn, such as tasks:needle,multikey:chat or tasks:retrieval",
    "needle": "that text with key-value statements and questions about them; needle:FILE takes the text from a file",
}
SUFFIXES = (".jsonl", ".parquet", ".txt")
_HELD_OUT_EVERY = 4


def documents(spec: str, split: Split, *, text_column: str = "text") -> Iterator[str]:
    """The texts that `spec` names, of one split.

    The shipped text has a file per split. Of any other source, every fourth document is held out; a source of fewer than four documents is
    joined and cut at three quarters of its characters.

    Args:
        spec: `text`, `stdlib`, a local `.jsonl`, `.txt` or `.parquet` file, several of these joined by `+`, or `name:config:split` of the hub
            (config may be empty).
        split: which part.
        text_column: the field of `.jsonl`, `.parquet` and hub rows that holds the text.

    Raises:
        ArtifactError: the file is missing, empty, not UTF-8 or damaged.
        SpecError: the spec is unknown, a row lacks the column, or an extra is not installed.
    """
    if spec == "text":
        resource = files("sparsesearch").joinpath("presets", "models", "needle-7m", f"{split}.jsonl")
        return _jsonl(resource.read_text(encoding="utf-8"), str(resource), text_column)
    if spec == "stdlib":
        return _part(stdlib_documents(), split, spec)
    if "+" in spec and spec.count(":") != 2 and not Path(spec).exists():
        return chain.from_iterable(documents(part, split, text_column=text_column) for part in spec.split("+"))
    if Path(spec).suffix in SUFFIXES:
        return _part(_local(Path(spec), text_column), split, spec)
    if spec.count(":") == 2:
        return _part(_hub(spec, text_column), split, spec)
    if spec == "needle" or spec.startswith(("needle:", "tasks:")):
        raise SpecError(
            f"plain text must be named here, such as text, stdlib or a file, but {spec} makes sequences of its own."
        )
    raise SpecError(
        f"calibration must be built in, a file ending in {', '.join(SUFFIXES)}, or a hub dataset written name:config:split, "
        f"but got {spec!r}.{nearest(spec, BUILT_IN)}"
    )


def _local(path: Path, column: str) -> Iterator[str]:
    match path.suffix:
        case ".parquet":
            return _parquet(path, column)
        case ".jsonl":
            return _jsonl(read_text(path), str(path), column)
        case _:
            return iter([read_text(path)])


def _jsonl(text: str, source: str, column: str) -> Iterator[str]:
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ArtifactError(
                f"{source}, line {number} must be a JSON object, but is damaged: {error.msg}."
            ) from error
        yield _text_of(row, column, f"{source}, line {number}")


def _parquet(path: Path, column: str) -> Iterator[str]:
    if not path.is_file():
        raise ArtifactError(f"{path} must exist, but there is no such file. Check the path.")
    parquet = _extra("pyarrow.parquet", f"reading {path}")
    arrow = _extra("pyarrow", f"reading {path}")
    try:
        rows = parquet.ParquetFile(path)
        if column not in rows.schema_arrow.names:
            raise SpecError(
                f"{path} must have a column {column!r}; name another with --text-column."
                + nearest(column, rows.schema_arrow.names)
            )
        for batch in rows.iter_batches(columns=[column]):
            for row in batch.to_pylist():
                yield _text_of(row, column, str(path))
    except arrow.ArrowInvalid as error:
        raise ArtifactError(f"{path} must be a Parquet file, but is empty or damaged. Make it again.") from error


def _hub(spec: str, column: str) -> Iterator[str]:
    name, config, split = spec.split(":")
    datasets = _extra("datasets", f"the hub dataset {spec}")
    try:
        rows = datasets.load_dataset(name, config or None, split=split, streaming=True)
    except (OSError, ValueError) as error:
        raise ArtifactError(f"the hub dataset {spec} must load, but: {error}. Check name:config:split.") from error
    for number, row in enumerate(rows):
        yield _text_of(row, column, f"{spec}, row {number}")


def _text_of(row: Any, column: str, place: str) -> str:
    if not isinstance(row, dict) or not isinstance(row.get(column), str):
        known = [name for name, value in row.items() if isinstance(value, str)] if isinstance(row, dict) else []
        raise SpecError(
            f"{place} must hold text in {column!r}; name the field with --text-column.{nearest(column, known)}"
        )
    return str(row[column])


def _extra(module: str, purpose: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.split(".")[0]
        raise SpecError(
            f"{purpose} needs {package}, which is not installed: pip install 'sparsesearch[data]'."
        ) from error


def _part(source: Iterable[str], split: Split, spec: str) -> Iterator[str]:
    """Every fourth document, or the others; streams, so that a large dataset is read only as far as needed."""
    texts = (text for text in source if text.strip())
    head = list(islice(texts, _HELD_OUT_EVERY))
    if not head:
        raise ArtifactError(f"{spec} must hold text, but is empty. Give a file or split with text.")
    if len(head) < _HELD_OUT_EVERY:
        joined = "\n\n".join(head)
        cut = len(joined) * 3 // 4
        yield joined[cut:] if split == "heldout" else joined[:cut]
        return
    for index, text in enumerate(chain(head, texts), start=1):
        if (index % _HELD_OUT_EVERY == 0) == (split == "heldout"):
            yield text
