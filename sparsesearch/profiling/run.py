"""The profiling run: calibrate templates, score every layer of every sample, merge."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import save
from torch import Tensor
from transformers import PreTrainedModel

from sparsesearch.artifacts import sha256_file, write_bytes
from sparsesearch.block_mask import BlockGrid
from sparsesearch.calibration import Calibration, check_context
from sparsesearch.errors import SpecError
from sparsesearch.plan import BaseModelInfo
from sparsesearch.profiling.activations import InMemory, Key
from sparsesearch.profiling.capture import AttentionCall, forward_calls, recorded
from sparsesearch.profiling.layer_inputs import Calibrated, head_tiles, layer_inputs, repeated, swept_input
from sparsesearch.profiling.layer_scores import LayerInput
from sparsesearch.profiling.layer_stack import LayerStack
from sparsesearch.profiling.record import Manifest, Profile, provenance_versions
from sparsesearch.profiling.shards import ShardStore
from sparsesearch.profiling.sweeps import Sweeps
from sparsesearch.profiling.templates import FittedTemplates
from sparsesearch.profiling.tile_scores import score_layer, tile_mass
from sparsesearch.profiling.world import World
from sparsesearch.rules import Rule
from sparsesearch.search_space import SearchSpace

Progress = Callable[[str, int, int], None]
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

    @property
    def num_samples(self) -> int:
        """Sequences per length.

        Raises:
            SpecError: the lengths have different numbers of them.
        """
        counts = {len(calibration.samples) for calibration in self.calibrations.values()}
        if len(counts) != 1:
            raise SpecError(f"every length must have the same number of samples, but got {sorted(counts)}.")
        return min(counts)

    @property
    def templates(self) -> list[Rule]:
        """Candidates that profiling turns into one rule per head."""
        return [rule for rule in self.space.candidates if rule.needs_calibration]

    def seed_of(self, length: int, index: int) -> int:
        """Of one sequence's probes."""
        return self.seed + 1000 * length + index

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
    model: PreTrainedModel,
    request: Request,
    out: Path,
    *,
    resume: bool = False,
    progress: Progress = silent,
    world: World | None = None,
) -> Profile:
    """Profile a model into a directory.

    Where the model's layers are a plain chain, no more than one layer's graph is held at a time (`sweeps`); otherwise the whole model's.

    Args:
        model: in evaluation mode, on the device to compute on (or dispatched by accelerate), running dense attention.
        request: model, candidates, calibration.
        out: the profile directory; shards are kept there until the end, so `resume` continues an interrupted run.
        resume: continue instead of refusing a directory that holds a profile.
        progress: called with (stage, done, total).
        world: processes that share the sequences between them, each with its own copy of the model and all with `out` on one file system.

    Raises:
        ArtifactError: `out` is taken, or was begun with another request.
        SpecError: calibrations of different sample counts, or longer than the model's context.
    """
    world = world or World()
    num_samples = request.num_samples
    check_context(model.config, request.lengths)
    store = world.first(lambda first: ShardStore.open(out, request.fingerprint(model), resume=resume or not first))
    if (out / "profile.json").exists():
        return Profile.load(out)
    with store.in_work(), frozen(model):
        stack = LayerStack.of(model, request.base_model.modules)
        fitted = _calibrate(model, stack, request, progress, world)
        todo = world.share([(length, index) for length in request.lengths for index in range(num_samples)])
        for done, (length, index) in enumerate(todo):
            progress("score", done, len(todo))
            _score_sample(model, stack, request, fitted.for_scoring(index), store, length, index)
        progress("score", len(todo), len(todo))
    dtype = str(model.dtype).removeprefix("torch.")
    world.wait()
    return world.first(lambda first: merge(request, fitted.rules, store, dtype) if first else Profile.load(out))


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


def grid_of(request: Request, length: int) -> BlockGrid:
    """Whole sequences against themselves."""
    return BlockGrid(length, length, request.space.block_tokens)


def _calibrate(
    model: PreTrainedModel, stack: LayerStack | None, request: Request, progress: Progress, world: World
) -> FittedTemplates:
    """Turn the space's templates into one rule per head, from the mean attention mass at the longest length."""
    if not request.templates:
        return FittedTemplates({})
    length = request.lengths[-1]
    samples = request.calibrations[length].samples
    grid = grid_of(request, length)
    masses: dict[int, list[Tensor]] = {}
    for index in world.share(range(len(samples))):
        progress("calibrate templates", index, len(samples))
        masses[index] = [mass_of(call, grid) for call in _calls(model, stack, samples[index].input_ids)]
    shapes = [(heads, grid.num_k_blocks, grid.num_k_blocks) for heads in request.base_model.num_heads]
    return fitted_templates(request, world.gathered(masses, len(samples), shapes))


def _calls(model: PreTrainedModel, stack: LayerStack | None, input_ids: Tensor) -> Iterator[AttentionCall]:
    """Every layer's attention call of one forward; one at a time where layers can run one at a time."""
    if stack is None:
        yield from forward_calls(model, input_ids)
        return
    with recorded(model) as calls, torch.no_grad():
        entry = stack.enter(input_ids)
        hidden = entry.hidden
        for layer in range(len(stack.layers)):
            hidden = stack.run(layer, hidden, entry)
            yield calls.pop()


def mass_of(call: AttentionCall, grid: BlockGrid) -> Float[Tensor, "H N N"]:
    """Attention mass per tile of one call, on the CPU."""
    return tile_mass(repeated(call), grid, call.sliding_window).cpu()


def fitted_templates(request: Request, masses: Iterable[Sequence[Float[Tensor, "H N N"]]]) -> FittedTemplates:
    """The request's templates, from every sequence's masses in the order of the sequences."""
    return FittedTemplates.fit(request.templates, request.base_model.modules, masses)


def _score_sample(
    model: PreTrainedModel,
    stack: LayerStack | None,
    request: Request,
    calibrated: Calibrated,
    store: ShardStore,
    length: int,
    index: int,
) -> None:
    """Write the shards of one sample that are not there yet."""
    layers = store.missing(length, index, len(request.base_model.modules))
    if not layers:
        return
    sample, key = request.calibrations[length].samples[index], (length, index)
    if stack is not None:

        def score(layer: int, key: Key, call: AttentionCall, gradients: Float[Tensor, "K S H D"]) -> None:
            if layer in layers:
                write_scores(request, calibrated, store, layer, key, swept_input(call, gradients, sample))

        sweeps = Sweeps(stack, {key: sample}, InMemory(), request.num_probes, {key: request.seed_of(*key)})
        sweeps.forward()
        sweeps.backward(score)
        return
    inputs = layer_inputs(model, sample, num_probes=request.num_probes, seed=request.seed_of(*key))
    for layer in layers:
        write_scores(request, calibrated, store, layer, key, inputs[layer])


def write_scores(
    request: Request, calibrated: Calibrated, store: ShardStore, layer: int, key: Key, inputs: LayerInput
) -> None:
    """Score all candidates in one layer of one sequence, and keep the shard."""
    grid = grid_of(request, key[0])
    tiles = head_tiles(request.space.candidates, calibrated, request.base_model.modules[layer], inputs, grid)
    store.write(*key, layer, vars(score_layer(request.space.candidates, tiles, inputs, grid)))


def merge(request: Request, calibrated: Calibrated, store: ShardStore, dtype: str) -> Profile:
    """Gather the shards into one file per length, write the manifest, remove the shards."""
    num_samples = request.num_samples
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
        dtype=dtype,
        versions=provenance_versions(),
        files=files,
    )
    profile = Profile(store.folder, manifest)
    profile.save_manifest()
    store.clear()
    return profile
