"""A study of plans: its description, its objective, and its front.

The description is kept in the study itself, so that whoever joins evaluates the same thing. Two objectives are minimised: the joint loss
(text KL + 0.1 answer KL, nats) and the density, both measured by running the plan on held-out sequences.
"""

import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import optuna
from optuna.trial import Trial, TrialState
from pydantic import BaseModel, ConfigDict, ValidationError
from transformers import PreTrainedModel

from sparsesearch import calibration
from sparsesearch.artifacts import sha256_file
from sparsesearch.errors import ArtifactError, BudgetInfeasibleError, SpecError, first_problem
from sparsesearch.evaluate.density import TileCount, achieved_density, counting
from sparsesearch.evaluate.reference import DenseReference
from sparsesearch.plan import Plan
from sparsesearch.profiling.local_model import ANSWER_KL_WEIGHT
from sparsesearch.profiling.record import Profile
from sparsesearch.runtime.loading import load_model
from sparsesearch.shapes import Granularity
from sparsesearch.studies.knobs import Knobs, solved, suggest
from sparsesearch.studies.pruning import Rival, beaten_by

DESCRIPTION = "sparsesearch:study"
LOSSES = "sparsesearch:losses"
BEATEN_BY = "sparsesearch:beaten_by"
INFEASIBLE = "sparsesearch:infeasible"


class StudyDescription(BaseModel):
    """What every worker of a study must agree on.

    Attributes:
        profiles: directories; profiles of one model, which may differ in block size.
        profile_sha256: of each one's manifest.
        model: what is evaluated.
        length_tokens: of the held-out sequences.
        num_sequences: held-out sequences; each trial sees them in the same order.
        batch_sequences: sequences between two looks of the pruner.
        lowest_density: of the search.
        highest_density: of the search.
        unit: what decides inside a trial.
        refresh_periods: whether the period of index reuse is varied too.
        seed: of sequences and sampler.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    profiles: tuple[str, ...]
    profile_sha256: tuple[str, ...]
    model: str
    length_tokens: int
    num_sequences: int
    batch_sequences: int
    lowest_density: float
    highest_density: float
    unit: Granularity = "query_head"
    refresh_periods: bool = False
    seed: int = 0

    @classmethod
    def of(cls, folders: Sequence[Path], **settings: Any) -> Self:
        """Describe a study of profiles on disk."""
        if not folders:
            raise SpecError("a study must have at least one profile. Name its directory.")
        opened = [Profile.load(folder) for folder in folders]
        models = {profile.manifest.base_model.weights_sha256 for profile in opened}
        if len(models) > 1:
            raise SpecError("the profiles of a study must be of one model, but theirs differ. Profile the same model.")
        defaults = {
            "model": opened[0].manifest.base_model.name_or_path,
            "length_tokens": max(opened[0].manifest.lengths),
        }
        given = {key: value for key, value in settings.items() if value is not None}
        digests = tuple(sha256_file(folder / "profile.json") for folder in folders)
        if len(set(digests)) < len(digests):
            raise SpecError("the profiles of a study must differ, but one is named twice. Name each of them once.")
        return cls(profiles=tuple(map(str, folders)), profile_sha256=digests, **{**defaults, **given})

    def save(self, study: optuna.Study) -> None:
        """Write it into a new study."""
        study.set_user_attr(DESCRIPTION, self.model_dump(mode="json"))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # names for the dashboard, no more
            study.set_metric_names(["joint loss (nats)", "density"])

    @classmethod
    def load(cls, study: optuna.Study) -> Self:
        """Read it from a study.

        Raises:
            ArtifactError: the study is none of ours, or of another version.
        """
        content = study.user_attrs.get(DESCRIPTION)
        if content is None:
            raise ArtifactError(f"study {study.study_name!r} must have been made by `sparsesearch tune`, but was not.")
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            raise ArtifactError(f"study {study.study_name!r}: {first_problem(error, cls.model_fields)}") from error

    def at(self, folders: Sequence[Path] = (), model: str | None = None) -> Self:
        """The same study where its profiles, and its model, lie elsewhere on this machine; without any, where they lay when it was made.

        Raises:
            ArtifactError: a folder is no profile, or a profile of the study is not among them.
        """
        here = self if model is None else self.model_copy(update={"model": model})
        if not folders:
            return here
        own = {sha256_file(Profile.load(folder).folder / "profile.json"): str(folder) for folder in folders}
        if absent := [
            name for name, digest in zip(self.profiles, self.profile_sha256, strict=True) if digest not in own
        ]:
            raise ArtifactError(
                f"a copy of {absent[0]}, with which the study was made, must be among the profiles named, but is not. Copy it here and name it."
            )
        return here.model_copy(update={"profiles": tuple(own[digest] for digest in self.profile_sha256)})

    def open_profiles(self) -> list[Profile]:
        """The profiles, which must be those the study was made with.

        Raises:
            ArtifactError: one is missing here, or is another.
        """
        for folder, digest in zip(self.profiles, self.profile_sha256, strict=True):
            path = Path(folder) / "profile.json"
            if not path.exists() or sha256_file(path) != digest:
                raise ArtifactError(
                    f"{folder} must be the profile that the study was made with, but is missing or another. Copy it here, or say "
                    "where it is: tune --join NAME PROFILE."
                )
        return [Profile.load(Path(folder)) for folder in self.profiles]


@dataclass
class PlanObjective:
    """Solve under a trial's knobs, run the plan on held-out sequences, stop early when it is clearly beaten.

    Attributes:
        description: of the study.
        model: dense, in evaluation mode.
        tokenizer: the model's.
    """

    description: StudyDescription
    model: PreTrainedModel
    tokenizer: Any

    @classmethod
    def load(cls, description: StudyDescription, *, device: str = "cpu") -> Self:
        """Load the model and measure dense on the held-out sequences."""
        description.open_profiles()
        model, tokenizer = load_model(description.model, device=device, with_plan=False)
        return cls(description, model, tokenizer)

    @cached_property
    def profiles(self) -> list[Profile]:
        """The study's profiles."""
        return self.description.open_profiles()

    @cached_property
    def batches(self) -> list[DenseReference]:
        """Dense on the held-out sequences, a batch at a time."""
        own = self.description
        samples = calibration.load(
            "needle",
            self.tokenizer,
            length_tokens=own.length_tokens,
            num_samples=own.num_sequences,
            seed=own.seed + 1,
            split="heldout",
        ).samples
        starts = range(0, len(samples), own.batch_sequences)
        return [
            DenseReference(self.model, samples[first : first + own.batch_sequences], batch_tokens=1) for first in starts
        ]

    def __call__(self, trial: Trial) -> tuple[float, float]:
        """Joint loss and density of a trial; prunes it when it is infeasible or beaten."""
        own = self.description
        knobs = suggest(
            trial,
            self.profiles,
            lowest=own.lowest_density,
            highest=own.highest_density,
            refresh_periods=own.refresh_periods,
        )
        try:
            plan = solved(self.profiles[knobs.profile], knobs, own.unit)
        except BudgetInfeasibleError as error:
            trial.set_user_attr(INFEASIBLE, str(error))
            raise optuna.TrialPruned from error
        rivals = rivals_of(trial.study)
        losses: list[float] = []
        count = TileCount()
        for batch in self.batches:
            with counting(plan, count):
                found = batch.compare(plan)
            losses += (found.kl_text + ANSWER_KL_WEIGHT * found.kl_answer.nan_to_num()).tolist()
            density = achieved_density(plan, own.length_tokens, count)
            rival = beaten_by(losses, density, rivals)
            if rival is not None and len(losses) < own.num_sequences:
                trial.set_user_attr(BEATEN_BY, rival.number)
                raise optuna.TrialPruned
        trial.set_user_attr(LOSSES, losses)
        return sum(losses) / len(losses), density


def rivals_of(study: optuna.Study) -> list[Rival]:
    """The finished trials, as the pruner wants them."""
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return [
        Rival(one.number, one.values[1], tuple(one.user_attrs[LOSSES])) for one in complete if LOSSES in one.user_attrs
    ]


def warm_start(study: optuna.Study, description: StudyDescription, count: int) -> int:
    """Enqueue points of the exact front, the default knobs at `count` densities, as the first trials; how many there are."""
    profiles = description.open_profiles()
    low, high = description.lowest_density, description.highest_density
    for index in range(count):
        density = low if count == 1 else low + (high - low) * index / (count - 1)
        knobs = Knobs(density=density)
        with suppress(BudgetInfeasibleError):  # the smallest densities may be out of reach
            solved(profiles[0], knobs, description.unit)
            study.enqueue_trial(
                knobs.params(profiles, description.refresh_periods), user_attrs={"origin": "exact front"}
            )
    return sum(trial.state == TrialState.WAITING for trial in study.get_trials(deepcopy=False))


def plan_of(trial: optuna.trial.FrozenTrial, description: StudyDescription, profiles: Sequence[Profile]) -> Plan:
    """The plan of a finished trial, made again: the exact search is deterministic."""
    knobs = Knobs(**{name: value for name, value in trial.params.items() if name in Knobs.__dataclass_fields__})
    plan = solved(profiles[knobs.profile], knobs, description.unit)
    record = {"trial": trial.number, "knobs": trial.params, "joint_loss": trial.values[0], "density": trial.values[1]}
    return plan.model_copy(update={"provenance": {**plan.provenance, "study": record}})


def front_rows(study: optuna.Study) -> list[dict[str, Any]]:
    """The study's Pareto front, cheapest first."""
    rows = [
        {
            "trial": trial.number,
            "density": trial.values[1],
            "joint_loss": trial.values[0],
            "origin": trial.user_attrs.get("origin", "study"),
            **trial.params,
        }
        for trial in study.best_trials
    ]
    return sorted(rows, key=lambda row: (row["density"], row["joint_loss"]))
