"""The command that measures families of plans: over a row of densities, or at equal measured latency."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from . import options as o
from .errors import guarded
from .front_latency import at_latency, show
from .render import emit_json, progress_bar, table

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from sparsesearch.profiling.record import Profile

TIMES = "With --at"
OF_TIMES = (
    *("part", "batch", "rounds", "time_limit", "cost_model", "choose_on", "choose_sequences", "refine", "folder"),
    *("suite", "task_format", "shots", "task_sequences"),
)
"""Options that mean something with --at only."""


def front(
    context: typer.Context,
    profile: o.ProfileDir,
    out: Annotated[Path, typer.Option("-o", "--out", help="File to write.")] = Path("front.json"),
    model: o.OptionalModel = None,
    families: Annotated[
        str | None,
        typer.Option(help="Families separated by semicolons; all by default. With --at also `mixture, answers`."),
    ] = None,
    densities: Annotated[str, typer.Option(help="Density budgets, by commas.")] = "0.15,0.2,0.25,0.35,0.5",
    at: Annotated[
        str | None,
        typer.Option(
            help="Compare at equal measured latency instead, at these shares of dense's time; at one length.",
            metavar="latency=0.5x,0.35x",
        ),
    ] = None,
    part: Annotated[
        Literal["prefill", "attention"],
        typer.Option(
            help="What is held equal: the whole prefill, or the device's time in attention.", rich_help_panel=TIMES
        ),
    ] = "prefill",
    batch: Annotated[int, typer.Option(help="Prompts that are timed together.", min=1, rich_help_panel=TIMES)] = 1,
    rounds: Annotated[
        int, typer.Option(help="Interleaved measurements per plan at the end.", min=1, rich_help_panel=TIMES)
    ] = 15,
    time_limit: Annotated[
        float,
        typer.Option(
            help="Seconds per target after which no step begins and plans that are off it move once more.",
            min=1,
            rich_help_panel=TIMES,
        ),
    ] = 3600,
    cost_model: Annotated[
        str | None,
        typer.Option(help="What prices the searches; the device's own by default.", rich_help_panel=TIMES),
    ] = None,
    choose_on: Annotated[
        str,
        typer.Option(
            help="Calibration data, not those of the profile, on which the first family chooses among parts of its space.",
            rich_help_panel=TIMES,
        ),
    ] = "needle",
    choose_sequences: Annotated[
        int,
        typer.Option(
            help="How many such sequences; 0: the first family takes its whole space's optimum.",
            min=0,
            rich_help_panel=TIMES,
        ),
    ] = 12,
    refine: Annotated[
        int,
        typer.Option(
            help="Most steps that improve every family's plan: the loss expanded around it, searched again, brought to the same measured "
            "time, and replayed on the --choose-on data.",
            min=0,
            rich_help_panel=TIMES,
        ),
    ] = 0,
    folder: Annotated[
        Path | None,
        typer.Option(
            help="Folder for every family's plan, written as soon as it is found, before it is judged.",
            rich_help_panel=TIMES,
        ),
    ] = None,
    suite: o.Suite = None,
    task_format: o.TaskFormat = "completion",
    shots: o.Shots = 0,
    task_sequences: o.TaskSequences = 24,
    plot: Annotated[Path | None, typer.Option(help="Also draw the front of the longest length as SVG.")] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Keep the families, with --at the targets, that an interrupted run of the same measurement left in --out. With --at, budgets of other "
            "targets start from those there.",
        ),
    ] = False,
    lengths: o.Lengths = "2048",
    num_sequences: Annotated[int, typer.Option(help="Held-out needle sequences per length.", min=1)] = 96,
    device: o.Device = "cpu",
    dtype: o.Dtype = "auto",
    seed: o.Seed = 0,
    json: o.Json = False,
) -> None:
    """Measure every family over a row of densities, or at equal latency. They are mixture, MoA, MInference, DuoAttention and uniform windows."""
    from sparsesearch.calibration import check_context
    from sparsesearch.profiling.record import Profile
    from sparsesearch.runtime.loading import load_model

    if at is None:
        o.refuse_given(context, "is for --at, which was not given", *OF_TIMES)
    else:
        o.refuse_given(context, "is not for --at, whose targets are times", "densities")
        if suite is None:
            o.refuse_given(context, "is for --suite, which was not given", "task_format", "shots", "task_sequences")
    opened = Profile.load(profile)
    names = None if families is None else [name.strip() for name in families.split(";")]
    live, tokenizer = load_model(
        model or opened.manifest.base_model.name_or_path, device=o.present_device(device), dtype=dtype, with_plan=False
    )
    check_context(live.config, o.parsed_lengths(lengths))
    if at is not None:
        found = at_latency(
            live, tokenizer, opened, names, at, part=part, batch=batch, rounds=rounds, time_limit_s=time_limit, cost_model=cost_model, out=out, resume=resume, folder=folder,
            choose=(choose_on, choose_sequences), steps=refine,
            lengths=o.parsed_lengths(lengths), num_sequences=num_sequences, seed=seed,
            suite=o.parsed_suite(suite, task_format, shots, task_sequences, seed, generate=False),
        )  # fmt: skip
        show(found, out, plot, json)
        return
    _at_densities(
        live, tokenizer, opened, names, o.parsed_shares(densities, "--densities"), o.parsed_lengths(lengths),
        num_sequences, seed, out, resume, plot, json,
    )  # fmt: skip


def _at_densities(
    live: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    profile: "Profile",
    families: list[str] | None,
    densities: list[float],
    lengths: list[int],
    num_sequences: int,
    seed: int,
    out: Path,
    resume: bool,
    plot: Path | None,
    json: bool,
) -> None:
    from sparsesearch.artifacts import write_bytes
    from sparsesearch.evaluate import Metrics
    from sparsesearch.measured_front import ALL_FAMILIES, front_table, measure_front
    from sparsesearch.report.front import front_plot

    with progress_bar() as progress:
        metrics = measure_front(
            live,
            tokenizer,
            profile,
            families=families or ALL_FAMILIES,
            densities=densities,
            lengths=lengths,
            num_sequences=num_sequences,
            seed=seed,
            command=o.command_line(),
            begun=Metrics.load(out) if resume and out.exists() else None,
            saved=lambda found: found.save(out),
            progress=progress,
        )
    metrics.save(out)
    if plot is not None:
        title = f"{metrics.model}, {metrics.lengths_tokens[-1]} tokens, {num_sequences} held-out sequences"
        write_bytes(plot, front_plot(metrics, metrics.lengths_tokens[-1], title=title).encode())
    content = {length: front_table(metrics, length) for length in metrics.lengths_tokens}
    if json:
        emit_json(content)
        return
    for length, rows in content.items():
        table(f"{length} tokens, {num_sequences} sequences", list(rows[0]), [list(row.values()) for row in rows])


def register(app: typer.Typer) -> None:
    """Add this file's command."""
    app.command("front")(guarded(front))
