"""The profile on disk: `profile.json` says what was measured, `scores-<length>.safetensors` holds the sums of every sample."""

import platform
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from sparsesearch.artifacts import read_json, sha256_file, write_json
from sparsesearch.errors import ArtifactError, PlanMismatchError, SpecError, first_problem, nearest
from sparsesearch.plan import AnyRule, BaseModelInfo, Plan
from sparsesearch.rules import Rule
from sparsesearch.rules.dense import Dense
from sparsesearch.shapes import Unit

FORMAT = "sparsesearch.profile"
SCHEMA_VERSION = "1.0"


class Manifest(BaseModel):
    """Everything about a profile but its tensors.

    Attributes:
        candidates: the menu, in order; the candidate axis of every tensor.
        calibrated: label of a template -> module -> one rule per query head.
        num_answers: length -> answer tokens of each sample.
        files: score file -> sha256.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    base_model: BaseModelInfo
    space: str
    space_sha256: str
    block_tokens: int
    candidates: tuple[AnyRule, ...]
    calibrated: dict[str, dict[str, tuple[AnyRule, ...]]]
    lengths: tuple[int, ...]
    num_samples: int
    num_answers: dict[str, tuple[int, ...]]
    calibration: dict[str, str]
    num_probes: int
    seed: int
    dtype: str
    versions: dict[str, str]
    files: dict[str, str]


@dataclass(frozen=True)
class Profile:
    """A finished profile."""

    folder: Path
    manifest: Manifest

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Open a profile directory and check every file's digest.

        Raises:
            ArtifactError: it is missing, unfinished, edited or damaged.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise ArtifactError(f"{folder} must be a profile directory, but there is none. Run `sparsesearch profile`.")
        if not (folder / "profile.json").exists() and (folder / "state.json").exists():
            raise ArtifactError(f"{folder} is an unfinished profile. Run its command again with --resume.")
        if not (folder / "profile.json").exists():
            raise ArtifactError(
                f"{folder} must be a profile directory, but has no profile.json. Give what `sparsesearch profile` wrote."
            )
        content = read_json(folder / "profile.json", format=FORMAT, schema_version=SCHEMA_VERSION)
        try:
            manifest = Manifest.model_validate(content)
        except ValidationError as error:
            raise ArtifactError(f"{folder}/profile.json: {first_problem(error)} Profile again.") from error
        for name, digest in manifest.files.items():
            if not (folder / name).exists() or sha256_file(folder / name) != digest:
                raise ArtifactError(f"{folder}/{name} is missing or damaged. Profile again.")
        return cls(folder, manifest)

    def require_source_of(self, plan: Plan) -> None:
        """That this profile scored what the plan's search saw; a plan that says nothing of a search may be of this model alone.

        Raises:
            PlanMismatchError: it is of another model, of other calibration data or block size, or never scored a rule of the plan.
        """
        own, other = plan.base_model, self.manifest.base_model
        if own.geometry != other.geometry or {own.weights_sha256, other.weights_sha256} - {None, own.weights_sha256}:
            raise PlanMismatchError(
                f"{self.folder} must be a profile of the plan's model, {own.name_or_path!r}, but is of {other.name_or_path!r}. Give the profile "
                "that the plan was searched in."
            )
        differs = self._differs(plan) if "space" in plan.provenance else None
        if differs is not None:
            raise PlanMismatchError(
                f"{self.folder} must be the profile that the plan was searched in (space {plan.provenance['space']!r}), but {differs}. Give that "
                "profile, or search again in this one."
            )

    def _differs(self, plan: Plan) -> str | None:
        """What tells this profile from that of a searched plan."""
        manifest = self.manifest
        stated = {
            "calibration": manifest.calibration,
            "profile_dtype": manifest.dtype,
            "block_tokens": manifest.block_tokens,
        }
        for name, value in stated.items():
            wanted = plan.block_tokens if name == "block_tokens" else plan.provenance.get(name, value)
            if wanted != value:
                return f"its {name} is {value}, and the plan's {wanted}"
        calibrated = (rule for modules in manifest.calibrated.values() for rules in modules.values() for rule in rules)
        scored = {Dense(), *manifest.candidates, *calibrated}
        used = {rule for _, _, rule in plan.heads() if not rule.reuses}
        missing = sorted(rule.label for rule in used - scored)
        return f"its space {manifest.space!r} never scored {missing[0]}" if missing else None

    def save_manifest(self) -> None:
        """Write `profile.json`; the last step of profiling."""
        write_json(
            self.folder / "profile.json",
            self.manifest.model_dump(mode="json"),
            format=FORMAT,
            schema_version=SCHEMA_VERSION,
        )

    def scores(self, length: int) -> dict[str, Tensor]:
        """Tensors of one length, named `<layer>.<field>` with a leading sample axis (fields: see `layer_scores.LayerScores`)."""
        if length not in self.manifest.lengths:
            known = ", ".join(map(str, self.manifest.lengths))
            raise SpecError(f"length {length} must be one of the profiled ones ({known}). Profile it with --lengths.")
        try:
            return load_file(self.folder / f"scores-{length}.safetensors")
        except (SafetensorError, OSError) as error:
            raise ArtifactError(f"{self.folder}/scores-{length}.safetensors cannot be read. Profile again.") from error

    @cached_property
    def derived(self) -> dict[Any, Any]:
        """What was worked out from the scores once, by whoever did it: reading them takes seconds for a large model."""
        return {}

    @cached_property
    def labels(self) -> tuple[str, ...]:
        """Names of the candidates, templates included."""
        return tuple(rule.label for rule in self.manifest.candidates)

    def indices(self, rules: tuple[Rule, ...]) -> list[int]:
        """Where each rule of another space stands in this profile's menu.

        Raises:
            SpecError: the profile never scored it.
        """
        for rule in rules:
            if rule.label not in self.labels:
                raise SpecError(
                    f"the profile must have scored {rule.label}, but used space {self.manifest.space!r}."
                    f"{nearest(rule.label, self.labels)} Profile again with this space."
                )
        return [self.labels.index(rule.label) for rule in rules]

    def rule_for(self, unit: Unit, candidate: int) -> tuple[Rule, ...]:
        """The rule of each head of a unit under a candidate; templates give each head its own calibrated one."""
        rule = self.manifest.candidates[candidate]
        if not rule.needs_calibration:
            return (rule,) * len(unit.heads)
        return tuple(self.manifest.calibrated[rule.label][unit.module][head] for head in unit.heads)


def device_name(device: str | torch.device) -> str:
    """What a record calls a device: the GPU's own name, or `cpu` with the machine's architecture."""
    where = torch.device(device)
    return torch.cuda.get_device_name(where) if where.type == "cuda" else f"{where} ({platform.machine()})"


def provenance_versions() -> dict[str, str]:
    """Versions that a result depends on."""
    from importlib.metadata import version

    return {name: version(name) for name in ("sparsesearch", "torch", "transformers")}


def summary(profile: Profile) -> dict[str, Any]:
    """What a person wants to know about a profile at a glance."""
    manifest = profile.manifest
    return {
        "model": manifest.base_model.name_or_path,
        "layers": len(manifest.base_model.modules),
        "query_heads": manifest.base_model.geometry.total_heads,
        "space": manifest.space,
        "candidates": len(manifest.candidates),
        "lengths_tokens": list(manifest.lengths),
        "samples_per_length": manifest.num_samples,
        "calibration": manifest.calibration,
    }
