"""`sparsesearch bench video` and `bench video-quality`: attention at true video shapes, and plans of the embedded model judged by sampling."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from . import options as o
from .errors import guarded
from .render import emit_json, lines, progress_bar, say, table

REDUCED: dict[str, Any] = {
    "frames": 8,
    "side": 16,
    "steps": 6,
    "held_out_clips": 4,
    "other_steps": (4, 9),
    "other_frames": (4,),
}
PLAIN: dict[str, Any] = {"again": False, "slices": 0, "other_steps": (), "other_frames": ()}
"""What --reduced and --plain change of a request."""


def video_quality(
    context: typer.Context,
    mode: Annotated[Literal["t2v", "i2v"], typer.Option(help="Text to video, or image to video.")] = "t2v",
    out: o.JsonOut = Path("bench-video-quality.json"),
    folder: Annotated[Path, typer.Option(help="Folder for profiles and plans; must be new or empty.")] = Path(
        "bench-video-quality"
    ),
    densities: Annotated[str | None, typer.Option(help="Budgets; 0.35,0.5 for t2v and 0.25,0.5 for i2v.")] = None,
    evaluations: Annotated[int, typer.Option(help="Replays per search beyond the fixed weightings.", min=0)] = 8,
    sensitivity: Annotated[
        Literal["layer", "head"], typer.Option(help="What is perturbed alone to learn what its errors matter.")
    ] = "layer",
    menus: Annotated[
        str | None,
        typer.Option(
            help="Menus with commas, of sparse_vdit, svg, video_mixture, video_mixture with rest terms; all by default."
        ),
    ] = None,
    plain: Annotated[
        bool, typer.Option("--plain", help="Leave out profiles under the plan, ranges by DP, other steps and lengths.")
    ] = False,
    calibration_clips: Annotated[int, typer.Option(help="Clips to profile, replay and choose on.", min=1)] = 4,
    held_out_clips: Annotated[int, typer.Option(help="Other clips, to judge on.", min=2)] = 12,
    reduced: Annotated[
        bool,
        typer.Option(
            "--reduced",
            help="For a CPU: clips of 8 frames of 16 x 16 pixels, 6 steps, 4 held-out clips; far from what the model saw.",
        ),
    ] = False,
    device: o.Device = "cuda",
    json: o.Json = False,
) -> None:
    """Judge plans of the embedded video model on held-out clips, beside Sparse-vDiT, SVG and controls."""
    from dataclasses import replace

    from sparsesearch.artifacts import write_bytes
    from sparsesearch.bench.video_quality import run
    from sparsesearch.bench.video_quality_request import DENSITIES, MENUS, QualityRequest
    from sparsesearch.errors import ArtifactError

    from .bench import as_bytes

    if folder.exists() and any(folder.iterdir()):
        raise ArtifactError(f"{folder} must be empty, but holds files. Choose another --folder.")
    budgets = DENSITIES[mode] if densities is None else tuple(o.parsed_shares(densities, "--densities"))
    request = QualityRequest(
        mode,
        budgets,
        folder,
        device=o.present_device(device),
        calibration_clips=calibration_clips,
        held_out_clips=held_out_clips,
        evaluations=evaluations,
        per_head=sensitivity == "head",
        menus=MENUS if menus is None else _menus(menus, MENUS),
    )
    if reduced:
        o.refuse_given(context, "is what --reduced takes care of", "held_out_clips")
    elif device == "cpu":
        say("on a CPU the whole run takes many hours; --reduced shows in minutes that everything runs")
    request = replace(request, **((REDUCED if reduced else {}) | (PLAIN if plain else {})))
    with progress_bar() as progress:
        record = run(
            request,
            command=[o.command_line()],
            progress=progress,
            on_variant=lambda name, found: say(
                f"{mode} {name}: {found.mean('psnr_db'):.2f} dB at density {found.density}"
            ),
        )
    write_bytes(out, as_bytes(record))
    if json:
        emit_json(record)
        return
    show(record)
    say(f"written: {out}; plans and profiles in {folder}")


def _menus(text: str, known: tuple[str, ...]) -> tuple[str, ...]:
    from sparsesearch.errors import nearest

    names = tuple(name.strip() for name in text.split(","))
    for name in names:
        if name not in known:
            raise typer.BadParameter(f"there is no menu {name!r}.{nearest(name, known)}", param_hint="--menus")
    return names


def show(record: dict[str, Any]) -> None:
    """Variants, pairs and bars."""
    bars = {f"{menu} {density}": bar for density, each in record["bars_db"].items() for menu, bar in each.items()}
    rows = []
    for name, found in record["variants"].items():
        values = found["values"]["psnr_db"]
        mean, share = sum(values) / len(values), found["density"]
        clips = " ".join(f"{value:.1f}" for value in values)
        rows.append([name, "by the data" if share is None else share, mean, bars.get(name, ""), clips])
    title = f"{record['model']}, {record['mode']}, {record['steps']} steps, {record['held_out']}, {record['provenance']['device']}"
    table(title, ["variant", "density", "PSNR (dB)", "bar", "clips"], rows)
    pairs = [
        [name, f"{p['mean']:+.2f} ± {p['standard_error']:.2f} ({p['won']})"] for name, p in record["paired_db"].items()
    ]
    table("paired differences (dB)", ["pair", "mean ± SE (clips won)"], pairs)
    for case, found in record["elsewhere"].items():
        table(case, ["variant", "density", "PSNR (dB)", "SSIM"], [[n, *each.values()] for n, each in found.items()])
    lines(*(f"{name}: {message}" for name, message in record["infeasible"].items()))


def video(
    out: o.JsonOut = Path("bench-video.json"),
    measured: Annotated[
        Path | None,
        typer.Option(help="Measure nothing: put the cost model's predictions into this record (no device needed)."),
    ] = None,
    backend: Annotated[Literal["gluon", "triton"], typer.Option(help="Whose kernels.")] = "gluon",
    cost_model: Annotated[
        str | None,
        typer.Option(help="Cost model whose prediction stands beside; the shipped one of the device by default."),
    ] = None,
    device: o.Device = "cuda",
    json: o.Json = False,
) -> None:
    """Time one attention layer of published video models at their true shapes, copies included, beside cuDNN and the prediction."""
    from sparsesearch.artifacts import write_bytes
    from sparsesearch.bench.video_predicted import load_record, with_predictions
    from sparsesearch.cost import load_cost_model
    from sparsesearch.cost.device.model import DeviceCostModel

    from .bench import as_bytes

    if measured is not None:
        costs = load_cost_model(cost_model or "h200")
        if not isinstance(costs, DeviceCostModel):
            raise typer.BadParameter("must be a cost model that was measured on a GPU.", param_hint="--cost-model")
        record = with_predictions(load_record(measured), costs)
    else:
        if not o.present_device(device).startswith("cuda"):
            raise typer.BadParameter(f"must be a CUDA device, but got {device!r}.", param_hint="--device")
        from sparsesearch.bench.video import run

        def keep(record: dict[str, Any]) -> None:  # what is measured is not lost if the rest fails
            write_bytes(out, as_bytes(record))
            say(str(record["rows"][-1]))

        record = run(backend=backend, cost_model=cost_model, command=[o.command_line()], progress=keep)
    write_bytes(out, as_bytes(record))
    if json:
        emit_json(record)
        return
    show_layers(record)
    say(f"written: {out}")


def show_layers(record: dict[str, Any]) -> None:
    """Measured and predicted times per model and mix."""
    rows, errors = [], []
    for row in record["rows"]:
        if "R" not in row:
            continue
        predicted = row.get("predicted_s")
        error = None if predicted is None else predicted / row["seconds"] - 1
        errors += [] if error is None else [abs(error)]
        rows.append(
            [
                row["model"],
                row["mix"],
                row["density"],
                row["dense_s"] * 1e3,
                row["seconds"] * 1e3,
                None if predicted is None else predicted * 1e3,
                None if error is None else f"{error:+.1%}",
                row["R"],
                row["attention_speedup"],
                row["projected_speedup"],
                row["published_speedup"],
            ]
        )
    columns = ["model", "mix", "density", "cuDNN (ms)", "plan (ms)", "predicted (ms)", "error", "R", "attention gain"]
    table(f"one layer, {record['provenance']['device']}", [*columns, "end to end, projected", "published"], rows)
    if errors:
        lines(
            f"prediction ({record['predicted_by']}): mean error {sum(errors) / len(errors):.1%}, largest {max(errors):.1%}"
        )


def register(bench: typer.Typer) -> None:
    """Add this file's commands to the group."""
    bench.command("video")(guarded(video))
    bench.command("video-quality")(guarded(video_quality))
