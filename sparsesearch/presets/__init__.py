"""Finds the data shipped with the package. The only module that knows where it lies.

Rooms: `search_spaces` (YAML), `cost_models` (JSON), `profiles` (reference profiles and baseline plans), `models` (whole folders). The
first three are folders at the top of the repository, mapped to packages `sparsesearch.presets.<room>` at build time.
"""

from importlib.resources import files
from pathlib import Path
from typing import Literal

from sparsesearch.errors import SpecError, nearest

Room = Literal["search_spaces", "cost_models", "profiles", "models"]

_SUFFIXES: dict[Room, tuple[str, ...]] = {
    "search_spaces": (".yaml",),
    "cost_models": (".json",),
    "profiles": (".json",),
    "models": (),
}


def preset_names(room: Room) -> list[str]:
    """Names of what is shipped in a room, sorted: files without their suffix, and folders."""
    return sorted(_entries(room))


def preset_path(room: Room, name: str) -> Path:
    """The file or folder of one preset.

    Raises:
        SpecError: nothing of that name is shipped; the message names the nearest one.
    """
    entries = _entries(room)
    if name not in entries:
        raise SpecError(f"{room} must hold {name!r}, but it does not.{nearest(name, entries)}")
    return entries[name]


def preset_text(room: Room, name: str) -> str:
    """The UTF-8 text of a preset that is one file.

    Raises:
        SpecError: nothing of that name is shipped, or it is a folder.
    """
    path = preset_path(room, name)
    if path.is_dir():
        raise SpecError(f"{room}/{name} must be a file to be read as text, but is a folder. Use preset_path.")
    return path.read_text(encoding="utf-8")


def _entries(room: Room) -> dict[str, Path]:
    if room not in _SUFFIXES:
        raise SpecError(f"a preset room must be known, but got {room!r}.{nearest(str(room), _SUFFIXES)}")
    found = {}
    for path in _folder(room).iterdir():
        if path.is_dir() and not path.name.startswith(("_", ".")):
            found[path.name] = path
        elif path.suffix in _SUFFIXES[room]:
            found[path.stem] = path
    return found


def _folder(room: Room) -> Path:
    if room == "models":
        return Path(str(files("sparsesearch.presets") / "models"))
    return Path(str(files(f"sparsesearch.presets.{room}")))
