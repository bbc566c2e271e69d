"""`sparsesearch bench cuts`: plans that remove, beside baselines at the same budget."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options as o
from . import prune
from .errors import guarded, usage
from .render import emit_json, lines, progress_bar, table

if TYPE_CHECKING:
    from sparsesearch.cost import CostModel
    from sparsesearch.plan import Plan
    from sparsesearch.profiling.record import Profile
    from sparsesearch.pruning.quality import Batch
    from sparsesearch.pruning.record import PruningProfile


def cuts(
    context: typer.Context,
    profile: o.ProfileDir,
    budget: Annotated[
        list[str], typer.Option(help="Budget such as params=0.8x; several are measured one after the other.")
    ],
    out: o.JsonOut = Path("bench-cuts.json"),
    model: o.OptionalModel = None,
    plans: Annotated[
        str | None, typer.Option("--plans", help="Baselines to measure, separated by semicolons; all by default.")
    ] = None,
    cost_model: Annotated[str | None, typer.Option(help="Cost model for latency budgets: cpu or a file.")] = None,
    refit_samples: Annotated[
        int, typer.Option(help="Calibration sequences to refit on; 0 leaves every plan as it is cut.", min=0)
    ] = prune.REFIT_SAMPLES,
    num_sequences: Annotated[int, typer.Option(help="Held-out sequences, sentences or images.", min=1)] = 32,
    held_out_data: o.HeldOut = None,
    time_tokens: Annotated[int, typer.Option(help="Tokens of the forward that is timed.", min=1)] = 1024,
    rounds: Annotated[int, typer.Option(help="Rounds of timing; 0 takes no times.", min=0)] = 7,
    device: o.Device = "cpu",
    time_device: Annotated[str | None, typer.Option(help="Where the forward is timed; --device by default.")] = None,
    dtype: o.Dtype = "float32",
    seed: o.Seed = 0,
    json: o.Json = False,
) -> None:
    """Measure plans that remove beside baselines at the same budget. A joint profile also compares attention and removals alone."""
    from sparsesearch.bench.cuts import CutBench, measure_cuts, record_of
    from sparsesearch.profiling.record import Profile
    from sparsesearch.pruning.data import load_batches
    from sparsesearch.pruning.models import load_prunable
    from sparsesearch.pruning.record import PruningProfile

    opened, timed_on = PruningProfile.load(profile), o.present_device(time_device or device)
    if not prune.only_cuts(profile):
        o.refuse_given(context, f"is for profiles of removals alone, and {profile} covers attention too", "plans")
    attention = None if prune.only_cuts(profile) else Profile.load(profile)
    names = None if plans is None else [name.strip() for name in plans.split(";")]
    priced = None if cost_model is None else _priced(opened, cost_model, time_tokens)
    wanted = _wanted(opened, attention, budget, names, priced, refit_samples, time_tokens)
    live, tokenizer = load_prunable(
        model or opened.manifest.base_model.name_or_path, device=o.present_device(device), dtype=dtype
    )
    where = opened.manifest.calibration
    window = where["length_tokens"] if attention is None else time_tokens  # rules of attention show at their own length
    judged_on = held_out_data or where["data"]
    held_out = load_batches(
        live, tokenizer, judged_on, length_tokens=window, num_samples=num_sequences, seed=seed, split="heldout"
    )
    bench = CutBench(
        held_out=held_out,
        refit=prune.refit_batches({str(key): plan for key, plan in wanted.items()}, live, tokenizer),
        timed=_timed_batch(live, held_out, time_tokens, seed),
        timed_tokens=time_tokens,
        rounds=rounds,
        timed_on=timed_on,
    )
    with progress_bar() as progress:
        rows = measure_cuts(live, opened, wanted, bench, progress=progress)
    record = record_of(
        live, opened, rows, judged_on=device, timed_on=timed_on if rounds else None, command=o.command_line(), seed=seed, num_sequences=num_sequences, refit_samples=refit_samples,
        time_tokens=time_tokens, held_out=judged_on,
    )  # fmt: skip
    _finish(record, out, json)


def _finish(record: dict[str, Any], out: Path, json: bool) -> None:
    from sparsesearch.artifacts import write_bytes

    from .bench import as_bytes

    write_bytes(out, as_bytes(record))
    if json:
        emit_json(record)
        return
    _show(record)
    lines(f"written: {out}")


def _wanted(
    profile: "PruningProfile",
    attention: "Profile | None",
    budgets: list[str],
    names: list[str] | None,
    cost_model: "CostModel | None",
    refit_samples: int,
    time_tokens: int,
) -> "dict[tuple[str, str], Plan]":
    """(plan, budget) -> the plans to measure."""
    from sparsesearch.bench.cuts import joint_plans, rival_plans
    from sparsesearch.pruning.search import PruningQuestion
    from sparsesearch.search.budget import parse_budgets

    lengths = (time_tokens,) if attention is None else attention.manifest.lengths
    compensation = prune.refit_spec(profile, refit_samples)
    found: dict[tuple[str, str], Plan] = {}
    for text in budgets:
        with usage("--budget"):
            question = PruningQuestion(parse_budgets(text), lengths, cost_model=cost_model, compensation=compensation)
        if attention is None:
            made = rival_plans(profile, question, names=names)
        else:
            made = joint_plans(profile, attention, question)
        found |= {(name, text): plan for name, plan in made.items()}
    return found


def _priced(profile: "PruningProfile", cost_model: str, tokens: int) -> "CostModel":
    """A cost model for whole layers; a CPU's linear layers are timed here."""
    from sparsesearch.bench.priced_here import PricedHere
    from sparsesearch.cost import load_cost_model
    from sparsesearch.cost.layer_costs import LayerCosts

    found = load_cost_model(cost_model)
    shape = next((layer for layer in profile.manifest.layers if layer.num_heads), None)
    if shape is None or isinstance(found, LayerCosts):
        return found
    return PricedHere(found, num_heads=shape.num_heads, head_dim=shape.head_dim, tokens=tokens)


def _show(record: dict[str, Any]) -> None:
    """Plans and baselines, and the kinds at equal times."""
    where, unit = record["provenance"], record["distance"]
    columns = {
        "plan": "plan", "budget": "budget", "params": "params", "flops": "FLOPs", "distance": unit, "loss_gap": "loss over dense",
        "forward_s": "forward s", "speed_up": "speed-up",
    }  # fmt: skip
    title = f"{record['model']}: held-out {unit}, {where['num_sequences']} sequences; forward of {where['time_tokens']} tokens"
    table(title, list(columns.values()), [[row[name] for name in columns] for row in record["rows"]])
    equal = record["at_equal_time"]
    if equal:
        table(
            f"held-out {unit} at the joint plan's measured time", list(equal[0]), [list(row.values()) for row in equal]
        )


def _timed_batch(model: Any, held_out: "Sequence[Batch]", tokens: int, seed: int) -> "Batch":
    """Random tokens of the asked length for what reads tokens; the first held-out images otherwise."""
    import torch

    if model.main_input_name == "pixel_values":
        return held_out[0]
    generator = torch.Generator().manual_seed(seed)
    return {"input_ids": torch.randint(model.config.vocab_size, (1, tokens), generator=generator)}


def register(bench: typer.Typer) -> None:
    """Add this file's commands."""
    bench.command("cuts")(guarded(cuts))
