"""The command that measures families of plans: over a row of densities, or at equal measured latency."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from . import options as o
from .errors import guarded
from .render import emit_json, lines, progress_bar, table

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sparsesearch.calibration import Calibration
    from sparsesearch.cost import CostModel
    from sparsesearch.equal_latency.record import Entry, EqualLatency
    from sparsesearch.evaluate import SuiteSpec


def front(
    profile: o.ProfileDir,
    out: Annotated[Path, typer.Option("-o", "--out", help="File to write.")] = Path("front.json"),
    model: o.OptionalModel = None,
    families: Annotated[str | None, typer.Option(help="Families separated by semicolons; all by default.")] = None,
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
        typer.Option(help="With --at, what is held equal: the whole prefill, or the device's time in attention."),
    ] = "prefill",
    batch: Annotated[int, typer.Option(help="With --at, prompts that are timed together.", min=1)] = 1,
    rounds: Annotated[int, typer.Option(help="With --at, interleaved measurements per plan at the end.", min=1)] = 15,
    time_limit: Annotated[
        float, typer.Option(help="With --at, seconds per target after which budgets move no more.", min=1)
    ] = 3600,
    cost_model: Annotated[
        str | None, typer.Option(help="With --at, what prices the searches; the device's own by default.")
    ] = None,
    choose_on: Annotated[
        str,
        typer.Option(
            help="With --at, calibration data, not those of the profile, on which the first family chooses among parts of its space."
        ),
    ] = "needle",
    choose_sequences: Annotated[
        int,
        typer.Option(
            help="With --at, how many such sequences; 0: the first family takes its whole space's optimum.", min=0
        ),
    ] = 12,
    refine: Annotated[
        int,
        typer.Option(
            help="With --at, most steps that improve every family's plan: the loss expanded around it, searched again, brought to the "
            "same measured time, and replayed on the --choose-on data.",
            min=0,
        ),
    ] = 0,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="With --at, start from the budgets that an earlier, perhaps interrupted, run left in --out.",
        ),
    ] = False,
    suite: o.Suite = None,
    task_format: o.TaskFormat = "completion",
    shots: o.Shots = 0,
    task_sequences: o.TaskSequences = 24,
    plot: Annotated[Path | None, typer.Option(help="Also draw the front of the longest length as SVG.")] = None,
    lengths: o.Lengths = "2048",
    num_sequences: Annotated[int, typer.Option(help="Held-out needle sequences per length.", min=1)] = 96,
    device: o.Device = "cpu",
    dtype: o.Dtype = "auto",
    seed: o.Seed = 0,
    json: o.Json = False,
) -> None:
    """Measure every family over a row of densities, or at equal latency. They are mixture, MoA, MInference, DuoAttention and uniform windows."""
    from sparsesearch.profiling.record import Profile
    from sparsesearch.runtime.loading import load_model

    opened = Profile.load(profile)
    names = None if families is None else [name.strip() for name in families.split(";")]
    live, tokenizer = load_model(
        model or opened.manifest.base_model.name_or_path, device=o.present_device(device), dtype=dtype, with_plan=False
    )
    if at is not None:
        found = _at_latency(
            live, tokenizer, opened, names, at, part=part, batch=batch, rounds=rounds, time_limit_s=time_limit, cost_model=cost_model, out=out, resume=resume,
            choose=(choose_on, choose_sequences), steps=refine,
            lengths=o.parsed_lengths(lengths), num_sequences=num_sequences, seed=seed,
            suite=o.parsed_suite(suite, task_format, shots, task_sequences, seed, generate=False),
        )  # fmt: skip
        _show(found, out, plot, json)
        return
    _at_densities(
        live, tokenizer, opened, names, o.parsed_shares(densities, "--densities"), o.parsed_lengths(lengths),
        num_sequences, seed, out, plot, json,
    )  # fmt: skip


def _at_densities(
    live: object,
    tokenizer: object,
    profile: object,
    families: list[str] | None,
    densities: list[float],
    lengths: list[int],
    num_sequences: int,
    seed: int,
    out: Path,
    plot: Path | None,
    json: bool,
) -> None:
    from sparsesearch.artifacts import write_bytes
    from sparsesearch.measured_front import ALL_FAMILIES, front_table, measure_front
    from sparsesearch.report.front import front_plot

    with progress_bar() as progress:
        metrics = measure_front(
            live,  # type: ignore[arg-type]
            tokenizer,  # type: ignore[arg-type]
            profile,  # type: ignore[arg-type]
            families=families or ALL_FAMILIES,
            densities=densities,
            lengths=lengths,
            num_sequences=num_sequences,
            seed=seed,
            command=o.command_line(),
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


def _at_latency(
    live: object,
    tokenizer: object,
    profile: object,
    families: list[str] | None,
    at: str,
    *,
    part: Literal["prefill", "attention"],
    batch: int,
    rounds: int,
    time_limit_s: float,
    cost_model: str | None,
    out: Path,
    resume: bool,
    choose: tuple[str, int],
    steps: int,
    lengths: list[int],
    num_sequences: int,
    seed: int,
    suite: "SuiteSpec | None",
) -> "EqualLatency":
    from sparsesearch.equal_latency.compare import compare_at_latency
    from sparsesearch.equal_latency.ladders import DEFAULT_FAMILIES
    from sparsesearch.equal_latency.record import EqualLatency
    from sparsesearch.equal_latency.settle import Setting
    from sparsesearch.evaluate.run import held_out_parts

    if len(lengths) != 1:
        raise typer.BadParameter(f"must be one length with --at, but got {lengths}.", param_hint="--lengths")
    setting = Setting(
        _targets(at), families or DEFAULT_FAMILIES, batch, part, rounds=max(1, rounds // 3), final_rounds=rounds,
        time_limit_s=time_limit_s, steps=steps, seed=seed,
    )  # fmt: skip
    parts = held_out_parts(tokenizer, lengths[0], num_sequences, seed=seed)  # type: ignore[arg-type]
    fresh = _fresh(choose, tokenizer, lengths[0], profile.manifest.seed)  # type: ignore[attr-defined]
    with progress_bar() as progress:
        return compare_at_latency(
            live,  # type: ignore[arg-type]
            profile,  # type: ignore[arg-type]
            setting,
            _priced(cost_model, live),
            [sample for each in parts[:-1] for sample in each.samples],
            parts[-1].samples,
            choose_on=[sample for each in fresh for sample in each.samples],
            suite=suite,
            tokenizer=tokenizer,  # type: ignore[arg-type]
            data={each.description: each.id for each in (*parts, *fresh)},
            command=o.command_line(),
            begun=EqualLatency.load(out) if resume and out.exists() else None,
            saved=lambda record: record.save(out),
            progress=progress,
        )


def _fresh(choose: tuple[str, int], tokenizer: object, length: int, profiled_seed: int) -> "list[Calibration]":
    """Calibration sequences of another seed than the profile's; none if none are asked for."""
    from sparsesearch import calibration

    spec, count = choose
    if count == 0:
        return []
    return [calibration.load(spec, tokenizer, length_tokens=length, num_samples=count, seed=profiled_seed + 1)]  # type: ignore[arg-type]


def _targets(at: str) -> list[float]:
    metric, _, bounds = at.partition("=")
    if metric.strip() != "latency" or not bounds:
        raise typer.BadParameter(f"must look like latency=0.5x,0.35x, but got {at!r}.", param_hint="--at")
    return o.parsed_shares(bounds.replace("x", ""), "--at")


def _priced(cost_model: str | None, live: object) -> "CostModel":
    from sparsesearch.cost import load_cost_model
    from sparsesearch.cost.shipped import shipped_for
    from sparsesearch.errors import SpecError

    found = load_cost_model(cost_model) if cost_model else shipped_for(live.device)  # type: ignore[attr-defined]
    if found is None:
        raise SpecError(
            "a cost model of this device must be known, but nobody has measured it. Run `sparsesearch calibrate --device cuda` and pass "
            "--cost-model FILE."
        )
    return found


def _show(found: "EqualLatency", out: Path, plot: Path | None, json: bool) -> None:
    from sparsesearch.artifacts import write_bytes
    from sparsesearch.report.equal_latency import equal_latency_plot

    if plot is not None:
        write_bytes(plot, equal_latency_plot(found).encode())
    if json:
        emit_json(found.model_dump(mode="json"))
        return
    for target, row in found.targets.items():
        rows = []
        for family, entry in row.items():
            differs = entry.excess["kl"]
            rows.append(
                [
                    family,
                    f"{entry.share:.3f} ± {entry.share_error:.3f}" + ("" if entry.at_target else " (nearest)"),
                    entry.quality.density,
                    f"{entry.quality.kl_text.mean:.4f}",
                    f"{differs.mean:+.4f} ± {differs.standard_error:.4f}",
                    entry.quality.needle.mean,
                    entry.quality.heldout_loss.mean,
                    entry.prefill_s * 1e3,
                ]
            )
        table(
            f"{found.model}, {found.batch} x {found.length_tokens} tokens: {found.part} at {target} of dense's "
            f"{found.dense_s * 1e3:.1f} ms (dense prefill {found.dense_prefill_s * 1e3:.1f} ms)",
            ["family", "time / dense", "density", "KL", f"KL minus {found.families[0]}'s", "needle", "text loss", "prefill (ms)"],
            rows,
        )  # fmt: skip
        _show_tasks(target, row)
    lines(f"written: {out}")


def _show_tasks(target: str, row: "Mapping[str, Entry]") -> None:
    """Share of dense's accuracy that every family keeps, task by task; tasks that dense hardly answers in brackets."""
    tasks = list(next(iter(row.values())).tasks)
    if not tasks:
        return
    content = []
    for task in tasks:
        cells = [entry.tasks[task] for entry in row.values()]
        dense = cells[0].accuracy.mean - cells[0].accuracy_minus_dense.mean
        name = task if task in next(iter(row.values())).answered else f"({task})"
        content.append(
            [name, f"{dense:.3f}", *(f"{c.accuracy.mean:.3f} ± {c.accuracy.standard_error:.3f}" for c in cells)]
        )
    kept = []
    for entry in row.values():
        answered = entry.answered.values()
        whole = sum(c.accuracy.mean - c.accuracy_minus_dense.mean for c in answered)
        kept.append(f"{sum(c.accuracy.mean for c in answered) / whole:.3f}" if whole else "")
    content.append(["kept, over tasks without brackets", "1", *kept])
    table(f"tasks at {target} of dense's time: accuracy", ["task", "dense", *row], content)


def register(app: typer.Typer) -> None:
    """Add this file's command."""
    app.command("front")(guarded(front))
