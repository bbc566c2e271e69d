"""A tiny masked diffusion language model that learns to copy its prompt, its sampler, and a cache of the trained weights per test run."""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from transformers import EuroBertConfig, EuroBertForMaskedLM

from sparsesearch.runtime.masked_diffusion import MaskedDenoiser

SYMBOLS, PROMPT, STEPS = 20, 48, 8
MASK = SYMBOLS


def make_model() -> EuroBertForMaskedLM:
    """Random weights: 2 layers, 4 query heads, 2 KV heads of 16."""
    torch.manual_seed(0)
    config = EuroBertConfig(
        vocab_size=SYMBOLS + 1, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=256, mask_token_id=MASK, pad_token_id=0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return EuroBertForMaskedLM(config).eval()


@cache
def trained() -> EuroBertForMaskedLM:
    """110 steps of LLaDA's objective: a share of the generation is masked, drawn uniformly, and predicted from all the rest."""
    model, generator = make_model(), torch.Generator().manual_seed(1)
    model.train()
    optimiser = torch.optim.AdamW(model.parameters(), 3e-3, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 4e-3, total_steps=110)
    for _ in range(110):
        prompt = torch.randint(SYMBOLS, (24, PROMPT), generator=generator)
        tokens = torch.cat([prompt, prompt], 1)
        hidden = torch.rand(tokens.shape, generator=generator) < torch.rand(24, 1, generator=generator).clamp(min=0.1)
        hidden[:, :PROMPT] = False
        logits = model(input_ids=tokens.masked_fill(hidden, MASK)).logits
        loss = torch.nn.functional.cross_entropy(logits[hidden], tokens[hidden])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return model.eval()


@dataclass
class Copying:
    """Sampler over prompts drawn with a seed: unmasks the most certain tokens, an equal share per step.

    Calling it returns the logits of the generation at the last step, which a replay compares.
    """

    denoiser: MaskedDenoiser
    seed: int = 5
    rows: int = 6

    @property
    def prompts(self) -> Tensor:
        """What is to be copied."""
        return torch.randint(SYMBOLS, (self.rows, PROMPT), generator=torch.Generator().manual_seed(self.seed))

    def sample(self) -> tuple[Tensor, Tensor]:
        """Tokens of the generation, and their last logits."""
        tokens = torch.cat([self.prompts, torch.full((self.rows, PROMPT), MASK)], 1)
        with torch.no_grad():
            for step in range(STEPS):
                logits = self.denoiser.logits(tokens, step=(step, STEPS))[:, PROMPT:, :SYMBOLS]
                best = logits.softmax(-1).max(-1)
                hidden = tokens[:, PROMPT:] == MASK
                certain = best.values.masked_fill(~hidden, -1.0)
                count = -(-PROMPT * (step + 1) // STEPS) - (PROMPT * step // STEPS)
                chosen = certain.topk(min(count, int(hidden.sum(1).max())), dim=1).indices
                new = tokens[:, PROMPT:].scatter(1, chosen, best.indices.gather(1, chosen))
                tokens[:, PROMPT:] = torch.where(hidden, new, tokens[:, PROMPT:])
        return tokens[:, PROMPT:], logits

    def __call__(self) -> Tensor:
        return self.sample()[1]
