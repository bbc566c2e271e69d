"""What stands for keys and values on the way from a cache layer of ours to our attention function."""

from typing import Any, NoReturn

from jaxtyping import Float
from torch import Tensor

from sparsesearch.errors import SparseSearchError, UnsupportedModelError
from sparsesearch.runtime.binding import LayerBinding
from sparsesearch.runtime.cache_keyword import CACHE_KEYWORD
from sparsesearch.runtime.mask_code import MaskCode


class KeyValues:
    """The new keys and values of a call, and the cache layer that attends to them and then takes them in.

    Attributes:
        layer: the cache layer; it has `binding` and `attend(query, keys, values, code, scale)`.
        keys: [B, G, S, D].
        values: likewise.
        step: answers a call of one query without the host, where the layer can.
    """

    step: Any = None

    def __init__(self, layer: Any, keys: Float[Tensor, "B G S D"], values: Float[Tensor, "B G S D"]) -> None:
        self.layer, self.keys, self.values = layer, keys, values

    def attend(
        self,
        binding: LayerBinding,
        query: Float[Tensor, "B H S D"],
        code: MaskCode | None,
        scale: float,
        sliding_window: int | None,
    ) -> Float[Tensor, "B H S D"]:
        """Attention over what the layer keeps and the new keys; then the layer takes those in."""
        if binding != self.layer.binding:
            raise SparseSearchError(
                f"{binding.path}: a cache must be continued under the plan that filled it, but another one is applied now. Use a new cache."
            )
        if sliding_window is not None:
            raise UnsupportedModelError(
                f"{binding.path}: a sliding-window layer must have a sliding-window cache, but has another. Pass {CACHE_KEYWORD}="
                "sparsesearch.sparse_cache(model), with max_tokens=... for a static one."
            )
        output: Tensor = self.layer.attend(query, self.keys, self.values, code, scale)
        return output

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)
        raise TypeError(
            "this cache keeps a different number of keys per head, so its keys are no tensor, but "
            f"{name!r} of a tensor was asked for. Use attn_implementation='sparsesearch' with it, or sparsesearch.apply(..., cache=False)."
        )
