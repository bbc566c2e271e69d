"""The output projection of an attention module, whatever the family calls it: errors are measured behind it."""

from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sparsesearch.errors import UnsupportedModelError

_NAMES = ("o_proj", "out_proj", "c_proj", "dense", "wo", "out_lin", "proj")


def projection_gram(module: nn.Module, num_heads: int) -> Float[Tensor, "H D D"]:
    """W_oᵀ W_o of each head's slice, in fp32: |W_o δ|² = δᵀ (W_oᵀ W_o) δ.

    Raises:
        UnsupportedModelError: no child of the module is recognised as its output projection.
    """
    for name in _NAMES:
        child = getattr(module, name, None)
        if isinstance(child, nn.Linear | Conv1D):
            weight = _weight(child).float()
            columns = weight.t() if isinstance(child, Conv1D) else weight
            per_head = columns.unflatten(1, (num_heads, -1)).transpose(0, 1)
            gram: Tensor = per_head.transpose(1, 2) @ per_head
            return gram
    children = ", ".join(name for name, _ in module.named_children())
    raise UnsupportedModelError(
        f"{type(module).__name__} must have an output projection named one of {', '.join(_NAMES)}, but has {children}. "
        "Open an issue with the model's name."
    )


def _weight(child: nn.Module) -> Tensor:
    """A module's weight, fetched where accelerate keeps it elsewhere between calls."""
    weight: Tensor = child.get_parameter("weight").detach()
    if weight.is_meta:
        from accelerate.utils import align_module_device

        with align_module_device(child):
            weight = child.get_parameter("weight").detach().clone()
    return weight
