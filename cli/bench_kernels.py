"""`sparsesearch bench attention` and `bench decode`: the kernels alone."""

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from . import options as o
from .errors import guarded
from .render import emit_json, say, table


def attention(
    out: Annotated[
        Path, typer.Option("-o", "--out", help="JSON file to write; the plot goes beside it as .svg.")
    ] = Path("bench-attention.json"),
    lengths: o.Lengths = "4096,8192,32768,131072",
    head_dims: Annotated[str, typer.Option(help="Head widths, with commas.")] = "128,64",
    no_flex: Annotated[
        bool, typer.Option("--no-flex", help="Leave FlexAttention out (it compiles for minutes).")
    ] = False,
    causal_only: Annotated[bool, typer.Option("--causal-only", help="Leave the full mask out.")] = False,
    device: o.Device = "cuda",
    json: o.Json = False,
) -> None:
    """Time prefill attention of dense, mixed, sparse and streaming plans against cuDNN, FlashAttention-2 and FlexAttention."""
    from sparsesearch.bench.kernel_report import attention_figure, attention_tables

    _needs_cuda(device)
    from sparsesearch.bench.attention import run

    record = run(
        lengths=o.parsed_lengths(lengths),
        head_dims=[int(size) for size in o.parsed_lengths(head_dims)],
        flex_lengths=() if no_flex else (8192, 32768),
        causal=(True,) if causal_only else (True, False),
        command=[o.command_line()],
        progress=partial(_keep, out),
    )
    figure = attention_figure([record], device=record["provenance"]["device"])
    _finish(record, attention_tables(record["rows"]), out, figure, json=json)


def decode(
    out: o.JsonOut = Path("bench-decode.json"),
    device: o.Device = "cuda",
    json: o.Json = False,
) -> None:
    """Time decoding over uniform and ragged caches of equal bytes, beside the copy bandwidth of the same run."""
    from sparsesearch.bench.kernel_report import decode_tables

    _needs_cuda(device)
    from sparsesearch.bench.decode import run

    record = run(command=[o.command_line()], progress=partial(_keep, out))
    _finish(record, decode_tables(record["rows"]), out, None, json=json)


def _needs_cuda(device: str) -> None:
    if not o.present_device(device).startswith("cuda"):
        raise typer.BadParameter(f"must be a CUDA device, but got {device!r}.", param_hint="--device")


def _keep(out: Path, record: dict[str, Any]) -> None:
    """What is measured is not lost if the rest fails."""
    from sparsesearch.artifacts import write_bytes

    from .bench import as_bytes

    write_bytes(out, as_bytes(record))
    say(_line(record["rows"][-1]))


def _line(row: dict[str, Any]) -> str:
    place = " ".join(
        str(row[key]) for key in ("head_dim", "batch", "length", "kernel", "plan", "lengths") if key in row
    )
    return f"{place}: {row['seconds'] * 1e6:.1f} us" if "seconds" in row else f"{place}: {row['error']}"


def _finish(
    record: dict[str, Any],
    tables: list[tuple[str, list[str], list[list[object]]]],
    out: Path,
    figure: str | None,
    *,
    json: bool,
) -> None:
    """Write the record, draw it, print it."""
    from sparsesearch.artifacts import write_bytes

    from .bench import as_bytes

    write_bytes(out, as_bytes(record))
    if figure is not None:
        write_bytes(out.with_suffix(".svg"), figure.encode())
    if json:
        emit_json(record)
        return
    for title, columns, body in tables:
        table(title, columns, body)
    say(f"written: {out}" + (f" and {out.with_suffix('.svg')}" if figure is not None else ""))


def register(bench: typer.Typer) -> None:
    """Add this file's commands to the group."""
    bench.command("attention")(guarded(attention))
    bench.command("decode")(guarded(decode))
