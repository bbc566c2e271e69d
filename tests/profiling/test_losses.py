import torch

from sparsesearch.profiling.losses import log_odds, sample_gradients


def test_log_odds_keeps_precision_near_certainty() -> None:
    logits = torch.tensor([[40.0, 0.0, 0.0]])
    assert abs(log_odds(logits, torch.tensor([0])).item() - (40 - torch.tensor(2.0).log().item())) < 1e-5


def test_fisher_probes_estimate_kl() -> None:
    """½ E[(Σ g·δ)²] of the probes is the KL divergence of a small change of the logits, summed over positions."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(1, 12, 2, 3, generator=generator, requires_grad=True)
    mix = torch.randn(6, 9, generator=generator)
    logits = base[0].flatten(1) @ mix
    ids, answers = torch.randint(0, 9, (12,), generator=generator), torch.zeros(12, dtype=torch.bool)
    found = sample_gradients(logits, [base], ids, answers, num_probes=3000, generator=generator)
    delta = 0.02 * torch.randn(12, 2, 3, generator=generator)
    with torch.no_grad():
        p, q = logits.log_softmax(-1), ((base[0] + delta).flatten(1) @ mix).log_softmax(-1)
        kl = (p.exp() * (p - q)).sum()
    estimates = torch.stack([(probe[0] * delta).sum() ** 2 / 2 for probe in found.fisher])
    standard_error = estimates.std() / len(estimates) ** 0.5
    assert abs(estimates.mean() - kl) < 4 * standard_error + 0.05 * kl


def test_answers_choose_the_positions() -> None:
    base = torch.randn(1, 6, 1, 4, generator=torch.Generator().manual_seed(1), requires_grad=True)
    answers = torch.zeros(6, dtype=torch.bool)
    answers[3] = True
    found = sample_gradients(
        base[0, :, 0], [base], torch.arange(6) % 4, answers, num_probes=1, generator=torch.Generator().manual_seed(0)
    )
    assert found.answer[0].abs().sum((1, 2)).nonzero().flatten().tolist() == [2]
