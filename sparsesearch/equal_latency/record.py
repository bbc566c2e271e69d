"""What a comparison at equal measured latency found: one file."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sparsesearch.artifacts import read_json, write_json
from sparsesearch.errors import ArtifactError, first_problem
from sparsesearch.evaluate import Estimate, SuiteSpec, TaskMetrics, VariantMetrics
from sparsesearch.evaluate.task_metrics import SAYS_LITTLE_BELOW

FORMAT = "sparsesearch.equal_latency"
SCHEMA_VERSION = "1.0"


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Entry(_Frozen):
    """One family at one target."""

    bound: float = Field(description="budget in predicted latency, share of dense, that its plan was found under")
    share: float = Field(description="measured time over dense's, median over the final rounds")
    share_error: float = Field(description="standard error of the share over the final rounds")
    seconds: float = Field(description="median of the final rounds, whole batch")
    prefill_s: float = Field(description="median wall time of the whole prefill, whatever part was held equal")
    at_target: bool = Field(description="whether the share is within the tolerance of the target")
    plan_sha256: str
    rules: dict[str, int] = Field(description="query heads per rule kind")
    quality: VariantMetrics
    excess: dict[str, Estimate] = Field(
        description="metric -> this family's loss minus the first family's, paired over sequences; positive is worse. `kl`: over all "
        "positions; `kl_answer`; `loss`: `kl` + 0.1 x `kl_answer`, by which plans are chosen; `heldout_loss`; `needle_error`: share of questions missed"
    )
    menu: str | None = Field(
        None,
        description="where its plan came from: its search, a step from it, or of the family on trial also a part of its space or a rival",
    )
    tried: dict[str, float] = Field(
        default={},
        description="where plans came from -> their KL + 0.1 x answer KL on calibration sequences that were neither profiled nor judged; "
        "KL + 2 x answer KL for `mixture, answers`",
    )
    tasks: dict[str, TaskMetrics] = Field(default={}, description="long-context task -> what was found")

    @property
    def answered(self) -> dict[str, TaskMetrics]:
        """The tasks that dense answers often enough for a plan's share of it to mean something."""

        def dense(found: TaskMetrics) -> float:
            return found.accuracy.mean - found.accuracy_minus_dense.mean

        return {task: found for task, found in self.tasks.items() if dense(found) >= SAYS_LITTLE_BELOW}


class EqualLatency(_Frozen):
    """All families at all targets."""

    model: str
    length_tokens: int
    batch: int
    part: str = Field(description="what was held equal: the whole prefill, or the device's time in attention")
    tolerance: float
    cost_model: str
    objective: str
    first: str = Field("mixture", description="the family on trial, from which the others' excess is counted")
    dense_s: float = Field(description="dense, same part and batch, median of the first target's final rounds")
    dense_prefill_s: float
    dense_quality: VariantMetrics
    targets: dict[str, dict[str, Entry]] = Field(description="share of dense's time -> family -> what was found")
    steps: int = Field(0, description="how often every family's plan could be improved by the loss expanded around it")
    suite: SuiteSpec | None = Field(None, description="which long-context tasks were judged besides, and how")
    data: dict[str, str]
    provenance: dict[str, Any]

    @property
    def families(self) -> tuple[str, ...]:
        """The one on trial, then those that are compared with it."""
        others = (family for family in next(iter(self.targets.values())) if family != self.first)
        return (self.first, *others)

    def bounds(self, target: float) -> dict[str, float]:
        """The budgets that its plans at a target were found under; none where the target is not there yet."""
        return {family: entry.bound for family, entry in self.targets.get(f"{target:g}", {}).items()}

    def finished(self, target: float, families: Sequence[str], stated: Mapping[str, Any]) -> dict[str, Entry] | None:
        """The row of a target, if it is there whole and was asked for alike on a device of that name; else None.

        Args:
            target: share of dense's time.
            families: that are compared.
            stated: the other fields of the record that is asked for.
        """
        row = self.targets.get(f"{target:g}")
        where = ("device", "dtype", "seed", "versions")
        alike = all(getattr(self, name) == value for name, value in stated.items() if name != "provenance") and all(
            self.provenance.get(name) == stated["provenance"][name] for name in where
        )
        if row is None or not alike or set(row) != set(families):
            return None
        tasks = set(self.suite.tasks) if self.suite is not None else set()
        return row if all(set(entry.tasks) == tasks for entry in row.values()) else None

    def with_target(self, target: float, row: Mapping[str, Entry]) -> Self:
        """The record with one more target."""
        return self.model_copy(update={"targets": {**self.targets, f"{target:g}": dict(row)}})

    def with_task(self, target: float, task: str, cells: Mapping[str, TaskMetrics]) -> Self:
        """The record with one more task at a target, judged for every family."""
        row = self.targets[f"{target:g}"]
        return self.with_target(
            target,
            {
                family: entry.model_copy(update={"tasks": {**entry.tasks, task: cells[family]}})
                for family, entry in row.items()
            },
        )

    def save(self, path: Path) -> None:
        """Write it atomically."""
        write_json(path, self.model_dump(mode="json"), format=FORMAT, schema_version=SCHEMA_VERSION)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read such a file.

        Raises:
            ArtifactError: it is missing, truncated, foreign, edited, or of a newer major version.
        """
        try:
            return cls.model_validate(read_json(path, format=FORMAT, schema_version=SCHEMA_VERSION))
        except ValidationError as error:
            raise ArtifactError(
                f"{path}: {first_problem(error)} Make it again with `sparsesearch front --at`."
            ) from error
