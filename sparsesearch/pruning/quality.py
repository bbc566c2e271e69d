"""What a model's output is worth: distance from the dense output, and random scalars whose gradients square to it.

| output | distance of one item | item |
|---|---|---|
| logits (language models, classifiers) | KL(dense ‖ variant), nats | a token or an image |
| hidden states (encoders) | 1 − cosine of the mean-pooled embeddings | a sequence |

For a small change δ of an activation both are ½ E[(g·δ)²] per item, g the gradient of a probe: for logits the log-probability of a label
drawn from the model itself, for unit embeddings their product with a random ±1 vector.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

Batch = Mapping[str, Tensor]
_CACHED_LOGITS = 2**19
"""Logits compared at a time on a CPU: several passes over 2 MB stay in its caches."""


def output_rows(model: PreTrainedModel, batch: Batch) -> tuple[Float[Tensor, "R V"], bool]:
    """The rows that are compared, and whether they are logits (else unit embeddings)."""
    output = model(**on_device(batch, model), **({"use_cache": False} if "input_ids" in batch else {}))
    mask = token_mask(batch)
    if getattr(output, "logits", None) is not None:
        logits = output.logits.float()
        if logits.ndim == 2:
            return logits, True
        return (logits.flatten(0, 1) if mask is None else logits[mask.to(logits.device)]), True
    hidden = output.last_hidden_state.float()
    if mask is None:
        pooled = hidden.mean(1)
    else:
        weight = mask.to(hidden.device)[..., None].float()
        pooled = (hidden * weight).sum(1) / weight.sum(1)
    return functional.normalize(pooled, dim=-1), False


def distance(dense: Float[Tensor, "R V"], rows: Float[Tensor, "R V"], *, logits: bool) -> Float[Tensor, " R"]:
    """Distance of every item from dense; 0 when equal, never negative."""
    if not logits:
        return 0.5 * (dense - rows).square().sum(-1)  # = 1 − cosine of unit vectors, and exactly 0 for equal ones
    log_p, log_q = dense.log_softmax(-1), rows.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).clamp(min=0)


def probe_scalars(
    rows: Float[Tensor, "R V"], *, logits: bool, num_probes: int, generator: torch.Generator
) -> list[Float[Tensor, ""]]:
    """Scalars whose gradients are probes; random signs keep items from cancelling each other.

    Source: Fisher estimate of KL: Martens 2014, arXiv:1412.1193, section 5.
    """
    device = rows.device
    if not logits:
        signs = torch.randint(0, 2, (num_probes, *rows.shape), generator=generator, device=device) * 2 - 1
        return [(rows * sign).sum() for sign in signs]
    log_p = rows.log_softmax(-1)
    labels = torch.multinomial(log_p.detach().exp(), num_probes, replacement=True, generator=generator)
    signs = torch.randint(0, 2, labels.shape, generator=generator, device=device) * 2 - 1
    return [(log_p.gather(-1, labels[:, i : i + 1])[:, 0] * signs[:, i]).sum() for i in range(num_probes)]


def own_loss(rows: Float[Tensor, "R V"], batch: Batch, *, logits: bool) -> Float[Tensor, ""]:
    """The loss whose plain gradient the first-order Taylor criterion uses.

    Next-token cross-entropy summed over positions for language models, entropy of the prediction for classifiers. The loss an embedding was
    trained with is not known; the sum of its first half of coordinates, a fixed direction, stands in for it.
    """
    if not logits:
        half = rows.shape[-1] // 2
        return rows[:, :half].sum()
    ids = batch.get("input_ids")
    if ids is not None and rows.shape[0] == ids.numel():
        log_p = rows.log_softmax(-1).unflatten(0, ids.shape)[:, :-1]
        picked: Tensor = log_p.gather(-1, ids[:, 1:, None].to(rows.device))
        return -picked.sum()
    log_p = rows.log_softmax(-1)
    return -(log_p.exp() * log_p).sum()


def token_mask(batch: Batch) -> Bool[Tensor, "B S"] | None:
    """Which tokens are real; None when all are."""
    mask = batch.get("attention_mask")
    return None if mask is None or bool(mask.all()) else mask.bool()


def on_device(batch: Batch, model: PreTrainedModel) -> dict[str, Tensor]:
    """The batch where the model is."""
    return {name: tensor.to(model.device) for name, tensor in batch.items()}


@torch.no_grad()
def dense_rows(model: PreTrainedModel, batches: list[Batch]) -> list[tuple[Float[Tensor, "R V"], bool]]:
    """What the model says now, to compare others with."""
    return [output_rows(model, batch) for batch in batches]


@torch.no_grad()
def mean_distance(
    model: PreTrainedModel, batches: list[Batch], dense: list[tuple[Float[Tensor, "R V"], bool]]
) -> float:
    """Mean over all items of the distance from the dense rows."""
    total, count = 0.0, 0
    for batch, (rows, logits) in zip(batches, dense, strict=True):
        found = output_rows(model, batch)[0]
        size = max(1, _CACHED_LOGITS // rows.shape[-1]) if rows.device.type == "cpu" else len(rows)
        for ours, theirs in zip(rows.split(size), found.split(size), strict=True):
            total += float(distance(ours, theirs, logits=logits).double().sum())
        count += len(found)
    return total / count
