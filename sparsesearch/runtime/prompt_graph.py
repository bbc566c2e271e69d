"""A prompt of one length, captured once and replayed: for short prompts, whose kernels are over before the host has launched the next ones.

    cache = sparsesearch.sparse_cache(model, max_tokens=5000)
    prompt = PromptGraph(model, cache, 4096)
    logits = prompt(input_ids)             # then DecodeStep on the same cache

Dynamic rules choose anew in every replay: their choices, the schedules that follow and the filling of the cache are kernels like the others.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import Cache, PreTrainedModel

from sparsesearch.errors import SpecError
from sparsesearch.runtime.attention import NAME
from sparsesearch.runtime.cache_keyword import CACHE_KEYWORD
from sparsesearch.runtime.static_layer import StaticPlanLayer

_WARM_UPS = (
    2  # the first run compiles kernels and makes what a shape needs, the second shows that nothing is left to make
)


class PromptGraph:
    """Unpadded prompts of one length through a model, into a static cache that each of them fills anew.

    Args:
        model: a model that runs a plan, or none, with transformers' own static cache.
        cache: a static cache; what it holds is forgotten.
        length: tokens of a prompt.
        batch: prompts at a time.
        graph: capture; needs a GPU. Without, calls run as they are.

    Raises:
        SpecError: the cache is not static or too short, or there is no GPU to capture on.
    """

    def __init__(
        self, model: PreTrainedModel, cache: Cache, length: int, *, batch: int = 1, graph: bool | None = None
    ) -> None:
        device = model.device
        self.graph_wanted = device.type == "cuda" if graph is None else graph
        if self.graph_wanted and device.type != "cuda":
            raise SpecError(f"a CUDA graph needs a GPU, but the model is on {device}. Pass graph=False.")
        if not 1 <= length <= cache.get_max_length():
            raise SpecError(
                f"a prompt must fit a static cache, but {length} tokens were asked for and the cache holds {cache.get_max_length()}. Make "
                "one with sparsesearch.sparse_cache(model, max_tokens=...)."
            )
        self.model, self.cache = model, cache
        self.ids = torch.zeros(batch, length, dtype=torch.long, device=device)
        self._inputs: dict[str, Any] = {
            "input_ids": self.ids,
            "position_ids": torch.arange(length, device=device)[None],
        }
        if model.config._attn_implementation == NAME:  # the code of an unpadded prompt, on the host, which needs it
            code = torch.cat([torch.arange(1, length + 1), torch.ones(1, dtype=torch.long)]).int()
            self._inputs["attention_mask"] = code.expand(batch, 1, 1, -1)
        self._inputs |= {CACHE_KEYWORD: cache, "use_cache": True, "logits_to_keep": 1}
        self._graph: torch.cuda.CUDAGraph | None = None
        self._logits: Tensor | None = None

    @torch.no_grad()
    def __call__(self, ids: Int[Tensor, "B S"]) -> Float[Tensor, "B V"]:
        """Logits behind each prompt's last token; the returned tensor is overwritten by the next call.

        Raises:
            SpecError: the prompts are not of the stated shape.
        """
        if ids.shape != self.ids.shape:
            raise SpecError(f"prompts must be {tuple(self.ids.shape)}, but are {tuple(ids.shape)}.")
        self.ids.copy_(ids)
        if not self.graph_wanted:
            return self._run()
        if self._graph is None:
            self._capture()
        assert self._graph is not None
        assert self._logits is not None
        self._graph.replay()
        return self._logits

    def _run(self) -> Float[Tensor, "B V"]:
        layers: list[Any] = self.cache.layers
        for layer in layers:
            if isinstance(layer, StaticPlanLayer):
                layer.reset()
            else:
                layer.cumulative_length.zero_()  # what lies behind it is never read
        logits: Tensor = self.model(**self._inputs).logits[:, -1]
        return logits

    def _capture(self) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                self._run()
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._logits = self._run()
