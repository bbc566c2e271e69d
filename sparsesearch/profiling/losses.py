"""The scalar losses whose gradients say how much an error in a head matters.

Two axes, because no single proxy sees both: text (how the next-token distribution moves everywhere) and retrieval (whether the answer is
still found). A confident answer has a vanishing cross-entropy gradient; log-odds do not vanish.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

CHUNK_LOGITS = 1 << 28  # logits at a time: 1 GiB in fp32, of which the losses hold about four copies
LEAST_ROWS = 256


@dataclass(frozen=True)
class SampleGradients:
    """Gradients with respect to every layer's attention output, in layer order.

    Attributes:
        fisher: R probes of the text loss; ½ E[(Σ g·δ)²] is the second-order estimate of the KL divergence summed over positions.
        answer: of the summed answer log-odds.
        answer_ce: of the answer cross-entropy, for MoA's influence.
    """

    fisher: list[list[Float[Tensor, "S H D"]]]
    answer: list[Float[Tensor, "S H D"]]
    answer_ce: list[Float[Tensor, "S H D"]]


def log_odds(logits: Float[Tensor, "P V"], target: Int[Tensor, " P"]) -> Float[Tensor, " P"]:
    """Log-odds ln p - ln(1 - p) of the target, without loss of precision where p is near 1."""
    chosen = logits.gather(-1, target[:, None])[:, 0]
    others = logits.scatter(-1, target[:, None], -torch.inf).logsumexp(-1)
    return chosen - others


def sample_gradients(
    logits: Float[Tensor, "S V"],
    outputs: list[Float[Tensor, "1 S H D"]],
    input_ids: Int[Tensor, " S"],
    answer_mask: Bool[Tensor, " S"],
    *,
    num_probes: int,
    generator: torch.Generator,
) -> SampleGradients:
    """Back-propagate every loss of one sequence to the attention outputs, through one graph of the whole model.

    See `scalar_losses` for the losses.
    """
    targets = Targets.of(input_ids, answer_mask)
    scalars = scalar_losses(logits, 0, targets, num_probes=num_probes, generator=generator)
    grads = []
    for index, scalar in enumerate(scalars):
        raw = torch.autograd.grad(scalar, outputs, retain_graph=index + 1 < len(scalars))
        grads.append([grad[0].float() for grad in raw])
    return SampleGradients(fisher=grads[:-2], answer=grads[-2], answer_ce=grads[-1])


@dataclass(frozen=True)
class Targets:
    """What the answer losses look at.

    Attributes:
        positions: those that predict answer tokens; all of them where a sequence has none.
        tokens: the answers; None: the model's own predictions.
    """

    positions: Int[Tensor, " P"]
    tokens: Int[Tensor, " P"] | None

    @classmethod
    def of(cls, input_ids: Int[Tensor, " S"], answer_mask: Bool[Tensor, " S"]) -> "Targets":
        """The targets of one sequence."""
        places = answer_mask.nonzero()[:, 0]
        if len(places):
            return cls(places - 1, input_ids[places])
        return cls(torch.arange(len(input_ids)), None)


def scalar_losses(
    logits: Float[Tensor, "R V"], first: int, targets: Targets, *, num_probes: int, generator: torch.Generator
) -> list[Float[Tensor, ""]]:
    """Fisher probes, answer log-odds and answer cross-entropy of R positions from `first` on; sums over chunks of positions are the whole.

    Fisher probes draw labels from the model's own softmax and sum their log-probabilities with random signs, so that gradients of different
    positions do not cancel (Rademacher estimate of the Fisher information). Where a sequence has no answer token, the answer losses run
    over all positions of the model's own predictions.

    Source: first-order influence, MoA, arXiv:2406.14909, equation 3; Fisher estimate of KL: Martens 2014, arXiv:1412.1193, section 5.
    """
    logits = logits.float()
    log_p = logits.log_softmax(-1)
    labels = torch.multinomial(log_p.detach().exp(), num_probes, replacement=True, generator=generator)
    signs = torch.randint(0, 2, labels.shape, generator=generator, device=labels.device).to(log_p.dtype) * 2 - 1
    scalars = [(log_p.gather(-1, labels[:, i : i + 1])[:, 0] * signs[:, i]).sum() for i in range(num_probes)]
    inside = (targets.positions >= first) & (targets.positions < first + len(logits))
    rows = (targets.positions[inside] - first).to(logits.device)
    target = logits[rows].argmax(-1) if targets.tokens is None else targets.tokens[inside.to(targets.tokens.device)]
    target = target.to(logits.device)
    scalars.append(log_odds(logits[rows], target).sum())
    scalars.append(-log_p[rows].gather(-1, target[:, None]).sum() / len(targets.positions))
    return scalars


def head_gradients(
    logits_of: Callable[[Float[Tensor, "R D"]], Float[Tensor, "R V"]],
    hidden: Float[Tensor, "S D"],
    targets: Targets,
    vocab_size: int,
    *,
    num_probes: int,
    generator: torch.Generator,
) -> Float[Tensor, "K S D"]:
    """Gradients of the K losses at the last layer's result, in chunks of positions: S x V logits are never held.

    Args:
        logits_of: the head, differentiable.
        hidden: the last layer's result.
        targets: of this sequence.
        vocab_size: V, for the size of chunks.
        num_probes: Fisher probes.
        generator: of labels and signs.
    """
    step = max(LEAST_ROWS, CHUNK_LOGITS // vocab_size)
    chunks = []
    for first in range(0, len(hidden), step):
        rows = hidden[first : first + step].detach().requires_grad_()
        with torch.enable_grad():
            scalars = scalar_losses(logits_of(rows), first, targets, num_probes=num_probes, generator=generator)
        grads = [
            torch.autograd.grad(scalar, rows, retain_graph=index + 1 < len(scalars))[0]
            for index, scalar in enumerate(scalars)
        ]
        chunks.append(torch.stack(grads))
    return torch.cat(chunks, 1)
