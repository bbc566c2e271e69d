"""The scalar losses whose gradients say how much an error in a head matters.

Two axes, because no single proxy sees both: text (how the next-token distribution moves everywhere) and retrieval (whether the answer is
still found). A confident answer has a vanishing cross-entropy gradient; log-odds do not vanish.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


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
    """Back-propagate every loss of one sequence to the attention outputs.

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
    positions = answer_mask.nonzero()[:, 0].to(logits.device) - 1
    if len(positions):
        target = input_ids.to(logits.device)[positions + 1]
    else:
        positions = torch.arange(len(logits), device=logits.device)
        target = logits.argmax(-1)
    scalars.append(log_odds(logits[positions], target).sum())
    scalars.append(-log_p[positions].gather(-1, target[:, None]).mean())
    grads = []
    for index, scalar in enumerate(scalars):
        raw = torch.autograd.grad(scalar, outputs, retain_graph=index + 1 < len(scalars))
        grads.append([grad[0].float() for grad in raw])
    return SampleGradients(fisher=grads[:-2], answer=grads[-2], answer_ce=grads[-1])
