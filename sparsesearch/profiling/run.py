"""The profiling run: calibrate templates, score every layer of every sample, merge."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from safetensors.torch import save
from torch import Tensor
from transformers import PreTrainedModel

from sparsesearch.artifacts import sha256_file, write_bytes
from sparsesearch.block_mask import BlockGrid
from sparsesearch.calibration import Calibration, Sample, check_context
from sparsesearch.errors import SpecError
from sparsesearch.plan import BaseModelInfo
from sparsesearch.profiling.capture import AttentionCall, forward_calls, logits_and_calls
from sparsesearch.profiling.losses import sample_gradients
from sparsesearch.profiling.projection import projection_gram
from sparsesearch.profiling.record import Manifest, Profile, provenance_versions
from sparsesearch.profiling.shards import ShardStore
from sparsesearch.profiling.tile_scores import LayerInput, choose_tiles, score_layer, tile_mass
from sparsesearch.rules import Rule
from sparsesearch.search_space import SearchSpace

Progress = Callable[[str, int, int], None]
Calibrated = dict[str, dict[str, tuple[Rule, ...]]]
_AVERAGED = ("mass", "influence")


def silent(stage: str, done: int, total: int) -> None:
    """The default progress callback."""


@dataclass(frozen=True)
class Request:
    """What to profile. Two runs of equal requests write equal bytes."""

    base_model: BaseModelInfo
    space: SearchSpace
    calibrations: dict[int, Calibration]
    num_probes: int = 4
    seed: int = 0

    @property
    def lengths(self) -> tuple[int, ...]:
        """Profiled lengths, ascending."""
        return tuple(sorted(self.calibrations))

    def fingerprint(self, model: PreTrainedModel) -> dict[str, Any]:
        """The fields a resumed run must repeat."""
        return {
            "model": self.base_model.model_dump(mode="json", exclude={"name_or_path"}),
            "space": self.space.sha256,
            "calibration": {str(length): c.id for length, c in self.calibrations.items()},
            "num_probes": self.num_probes,
            "seed": self.seed,
            "dtype": str(model.dtype).removeprefix("torch."),
            "versions": provenance_versions(),
        }


def profile_model(
    model: PreTrainedModel, request: Request, out: Path, *, resume: bool = False, progress: Progress = silent
) -> Profile:
    """Profile a model into a directory.

    Args:
        model: in evaluation mode, on the device to compute on, running dense attention.
        request: model, candidates, calibration.
        out: the profile directory; shards are kept there until the end, so `resume` continues an interrupted run.
        resume: continue instead of refusing a directory that holds a profile.
        progress: called with (stage, done, total).

    Raises:
        ArtifactError: `out` is taken, or was begun with another request.
        SpecError: calibrations of different sample counts, or longer than the model's context.
    """
    counts = {len(calibration.samples) for calibration in request.calibrations.values()}
    if len(counts) != 1:
        raise SpecError(f"every length must have the same number of samples, but got {sorted(counts)}.")
    check_context(model.config, request.lengths)
    store = ShardStore.open(out, request.fingerprint(model), resume=resume)
    if (out / "profile.json").exists():
        return Profile.load(out)
    with frozen(model):
        calibrated = _calibrate(model, request, progress)
        todo = [(length, index) for length in request.lengths for index in range(min(counts))]
        for done, (length, index) in enumerate(todo):
            progress("score", done, len(todo))
            _score_sample(model, request, calibrated, store, length, index)
        progress("score", len(todo), len(todo))
    return _merge(model, request, calibrated, store, min(counts))


class frozen:
    """No parameter needs a gradient; the embedding output does, so that attention outputs are part of the graph."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def __enter__(self) -> None:
        self.flags = [(p, p.requires_grad) for p in self.model.parameters()]
        for parameter, _ in self.flags:
            parameter.requires_grad_(False)
        self.hook = self.model.get_input_embeddings().register_forward_hook(
            lambda module, args, output: output.requires_grad_() if torch.is_grad_enabled() else output
        )

    def __exit__(self, *exception: object) -> None:
        self.hook.remove()
        for parameter, flag in self.flags:
            parameter.requires_grad_(flag)


def _grid(request: Request, length: int) -> BlockGrid:
    return BlockGrid(length, length, request.space.block_tokens)


def _calibrate(model: PreTrainedModel, request: Request, progress: Progress) -> Calibrated:
    """Turn the space's templates into one rule per head, from the mean attention mass at the longest length."""
    templates = [rule for rule in request.space.candidates if rule.needs_calibration]
    if not templates:
        return {}
    length = request.lengths[-1]
    samples = request.calibrations[length].samples
    mass: list[Tensor] = []
    for index, sample in enumerate(samples):
        progress("calibrate templates", index, len(samples))
        calls = forward_calls(model, sample.input_ids)
        found = [tile_mass(_repeated(call), _grid(request, length), call.sliding_window).cpu() for call in calls]
        mass = found if not mass else [total + new for total, new in zip(mass, found, strict=True)]
    modules = request.base_model.modules
    return {
        template.label: {
            module: tuple(template.calibrated(head / len(samples)) for head in mass[layer])
            for layer, module in enumerate(modules)
        }
        for template in templates
    }


def _score_sample(
    model: PreTrainedModel, request: Request, calibrated: Calibrated, store: ShardStore, length: int, index: int
) -> None:
    """Write the shards of one sample that are not there yet."""
    layers = store.missing(length, index, len(request.base_model.modules))
    if not layers:
        return
    sample = request.calibrations[length].samples[index]
    inputs = layer_inputs(model, sample, num_probes=request.num_probes, seed=request.seed + 1000 * length + index)
    grid = _grid(request, length)
    for layer in layers:
        module = request.base_model.modules[layer]
        tiles = head_tiles(request.space.candidates, calibrated, module, inputs[layer], grid)
        scores = score_layer(request.space.candidates, tiles, inputs[layer], grid)
        store.write(length, index, layer, asdict(scores))


def layer_inputs(model: PreTrainedModel, sample: Sample, *, num_probes: int, seed: int) -> list[LayerInput]:
    """Run one sequence forward and every loss backward; what scoring needs, per layer."""
    logits, calls = logits_and_calls(model, sample.input_ids)
    generator = torch.Generator(device=logits.device).manual_seed(seed)
    gradients = sample_gradients(
        logits,
        [call.out for call in calls],
        sample.input_ids,
        sample.answer_mask,
        num_probes=num_probes,
        generator=generator,
    )
    generated = sample.answer_mask if sample.answer_mask.any() else None
    return [
        layer_input(
            call,
            [probe[layer] for probe in gradients.fisher],
            gradients.answer[layer],
            gradients.answer_ce[layer],
            generated=generated,
        )
        for layer, call in enumerate(calls)
    ]


def layer_input(
    call: AttentionCall,
    probes: Sequence[Float[Tensor, "S H D"]],
    answer: Float[Tensor, "S H D"],
    answer_ce: Float[Tensor, "S H D"],
    *,
    generated: Bool[Tensor, " S"] | None = None,
) -> LayerInput:
    """A recorded call and its gradients, as scoring wants them."""
    return LayerInput(
        q=call.q,
        k=_repeated(call)[1],
        v=call.v.repeat_interleave(call.q.shape[0] // call.v.shape[0], 0),
        probes=torch.stack([gradient.transpose(0, 1) for gradient in probes]),
        answer=answer.transpose(0, 1),
        answer_ce=answer_ce.transpose(0, 1),
        projection_gram=projection_gram(call.module, call.q.shape[0]),
        sliding_window=call.sliding_window,
        num_kv_heads=call.k.shape[0],
        generated=None if generated is None else generated.to(call.q.device),
    )


def head_tiles(
    candidates: Sequence[Rule], calibrated: Calibrated, module: str, layer: LayerInput, grid: BlockGrid
) -> Tensor:
    """Each candidate's tiles in each head [H C N N], templates replaced by the head's own rule."""
    heads = layer.q.shape[0]
    per_head = {label: rules[module] for label, rules in calibrated.items()}
    plain = [rule for rule in candidates if not rule.needs_calibration]
    chosen = iter(choose_tiles(plain, layer, grid).unbind(1))
    columns = [
        torch.stack([per_head[rule.label][head].select(grid) for head in range(heads)]).to(layer.q.device)
        if rule.needs_calibration
        else next(chosen)
        for rule in candidates
    ]
    return torch.stack(columns, 1)


def _repeated(call: AttentionCall) -> tuple[Float[Tensor, "H S D"], Float[Tensor, "H S D"]]:
    return call.q, call.k.repeat_interleave(call.q.shape[0] // call.k.shape[0], 0)


def _merge(
    model: PreTrainedModel, request: Request, calibrated: Calibrated, store: ShardStore, num_samples: int
) -> Profile:
    """Gather the shards into one file per length, write the manifest, remove the shards."""
    files = {}
    for length in request.lengths:
        merged: dict[str, Tensor] = {}
        for layer in range(len(request.base_model.modules)):
            shards = list(store.samples(length, layer, num_samples))
            for name in shards[0]:
                stacked = torch.stack([shard[name] for shard in shards])
                merged[f"{layer:03d}.{name}"] = stacked.mean(0) if name in _AVERAGED else stacked
        name = f"scores-{length}.safetensors"
        write_bytes(store.folder / name, save(merged))
        files[name] = sha256_file(store.folder / name)
    manifest = Manifest(
        base_model=request.base_model,
        space=request.space.name,
        space_sha256=request.space.sha256,
        block_tokens=request.space.block_tokens,
        candidates=request.space.candidates,
        calibrated=calibrated,
        lengths=request.lengths,
        num_samples=num_samples,
        num_answers={
            str(length): tuple(int(sample.answer_mask.sum()) for sample in calibration.samples)
            for length, calibration in sorted(request.calibrations.items())
        },
        calibration={
            str(length): f"{calibration.description} ({calibration.id[:12]})"
            for length, calibration in sorted(request.calibrations.items())
        },
        num_probes=request.num_probes,
        seed=request.seed,
        dtype=str(model.dtype).removeprefix("torch."),
        versions=provenance_versions(),
        files=files,
    )
    profile = Profile(store.folder, manifest)
    profile.save_manifest()
    store.clear()
    return profile
