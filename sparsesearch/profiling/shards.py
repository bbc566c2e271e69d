"""A profile under construction: one shard per length, sample and layer, so that an interruption loses at most the layer in work."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save
from torch import Tensor

from sparsesearch.artifacts import read_json, write_bytes, write_json
from sparsesearch.errors import ArtifactError

_FORMAT = "sparsesearch.profile-state"
_VERSION = "1.0"


@dataclass(frozen=True)
class ShardStore:
    """Shards below `folder`, all belonging to one request."""

    folder: Path

    @classmethod
    def open(cls, folder: Path, request: dict[str, Any], *, resume: bool) -> "ShardStore":
        """Start afresh, or continue exactly the same request.

        Raises:
            ArtifactError: the folder holds a profile and `resume` is off, or it was begun with another request; the message names the field.
        """
        state = folder / "state.json"
        if state.exists() and not resume:
            raise ArtifactError(f"{folder} must not hold a profile yet, but does. Pass --resume, or choose another -o.")
        if state.exists():
            begun = read_json(state, format=_FORMAT, schema_version=_VERSION)
            for key in sorted(request | begun):
                if begun.get(key) != request.get(key):
                    raise ArtifactError(
                        f"{folder} was begun with another {key}: {_short(begun.get(key))} there, {_short(request.get(key))} now. "
                        "Repeat the first command to resume it, or choose another -o."
                    )
        elif folder.exists() and any(folder.iterdir()):
            raise ArtifactError(f"{folder} must be empty or a profile, but holds other files. Choose another -o.")
        else:
            write_json(state, request, format=_FORMAT, schema_version=_VERSION)
        return cls(folder)

    @contextmanager
    def in_work(self) -> Iterator[None]:
        """A folder in which nothing was finished yet is removed again when the body fails: there is nothing to resume."""
        try:
            yield
        except BaseException:
            if [path.name for path in self.folder.iterdir()] == ["state.json"]:
                (self.folder / "state.json").unlink()
                self.folder.rmdir()
            raise

    def path(self, length: int, sample: int, layer: int) -> Path:
        """Where one shard lies."""
        return self.folder / "shards" / f"{length}" / f"{sample:03d}" / f"{layer:03d}.safetensors"

    def missing(self, length: int, sample: int, num_layers: int) -> list[int]:
        """Layers of one sample that are not on disk yet. Shards are renamed into place, so one that is there is whole."""
        return [layer for layer in range(num_layers) if not self.path(length, sample, layer).exists()]

    def write(self, length: int, sample: int, layer: int, tensors: dict[str, Tensor]) -> None:
        """Write one shard atomically."""
        write_bytes(self.path(length, sample, layer), save({name: t.cpu().contiguous() for name, t in tensors.items()}))

    def samples(self, length: int, layer: int, count: int) -> Iterator[dict[str, Tensor]]:
        """One layer's shards of every sample."""
        for sample in range(count):
            yield load_file(self.path(length, sample, layer))

    def clear(self) -> None:
        """Remove the shards once they are merged."""
        for path in sorted((self.folder / "shards").rglob("*"), reverse=True):
            path.unlink() if path.is_file() else path.rmdir()
        if (self.folder / "shards").exists():
            (self.folder / "shards").rmdir()


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:28]}…{text[-28:]}"
