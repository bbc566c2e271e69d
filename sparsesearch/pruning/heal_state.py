"""The optimiser of healing, and its unfinished state on disk."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsesearch.artifacts import read_json, write_bytes, write_json
from sparsesearch.errors import ArtifactError
from sparsesearch.testbed.muon import Muon

_FORMAT, _VERSION = "sparsesearch.heal-state", "2.0"
_MOMENTS = ("exp_avg", "exp_avg_sq")
VECTOR_RATE = 1e-3
"""Peak rate of norms and biases under Muon, which AdamW trains."""


class HealOptimiser:
    """AdamW, or Muon for the matrices and AdamW for vectors; no weight decay.

    Args:
        trained: parameter name -> parameter.
        kind: `muon` or `adamw`.
        learning_rate: peak, of the matrices under Muon, of everything under AdamW.
    """

    def __init__(self, trained: dict[str, nn.Parameter], kind: str, learning_rate: float) -> None:
        self.trained, self.learning_rate = trained, learning_rate
        matrices = {name: p for name, p in trained.items() if kind == "muon" and p.ndim == 2}
        self.muon = Muon(matrices.values()) if matrices else None
        self._vectors = {name: p for name, p in trained.items() if name not in matrices}
        self._vector_rate = VECTOR_RATE if kind == "muon" else learning_rate
        self._adam = torch.optim.AdamW(self._vectors.values(), lr=self._vector_rate, weight_decay=0.0)

    def step(self, share: float) -> None:
        """Clip, step at a share of the peak rates, and drop the gradients."""
        torch.nn.utils.clip_grad_norm_(list(self.trained.values()), 1.0)
        for group in self._adam.param_groups:
            group["lr"] = self._vector_rate * share
        self._adam.step()
        if self.muon is not None:
            self.muon.step(self.learning_rate * share)
        self._adam.zero_grad()

    def tensors(self) -> dict[str, Tensor]:
        """Weights and moments by name."""
        found = {f"model.{name}": parameter.detach() for name, parameter in self.trained.items()}
        names = {id(parameter): name for name, parameter in self.trained.items()}
        for name, parameter in self._vectors.items():
            # what the output does not depend on (an encoder's pooler) gets no gradient, hence no moments
            moments = self._adam.state.get(parameter, {})
            found |= {f"{key}.{name}": moments[key] for key in _MOMENTS if key in moments}
        for parameter, average in () if self.muon is None else self.muon.averages():
            found[f"momentum.{names[id(parameter)]}"] = average
        return {name: tensor.cpu().contiguous() for name, tensor in found.items()}

    def restore(self, tensors: dict[str, Tensor], step: int) -> None:
        """Take up what `tensors` gave after a step."""
        names = {id(parameter): name for name, parameter in self.trained.items()}
        for name, parameter in self.trained.items():
            parameter.data.copy_(tensors[f"model.{name}"])
        for name, parameter in self._vectors.items():
            if f"{_MOMENTS[0]}.{name}" not in tensors:
                continue
            moments: dict[str, Tensor] = {key: tensors[f"{key}.{name}"].to(parameter.device) for key in _MOMENTS}
            self._adam.state[parameter] = {"step": torch.tensor(float(step)), **moments}
        for parameter, average in () if self.muon is None else self.muon.averages():
            average.copy_(tensors[f"momentum.{names[id(parameter)]}"])


@dataclass
class Best:
    """The state nearest to the teacher so far, on data that are neither trained on nor reported on; step 0 is the checkpoint itself.

    Attributes:
        distances: step -> mean distance of that step's state.
        step: of the nearest; the earliest of several.
        weights: its trained parameters by name, on the CPU.
    """

    distances: dict[int, float] = field(default_factory=dict)
    step: int = 0
    weights: dict[str, Tensor] = field(default_factory=dict)

    def see(self, step: int, distance: float, trained: dict[str, nn.Parameter]) -> None:
        """Note a state, and keep it if it is the nearest; one that is no number is not."""
        self.distances[step] = distance
        if not self.weights or distance < self.distances[self.step]:
            self.step = step
            self.weights = {name: parameter.detach().to("cpu", copy=True) for name, parameter in trained.items()}

    def take(self, trained: dict[str, nn.Parameter]) -> None:
        """Put the nearest state into the parameters."""
        for name, parameter in trained.items():
            parameter.data.copy_(self.weights[name])


def trained_parameters(student: PreTrainedModel) -> dict[str, nn.Parameter]:
    """Everything but the embeddings, which no cut touched; only these need gradients from now on."""
    embeddings = {
        id(parameter)
        for module in (student.get_input_embeddings(), student.get_output_embeddings())
        if module is not None
        for parameter in module.parameters()
    }
    for parameter in student.parameters():
        parameter.requires_grad_(id(parameter) not in embeddings)
    return {name: parameter for name, parameter in student.named_parameters() if parameter.requires_grad}


@dataclass(frozen=True)
class HealState:
    """Weights, optimiser moments and step of an unfinished run, below a folder.

    Attributes:
        folder: where.
        request: the run's request, a dataclass; another one cannot continue it.
    """

    folder: Path
    request: Any

    @classmethod
    def open(cls, folder: Path, request: Any, *, resume: bool) -> "HealState":
        """A state that may be begun or continued.

        Raises:
            ArtifactError: one is there and `resume` is off, or it belongs to another request.
        """
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

    def save(self, optimiser: HealOptimiser, best: Best, step: int) -> None:
        """Write the state after a step; the one before goes when the new one is whole."""
        kept = {f"state-{step}.safetensors", f"best-{best.step}.safetensors"}
        write_bytes(self.folder / f"state-{step}.safetensors", save(optimiser.tensors()))
        if not (self.folder / f"best-{best.step}.safetensors").exists():
            write_bytes(self.folder / f"best-{best.step}.safetensors", save(best.weights))
        content = {"request": asdict(self.request), "step": step, "best": best.step}
        content["distances"] = {str(seen): distance for seen, distance in best.distances.items()}
        write_json(self.folder / "state.json", content, format=_FORMAT, schema_version=_VERSION)
        for old in self.folder.glob("*.safetensors"):
            if old.name not in kept:
                old.unlink()

    def restore(self, optimiser: HealOptimiser) -> tuple[int, Best]:
        """Steps done so far, and the best state that was seen."""
        if not (self.folder / "state.json").exists():
            return 0, Best()
        content = read_json(self.folder / "state.json", format=_FORMAT, schema_version=_VERSION)
        optimiser.restore(load_file(self.folder / f"state-{content['step']}.safetensors"), content["step"])
        distances = {int(seen): distance for seen, distance in content["distances"].items()}
        return content["step"], Best(
            distances, content["best"], load_file(self.folder / f"best-{content['best']}.safetensors")
        )
