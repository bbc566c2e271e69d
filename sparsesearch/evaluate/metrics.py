"""What an evaluation found: one file, `metrics.json`."""

from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sparsesearch.artifacts import read_json, write_json
from sparsesearch.errors import ArtifactError, PlanMismatchError, SpecError, first_problem, nearest
from sparsesearch.evaluate.estimate import Estimate
from sparsesearch.evaluate.task_metrics import SAYS_LITTLE_BELOW, SuiteSpec, TaskTable
from sparsesearch.plan import Plan

FORMAT = "sparsesearch.metrics"
SCHEMA_VERSION = "1.1"


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class VariantMetrics(_Frozen):
    """One variant at one length. Everything is measured; `*_minus_dense` are paired over the same sequences."""

    density: float = Field(ge=0, le=1, description="tiles computed / tiles dense attention computes, over all heads")
    heldout_loss: Estimate = Field(description="nats per token of plain held-out text")
    heldout_loss_minus_dense: Estimate
    kl_text: Estimate = Field(description="KL(dense ‖ variant) over all positions of the needle sequences, nats")
    kl_answer: Estimate = Field(description="the same over positions that predict the answer")
    top1_agreement: Estimate = Field(description="share of positions with dense's most probable token")
    needle: Estimate = Field(description="share of questions answered exactly (teacher forced)")
    needle_minus_dense: Estimate
    needle_by_template: dict[str, Estimate]
    needle_by_depth: dict[str, Estimate] = Field(
        description="where the statement stands: share of the text, as `from-to`"
    )
    prefill_s: float | None = Field(None, gt=0, description="median wall time of one sequence, batch 1")
    prefill_runs_s: tuple[float, ...] = ()
    attention_s: float | None = Field(
        None, gt=0, description="median of the same prefill's attention, choosing tiles included"
    )
    predicted: dict[str, float] = Field(
        default_factory=dict,
        description="`attention_s` and, where whole layers are known, `prefill_s`, by the cost model",
    )
    cost_model: str | None = None


class Metrics(_Frozen):
    """Dense and every variant, length by length."""

    model: str
    results: dict[int, dict[str, VariantMetrics]] = Field(description="length in tokens -> variant -> what was found")
    plans: dict[str, str] = Field(description="variant -> sha256 of its plan; dense has none")
    data: dict[str, str] = Field(description="description of each data set -> its id")
    suite: SuiteSpec | None = Field(None, description="which tasks were judged besides, and how")
    decode_tokens: int = Field(
        0,
        ge=0,
        description="how many of a sequence's last tokens plans decoded one by one; agreement, KL and loss are then of these",
    )
    tasks: TaskTable = Field(default={}, description="length in tokens -> task -> variant -> what was found")
    provenance: dict[str, Any] = Field(description="versions, device, dtype, threads, seed, command")

    @property
    def lengths_tokens(self) -> tuple[int, ...]:
        """Judged lengths, ascending."""
        return tuple(sorted(self.results))

    @property
    def best_judged_length(self) -> int:
        """The length with the most sequences, the longest of them where several have as many."""
        return max(self.lengths_tokens, key=lambda length: (self.at(length, "dense").needle.num_sequences, length))

    @property
    def variants(self) -> tuple[str, ...]:
        """Dense first, then the plans by name."""
        return ("dense", *sorted(self.plans))

    def variant_of(self, plan: Plan) -> str:
        """What the plan is called here.

        Raises:
            PlanMismatchError: it was not judged.
        """
        for name, sha256 in self.plans.items():
            if plan.has_sha256(sha256):
                return name
        judged = ", ".join(f"{name} ({sha256[:12]})" for name, sha256 in sorted(self.plans.items())) or "dense alone"
        raise PlanMismatchError(
            f"the metrics must be of this plan ({plan.sha256[:12]}), but are of {judged}. Measure it with `sparsesearch eval PLAN -o METRICS`."
        )

    def at(self, length_tokens: int, variant: str) -> VariantMetrics:
        """One cell.

        Raises:
            SpecError: it was not measured.
        """
        if length_tokens not in self.results:
            raise SpecError(f"length {length_tokens} must be among the judged ones: {list(self.lengths_tokens)}.")
        row = self.results[length_tokens]
        if variant not in row:
            raise SpecError(f"variant {variant!r} was not judged.{nearest(variant, row)}")
        return row[variant]

    def says_little(self, length_tokens: int, task: str) -> bool:
        """Whether dense itself answers a task so seldom that a plan's share of it means nothing."""
        return self.tasks[length_tokens][task]["dense"].accuracy.mean < SAYS_LITTLE_BELOW

    def slowdown(self, length_tokens: int, variant: str) -> float | None:
        """Prefill time relative to dense, in the same job; below 1 is faster. None when time was not measured."""
        own, dense = self.at(length_tokens, variant).prefill_s, self.at(length_tokens, "dense").prefill_s
        return None if own is None or dense is None else own / dense

    def save(self, path: str | Path) -> None:
        """Write `metrics.json` atomically."""
        write_json(Path(path), self.model_dump(mode="json"), format=FORMAT, schema_version=SCHEMA_VERSION)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a metrics file.

        Raises:
            ArtifactError: it is missing, truncated, foreign, edited, or of a newer major version.
        """
        try:
            return cls.model_validate(read_json(Path(path), format=FORMAT, schema_version=SCHEMA_VERSION))
        except ValidationError as error:
            raise ArtifactError(f"{path}: {first_problem(error)} Make it again with `sparsesearch eval`.") from error
