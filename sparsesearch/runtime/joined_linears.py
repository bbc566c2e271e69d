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
    joined_bias: Tensor | None
    product: _Product
    part: tuple[int, int, bool, bool]

    def forward(self, input: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """As `nn.Linear`."""
        if not torch.compiler.is_compiling():
            return super().forward(input)
        start, stop, first, last = self.part
        value = F.linear(input, self.joined, self.joined_bias) if first else self.product.value
        assert value is not None, "the first linear of a group is called first"
        self.product.value = None if last else value
        return value[..., start:stop]


def join_linears(model: nn.Module, *, biased: bool = False) -> int:
    """Lay the weights of `SAME_INPUT` side by side, in place; the model computes what it computed.

    Only plain linears of one type are joined; what compiles the layers then needs one product per group.

    Args:
        model: any module.
        biased: join those with biases too: only where all linears of a group are known to have one input (cross attention has not).

    Returns:
        How many linears were joined.
    """
    count = 0
    for module in model.modules():
        for names in SAME_INPUT:
            linears = [child for name in names if type(child := getattr(module, name, None)) is nn.Linear]
            if len(linears) != len(names) or len({_kind(linear) for linear in linears}) > 1:
                continue
            if biased or linears[0].bias is None:
                _join(linears)
                count += len(linears)
    return count


def _kind(linear: nn.Linear) -> tuple[int, torch.dtype, torch.device, bool]:
    return linear.in_features, linear.weight.dtype, linear.weight.device, linear.bias is None


def _join(linears: Sequence[nn.Linear]) -> None:
    sizes = [linear.out_features for linear in linears]
    with torch.no_grad():
        joined = torch.cat([linear.weight for linear in linears])
        joined_bias = None if linears[0].bias is None else torch.cat([linear.bias for linear in linears])
    product, start = _Product(), 0
    for number, (linear, size, part) in enumerate(zip(linears, sizes, joined.split(sizes), strict=True)):
        linear.weight = nn.Parameter(part, requires_grad=linear.weight.requires_grad)
        if joined_bias is not None:
            own = joined_bias[start : start + size]
            linear.bias = nn.Parameter(own, requires_grad=linear.bias.requires_grad)
        linear.__class__ = JoinedLinear
        assert isinstance(linear, JoinedLinear)
        # neither a parameter nor a buffer: it is in no checkpoint
        linear.__dict__.update(
            joined=joined, joined_bias=joined_bias, product=product,
            part=(start, start + size, number == 0, number == len(linears) - 1),
        )  # fmt: skip
        start += size
