"""`sparsesearch heal`: the training that heals a pruned checkpoint."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from . import options as o
from .errors import guarded, usage
from .render import emit_json, lines, progress_bar, say, table


def heal(
    checkpoint: Annotated[
        Path, typer.Argument(help="Pruned checkpoint, written by `sparsesearch apply`.", metavar="DIR")
    ],
    teacher: Annotated[str, typer.Option(help="The dense model.")],
    out: o.CheckpointOut,
    steps: Annotated[int, typer.Option(help="Optimiser steps.", min=1)] = 200,
    data: o.Data = "text",
    length: Annotated[int, typer.Option(help="Tokens per sequence.", min=2)] = 512,
    batch: Annotated[int, typer.Option(help="Sequences per step.", min=1)] = 4,
    optimiser: Annotated[
        Literal["muon", "adamw"], typer.Option(help="muon orthogonalises the updates of matrices; vectors take AdamW.")
    ] = "muon",
    learning_rate: Annotated[
        float | None, typer.Option(help="Peak of the cosine schedule; the optimiser's own by default.")
    ] = None,
    generated: Annotated[
        int, typer.Option(help="Sequences the dense model writes itself, to be trained on too.", min=0)
    ] = 256,
    num_sequences: Annotated[int, typer.Option(help="Held-out sequences to print the gain on.", min=1)] = 16,
    held_out_data: o.HeldOut = None,
    save_every: Annotated[
        int,
        typer.Option(
            help="Steps between states, which --resume continues from and the best of which is written.", min=1
        ),
    ] = 50,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted run.")] = False,
    device: o.Device = "cpu",
    seed: o.Seed = 0,
    json: o.Json = False,
) -> None:
    """Distil the dense model into a pruned checkpoint. The state nearest to it on validation data is written, and its gain on held-out data printed."""
    from dataclasses import asdict

    from sparsesearch.profiling.record import device_name, provenance_versions
    from sparsesearch.pruning.heal import heal_checkpoint
    from sparsesearch.pruning.heal_data import HealRequest

    with usage("--learning-rate"):
        request = HealRequest(
            steps=steps, data=data, length_tokens=length, batch=batch, optimiser=optimiser, learning_rate=learning_rate,
            generated=generated, num_sequences=num_sequences, save_every=save_every, seed=seed, held_out=held_out_data,
        )  # fmt: skip
    with progress_bar() as progress:
        found = heal_checkpoint(
            checkpoint, teacher, out, request, device=o.present_device(device), resume=resume, progress=progress
        )
    if not found.improved:
        say(
            f"[yellow]warning[/]: {out} is further from its teacher on held-out data than {checkpoint} is ({found.distance_after:.4g} against "
            f"{found.distance_before:.4g}), though validation data said otherwise; keep {checkpoint}, or heal with more --data or a lower --learning-rate."
        )
    if json:
        origin = {"command": o.command_line(), "device": device_name(device), "versions": provenance_versions()}
        emit_json({**asdict(found), "provenance": {**origin, "request": asdict(request)}})
        return
    columns = ["held-out", "dense", "pruned", "healed", "recovered"]
    rows = [
        ["distance", 0.0, found.distance_before, found.distance_after, 1 - found.distance_after / found.distance_before]
    ]
    if found.loss_dense is not None:
        rows.append(["loss, nats per token", found.loss_dense, found.loss_before, found.loss_after, found.recovered])
    table(f"step {found.best_step} of {steps}, {num_sequences} held-out sequences", columns, rows)
    lines(f"written: {out}")


def register(app: typer.Typer) -> None:
    """Add this file's commands."""
    app.command("heal")(guarded(heal))
