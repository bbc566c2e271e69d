"""The command that turns plans of other systems into ours and back."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from . import options as o
from .errors import guarded
from .render import emit_json, lines

Format = Literal["plan", "minference", "moa", "duo_attention", "ucm", "modelopt"]


IMPORTS = "For a plan of another system"
OF_IMPORTS = ("model", "lengths", "block_tokens", "revision", "trust_remote_code")
"""Options that fill in what a foreign file leaves open."""
OF_FORMATS = {"streaming_share": "duo_attention", "target_sparsity": "modelopt"}
"""Options of --from one format only."""


def convert(
    context: typer.Context,
    source: Annotated[Path, typer.Argument(help="File or folder to read.", metavar="SOURCE")],
    out: Annotated[Path, typer.Option("-o", "--out", help="File or folder to write.")],
    from_: Annotated[Format, typer.Option("--from", help="Format of SOURCE.")] = "plan",
    to: Annotated[Format, typer.Option("--to", help="Format to write.")] = "plan",
    model: Annotated[
        str | None,
        typer.Option(help="The model it is for; only its configuration is read.", rich_help_panel=IMPORTS),
    ] = None,
    lengths: Annotated[
        str, typer.Option(help="Prompt lengths the plan is meant for.", rich_help_panel=IMPORTS)
    ] = "8192",
    block_tokens: Annotated[
        int, typer.Option(help="Tile of the plan, in tokens.", min=16, max=256, rich_help_panel=IMPORTS)
    ] = 64,
    streaming_share: Annotated[
        float | None,
        typer.Option(
            help="duo_attention: share of KV heads that stream, instead of its threshold.",
            min=0,
            max=1,
            rich_help_panel=IMPORTS,
        ),
    ] = None,
    target_sparsity: Annotated[
        float | None,
        typer.Option(
            help="modelopt: where to evaluate its threshold law; the file's own by default.",
            min=0,
            max=1,
            rich_help_panel=IMPORTS,
        ),
    ] = None,
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit of a hub model.", rich_help_panel=IMPORTS)
    ] = None,
    trust_remote_code: Annotated[
        bool,
        typer.Option("--trust-remote-code", help="Run code that a hub repository ships.", rich_help_panel=IMPORTS),
    ] = False,
    length: Annotated[
        int | None,
        typer.Option(help="Prompt length at which a + b·N becomes a number, for formats without laws.", min=1),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file or folder.")] = False,
    json: o.Json = False,
) -> None:
    """Convert a plan between our format and those of MInference, MoA, DuoAttention, UCM and NVIDIA Model Optimizer."""
    from sparsesearch.errors import ArtifactError
    from sparsesearch.exchange import Target, read_plan, write_plan

    if from_ == "plan":
        o.refuse_given(context, "is for plans of other systems, named by --from", *OF_IMPORTS)
    for option, own in OF_FORMATS.items():
        if from_ != own:
            o.refuse_given(context, f"is for --from {own}, and not for {from_}", option)
    if to == "plan":
        o.refuse_given(context, "is for formats without laws, and a plan has them", "length")
    if out.exists() and not overwrite:
        raise ArtifactError(f"{out} must not exist yet. Pass --overwrite, or choose another -o.")
    target = None
    if model is not None and from_ != "plan":
        from sparsesearch.runtime.skeleton import describe_config

        target = Target(
            describe_config(model, revision=revision, trust_remote_code=trust_remote_code),
            lengths_tokens=tuple(o.parsed_lengths(lengths)),
            block_tokens=block_tokens,
            streaming_share=streaming_share,
            target_sparsity=target_sparsity,
        )
    plan = read_plan(source, from_, target)
    write_plan(plan, to, out, length_tokens=length)
    content = {"written": str(out), "format": to, "rules": plan.kind_counts(), "sha256": plan.sha256}
    if json:
        emit_json(content)
        return
    kinds = ", ".join(f"{kind} {count}" for kind, count in plan.kind_counts().items())
    lines(f"written: {out} ({to}); query heads: {kinds}")
    if "note" in plan.provenance and from_ != "plan":
        lines(f"{from_} and a plan differ: {plan.provenance['note']}")


def register(app: typer.Typer) -> None:
    """Add this file's commands."""
    app.command("convert")(guarded(convert))
