"""Linears that read the same input, computed in one product: one long read of weights instead of two or three short ones.

At decoding sizes a product of few rows is as fast as its weights are read, and short reads never reach the memory's pace: three products of
4096, 1024 and 1024 columns (Llama-3-8B's queries, keys and values) take 1.7 times as long on an H200 as one of 6144.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names of linears, in the order in which Llama, Qwen, Mistral and their kin call them with one input."""


class _Product:
    """The joined product on its way from the first linear of a group to the others; traced away by torch.compile."""

    value: Tensor | None = None


class JoinedLinear(nn.Linear):
    """A linear whose weights lie beside others'. Eager calls compute it alone; compiled ones take their part of the joined product."""

    joined: Tensor
    product: _Product
    part: tuple[int, int, bool, bool]

    def forward(self, input: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """As `nn.Linear`."""
        if not torch.compiler.is_compiling():
            return super().forward(input)
        start, stop, first, last = self.part
        value = F.linear(input, self.joined) if first else self.product.value
        assert value is not None, "the first linear of a group is called first"
        self.product.value = None if last else value
        return value[..., start:stop]


def join_linears(model: nn.Module) -> int:
    """Lay the weights of `SAME_INPUT` side by side, in place; the model computes what it computed.

    Only plain linears without bias and of one type are joined; what compiles the layers then needs one product per group.

    Returns:
        How many linears were joined.
    """
    count = 0
    for module in model.modules():
        for names in SAME_INPUT:
            linears = [child for name in names if type(child := getattr(module, name, None)) is nn.Linear]
            if (
                len(linears) == len(names)
                and len({_kind(linear) for linear in linears}) == 1
                and linears[0].bias is None
            ):
                _join(linears)
                count += len(linears)
    return count


def _kind(linear: nn.Linear) -> tuple[int, torch.dtype, torch.device, bool]:
    return linear.in_features, linear.weight.dtype, linear.weight.device, linear.bias is None


def _join(linears: Sequence[nn.Linear]) -> None:
    sizes = [linear.out_features for linear in linears]
    with torch.no_grad():
        joined = torch.cat([linear.weight for linear in linears])
    product, start = _Product(), 0
    for number, (linear, size, part) in enumerate(zip(linears, sizes, joined.split(sizes), strict=True)):
        linear.weight = nn.Parameter(part, requires_grad=linear.weight.requires_grad)
        linear.__class__ = JoinedLinear
        assert isinstance(linear, JoinedLinear)
        # neither a parameter nor a buffer: it is in no checkpoint
        linear.__dict__.update(
            joined=joined, product=product, part=(start, start + size, number == 0, number == len(linears) - 1)
        )
        start += size
