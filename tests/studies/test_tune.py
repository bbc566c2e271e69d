"""Studies of the embedded model: knobs, the objective, the front."""

import shutil
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from sparsesearch.errors import ArtifactError, BudgetInfeasibleError, SpecError
from sparsesearch.planning import Question, find_choice, write_plan
from sparsesearch.presets import preset_path
from sparsesearch.profiling.record import Profile
from sparsesearch.rules import LengthLaw
from sparsesearch.rules.pooled_topk import PooledTopk
from sparsesearch.search.budget import Budget
from sparsesearch.studies.knobs import Knobs, has_styles, solved, with_refresh_period
from sparsesearch.studies.processes import join, run_workers
from sparsesearch.studies.storage import create_study, open_study
from sparsesearch.studies.tune import (
    BEATEN_BY,
    INFEASIBLE,
    LOSSES,
    PlanObjective,
    StudyDescription,
    front_rows,
    plan_of,
    warm_start,
)

PROFILE = preset_path("profiles", "needle-7m")


@pytest.fixture(scope="module")
def profile() -> Profile:
    return Profile.load(PROFILE)


def described(**changes: Any) -> StudyDescription:
    settings = {
        "length_tokens": 256,
        "num_sequences": 4,
        "batch_sequences": 2,
        "lowest_density": 0.3,
        "highest_density": 0.6,
    }
    return StudyDescription.of([PROFILE], **{**settings, **changes})


def test_default_knobs_are_the_plain_search(profile: Profile) -> None:
    table, solution = find_choice(profile, question := Question((Budget("density", 0.25),)))
    plain = write_plan(profile, question, table, solution.choice, solution)
    assert solved(profile, Knobs(0.25), "query_head").assignments == plain.assignments


def test_each_knob_turns_something(profile: Profile) -> None:
    plain = solved(profile, Knobs(0.25), "query_head")
    modules = plain.base_model.modules
    kept = solved(profile, Knobs(0.4, dense_first=1, dense_last=1), "query_head")
    for place, module in enumerate(modules):
        kinds = {rule.kind for rule in kept.module_rules(module)}
        assert (kinds == {"dense"}) == (place in (0, len(modules) - 1))
    flat = solved(profile, Knobs(0.25, slope_cap=0.0), "query_head")
    laws = [getattr(rule, name) for _, _, rule in flat.heads() for name in type(rule).model_fields]
    assert all(law.b == 0 for law in laws if isinstance(law, LengthLaw))
    assert solved(profile, Knobs(0.25, answer_weight=20.0), "query_head").assignments != plain.assignments
    ends, spread = (solved(profile, Knobs(0.25, end_share=share), "query_head") for share in (0.0, 1.0))
    assert has_styles(profile)
    assert ends.assignments != spread.assignments
    even = solved(profile, Knobs(0.25, end_share=0.5), "query_head")
    assert even.assignments == plain.assignments, "three sequences of each style: half and half is all alike"
    with pytest.raises(BudgetInfeasibleError):
        solved(profile, Knobs(0.1, dense_first=2), "query_head")


def test_refresh_periods_replace_estimators_by_reuse(profile: Profile) -> None:
    base = solved(profile, Knobs(0.25), "query_head")
    pooled = PooledTopk(keep=LengthLaw(b=0.25))
    dynamic = base.model_copy(
        update={
            "rules": {pooled.label: pooled},
            "assignments": dict.fromkeys(base.base_model.modules, (pooled.label,) * 8),
        }
    )
    spaced = with_refresh_period(dynamic, 3)
    layers = [spaced.module_rules(module)[0] for module in spaced.base_model.modules]
    assert [getattr(rule, "layer", None) for rule in layers] == [None, 0, 0, None, 3, 3, None, 6]
    assert type(base).model_validate(spaced.model_dump()) == spaced, "a legal plan"
    mixed = with_refresh_period(base, 3)
    assert type(base).model_validate(mixed.model_dump()) == mixed
    with pytest.raises(SpecError, match="at least one layer"):
        with_refresh_period(base, 0)


@pytest.mark.slow
def test_a_study_end_to_end(tmp_path: Path, profile: Profile) -> None:
    storage, description = str(tmp_path / "study.journal"), described()
    study = create_study(storage, "s", seed=0)
    description.save(study)
    assert warm_start(study, description, 2) == 2
    assert join(storage, "s", num_trials=4) == 4
    study = open_study(storage, "s", seed=0)
    assert [trial.user_attrs.get("origin") for trial in study.trials[:3]] == ["exact front", "exact front", None]
    rows = front_rows(study)
    assert rows == sorted(rows, key=lambda row: row["density"])
    complete = [trial for trial in study.trials if trial.state == TrialState.COMPLETE]
    assert all(len(trial.user_attrs[LOSSES]) == 4 for trial in complete)
    again = PlanObjective.load(description)
    for trial in study.best_trials[:1]:
        plan = plan_of(trial, description, [profile])
        losses = [loss for batch in again.batches for loss in _joint(batch.compare(plan))]
        assert sum(losses) / 4 == pytest.approx(trial.values[0])
    before = len(study.trials)
    assert run_workers(storage, "s", num_trials=6, num_workers=2) == []
    after = open_study(storage, "s", seed=0)
    assert sum(trial.state in (TrialState.COMPLETE, TrialState.PRUNED) for trial in after.trials) >= 6
    assert len(after.trials) > before


def test_a_study_goes_on_where_its_profiles_lie_elsewhere(tmp_path: Path) -> None:
    description = described()
    copy = Path(shutil.copytree(PROFILE, tmp_path / "copy"))
    moved = description.model_copy(update={"profiles": ("/nowhere",)})
    with pytest.raises(ArtifactError, match=r"/nowhere must be the profile .* tune --join NAME PROFILE"):
        moved.open_profiles()
    here = moved.at([copy], "elsewhere/model")
    assert (here.profiles, here.model) == ((str(copy),), "elsewhere/model")
    assert len(here.open_profiles()) == 1
    assert moved.at() == moved
    manifest = copy / "profile.json"
    manifest.write_bytes(manifest.read_bytes() + b" ")
    with pytest.raises(ArtifactError, match="a copy of /nowhere, with which the study was made, must be among"):
        moved.at([copy])


def _joint(found: Any) -> list[float]:
    return (found.kl_text + 0.1 * found.kl_answer.nan_to_num()).tolist()


def test_infeasible_and_beaten_trials_are_pruned(tmp_path: Path) -> None:
    description = described(num_sequences=8, batch_sequences=7, lowest_density=0.05, highest_density=0.6)
    study = create_study(str(tmp_path / "s.journal"), "s", seed=0)
    objective = PlanObjective.load(description)
    study.enqueue_trial({"density": 0.05, "dense_first": 2, "dense_last": 2})
    with pytest.raises(optuna.TrialPruned):
        objective(trial := study.ask())
    assert "density" in study.trials[trial.number].user_attrs[INFEASIBLE]
    perfect = study.ask({"density": optuna.distributions.FloatDistribution(0, 1)})
    perfect.set_user_attr(LOSSES, [0.0] * 8)
    study.tell(perfect, (0.0, 0.01))
    study.enqueue_trial({"density": 0.3, "dense_first": 0, "dense_last": 0})
    with pytest.raises(optuna.TrialPruned):
        objective(trial := study.ask())
    assert study.trials[trial.number].user_attrs[BEATEN_BY] == perfect.number


def test_strangers_are_refused(tmp_path: Path) -> None:
    study = create_study(str(tmp_path / "s.journal"), "s", seed=0)
    with pytest.raises(ArtifactError, match="sparsesearch tune"):
        StudyDescription.load(study)
    described().model_copy(update={"profile_sha256": ("0" * 64,)}).save(study)
    with pytest.raises(ArtifactError, match="missing or another"):
        StudyDescription.load(study).open_profiles()
    with pytest.raises(SpecError, match="at least one profile"):
        StudyDescription.of([])
    with pytest.raises(SpecError, match="named twice"):
        StudyDescription.of([PROFILE, PROFILE])
