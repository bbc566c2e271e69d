"""The command that runs a study: true evaluations of plans on one or many machines."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import options as o
from .errors import guarded
from .render import emit_json, lines, progress_bar, say, table

if TYPE_CHECKING:
    from sparsesearch.studies.tune import StudyDescription

NEW = "For a new study"
OF_NEW_STUDIES = ("name", "densities", "num_sequences", "warm", "unit", "refresh_periods")
"""Options that describe a study; one that is joined keeps its own."""


def tune(
    context: typer.Context,
    profiles: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Profile directories of one model; more than one varies the block size. With --join: copies of the study's own, if they lie "
            "elsewhere on this machine.",
            metavar="[PROFILE]...",
        ),
    ] = None,
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for the front and its plans.")] = Path("study"),
    name: Annotated[str, typer.Option(help="Its name.", rich_help_panel=NEW)] = "study",
    join: Annotated[str | None, typer.Option(help="Join this study instead of making one.", metavar="NAME")] = None,
    storage: Annotated[
        str | None,
        typer.Option(help="A journal file, postgresql+psycopg://… or redis://…; <out>/study.journal by default."),
    ] = None,
    trials: Annotated[int, typer.Option(help="Finished trials of the whole study.", min=1)] = 50,
    workers: Annotated[int, typer.Option(help="Processes on this machine.", min=1)] = 1,
    densities: Annotated[
        str, typer.Option(help="Smallest and largest density to look at.", rich_help_panel=NEW)
    ] = "0.1,0.4",
    num_sequences: Annotated[int, typer.Option(help="Held-out sequences per trial.", min=4, rich_help_panel=NEW)] = 12,
    warm: Annotated[int, typer.Option(help="First trials: points of the exact front.", min=0, rich_help_panel=NEW)] = 5,
    unit: Annotated[o.Unit, typer.Option(help="What decides inside a trial.", rich_help_panel=NEW)] = "query_head",
    refresh_periods: Annotated[
        bool,
        typer.Option("--refresh-periods", help="Also vary how often dynamic rules choose anew.", rich_help_panel=NEW),
    ] = False,
    model: o.OptionalModel = None,
    device: o.Device = "cpu",
    seed: o.Seed = 0,
    json: o.Json = False,
) -> None:
    """Improve the exact front by true evaluations. Many workers, here and elsewhere, may join one study."""
    import optuna

    from sparsesearch.studies.processes import run_workers
    from sparsesearch.studies.storage import create_study, open_study
    from sparsesearch.studies.tune import StudyDescription, warm_start

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    place, study_name, where = storage or str(out / "study.journal"), join or name, o.present_device(device)
    if join is None:
        lowest, highest = _bounds(densities)
        description = StudyDescription.of(
            profiles or [], model=model, num_sequences=num_sequences, batch_sequences=max(2, num_sequences // 3),
            lowest_density=lowest, highest_density=highest, unit=unit, refresh_periods=refresh_periods, seed=seed,
        )  # fmt: skip
        study = create_study(place, study_name, seed=seed)
        description.save(study)
        warm_start(study, description, warm)
    else:
        o.refuse_given(context, "is for a new study; one that is joined keeps its own", *OF_NEW_STUDIES)
        description = StudyDescription.load(open_study(place, study_name, seed=seed)).at(profiles or (), model)
    local = [Path(folder) for folder in description.profiles]
    with progress_bar() as progress:
        failed = run_workers(
            place, study_name, num_trials=trials, num_workers=workers, device=where, profiles=local, model=description.model, progress=progress
        )  # fmt: skip
    if failed:
        say(
            f"{len(failed)} of {workers} workers ended early, with exit codes {', '.join(map(str, failed))}; the others took over their trials."
        )
    _write(description, place, study_name, out, seed=seed, json=json)


def _write(description: "StudyDescription", place: str, name: str, out: Path, *, seed: int, json: bool) -> None:
    """The front of a study and its plans, on disk and in print."""
    import pandas as pd

    from sparsesearch.artifacts import write_bytes
    from sparsesearch.studies.storage import open_study
    from sparsesearch.studies.tune import front_rows, plan_of

    study = open_study(place, name, seed=seed)
    rows, opened = front_rows(study), description.open_profiles()
    for trial in study.best_trials:
        plan_of(trial, description, opened).save(out / f"plan-{trial.number}.json")
    write_bytes(out / "front.csv", pd.DataFrame(rows).to_csv(index=False).encode())
    states = pd.Series([trial.state.name.lower() for trial in study.trials]).value_counts().to_dict()
    if json:
        emit_json({"study": name, "storage": place, "trials": states, "front": rows})
        return
    shown = [[row["trial"], row["density"], row["joint_loss"], row["origin"]] for row in rows]
    table(f"front of {name!r}", ["trial", "density", "joint loss (nats)", "origin"], shown)
    lines(
        f"trials: {', '.join(f'{count} {state}' for state, count in states.items())}",
        f"written: {out}/front.csv and plans",
    )


def _bounds(text: str) -> tuple[float, float]:
    """`0.1,0.4` as the smallest and the largest density; a usage error otherwise."""
    shares = o.parsed_shares(text, "--densities")
    if len(shares) != 2 or shares[0] > shares[1]:
        raise typer.BadParameter(
            f"must be two rising shares, such as 0.1,0.4, but got {text!r}.", param_hint="--densities"
        )
    return shares[0], shares[1]


def register(app: typer.Typer) -> None:
    """Add this file's commands."""
    app.command("tune")(guarded(tune))
