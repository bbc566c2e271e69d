"""Options that several commands share."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from sparsesearch.shapes import Granularity

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else there.")]
Seed = Annotated[int, typer.Option(help="Seed of everything that is drawn.")]
Model = Annotated[
    str,
    typer.Argument(help="Hub id, local directory, a GGUF file, or needle-7m (the embedded model).", metavar="MODEL"),
]
PlanFile = Annotated[Path, typer.Argument(help="sparse_plan.json", metavar="PLAN")]
ProfileDir = Annotated[Path, typer.Argument(help="Directory written by `sparsesearch profile`.", metavar="PROFILE")]
OptionalModel = Annotated[
    str | None, typer.Option("--model", help="The model; the one named in the plan or profile by default.")
]
Lengths = Annotated[str, typer.Option(help="Sequence lengths in tokens, separated by commas.")]
Device = Annotated[str, typer.Option(help="Where the model runs: cpu, cuda, cuda:1 …")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16; auto is float32 on a CPU.")]
Data = Annotated[
    str, typer.Option(help="needle, text, a .jsonl/.txt/.parquet file, or a hub dataset name:config:split.")
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.")]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that a hub repository ships.")]


def parsed_lengths(text: str) -> list[int]:
    """`1024,2048` as numbers; a usage error otherwise."""
    try:
        lengths = sorted({int(part) for part in text.split(",") if part.strip()})
    except ValueError:
        lengths = []
    if not lengths or lengths[0] < 1:
        raise typer.BadParameter(f"must be positive token counts separated by commas, but got {text!r}.")
    return lengths


def granularity(text: str) -> "Granularity":
    """`query_head` or `kv_group`; a usage error otherwise."""
    if text == "query_head" or text == "kv_group":
        return text
    raise typer.BadParameter(f"--unit must be query_head or kv_group, but got {text!r}.")
