"""`sparsesearch bench …`: measure kernels and whole models on a device, against the fastest dense alternative in the same run."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import bench_cuts, bench_kernels, bench_video
from . import options as o
from .errors import guarded
from .render import emit_json, say, table

if TYPE_CHECKING:
    from transformers import PreTrainedModel

bench = typer.Typer(
    name="bench",
    help="Measure on a device, against the fastest dense alternative in the same run.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


def model(
    model: Annotated[
        str,
        typer.Argument(
            help="A named shape with random weights (llama3-8b, qwen3-4b, smollm2-135m), or a model.", metavar="MODEL"
        ),
    ],
    out: Annotated[
        Path, typer.Option("-o", "--out", help="JSON file to write; the plot goes beside it as .svg.")
    ] = Path("bench-model.json"),
    plan: Annotated[
        Path | None, typer.Option(help="Plan to run; by default a mixture of --density and --kv-fraction.")
    ] = None,
    density: Annotated[
        float, typer.Option(help="Share of tiles the mixture computes in prefill.", min=0.01, max=1)
    ] = 0.15,
    kv_fraction: Annotated[float, typer.Option(help="Share of the cache the mixture keeps.", min=0.01, max=1)] = 0.25,
    lengths: o.Lengths = "4096,32768,131072",
    decode_tokens: Annotated[
        int, typer.Option(help="Tokens in the cache when decoding; 0 leaves decoding out.", min=0)
    ] = 32768,
    batches: Annotated[str, typer.Option(help="Decoding batches; max is the largest that fits.")] = "1,8,max",
    steps: Annotated[int, typer.Option(help="Decoding steps timed.", min=1)] = 32,
    eager: Annotated[
        bool, typer.Option("--eager", help="Do not compile decoder layers in decoding (of either variant).")
    ] = False,
    cost_model: Annotated[str | None, typer.Option(help="Cost model whose prediction stands beside.")] = None,
    device: o.Device = "cuda",
    json: o.Json = False,
) -> None:
    """Time prefill and decoding of a whole model under a plan. The dense baseline is cuDNN, a static cache and CUDA graphs."""
    from sparsesearch.artifacts import write_bytes
    from sparsesearch.bench.model import Request, run
    from sparsesearch.bench.model_report import figure, rows_of
    from sparsesearch.bench.random_model import mixture_plan
    from sparsesearch.cost import load_cost_model
    from sparsesearch.plan import Plan
    from sparsesearch.runtime.fingerprint import describe

    sizes = [] if lengths.strip() in ("", "0") else o.parsed_lengths(lengths)
    request = Request(sizes, decode_tokens, _batches(batches), steps, compiled=not eager)
    if not o.present_device(device).startswith("cuda"):
        raise typer.BadParameter(f"must be a CUDA device, but got {device!r}.", param_hint="--device")
    live = _live(model, device, max([*sizes, decode_tokens + steps + 8]))
    chosen = Plan.load(plan) if plan else mixture_plan(describe(live, model), density=density, kv_fraction=kv_fraction)
    predictor = None if cost_model is None else load_cost_model(cost_model)

    def keep(record: dict[str, Any]) -> None:  # what is measured is not lost if the rest fails
        write_bytes(out, as_bytes(record))
        say(str(record["rows"][-1]))

    record = run(live, chosen, request, cost_model=predictor, command=[o.command_line()], progress=keep)
    write_bytes(out, as_bytes(record))
    write_bytes(out.with_suffix(".svg"), figure(record).encode())
    if json:
        emit_json(record)
        return
    for title, columns, body in rows_of(record):
        table(title, columns, body)
    say(f"written: {out} and {out.with_suffix('.svg')}")


def _batches(text: str) -> list[int]:
    """`1,8,max` as numbers; 0 stands for max."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part == "max" or (part.isdigit() and int(part) > 0) for part in parts):
        raise typer.BadParameter(f"must be numbers or max, such as 1,8,max, but got {text!r}.", param_hint="--batches")
    return [0 if part == "max" else int(part) for part in parts]


def _live(name: str, device: str, max_tokens: int) -> "PreTrainedModel":
    """A random model of a named shape, or a real one."""
    from sparsesearch.bench.random_model import random_model
    from sparsesearch.model_shapes import MODEL_SHAPES
    from sparsesearch.runtime.loading import load_weights

    if name in MODEL_SHAPES:
        return random_model(MODEL_SHAPES[name], device=device, max_tokens=max_tokens)
    model = load_weights(name, dtype="bfloat16", device=device, with_plan=False)
    model.train(False)
    return model


def as_bytes(record: object) -> bytes:
    """A record as it is written to disk."""
    import json

    return (json.dumps(record, indent=1, sort_keys=True) + "\n").encode()


def register(app: typer.Typer) -> None:
    """Add this file's commands."""
    bench_kernels.register(bench)
    bench_video.register(bench)
    bench.command("model")(guarded(model))
    bench_cuts.register(bench)
    app.add_typer(bench, name="bench")
