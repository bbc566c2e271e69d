"""The pruning part of a profile on disk: `pruning.json` says what was measured, `pruning.safetensors` holds every sublayer's menu."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors.torch import load_file, save
from torch import Tensor

from sparsesearch.artifacts import read_json, sha256_file, write_bytes, write_json
from sparsesearch.errors import ArtifactError, SpecError, first_problem, nearest
from sparsesearch.plan import BaseModelInfo
from sparsesearch.pruning.menus import CRITERIA, Option
from sparsesearch.search_space import PruningMenu

FORMAT = "sparsesearch.pruning-profile"
SCHEMA_VERSION = "1.0"
FILE, TENSORS = "pruning.json", "pruning.safetensors"
Kind = Literal["attention", "feed_forward"]
KINDS: tuple[Kind, ...] = ("attention", "feed_forward")


class LayerShape(BaseModel):
    """Sizes of one layer's projections.

    Attributes:
        hidden: width of the residual stream.
        into_feed_forward: projections into the FFN (2 with a gate).
        biased: whether the projections have biases.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_channels: int
    hidden: int
    into_feed_forward: int
    biased: bool


class PruningManifest(BaseModel):
    """Everything about it but the menus."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    base_model: BaseModelInfo
    layers: tuple[LayerShape, ...]
    causal: bool
    menu: PruningMenu
    distance: Literal["kl", "cosine"]
    calibration: dict[str, Any]
    num_probes: int
    seed: int
    dtype_bytes: int
    versions: dict[str, str]
    file_sha256: str


@dataclass(frozen=True)
class PruningProfile:
    """Menus of every sublayer under every criterion."""

    folder: Path
    manifest: PruningManifest
    tensors: dict[str, Tensor]

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Open and check.

        Raises:
            ArtifactError: it is missing, edited or damaged.
        """
        if not (folder / FILE).exists():
            raise ArtifactError(
                f"{folder} must cover removals, but has no {FILE}. Make a profile with `sparsesearch profile --space pruning`."
            )
        content = read_json(folder / FILE, format=FORMAT, schema_version=SCHEMA_VERSION)
        try:
            manifest = PruningManifest.model_validate(content)
        except ValidationError as error:
            raise ArtifactError(f"{folder}/{FILE}: {first_problem(error)} Profile again.") from error
        if not (folder / TENSORS).is_file() or sha256_file(folder / TENSORS) != manifest.file_sha256:
            raise ArtifactError(f"{folder}/{TENSORS} is missing or damaged. Profile again.")
        return cls(folder, manifest, load_file(folder / TENSORS))

    def options(self, layer: int, kind: Kind, criterion: str) -> list[Option]:
        """A sublayer's menu; the first option removes nothing. Under `measured`, reconstruction corrected by what was measured.

        Raises:
            SpecError: unknown criterion.
        """
        known = ("measured", *CRITERIA, *(["learned"] if self.has("learned") else []))
        if criterion == "learned" and criterion not in known:
            raise SpecError("the profile must have learned masks. Profile again with --learn-masks STEPS.")
        if criterion not in known:
            raise SpecError(f"unknown pruning criterion {criterion!r}.{nearest(criterion, known)}")
        if criterion == "measured":
            plain = self.options(layer, kind, "reconstruction")
            losses = self._corrected(layer, kind, np.array([option.loss for option in plain]))
            return [Option(option.removed, float(loss)) for option, loss in zip(plain, losses, strict=True)]
        prefix = f"{layer:03d}.{kind}.{criterion}."
        known_losses = self.tensors[prefix + "loss"].tolist()
        if kind == "attention":
            removed = [tuple(row.nonzero()[:, 0].tolist()) for row in self.tensors[prefix + "removed"]]
        else:
            order = self.tensors[prefix + "order"].tolist()
            removed = [tuple(sorted(order[:count])) for count in self.tensors[prefix + "counts"].tolist()]
        return [Option(gone, loss) for gone, loss in zip(removed, known_losses, strict=True)]

    def has(self, criterion: str) -> bool:
        """Whether every sublayer has a menu under a criterion."""
        return all(f"{index:03d}.{kind}.{criterion}.loss" in self.tensors for index, kind in self.sublayers())

    def sublayers(self) -> list[tuple[int, Kind]]:
        """(layer, kind) of every sublayer there is, in order."""
        return [
            (index, kind)
            for index, shape in enumerate(self.manifest.layers)
            for kind in KINDS
            if (shape.num_heads if kind == "attention" else shape.num_channels)
        ]

    def measured(self, layer: int, kind: Kind) -> tuple[list[int], list[float]]:
        """Which options of the reconstruction menu were measured one at a time, and the distance from dense that was found."""
        prefix = f"{layer:03d}.{kind}.measured."
        return self.tensors[prefix + "index"].tolist(), self.tensors[prefix + "loss"].tolist()

    def _corrected(self, layer: int, kind: Kind, predicted: Float[ndarray, " C"]) -> Float[ndarray, " C"]:
        """Predicted losses times the ratio measured / predicted, interpolated over the logarithm of the prediction."""
        index, found = self.measured(layer, kind)
        pairs = [(predicted[i], loss) for i, loss in zip(index, found, strict=True) if predicted[i] > 0 and loss > 0]
        if not pairs:
            return predicted
        at, ratio = np.log([p for p, _ in pairs]), np.log([loss / p for p, loss in pairs])
        order = np.argsort(at)
        positive = np.maximum(predicted, 1e-30)
        factor = np.exp(np.interp(np.log(positive), at[order], ratio[order]))
        return np.where(predicted > 0, predicted * factor, 0.0)


def save_profile(folder: Path, manifest: dict[str, Any], tensors: dict[str, Tensor]) -> PruningProfile:
    """Write both files; the manifest last."""
    write_bytes(folder / TENSORS, save(tensors))
    whole = PruningManifest.model_validate({**manifest, "file_sha256": sha256_file(folder / TENSORS)})
    write_json(folder / FILE, whole.model_dump(mode="json"), format=FORMAT, schema_version=SCHEMA_VERSION)
    return PruningProfile(folder, whole, tensors)


def menu_tensors(prefix: str, options: Sequence[Option], *, count: int, nested: bool) -> dict[str, Tensor]:
    """A menu as tensors: order and counts where each option contains the one before, else a mask per option."""
    loss = torch.tensor([option.loss for option in options], dtype=torch.float64)
    if not nested:
        removed = torch.zeros(len(options), count, dtype=torch.bool)
        for row, option in enumerate(options):
            removed[row, list(option.removed)] = True
        return {prefix + "loss": loss, prefix + "removed": removed}
    order: list[int] = []
    for option in options:
        order += sorted(set(option.removed) - set(order))
    counts = torch.tensor([len(option.removed) for option in options], dtype=torch.int32)
    return {
        prefix + "loss": loss,
        prefix + "order": torch.tensor(order, dtype=torch.int32),
        prefix + "counts": counts,
    }
