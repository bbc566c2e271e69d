"""Profiling a checkpoint that does not fit: one layer on the device, layer inputs and gradients on disk."""

from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from sparsesearch.calibration import check_context
from sparsesearch.profiling.activations import Key, OnDisk
from sparsesearch.profiling.capture import AttentionCall
from sparsesearch.profiling.layer_inputs import swept_input
from sparsesearch.profiling.record import Profile
from sparsesearch.profiling.run import (
    Progress,
    Request,
    fitted_templates,
    frozen,
    grid_of,
    mass_of,
    merge,
    silent,
    write_scores,
)
from sparsesearch.profiling.shards import ShardStore
from sparsesearch.profiling.streamed_model import StreamedModel
from sparsesearch.profiling.sweeps import Sweeps
from sparsesearch.profiling.templates import FittedTemplates


def profile_streamed(
    streamed: StreamedModel, request: Request, out: Path, *, resume: bool = False, progress: Progress = silent
) -> Profile:
    """Profile a streamed model into a directory; the scores are those of `profile_model` on the same model loaded whole.

    Every layer is read twice: once on the way forward, for all sequences, once on the way back. What waits between lies below `out`:
    [S, hidden] per layer and sequence, and the gradients of one layer.

    Args:
        streamed: the checkpoint.
        request: model, candidates, calibration.
        out: the profile directory; `resume` continues after the last finished layer.
        resume: continue instead of refusing a directory that holds a profile.
        progress: called with (stage, layers done, layers).

    Raises:
        ArtifactError: `out` is taken, or was begun with another request.
        SpecError: calibrations of different sample counts, or longer than the model's context.
    """
    check_context(streamed.model.config, request.lengths)
    num_samples, longest = request.num_samples, request.lengths[-1]
    store = ShardStore.open(out, request.fingerprint(streamed.model), resume=resume)
    if (out / "profile.json").exists():
        return Profile.load(out)
    kept = OnDisk(out / "activations")
    keys = [(length, index) for length in request.lengths for index in range(num_samples)]
    samples = {key: request.calibrations[key[0]].samples[key[1]] for key in keys}
    sweeps = Sweeps(
        streamed.stack,
        samples,
        kept,
        request.num_probes,
        {key: request.seed_of(*key) for key in keys},
        streamed.present,
    )
    grid = grid_of(request, longest)
    count = sweeps.num_layers

    def note_mass(layer: int, key: Key, call: AttentionCall) -> None:
        if request.templates and key[0] == longest:
            kept.put("mass", layer, key, mass_of(call, grid))

    with frozen(streamed.model):
        sweeps.forward(note_mass, lambda layer: progress("forward", layer + 1, count))
        measured = [key for key in keys if key[0] == longest] if request.templates else []
        masses = ([kept.get("mass", layer, key, "cpu") for layer in range(count)] for key in measured)
        fitted = fitted_templates(request, masses) if measured else FittedTemplates({})

        def score(layer: int, key: Key, call: AttentionCall, gradients: Float[Tensor, "K S H D"]) -> None:
            inputs = swept_input(call, gradients, samples[key])
            write_scores(request, fitted.for_scoring(key[1]), store, layer, key, inputs)

        sweeps.backward(score, lambda layer: progress("score", count - layer, count))
    dtype = str(streamed.model.dtype).removeprefix("torch.")
    found = merge(request, fitted.rules, store, dtype)
    kept.clear()
    return found
