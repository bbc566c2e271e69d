"""Reading and writing of artefacts: atomic, checksummed, versioned, and refused by name when anything is off.

A JSON artefact is one object with `format`, `schema_version` ("major.minor"), and `sha256` of its own canonical text without that key.
Keys are sorted and floats are written by `repr`, so the same content is the same bytes.
"""

import hashlib
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import IO, Any

from sparsesearch.errors import ArtifactError


def canonical_json(content: Any) -> str:
    """One text per content: sorted keys, indent 1, no NaN."""
    return json.dumps(content, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def sha256_text(text: str) -> str:
    """Hex digest of a text's UTF-8 bytes."""
    return hashlib.sha256(text.encode()).hexdigest()


def sha256_file(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """Open a temporary neighbour for writing and rename it to `path` only when the body ended well.

    Raises:
        ArtifactError: the disk is full or the folder cannot be written; what stood at `path` before is untouched.
    """
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile("wb", dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            temporary = Path(file.name)
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except IsADirectoryError as error:
        raise ArtifactError(f"{path} must be a file, but is a folder. Name a file in it.") from error
    except OSError as error:
        raise ArtifactError(
            f"{path} must be writable, but {error.strerror or error}; nothing was changed there. "
            "Free space or choose another folder with -o."
        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def require_writable(path: Path, *, is_file: bool = False) -> None:
    """Refuse a place where nothing can be written, before the work whose result is to go there; nothing is created.

    Args:
        path: the place.
        is_file: a file is to be written, so that it must not be a folder.

    Raises:
        ArtifactError: its nearest existing ancestor is a file, or may not be written; or it is a folder and must be a file.
    """
    if is_file and path.is_dir():
        raise ArtifactError(f"{path} must be a file, but is a folder. Name a file in it.")
    folder = path.absolute().parent
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    reason = None
    if not folder.is_dir():
        reason = f"{folder} is a file"
    elif not os.access(folder, os.W_OK | os.X_OK):
        reason = f"{folder} may not be written"
    if reason is not None:
        raise ArtifactError(f"{path} must be writable, but {reason}. Choose another folder with -o.")


@contextmanager
def reserved(folder: Path) -> Iterator[None]:
    """Keep other runs out of a folder while this one fills it; the system lets go when the process ends, however it ends.

    The lock is the folder's own, so nothing is left behind; where a file system or a platform has no such locks, nobody is kept out.

    Raises:
        ArtifactError: another run is filling it, or it is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise ArtifactError(f"{folder} must be a folder, but is a file. Choose another -o.")
    if sys.platform == "win32":
        yield
        return
    import fcntl

    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ArtifactError(
                f"{folder} must be filled by one run at a time, but another one is at work there. Wait for it, or choose another -o."
            ) from None
        except OSError:
            pass
        try:
            yield
        finally:
            with suppress(OSError):
                folder.rmdir()  # where nothing came to lie
    finally:
        os.close(handle)


def require_unfinished(out: Path, written: set[str]) -> None:
    """Refuse a folder that holds anything but what an interrupted run leaves; the report is written last.

    Args:
        out: the folder.
        written: names that a run writes before its report.

    Raises:
        ArtifactError: it holds a report, or other files.
    """
    held = {path.name for path in out.iterdir()} if out.exists() else set()
    if held - written:
        raise ArtifactError(
            f"{out} must be empty or hold an interrupted quickstart, but holds {min(held - written)}. Choose another folder with -o."
        )


def write_bytes(path: Path, data: bytes) -> None:
    """Write bytes atomically."""
    with atomic_file(path) as file:
        file.write(data)


def write_json(path: Path, content: dict[str, Any], *, format: str, schema_version: str) -> None:
    """Write a checksummed JSON artefact atomically."""
    write_bytes(path, canonical_json(stamped(content, format=format, schema_version=schema_version)).encode())


def stamped(content: dict[str, Any], *, format: str, schema_version: str) -> dict[str, Any]:
    """The object that `write_json` writes: the content with its format, version and checksum."""
    marked = {**content, "format": format, "schema_version": schema_version}
    return {**marked, "sha256": sha256_text(canonical_json(marked))}


def file_schema(content: dict[str, Any], *, format: str) -> dict[str, Any]:
    """JSON Schema of a file as `write_json` writes it: that of its content, and the three stamps."""
    stamps = {
        "format": {"const": format},
        "schema_version": {"type": "string", "pattern": r"^\d+\.\d+$"},
        "sha256": {"type": "string", "pattern": "^[0-9a-f]{64}$"},
    }
    return {
        **content,
        "properties": {**content["properties"], **stamps},
        "required": sorted([*content.get("required", ()), *stamps]),
    }


def read_text(path: Path) -> str:
    """Read a UTF-8 text file.

    Raises:
        ArtifactError: it is missing, a folder, or not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ArtifactError(f"{path} must exist, but there is no such file. Check the path.") from error
    except IsADirectoryError as error:
        raise ArtifactError(f"{path} must be a file, but is a folder. Name the file in it.") from error
    except OSError as error:
        raise ArtifactError(f"{path} must be readable, but {error.strerror or error}. Check the path.") from error
    except UnicodeDecodeError as error:
        raise ArtifactError(
            f"{path} must be UTF-8 text, but byte {error.start} is not. Re-save it as UTF-8."
        ) from error


def read_json(path: Path, *, format: str, schema_version: str) -> dict[str, Any]:
    """Read a JSON artefact, checking its format, major version and checksum; the stamps are removed.

    Raises:
        ArtifactError: the file is missing, truncated, of another format, of a newer major version, or edited by hand.
    """
    return parse_json(read_text(path), source=str(path), format=format, schema_version=schema_version)


class _NotFinite(ValueError):
    """NaN or an infinity, which Python reads and JSON does not have."""


def _no_number(text: str) -> Any:
    raise _NotFinite(text)


def parse_json(text: str, *, source: str, format: str, schema_version: str) -> dict[str, Any]:
    """Like `read_json`, from a text; `source` names it in messages."""
    try:
        content = json.loads(text, parse_constant=_no_number)
    except json.JSONDecodeError as error:
        raise ArtifactError(
            f"{source} must be complete JSON, but it breaks off or is damaged at line {error.lineno}. Make it again."
        ) from error
    except (_NotFinite, RecursionError) as error:
        reason = "is nested too deeply" if isinstance(error, RecursionError) else f"holds {error}"
        raise ArtifactError(f"{source} must be JSON with finite numbers, but {reason}. Make it again.") from error
    return unstamped(content, source=source, format=format, schema_version=schema_version)


def unstamped(content: Any, *, source: str, format: str, schema_version: str) -> dict[str, Any]:
    """The content of an object that `stamped` made, after the checks of `read_json`."""
    if not isinstance(content, dict) or content.get("format") != format:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise ArtifactError(f"{source} must have format {format!r}, but has {found!r}. Give the right file.")
    found_version = str(content.get("schema_version"))
    if found_version.split(".")[0] != schema_version.split(".")[0]:
        raise ArtifactError(
            f"{source} has schema_version {found_version}, but this sparsesearch reads {schema_version}. "
            "Upgrade sparsesearch or make the file again."
        )
    marked = {key: value for key, value in content.items() if key != "sha256"}
    if content.get("sha256") != sha256_text(canonical_json(marked)):
        raise ArtifactError(f"{source} does not match its own checksum: it was edited or damaged. Make it again.")
    return {key: value for key, value in marked.items() if key not in ("format", "schema_version")}
