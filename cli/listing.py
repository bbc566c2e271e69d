"""Commands that list what there is."""

from typing import Annotated

import typer

from . import options as o
from .errors import guarded
from .render import emit_json, entries, lines, pairs


def rules(json: o.Json = False) -> None:
    """List the rules: how a head may attend."""
    from sparsesearch.rules import rule_kinds

    rows = [
        {
            "kind": kind,
            "acts": "prefill" if rule.dynamic and not rule.decodes else "prefill and decode",
            "parameters": ", ".join(name for name in rule.model_fields if name != "kind"),
            "what": (rule.__doc__ or "").split("\n")[0],
            "source": rule.source,
        }
        for kind, rule in rule_kinds().items()
    ]
    if json:
        emit_json(rows)
        return
    entries(
        "rules",
        {
            row["kind"]: [
                row["what"],
                f"parameters: {row['parameters'] or 'none'}; acts in {row['acts']}",
                row["source"],
            ]
            for row in rows
        },
    )


def spaces(json: o.Json = False) -> None:
    """List the shipped search spaces."""
    from sparsesearch.presets import preset_names
    from sparsesearch.search_space import SearchSpace

    loaded = [SearchSpace.load(name) for name in preset_names("search_spaces")]
    rows = [
        {
            "name": s.name,
            "candidates": len(s.candidates),
            "removals": s.pruning is not None,
            "unit": s.unit,
            "what": s.description,
            "source": s.source,
        }
        for s in loaded
    ]
    if json:
        emit_json(rows)
        return
    entries(
        "search spaces",
        {
            s.name: [
                s.description,
                f"{len(s.candidates)} candidates per {s.unit}" + ", and removals" * (s.pruning is not None),
                s.source,
            ]
            for s in loaded
        },
    )


def tasks(json: o.Json = False) -> None:
    """List the long-context tasks that `eval --suite` judges, their suites and formats."""
    from sparsesearch.calibration.tasks import FORMATS, SUITES, TASKS

    described = {task.name: task.description for task in TASKS.values()}
    if json:
        emit_json({"tasks": described, "suites": SUITES, "formats": FORMATS})
        return
    entries("tasks", {name: [what] for name, what in described.items()})
    entries("suites", {name: [", ".join(names)] for name, names in SUITES.items()})
    entries("formats", {name: [what] for name, what in FORMATS.items()})


def models(json: o.Json = False) -> None:
    """List the embedded models and the supported families."""
    from sparsesearch.presets import preset_names
    from sparsesearch.runtime.families import supported_families

    content = {"embedded": preset_names("models"), "families": supported_families()}
    if json:
        emit_json(content)
        return
    lines(
        f"embedded: {', '.join(content['embedded'])}",
        f"causal LM families of this transformers release that route through AttentionInterface ({len(content['families'])}):",
        ", ".join(content["families"]),
        "A family that soft-caps scores or adds attention sinks is refused by name when it is loaded.",
    )


def schema(
    artifact: Annotated[str, typer.Argument(help="plan, metrics or rules")] = "plan",
) -> None:
    """Print the JSON Schema of an artefact."""
    from sparsesearch import plan
    from sparsesearch.artifacts import file_schema
    from sparsesearch.errors import nearest
    from sparsesearch.evaluate import metrics
    from sparsesearch.rules import rule_kinds

    match artifact:
        case "plan":
            emit_json(file_schema(plan.Plan.model_json_schema(), format=plan.FORMAT))
        case "metrics":
            emit_json(file_schema(metrics.Metrics.model_json_schema(), format=metrics.FORMAT))
        case "rules":
            emit_json({kind: rule.model_json_schema() for kind, rule in rule_kinds().items()})
        case _:
            message = f"no artefact {artifact!r}.{nearest(artifact, ['plan', 'metrics', 'rules'])}"
            raise typer.BadParameter(message, param_hint="ARTIFACT")


PACKAGES = {
    **dict.fromkeys(("sparsesearch", "torch", "transformers", "triton", "optuna", "scipy"), ""),
    **dict.fromkeys(("gguf", "accelerate"), "gguf"),
    **dict.fromkeys(("datasets", "pyarrow"), "data"),
    "diffusers": "diffusers",
    "lm-eval": "lm-eval",
    "psycopg": "postgresql",
    "redis": "redis",
}
"""Packages that something here needs -> the extra that brings them."""


def doctor(json: o.Json = False) -> None:
    """Show what this installation can do here."""
    import os
    from importlib.metadata import PackageNotFoundError, version

    import torch

    content: dict[str, object] = {}
    for name, extra in PACKAGES.items():
        try:
            content[name] = version(name)
        except PackageNotFoundError:
            content[name] = f"not installed: pip install 'sparsesearch[{extra}]'" if extra else "not installed"
    content["cpu cores"] = os.cpu_count()
    content["torch threads"] = torch.get_num_threads()
    content["OMP_WAIT_POLICY"] = os.environ.get("OMP_WAIT_POLICY", "not set (set it to passive on shared machines)")
    cuda = torch.cuda.is_available()
    content["gpu"] = torch.cuda.get_device_name() if cuda else "none: profile and search run on the CPU"
    emit_json(content) if json else pairs("doctor", content)


def register(app: typer.Typer) -> None:
    """Add this file's commands."""
    for name, command in (
        ("rules", rules),
        ("spaces", spaces),
        ("tasks", tasks),
        ("models", models),
        ("schema", schema),
        ("doctor", doctor),
    ):
        app.command(name)(guarded(command))
