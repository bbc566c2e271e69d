"""Commands that put a plan on a checkpoint and verify it."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import options as o
from . import pipelines, prune
from .errors import guarded
from .render import emit_json, lines, pairs

if TYPE_CHECKING:
    from sparsesearch.plan import Plan


FOR_REMOVALS = ("logical", "device")
"""Options of `apply` that mean something only for plans that remove."""


def apply(
    context: typer.Context,
    plan: o.PlanFile,
    model: o.Model,
    out: o.CheckpointOut,
    revision: o.Revision = None,
    trust_remote_code: o.TrustRemoteCode = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing directory.")] = False,
    allow_other_weights: Annotated[
        bool,
        typer.Option(
            "--allow-other-weights", help="Accept weights the plan was not made for, such as a fine-tuned copy."
        ),
    ] = False,
    logical: Annotated[
        bool,
        typer.Option(
            "--logical",
            help="Keep the shapes and write zeros; stock transformers loads it.",
            rich_help_panel=o.REMOVALS,
        ),
    ] = False,
    component: Annotated[
        str | None,
        typer.Option(help="Which transformer; by default the one the plan was made for.", rich_help_panel=o.PIPELINES),
    ] = None,
    device: Annotated[str, typer.Option(help="Where the refit runs.", rich_help_panel=o.REMOVALS)] = "cpu",
    json: o.Json = False,
) -> None:
    """Write a checkpoint that carries and runs a plan. Plain from_pretrained loads it, after `import sparsesearch`."""
    if pipelines.is_pipeline(model):
        o.refuse_given(context, "is not for diffusers pipelines", "revision", "trust_remote_code", *FOR_REMOVALS)
        taken = {"overwrite": overwrite, "allow_other_weights": allow_other_weights, "json": json}
        pipelines.apply(plan, Path(model), out, component=component, **taken)
        return
    from sparsesearch.plan import Plan
    from sparsesearch.runtime.export import PLAN_FILE, export

    opened = Plan.load(plan)
    o.refuse_given(context, f"is for diffusers pipelines, and {model} is none", "component")
    if opened.pruning is not None:
        o.refuse_given(context, "is not for plans that remove", "revision", "trust_remote_code")
        prune.apply_cuts(
            opened, model, out, logical=logical, overwrite=overwrite, allow_other_weights=allow_other_weights, device=device, json=json
        )  # fmt: skip
        return
    o.refuse_given(context, f"is for removals, and {plan} has none", *FOR_REMOVALS)
    export(
        opened,
        model,
        out,
        revision=revision,
        trust_remote_code=trust_remote_code,
        overwrite=overwrite,
        allow_other_weights=allow_other_weights,
    )
    _show(Plan.load(out / PLAN_FILE), out, "AutoModelForCausalLM", json)


def _show(plan: "Plan", out: Path, loader: str, json: bool) -> None:
    """Say what was written; under a step schedule, heads are counted at its first step."""
    counts = plan.at_step(0, chunk=0).kind_counts()
    if json:
        emit_json({"checkpoint": str(out), "plan_sha256": plan.sha256, "rules": counts})
        return
    sparse = sum(counts.values()) - counts.get("dense", 0)
    lines(
        f"written: {out} ({sparse} of {sum(counts.values())} query heads changed)",
        f"load it with: import sparsesearch; {loader}.from_pretrained({str(out)!r})",
    )


def verify(
    checkpoint: Annotated[Path, typer.Argument(help="Directory written by `sparsesearch apply`.", metavar="DIR")],
    json: o.Json = False,
) -> None:
    """Check a patched checkpoint against the oracle. It looks at files, weights, prefill and decoding."""
    from dataclasses import asdict

    from sparsesearch.errors import ArtifactError, UnsupportedModelError
    from sparsesearch.pruning.verify import is_pruned, verify_pruned
    from sparsesearch.runtime.verify import verify as run

    if pipelines.is_pipeline(str(checkpoint)):
        raise UnsupportedModelError(
            f"{checkpoint} must be a language model or an encoder to be verified, but is a diffusers checkpoint. Judge its plans by "
            "`sparsesearch eval --run`."
        )
    found = verify_pruned(checkpoint) if is_pruned(checkpoint) else run(checkpoint)
    verdict = "is sound" if found.ok else "is NOT sound"
    emit_json(asdict(found)) if json else pairs(f"{checkpoint} {verdict}", asdict(found))
    if not found.ok:
        problems = "; ".join(found.problems)
        raise ArtifactError(
            f"{checkpoint} must run its plan, but: {problems}. Make it again with `sparsesearch apply`."
        )


def register(app: typer.Typer) -> None:
    """Add this file's commands."""
    app.command("apply")(guarded(apply))
    app.command("verify")(guarded(verify))
