"""Where layer inputs and gradients wait between the two sweeps of a profile: in memory, or on disk."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from sparsesearch.artifacts import write_bytes

Kind = Literal["input", "gradient", "mass"]
Key = tuple[int, int]
"""Length in tokens and number of a sequence."""


class Activations(Protocol):
    """Tensors by kind, layer and sequence."""

    def put(self, kind: Kind, layer: int, key: Key, tensor: Tensor) -> None:
        """Keep one."""

    def get(self, kind: Kind, layer: int, key: Key, device: torch.device | str) -> Tensor:
        """One that was kept, on a device."""

    def has(self, kind: Kind, layer: int, keys: Iterable[Key]) -> bool:
        """Whether all sequences' are kept."""

    def drop(self, kind: Kind, layer: int, keys: Iterable[Key]) -> None:
        """Forget some."""


@dataclass
class InMemory:
    """On the device they came from."""

    kept: dict[tuple[Kind, int, Key], Tensor] = field(default_factory=dict)

    def put(self, kind: Kind, layer: int, key: Key, tensor: Tensor) -> None:
        """Keep a reference."""
        self.kept[kind, layer, key] = tensor

    def get(self, kind: Kind, layer: int, key: Key, device: torch.device | str) -> Tensor:
        """The tensor, moved where it is needed."""
        return self.kept[kind, layer, key].to(device)

    def has(self, kind: Kind, layer: int, keys: Iterable[Key]) -> bool:
        """Whether all sequences' are kept."""
        return all((kind, layer, key) in self.kept for key in keys)

    def drop(self, kind: Kind, layer: int, keys: Iterable[Key]) -> None:
        """Forget some."""
        for key in keys:
            self.kept.pop((kind, layer, key), None)


@dataclass(frozen=True)
class OnDisk:
    """One safetensors file each, written to a temporary name and renamed: one that is there is whole."""

    folder: Path

    def _path(self, kind: Kind, layer: int, key: Key) -> Path:
        return self.folder / f"{kind}-{layer:03d}" / f"{key[0]}-{key[1]:03d}.safetensors"

    def put(self, kind: Kind, layer: int, key: Key, tensor: Tensor) -> None:
        """Write one file."""
        write_bytes(self._path(kind, layer, key), save({"": tensor.detach().cpu().contiguous()}))

    def get(self, kind: Kind, layer: int, key: Key, device: torch.device | str) -> Tensor:
        """Read one file."""
        return load_file(self._path(kind, layer, key), device=str(device))[""]

    def has(self, kind: Kind, layer: int, keys: Iterable[Key]) -> bool:
        """Whether all sequences' files are there."""
        return all(self._path(kind, layer, key).exists() for key in keys)

    def drop(self, kind: Kind, layer: int, keys: Iterable[Key]) -> None:
        """Remove some, and their folder once it is empty."""
        for key in keys:
            self._path(kind, layer, key).unlink(missing_ok=True)
        folder = self.folder / f"{kind}-{layer:03d}"
        if folder.exists() and not any(folder.iterdir()):
            folder.rmdir()

    def clear(self) -> None:
        """Remove everything."""
        for path in sorted(self.folder.rglob("*"), reverse=True):
            path.unlink() if path.is_file() else path.rmdir()
        if self.folder.exists():
            self.folder.rmdir()
