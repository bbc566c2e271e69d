"""Watching the attention of a sampled run: what is measured at the captured steps is summed and kept in one shard per step."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from sparsesearch.artifacts import write_bytes
from sparsesearch.errors import SpecError
from sparsesearch.layout import Layout
from sparsesearch.plan import Plan
from sparsesearch.profiling.denoising.request import StepsRequest
from sparsesearch.runtime.denoisers import apply_denoiser
from sparsesearch.runtime.diffusion.attention import LayerCall

Sampler = Callable[[], Tensor]
"""Samples from the calibration inputs through the model under study and returns the final latents, one row per sequence."""
Progress = Callable[[str, int, int], None]


def silent(stage: str, done: int, total: int) -> None:
    """The default progress callback."""


@dataclass
class Observer:
    """One sampled run after another under one plan.

    Attributes:
        model: in evaluation mode.
        sampler: samples the calibration inputs through it.
        request: which steps to look at.
        running: the plan that runs meanwhile.
        folder: where shards go.
        progress: called with (stage, done, total).
        scheduler: of the model's pipeline, where that does not tell the step itself.
        layout: tokens of the sequences, once seen.
    """

    model: Any
    sampler: Sampler
    request: StepsRequest
    running: Plan
    folder: Path
    progress: Progress
    scheduler: Any
    layout: Layout | None = None

    def shards(
        self,
        name: str,
        measure: Callable[[LayerCall], dict[str, Tensor]],
        before: Callable[[LayerCall], None] | None = None,
    ) -> dict[int, dict[str, Tensor]]:
        """Sample once and measure every layer at the captured steps that have no shard yet; then the shards of all of them.

        `before` is shown every call, before it is measured.
        """
        steps = [step for captured in self.request.captured for step in captured]
        paths = {step: self.folder / "shards" / name / f"{step:04d}.safetensors" for step in steps}
        missing = {step for step in steps if not paths[step].exists()}
        sums: dict[int, dict[str, Tensor]] = {step: {} for step in missing}
        passes, taken = dict.fromkeys(missing, 0), set[int]()

        def probe(seen: LayerCall) -> None:
            step = self._step_of(seen)
            if step in taken:
                raise SpecError(
                    f"the sampler came to step {step} more than {self.request.passes} times. Prompts one after another and guidance in "
                    "calls of its own count each: set `passes` of the request."
                )
            if before is not None:
                before(seen)
            if step not in missing:
                return
            for key, value in measure(seen).items():
                full = f"{seen.path}/{key}"
                sums[step][full] = value if full not in sums[step] else sums[step][full] + value
            if seen.path == self.request.base_model.modules[-1]:
                passes[step] += 1
                if passes[step] == self.request.passes:
                    self._write(paths[step], sums.pop(step))
                    taken.add(step)
                    self.progress(name, len(steps) - len(missing) + len(taken), len(steps))

        if missing:
            with apply_denoiser(self.model, self.running, scheduler=self.scheduler) as applied:
                applied.probe(probe)
                self.sampler()
            if missing - taken:
                raise SpecError(
                    f"the sampler must come to steps {sorted(missing)} {self.request.passes} times, but did not for {sorted(missing - taken)}."
                )
        if self.layout is None:
            with safe_open(paths[steps[0]], "pt") as shard:
                self.layout = Layout.model_validate_json(shard.metadata()["layout"])
        return {step: load_file(path) for step, path in paths.items()}

    def _step_of(self, seen: LayerCall) -> int:
        """The step of a call, which must be one of the request's run over the same tokens as ever."""
        if seen.call.step is None or seen.call.step[1] != self.request.num_steps:
            raise SpecError(
                f"the sampler must take the {self.request.num_steps} steps of the request and tell them, but the call says {seen.call.step}."
            )
        if self.layout not in (None, seen.call.layout):
            raise SpecError(
                "calibration inputs must have one size, but these differ. Use one height, width and length."
            )
        real_tokens(seen)
        self.layout = seen.call.layout
        return seen.call.step[0]

    def _write(self, path: Path, sums: dict[str, Tensor]) -> None:
        assert self.layout is not None
        means = {key: (value / self.request.passes).cpu().contiguous() for key, value in sums.items()}
        write_bytes(path, save(means, metadata={"layout": self.layout.model_dump_json()}))


def real_tokens(seen: LayerCall) -> int | None:
    """How many tokens stand before the padding of a call; None without padding.

    Raises:
        SpecError: the rows of the batch differ.
    """
    lengths = set(seen.call.key_lengths or ())
    if len(lengths) > 1:
        raise SpecError(
            "prompts of different lengths must be sampled one after another, but share a batch. Use batches of one."
        )
    return lengths.pop() if lengths else None
