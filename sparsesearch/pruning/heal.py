"""Healing: a short distillation of the dense model's output into a pruned checkpoint, resumable, with its gain measured."""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor
from transformers import PreTrainedModel

from sparsesearch.artifacts import read_json, write_bytes, write_json
from sparsesearch.errors import ArtifactError, SpecError
from sparsesearch.pruning.data import load_batches
from sparsesearch.pruning.models import load_prunable
from sparsesearch.pruning.quality import Batch, dense_rows, distance, mean_distance, output_rows
from sparsesearch.runtime.export import COMPANIONS, PLAN_FILE, check_target, complete_or_nothing

_FORMAT, _VERSION = "sparsesearch.heal-state", "1.0"
_WARMUP_SHARE = 0.05
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class HealRequest:
    """What to do. Two runs of equal requests on equal checkpoints take the same steps.

    Attributes:
        steps: optimiser steps.
        data: calibration spec.
        length_tokens: of a training sequence.
        batch: sequences per step.
        learning_rate: peak of the cosine schedule, after a warm-up over 5 % of the steps.
        num_sequences: held-out sequences for the gain.
        save_every: steps between states.
        seed: of data and order.
    """

    steps: int
    data: str = "text"
    length_tokens: int = 512
    batch: int = 4
    learning_rate: float = 3e-4
    num_sequences: int = 16
    save_every: int = 50
    seed: int = 0


@dataclass(frozen=True)
class HealReport:
    """Held-out distance from dense (KL in nats per token, or 1 − cosine) and, for language models, loss in nats per token.

    Attributes:
        recovered: share of the loss gap to dense (of the distance, where there is no loss) that healing closed.
    """

    steps: int
    distance_before: float
    distance_after: float
    loss_dense: float | None
    loss_before: float | None
    loss_after: float | None
    recovered: float


def heal_checkpoint(
    checkpoint: Path,
    teacher: str | Path,
    out: Path,
    request: HealRequest,
    *,
    device: str = "cpu",
    resume: bool = False,
    progress: Progress = lambda stage, done, total: None,
) -> HealReport:
    """Distil and write a healed checkpoint.

    Args:
        checkpoint: pruned; left as it is.
        teacher: the dense model.
        out: directory to make; until it is whole its training state lies beside it in `<out>.heal`.
        request: see there.
        device: where to train.
        resume: continue from that state.
        progress: called with (stage, done, total).

    Raises:
        ArtifactError: `out` is taken; a state is there and `resume` is off, or it belongs to another request.
    """
    check_target(out, checkpoint, overwrite=False)
    state = _State.open(out.with_name(f"{out.name}.heal"), request, resume=resume)
    student, tokenizer = load_prunable(checkpoint, device=device, dtype="float32")
    dense, reader = load_prunable(teacher, device=device, dtype="float32")
    held_out = load_batches(
        dense, reader or tokenizer, request.data, length_tokens=request.length_tokens,
        num_samples=request.num_sequences, seed=request.seed, split="heldout",
    )  # fmt: skip
    reference = dense_rows(dense, held_out)
    before = mean_distance(student, held_out, reference), held_out_loss(student, held_out)
    train(student, dense, tokenizer or reader, request, state, progress)
    after = mean_distance(student, held_out, reference), held_out_loss(student, held_out)
    with complete_or_nothing(out, overwrite=False) as staging:
        _write(student, checkpoint, staging)
    shutil.rmtree(state.folder, ignore_errors=True)
    goal = held_out_loss(dense, held_out)
    if goal is None or before[1] is None or after[1] is None:
        share = (before[0] - after[0]) / max(before[0], 1e-12)
    else:
        share = (before[1] - after[1]) / max(before[1] - goal, 1e-12)
    return HealReport(request.steps, before[0], after[0], goal, before[1], after[1], share)


def train(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    tokenizer: Any,
    request: HealRequest,
    state: "_State",
    progress: Progress,
) -> None:
    """Minimise the distance to the teacher over everything but the embeddings."""
    pool = load_batches(
        teacher, tokenizer, request.data, length_tokens=request.length_tokens,
        num_samples=_pool_size(request), seed=request.seed,
    )  # fmt: skip
    embeddings = {id(parameter) for module in (student.get_input_embeddings(), student.get_output_embeddings()) if module is not None for parameter in module.parameters()}  # fmt: skip
    trained = [parameter for parameter in student.parameters() if id(parameter) not in embeddings]
    for parameter in student.parameters():
        parameter.requires_grad_(id(parameter) not in embeddings)
    optimiser = torch.optim.AdamW(trained, lr=request.learning_rate, weight_decay=0.0)
    first = state.restore(student, optimiser)
    for step in range(first, request.steps):
        progress("heal", step, request.steps)
        for group in optimiser.param_groups:
            group["lr"] = request.learning_rate * _schedule(step, request.steps)
        optimiser.zero_grad()
        chosen = [pool[index] for index in _drawn(step, len(pool), request)]
        for batch in chosen:
            with torch.no_grad():
                rows, logits = output_rows(teacher, batch)
            with torch.enable_grad():
                (distance(rows, output_rows(student, batch)[0], logits=logits).mean() / len(chosen)).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        if (step + 1) % request.save_every == 0 and step + 1 < request.steps:
            state.save(student, optimiser, step + 1)
    progress("heal", request.steps, request.steps)


@torch.no_grad()
def held_out_loss(model: PreTrainedModel, batches: list[Batch]) -> float | None:
    """Mean next-token cross-entropy, nats per token; None for models that do not predict tokens."""
    if not model.can_generate():
        return None
    total, count = 0.0, 0
    for batch in batches:
        ids = batch["input_ids"].to(model.device)
        log_p = output_rows(model, batch)[0].unflatten(0, ids.shape)[:, :-1].log_softmax(-1)
        total -= float(log_p.gather(-1, ids[:, 1:, None]).double().sum())
        count += ids[:, 1:].numel()
    return total / count


def _pool_size(request: HealRequest) -> int:
    """Distinct sequences: each is seen about twice at most, up to what a small corpus gives."""
    return min(512, max(request.batch, request.steps * request.batch // 2))


def _drawn(step: int, size: int, request: HealRequest) -> list[int]:
    """The sequences of a step, a function of the step alone, so that a resumed run sees the same."""
    first = step * request.batch
    orders = {epoch: torch.randperm(size, generator=torch.Generator().manual_seed(request.seed + epoch)).tolist()
              for epoch in {first // size, (first + request.batch - 1) // size}}  # fmt: skip
    return [orders[place // size][place % size] for place in range(first, first + request.batch)]


def _schedule(step: int, steps: int) -> float:
    warmup = max(1, int(_WARMUP_SHARE * steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


@dataclass(frozen=True)
class _State:
    """Weights, optimiser moments and step of an unfinished run, below a folder."""

    folder: Path
    request: HealRequest

    @classmethod
    def open(cls, folder: Path, request: HealRequest, *, resume: bool) -> "_State":
        path = folder / "state.json"
        if path.exists() and not resume:
            raise ArtifactError(f"{folder} holds an unfinished healing. Pass --resume, or remove it.")
        if path.exists():
            begun = read_json(path, format=_FORMAT, schema_version=_VERSION)["request"]
            for key, value in asdict(request).items():
                if begun.get(key) != value:
                    raise ArtifactError(
                        f"{folder} was begun with {key}={begun.get(key)}, but got {value}. Repeat the first command."
                    )
        return cls(folder, request)

    def save(self, model: PreTrainedModel, optimiser: torch.optim.Optimizer, step: int) -> None:
        tensors = {
            f"model.{name}": p.detach().cpu().contiguous() for name, p in model.named_parameters() if p.requires_grad
        }
        names = [name for name, p in model.named_parameters() if p.requires_grad]
        for name, moments in zip(names, optimiser.state_dict()["state"].values(), strict=True):
            tensors |= {f"{key}.{name}": moments[key].detach().cpu() for key in ("exp_avg", "exp_avg_sq")}
        write_bytes(self.folder / f"state-{step}.safetensors", save(tensors))
        write_json(
            self.folder / "state.json",
            {"request": asdict(self.request), "step": step},
            format=_FORMAT,
            schema_version=_VERSION,
        )
        for old in self.folder.glob("state-*.safetensors"):
            if old.name != f"state-{step}.safetensors":
                old.unlink()

    def restore(self, model: PreTrainedModel, optimiser: torch.optim.Optimizer) -> int:
        if not (self.folder / "state.json").exists():
            return 0
        step = int(read_json(self.folder / "state.json", format=_FORMAT, schema_version=_VERSION)["step"])
        tensors = load_file(self.folder / f"state-{step}.safetensors")
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            parameter.data.copy_(tensors[f"model.{name}"])
            moments: dict[str, Tensor] = {
                key: tensors[f"{key}.{name}"].to(parameter.device) for key in ("exp_avg", "exp_avg_sq")
            }
            optimiser.state[parameter] = {"step": torch.tensor(float(step)), **moments}
        return step


def _write(student: PreTrainedModel, checkpoint: Path, staging: Path) -> None:
    content = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    name = content.get("dtype") or content.get("torch_dtype") or "float32"
    if not isinstance(getattr(torch, name, None), torch.dtype):
        raise SpecError(f"{checkpoint}/config.json must name a torch dtype, but names {name!r}.")
    student.to(getattr(torch, name)).save_pretrained(staging)
    for pattern in (*COMPANIONS, PLAN_FILE, "README.md"):
        for file in sorted(checkpoint.glob(pattern)):
            if file.is_file() and file.name != "generation_config.json":
                shutil.copy(file, staging / file.name)
    shutil.copy(checkpoint / "config.json", staging / "config.json")
