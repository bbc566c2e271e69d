"""Plans of other systems, read and written: `read_plan` and `write_plan`.

| format | file | what it holds |
|---|---|---|
| minference | JSON, a list over layers of {head: [type, vertical, slash, score]} | one pattern with token counts per query head |
| moa | JSON {"alphas": [[…]], "betas": [[…]]} | a window α + β·N per query head |
| duo_attention | folder with full_attention_heads.tsv and config.json | a gate per KV head: dense or streaming |
| ucm | JSON of unified-cache-management's GSA on device (RALS) | per layer: dense, top-k in decoding, or reuse |
| modelopt | JSON with `sparse_attention_config` (Model Optimizer's checkpoint export) | one skip-softmax threshold law for matched layers |

What a format cannot say is an error that names the head and the reason; nothing is approximated in silence. What differs by design (whole tiles
for single columns) is written into the plan's provenance.
"""

from pathlib import Path
from types import ModuleType

from sparsesearch.errors import SpecError, nearest
from sparsesearch.exchange import duo_attention, minference, moa, modelopt, ucm
from sparsesearch.exchange.target import Target
from sparsesearch.plan import Plan

__all__ = ["FORMATS", "Target", "read_plan", "write_plan"]

FORMATS = ("plan", "minference", "moa", "duo_attention", "ucm", "modelopt")


def read_plan(path: Path, format: str, target: Target | None = None) -> Plan:
    """Read a plan in a format of `FORMATS`.

    Args:
        path: file, or folder where the table above says so.
        format: which one; `plan` is our own.
        target: the model it is for and how to fill in what the file leaves open; needed by every format but `plan`.

    Raises:
        SpecError: no such format, no target, or the file says something that no rule expresses.
        ArtifactError: the file is missing, damaged, or not of that format.
        PlanMismatchError: its layers or heads are not the model's.
    """
    if format == "plan":
        return Plan.load(path)
    module = _module(format)
    if target is None:
        raise SpecError(f"a {format} file does not describe its model; name it with --model.")
    plan: Plan = module.read(path, target)
    return plan


def write_plan(plan: Plan, format: str, path: Path, *, length_tokens: int | None = None) -> None:
    """Write a plan in a format of `FORMATS`.

    Args:
        plan: the plan.
        format: which one.
        path: file or folder to write.
        length_tokens: prompt length at which laws a + b·N become the plain numbers that some formats want.

    Raises:
        SpecError: no such format, or the format cannot say what some head does.
    """
    if format == "plan":
        plan.save(path)
        return
    _module(format).write(plan, path, length_tokens)


def _module(format: str) -> ModuleType:
    match format:
        case "minference":
            return minference
        case "moa":
            return moa
        case "duo_attention":
            return duo_attention
        case "ucm":
            return ucm
        case "modelopt":
            return modelopt
    raise SpecError(f"unknown format {format!r}.{nearest(format, FORMATS)}")
