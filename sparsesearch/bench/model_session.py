"""What the parts of a whole model's benchmark share: the model, its plan, what to measure, and where rows go."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparsesearch.bench.meter import synchronize
from sparsesearch.errors import SpecError
from sparsesearch.plan import Plan
from sparsesearch.runtime.cache_keyword import CACHE_KEYWORD

Row = dict[str, Any]


@dataclass(frozen=True)
class Request:
    """What to measure.

    Attributes:
        lengths: prompt lengths of the prefill, batch 1.
        decode_tokens: tokens per sequence in the cache when decoding is measured; 0 leaves decoding out.
        batches: decoding batches; 0 stands for the largest that fits, of either variant.
        steps: decoding steps timed.
        compiled: compile decoder layers in decoding, of either variant.
        repeats: fewest timed prefills of either variant per length, of which the fastest counts; a cold one comes first.
        graph_tokens: prompts up to this long are timed captured into a CUDA graph too, of either variant; 0 leaves that out.
    """

    lengths: Sequence[int] = (4096, 32768, 131072)
    decode_tokens: int = 32768
    batches: Sequence[int] = (1, 8, 0)
    steps: int = 32
    compiled: bool = True
    repeats: int = 1
    graph_tokens: int = 4096

    def __post_init__(self) -> None:
        if any(length < 1 for length in self.lengths) or self.decode_tokens < 0 or min(self.batches, default=0) < 0:
            raise SpecError(f"lengths >= 1, decode_tokens >= 0 and batches >= 0 must hold, but got {self}.")
        if self.steps < 1 or self.repeats < 1 or self.graph_tokens < 0:
            raise SpecError(f"steps >= 1, repeats >= 1 and graph_tokens >= 0 must hold, but got {self}.")


@dataclass(frozen=True)
class Session:
    """One model and one plan.

    Attributes:
        model: on the device that is measured.
        plan: beside dense.
        request: what to measure.
        record: what is known so far.
        progress: called with the record whenever a row is finished.
        backend: of the plan's attention.
    """

    model: PreTrainedModel
    plan: Plan
    request: Request
    record: dict[str, Any]
    progress: Callable[[dict[str, Any]], None] = lambda record: None
    backend: str = "auto"

    @property
    def device(self) -> torch.device:
        """Of the model."""
        return self.model.device

    @property
    def config(self) -> Any:
        """Of the text model."""
        return self.model.config.get_text_config()

    def add(self, **row: Any) -> None:
        """Put one more row into the record."""
        self.record["rows"].append(row)
        self.progress(self.record)

    def prompt(self, length: int) -> Tensor:
        """Random tokens [1, length]."""
        generator = torch.Generator(self.device).manual_seed(length)
        return torch.randint(self.config.vocab_size, (1, length), generator=generator, device=self.device)

    def prefill_s(self, ids: Tensor, cache: Any) -> float:
        """Seconds until the first token is there."""
        synchronize(self.device)
        start = time.perf_counter()
        self.model(ids, use_cache=True, logits_to_keep=1, **{CACHE_KEYWORD: cache})
        synchronize(self.device)
        return time.perf_counter() - start


def cache_bytes(cache: Any) -> int:
    """Bytes of a static cache's keys and values."""
    return sum(getattr(layer, "nbytes", None) or layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
