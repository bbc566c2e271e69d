"""`front --at`: the comparison at equal measured latency, and how it is shown."""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import typer

from . import options as o
from .render import emit_json, lines, progress_bar, table

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from sparsesearch.calibration import Calibration
    from sparsesearch.cost import CostModel
    from sparsesearch.equal_latency.record import Entry, EqualLatency
    from sparsesearch.evaluate import SuiteSpec
    from sparsesearch.plan import Plan
    from sparsesearch.profiling.record import Profile


def at_latency(
    live: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    profile: "Profile",
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
    folder: Path | None,
    choose: tuple[str, int],
    steps: int,
    lengths: list[int],
    num_sequences: int,
    seed: int,
    suite: "SuiteSpec | None",
) -> "EqualLatency":
    """Compare the families at the stated shares of dense's time, and save what is known after every target and task."""
    from sparsesearch.equal_latency.compare import compare_at_latency
    from sparsesearch.equal_latency.ladders import DEFAULT_FAMILIES
    from sparsesearch.equal_latency.record import EqualLatency
    from sparsesearch.equal_latency.settle import Setting
    from sparsesearch.evaluate.run import held_out_parts

    if len(lengths) != 1:
        raise typer.BadParameter(f"must be one length with --at, but got {lengths}.", param_hint="--lengths")
    setting = Setting(
        _targets(at), families or DEFAULT_FAMILIES, batch, part, rounds=max(1, rounds // 2), final_rounds=rounds,
        time_limit_s=time_limit_s, steps=steps, seed=seed,
    )  # fmt: skip
    parts = held_out_parts(tokenizer, lengths[0], num_sequences, seed=seed)
    fresh = _fresh(choose, tokenizer, lengths[0], profile.manifest.seed)
    with progress_bar() as progress:
        return compare_at_latency(
            live,
            profile,
            setting,
            _priced(cost_model, live),
            [sample for each in parts[:-1] for sample in each.samples],
            parts[-1].samples,
            choose_on=[sample for each in fresh for sample in each.samples],
            suite=suite,
            tokenizer=tokenizer,
            data={each.description: each.id for each in (*parts, *fresh)},
            command=o.command_line(),
            begun=EqualLatency.load(out) if resume and out.exists() else None,
            settled=lambda target, plans: _write(plans, target, folder),
            saved=lambda record: record.save(out),
            progress=progress,
        )


def _write(plans: "Mapping[str, Plan]", target: float, folder: Path | None) -> None:
    """A file per family, such as `mixture-0.5x.json`."""
    if folder is not None:
        for family, plan in plans.items():
            plan.save(folder / f"{family.replace(',', '').replace(' ', '-')}-{target:g}x.json")


def _fresh(
    choose: tuple[str, int], tokenizer: "PreTrainedTokenizerBase", length: int, profiled_seed: int
) -> "list[Calibration]":
    """Calibration sequences of another seed than the profile's; none if none are asked for."""
    from sparsesearch import calibration

    spec, count = choose
    if count == 0:
        return []
    return [calibration.load(spec, tokenizer, length_tokens=length, num_samples=count, seed=profiled_seed + 1)]


def _targets(at: str) -> list[float]:
    metric, _, bounds = at.partition("=")
    if metric.strip() != "latency" or not bounds:
        raise typer.BadParameter(f"must look like latency=0.5x,0.35x, but got {at!r}.", param_hint="--at")
    return o.parsed_shares(bounds.replace("x", ""), "--at")


def _priced(cost_model: str | None, live: "PreTrainedModel") -> "CostModel":
    from sparsesearch.cost import load_cost_model
    from sparsesearch.cost.shipped import shipped_for
    from sparsesearch.errors import SpecError

    found = load_cost_model(cost_model) if cost_model else shipped_for(live.device)
    if found is None:
        raise SpecError(
            "a cost model of this device must be known, but nobody has measured it. Run `sparsesearch calibrate --device cuda` and pass "
            "--cost-model FILE."
        )
    return found


def show(found: "EqualLatency", out: Path, plot: Path | None, json: bool) -> None:
    """Tables of what was found, or JSON; the plot where one was asked for."""
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
        chosen = [f"{family}: {entry.menu}" for family, entry in row.items() if entry.menu not in (None, family)]
        if chosen:
            lines(*(f"plan of {one}" for one in chosen))
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
