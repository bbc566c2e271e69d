"""The profile of a diffusion transformer on disk: `profile.json` and `scores.safetensors`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from sparsesearch.artifacts import read_json, sha256_file, write_bytes, write_json
from sparsesearch.errors import ArtifactError, first_problem
from sparsesearch.layout import Layout
from sparsesearch.plan import AnyRule, BaseModelInfo
from sparsesearch.rules import Rule

FORMAT = "sparsesearch.denoising-profile"
SCHEMA_VERSION = "1.0"


class StepsManifest(BaseModel):
    """Everything about a profile but its tensors.

    Attributes:
        num_steps: of the calibration runs.
        ranges: first and end step of each range; they cover the run, or the part of it in which this transformer is called.
        captured: steps that were looked at, per range.
        candidates: the menu, dense first; the candidate axis of every tensor.
        calibrated: label of a template -> per range -> module -> one rule per head.
        bitmaps: whether calibrated rules are those of their range, or the same in all ranges.
        base_plan_sha256: the plan that was running, if the profile was made under one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    base_model: BaseModelInfo
    layout: Layout
    space: str
    space_sha256: str
    block_tokens: int
    num_steps: int
    ranges: tuple[tuple[int, int], ...]
    captured: tuple[tuple[int, ...], ...]
    candidates: tuple[AnyRule, ...]
    calibrated: dict[str, tuple[dict[str, tuple[AnyRule, ...]], ...]]
    bitmaps: Literal["range", "run"] = "range"
    calibration: str
    base_plan_sha256: str | None
    versions: dict[str, str]
    scores_sha256: str


@dataclass(frozen=True)
class DenoisingProfile:
    """A finished profile.

    Attributes:
        error: |W_o δ|² of a head under a candidate over |attention output of its layer|², mean over sequences and captured steps.
        tiles: computed tiles of a head under a candidate, per forward pass of one sequence.
        sensitivity: mean square change of the final latents per unit of error that a head has in a range of steps, times the range's share of
            all steps; ones until measured.
    """

    folder: Path | None
    manifest: StepsManifest
    error: Float[Tensor, "R L H C"]
    tiles: Float[Tensor, "R L H C"]
    sensitivity: Float[Tensor, "R L H"]

    def rule_for(self, place: int, module: str, head: int, candidate: int) -> Rule:
        """The rule of a head under a candidate in one range; templates give each head its own calibrated one."""
        rule = self.manifest.candidates[candidate]
        if not rule.needs_calibration:
            return rule
        return self.manifest.calibrated[rule.label][place][module][head]

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Open a profile directory and check its digest.

        Raises:
            ArtifactError: it is missing, unfinished, edited or damaged.
        """
        if not (folder / "profile.json").exists():
            raise ArtifactError(
                f"{folder} must be a finished profile of a diffusion transformer, but is none. Profile again."
            )
        content = read_json(folder / "profile.json", format=FORMAT, schema_version=SCHEMA_VERSION)
        try:
            manifest = StepsManifest.model_validate(content)
        except ValidationError as error:
            raise ArtifactError(f"{folder}/profile.json: {first_problem(error)} Profile again.") from error
        file = folder / "scores.safetensors"
        if not file.exists() or sha256_file(file) != manifest.scores_sha256:
            raise ArtifactError(f"{file} is missing or damaged. Profile again.")
        try:
            tensors = load_file(file)
        except (SafetensorError, OSError) as error:
            raise ArtifactError(f"{file} cannot be read. Profile again.") from error
        return cls(folder, manifest, tensors["error"], tensors["tiles"], tensors["sensitivity"])

    def with_sensitivity(self, sensitivity: Float[Tensor, "R L H"]) -> Self:
        """The profile with measured sensitivities, saved where it lies."""
        tensors = {"error": self.error, "tiles": self.tiles, "sensitivity": sensitivity}
        manifest = self.manifest
        if self.folder is not None:
            write_bytes(self.folder / "scores.safetensors", save(tensors))
            digest = sha256_file(self.folder / "scores.safetensors")
            manifest = manifest.model_copy(update={"scores_sha256": digest})
        found = type(self)(self.folder, manifest, **tensors)
        if self.folder is not None:
            found.save_manifest(self.folder)
        return found

    def save_manifest(self, folder: Path) -> None:
        """Write `profile.json`; the last step of profiling."""
        write_json(
            folder / "profile.json", self.manifest.model_dump(mode="json"), format=FORMAT, schema_version=SCHEMA_VERSION
        )
