"""The model cut in two before its vocabulary: the body runs once per variant, the vocabulary in chunks of rows."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from sparsesearch.errors import UnsupportedModelError
from sparsesearch.runtime.cache_keyword import CACHE_KEYWORD
from sparsesearch.runtime.prepare import sparse_cache

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Head:
    """The output embedding and whatever the model does after it (soft cap, scale), on hidden states of our choice.

    Logits of S positions and V words take S·V numbers, often more than the model itself. A hook on the output embedding keeps what goes in
    (S·D) and lets the last position through; a second forward of one token with the hook feeding stored rows in turns them into logits.
    The model's own code runs in both, so every causal LM with an output embedding module works unchanged and exactly. What the body makes of
    that one token is never looked at, so it is made once: launching thirty layers takes a GPU's host longer than the vocabulary takes the GPU.

    Attributes:
        model: in evaluation mode; the caller's, not changed.
        vocab_size: V, for the size of chunks.
    """

    def __init__(self, model: "PreTrainedModel") -> None:
        embedding = model.get_output_embeddings()
        if not isinstance(embedding, nn.Module):
            raise UnsupportedModelError(
                f"a model must have output embeddings to be judged, but {type(model).__name__} has none; give a causal LM."
            )
        self.model = model
        self.vocab_size = int(model.config.get_text_config().vocab_size)
        self._embedding = embedding
        self._of_one_token: Any = None

    @torch.no_grad()
    def hidden(
        self, input_ids: Int64[Tensor, "B S"], *, use_cache: bool = False, decode_tokens: int = 0
    ) -> Float[Tensor, "B S D"]:
        """One forward of the body (and of the head at the last position): what the output embedding would see.

        With `decode_tokens` the sequences are taken in as they are served: the last so many tokens one by one, against the cache of those before.
        """
        seen: list[Tensor] = []

        def last_only(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            seen.append(args[0])
            return (args[0][:, -1:], *args[1:])

        ids, prompt = input_ids.to(self.model.device), input_ids.shape[1] - decode_tokens
        options: dict[str, Any] = {"use_cache": use_cache}
        if decode_tokens:  # its steps choose for all sequences at once
            options = {"use_cache": True, CACHE_KEYWORD: sparse_cache(self.model, max_tokens=ids.shape[1])}
        with self._before_embedding(last_only):
            self.model(input_ids=ids[:, :prompt], **options)
            for at in range(prompt, ids.shape[1]):
                self.model(input_ids=ids[:, at : at + 1], **options)
        if len(seen) != 1 + decode_tokens or seen[0].shape[:2] != (len(ids), prompt):
            raise UnsupportedModelError(
                f"a forward of {type(self.model).__name__} must call its output embedding once on all positions, but called it "
                f"{len(seen)} times in {1 + decode_tokens}; this model cannot be judged."
            )
        return seen[0] if len(seen) == 1 else torch.cat(seen, 1)

    @torch.no_grad()
    def logits(self, rows: Float[Tensor, "R D"]) -> Float[Tensor, "R V"]:
        """Logits of stored hidden states, in fp32."""
        with self._before_embedding(lambda _, args: (rows[None], *args[1:])), self._body_run_once():
            one_token = torch.zeros(1, 1, dtype=torch.long, device=self.model.device)
            logits: Tensor = self.model(input_ids=one_token, use_cache=False).logits
        return logits[0].float()

    @contextmanager
    def _body_run_once(self) -> Iterator[None]:
        """The first time the body's result is kept, afterwards it is handed out in the body's place; a model that is its own body runs whole."""
        body = self.model.base_model
        if body is self.model:
            yield
            return
        if self._of_one_token is None:
            handle = body.register_forward_hook(lambda _, args, output: setattr(self, "_of_one_token", output))
            try:
                yield
            finally:
                handle.remove()
            return
        own = body.__dict__.get("forward")  # accelerate puts one there
        body.forward = lambda *args, **options: self._of_one_token
        try:
            yield
        finally:
            del body.forward
            if own is not None:
                body.forward = own

    @contextmanager
    def _before_embedding(self, hook: Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]) -> Iterator[None]:
        handle = self._embedding.register_forward_pre_hook(hook)
        try:
            yield
        finally:
            handle.remove()
