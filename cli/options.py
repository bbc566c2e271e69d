"""Options that several commands share."""

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from .render import say

if TYPE_CHECKING:
    from sparsesearch.evaluate import SuiteSpec
    from sparsesearch.plan import Plan
    from sparsesearch.profiling.record import Profile

PIPELINES = "For diffusers pipelines"
REMOVALS = "For plans that remove"
TASKS = "Long-context tasks"
"""Headings of options that mean something only there."""

Json = Annotated[bool, typer.Option("--json", help="Print one JSON value on stdout and nothing else there.")]
Seed = Annotated[int, typer.Option(help="Seed of everything that is drawn.", min=0)]
Model = Annotated[
    str,
    typer.Argument(
        help="Hub id, local directory (of diffusers too), a GGUF file, or needle-7m (the embedded model).",
        metavar="MODEL",
    ),
]
PlanFile = Annotated[
    Path, typer.Argument(help="sparse_plan.json, or a checkpoint that carries its plan.", metavar="PLAN")
]
ProfileDir = Annotated[Path, typer.Argument(help="Directory written by `sparsesearch profile`.", metavar="PROFILE")]
OptionalModel = Annotated[
    str | None, typer.Option("--model", help="The model; the one named in the plan or profile by default.")
]
Lengths = Annotated[str, typer.Option(help="Sequence lengths in tokens, separated by commas.")]
Device = Annotated[str, typer.Option(help="Where the model runs: cpu, cuda, cuda:1 …")]
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"],
    typer.Option(help="Of weights and activations; auto is float32 on a CPU, else the checkpoint's own."),
]
Unit = Literal["query_head", "kv_group"]
RunFile = Annotated[
    Path | None,
    typer.Option("--run", help="YAML file with prompts, steps, seed and size to sample.", rich_help_panel=PIPELINES),
]
Data = Annotated[
    str,
    typer.Option(
        help="needle, tasks:NAMES:FORMAT, text, stdlib, a .jsonl/.txt/.parquet file, several joined by +, or a hub dataset name:config:split; several of "
        "these separated by ; take turns."
    ),
]
TextData = Annotated[
    str,
    typer.Option(
        "--data",
        help="Where the text of held-out sequences is from: text, stdlib, a .jsonl/.txt/.parquet file, several joined by +, or a hub dataset "
        "name:config:split.",
    ),
]
HeldOut = Annotated[
    str | None,
    typer.Option(
        "--held-out",
        help="Spec of the data to judge on, of its held-out split; that of the calibration data by default.",
    ),
]
JsonOut = Annotated[Path, typer.Option("-o", "--out", help="JSON file to write.")]
PlanOut = Annotated[Path, typer.Option("-o", "--out", help="Plan file to write.")]
CheckpointOut = Annotated[Path, typer.Option("-o", "--out", help="Checkpoint directory to write.")]
OverwritePlan = Annotated[bool, typer.Option("--overwrite", help="Replace an existing plan file.")]
HeldOutNeedles = Annotated[int, typer.Option(help="Held-out needle sequences per length.", min=1)]
NumNeedles = Annotated[
    int | None,
    typer.Option(
        help="Statements hidden in each needle sequence; 8, or as many as fit into a short one, by default.", min=1
    ),
]
Suite = Annotated[
    str | None,
    typer.Option(
        "--suite",
        help="Also judge these tasks: ruler, retrieval, aggregation, or tasks by name, by commas.",
        rich_help_panel=TASKS,
    ),
]
TaskFormat = Annotated[
    Literal["completion", "sentence", "chat"],
    typer.Option(
        "--format",
        help="How tasks are put: plain completion, a sentence to finish, or the chat template.",
        rich_help_panel=TASKS,
    ),
]
Shots = Annotated[int, typer.Option(help="Worked examples before each task.", min=0, rich_help_panel=TASKS)]
TaskSequences = Annotated[int, typer.Option(help="Sequences per task and length.", min=1, rich_help_panel=TASKS)]
Generate = Annotated[
    bool, typer.Option("--generate", help="Also let the model generate its answers.", rich_help_panel=TASKS)
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
        raise typer.BadParameter(
            f"must be positive token counts separated by commas, such as 1024,2048, but got {text!r}.",
            param_hint="--lengths",
        )
    return lengths


def parsed_shares(text: str, option: str) -> list[float]:
    """`0.2,0.35` as shares in (0, 1]; a usage error otherwise."""
    try:
        shares = [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        shares = []
    if not shares or not all(0 < share <= 1 for share in shares):
        raise typer.BadParameter(
            f"must be shares in (0, 1] separated by commas, such as 0.25,0.5, but got {text!r}.", param_hint=option
        )
    return shares


def parsed_suite(
    text: str | None, task_format: str, shots: int, num_sequences: int, seed: int, *, generate: bool
) -> "SuiteSpec | None":
    """Which tasks to judge; None for none.

    Raises:
        SpecError: an unknown task or suite.
    """
    from sparsesearch.calibration.tasks import task_names
    from sparsesearch.evaluate import SuiteSpec

    if text is None:
        return None
    return SuiteSpec.model_validate(
        {
            "tasks": task_names(text),
            "format": task_format,
            "shots": shots,
            "num_sequences": num_sequences,
            "seed": seed,
            "generate": generate,
        }
    )


def profile_for(plan: "Plan", folder: Path) -> "Profile":
    """The profile in a folder, in which the plan was searched.

    Raises:
        ArtifactError: it is missing or damaged.
        PlanMismatchError: it is of another model, or the plan was searched in another profile.
    """
    from sparsesearch.profiling.record import Profile

    opened = Profile.load(folder)
    opened.require_source_of(plan)
    return opened


def refuse_given(context: typer.Context, why: str, *names: str) -> None:
    """Refuse options that mean nothing for the input at hand: nothing is ignored in silence.

    Args:
        context: the command's, which knows what was given and what is a default.
        why: ends the sentence, such as "is for diffusers pipelines, and p is the profile of none".
        names: parameters of the command.

    Raises:
        BadParameter: one of them was given, on the command line, in the environment or in --config.
    """
    for name in names:
        source = context.get_parameter_source(name)
        if source is not None and source.name != "DEFAULT":
            option = next(parameter.opts[-1] for parameter in context.command.params if parameter.name == name)
            raise typer.BadParameter(f"{why}.", param_hint=option)


def model_for(path: Path, plan: "Plan") -> str:
    """The model that a plan is judged on: the checkpoint that carries it, or else the one it was made for."""
    return str(path) if path.is_dir() else plan.base_model.name_or_path


def variant_names(plans: list[Path]) -> dict[str, Path]:
    """What plans are called when they are compared: `plan` if it is one, else by their files.

    Raises:
        BadParameter: two would have one name, or one that of the model itself.
    """
    names = [path.stem for path in plans] if len(plans) > 1 else ["plan"] * len(plans)
    for name in names:
        if names.count(name) > 1 or name == "dense":
            raise typer.BadParameter(
                f"must have file names of their own, none of them dense, but {name!r} is taken. Rename a file.",
                param_hint="PLAN",
            )
    return dict(zip(names, plans, strict=True))


def command_line() -> str:
    """How this run was started, for the record."""
    return shlex.join(["sparsesearch", *sys.argv[1:]])


def device_name(text: str) -> str:
    """A device that there could be; a usage error otherwise."""
    import torch

    try:
        kind = torch.device(text).type
    except RuntimeError:
        kind = "none"
    if kind not in ("cpu", "cuda"):
        raise typer.BadParameter(f"must be cpu, cuda or cuda:N, but got {text!r}.", param_hint="--device")
    return text


def present_device(text: str) -> str:
    """A device of this machine; a usage error when it is no device, a `SpecError` when this machine lacks it."""
    import torch

    from sparsesearch.errors import SpecError

    device = torch.device(device_name(text))
    found = torch.cuda.device_count() if device.type == "cuda" else 1
    if (device.index or 0) >= found:
        has = f"{found} of them" if found else f"none (torch {torch.__version__})"
        other = "Pass another" if found else "Run this on one that has, or pass cpu where the command takes it"
        raise SpecError(f"--device {text} must be a GPU that torch can use, but this machine has {has}. {other}.")
    if device.type == "cpu" and sys.stderr.isatty() and torch.cuda.is_available():
        say(f"on the CPU; this machine has {torch.cuda.get_device_name()}, which --device cuda takes")
    return text
