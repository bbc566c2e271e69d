"""The verdict on plans of a diffusion transformer, as a file: similarity to dense sampling from the same noise, clip by clip."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Self

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from sparsesearch.artifacts import read_json, write_json
from sparsesearch.errors import ArtifactError, PlanMismatchError, first_problem
from sparsesearch.layout import Layout
from sparsesearch.plan import Plan

FORMAT, SCHEMA_VERSION = "sparsesearch.video-metrics", "1.1"


class Variant(BaseModel):
    """One plan on the held-out inputs.

    Attributes:
        density: computed tiles over all steps as a share of dense attention's; None where rules choose for themselves.
        values: measure -> one value per clip.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    density: float | None
    values: dict[str, tuple[float, ...]]

    def mean(self, measure: str) -> float:
        """Mean over clips."""
        return float(np.mean(self.values[measure]))


@dataclass(frozen=True)
class Paired:
    """Difference of two variants, clip by clip.

    Attributes:
        mean: of the differences.
        standard_error: of that mean; NaN for one clip.
        won: clips in which the first is better.
    """

    mean: float
    standard_error: float
    won: int

    def __str__(self) -> str:
        return f"{self.mean:+.2f} ± {self.standard_error:.2f} ({self.won})"


class Judgement(BaseModel):
    """Variants judged on the same inputs.

    Attributes:
        num_steps: denoising steps.
        layout: tokens of a clip.
        variants: name -> what was found.
        plans: name -> transformer of the pipeline -> sha256 of its plan.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    num_steps: int
    layout: Layout
    variants: dict[str, Variant]
    plans: dict[str, dict[str, str]] = {}

    def variant_of(self, plans: Mapping[str, Plan]) -> str:
        """What the plans of a pipeline's transformers are called here.

        Raises:
            PlanMismatchError: they were not judged.
        """
        for name, judged in self.plans.items():
            if judged.keys() == plans.keys() and all(plans[part].has_sha256(sha256) for part, sha256 in judged.items()):
                return name
        own = _digests({part: plan.sha256 for part, plan in plans.items()})
        others = ", ".join(f"{name} ({_digests(judged)})" for name, judged in self.plans.items()) or "plans not named"
        raise PlanMismatchError(
            f"the metrics must be of these plans ({own}), but are of {others}. Measure them with `sparsesearch eval PLAN --run FILE -o METRICS`."
        )

    def save(self, path: Path) -> None:
        """Write it."""
        write_json(path, self.model_dump(mode="json"), format=FORMAT, schema_version=SCHEMA_VERSION)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read it.

        Raises:
            ArtifactError: it is missing, damaged, or something else.
        """
        try:
            return cls.model_validate(read_json(path, format=FORMAT, schema_version=SCHEMA_VERSION))
        except ValidationError as error:
            raise ArtifactError(f"{path}: {first_problem(error)} Judge again.") from error

    def paired(self, first: str, second: str, measure: str = "psnr_db") -> Paired:
        """How much better `first` is than `second`."""
        a, b = (np.array(self.variants[name].values[measure]) for name in (first, second))
        difference = a - b
        count = len(difference)
        error = float(difference.std(ddof=1) / sqrt(count)) if count > 1 else float("nan")
        return Paired(float(difference.mean()), error, int((difference > 0).sum()))


def _digests(plans: Mapping[str, str]) -> str:
    return " ".join(f"{part} {sha256[:12]}".strip() for part, sha256 in plans.items())
