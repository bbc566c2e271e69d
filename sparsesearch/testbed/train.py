"""How `wan-tiny-11m` is trained: rectified flow on procedural clips, 541 s on one H100.

    python -m sparsesearch.testbed.train OUT --seconds 541

It lies beside the clips and the sampler because the three share the data, the noise schedule and the model's inputs; nothing else imports it.
The shipped weights came from a prototype with the same recipe, which fed patches to the blocks without the convolution (equal up to rounding).
"""

import argparse
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors.torch import save
from torch import Tensor, nn

from sparsesearch.artifacts import write_bytes
from sparsesearch.testbed.clips import ABSENT, FRAMES, SIDE, VOCABULARY, render_clips
from sparsesearch.testbed.model import CAPTION_WIDTH, CONDITION_CHANNELS, VideoBed, require_diffusers
from sparsesearch.testbed.muon import Muon
from sparsesearch.testbed.sampling import SHIFT


@dataclass(frozen=True)
class Recipe:
    """The shipped model's by default.

    Attributes:
        seconds: of training; the learning rates follow the clock.
        batch: clips per step.
        matrix_rate: of Muon, on the blocks' matrices.
        other_rate: of AdamW, on everything else; three times that on the query and key norms, whose scale is the attention's sharpness.
        image_share: share of clips that are conditioned on their first frame.
        drop_share: share of captions that are dropped.
        compiled: compile each block (one graph serves all).
    """

    seconds: float = 541.0
    batch: int = 24
    frames: int = FRAMES
    side: int = SIDE
    layers: int = 8
    heads: int = 5
    feed_forward: int = 768
    matrix_rate: float = 0.012
    other_rate: float = 2e-3
    weight_decay: float = 0.02
    image_share: float = 0.4
    drop_share: float = 0.1
    averaging: float = 0.998
    compiled: bool = True
    seed: int = 1


def new_bed(recipe: Recipe, device: torch.device | str) -> VideoBed:
    """An untrained model: output 0, modulation 0 but for gates of 0.4, text and time dampened."""
    require_diffusers()
    from diffusers import WanTransformer3DModel

    model: Any = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=recipe.heads, attention_head_dim=64, in_channels=3 + CONDITION_CHANNELS,
        out_channels=3, text_dim=CAPTION_WIDTH, freq_dim=256, ffn_dim=recipe.feed_forward, num_layers=recipe.layers,
        cross_attn_norm=True, qk_norm="rms_norm_across_heads", eps=1e-6, rope_max_seq_len=64,
    )  # fmt: skip
    with torch.no_grad():
        for block in model.blocks:
            block.scale_shift_table.zero_()
            block.scale_shift_table[:, [2, 5]] = 0.4
            block.attn2.to_out[0].weight.mul_(0.3)
        model.condition_embedder.time_proj.weight.mul_(0.3)
        model.condition_embedder.time_proj.bias.zero_()
        for parameter in (model.scale_shift_table, model.proj_out.weight, model.proj_out.bias):
            parameter.zero_()
    return VideoBed(model.to(device), nn.Embedding(VOCABULARY, CAPTION_WIDTH).to(device))


def noise_levels(count: int, device: torch.device | str) -> Float[Tensor, " B"]:
    """Stratified: logit-normal and shifted as sampling is, 15 % of them uniform, in random order."""
    even = (torch.arange(count, device=device) + torch.rand(count, device=device)) / count
    level = torch.sigmoid(torch.erfinv((2 * even - 1).clamp(-0.9999, 0.9999)) * math.sqrt(2))
    level = SHIFT * level / (1 + (SHIFT - 1) * level)
    level = torch.where(torch.rand(count, device=device) < 0.15, torch.rand(count, device=device), level)
    return level[torch.randperm(count, device=device)]


def flow_loss(
    bed: VideoBed, video: Float[Tensor, "B 3 F Y X"], captions: Int[Tensor, "B 13"], recipe: Recipe
) -> Float[Tensor, ""]:
    """Mean square error of the velocity ε − x₀ at random noise levels."""
    count, device = len(video), video.device
    level = noise_levels(count, device)
    pictured = (torch.rand(count, device=device) < recipe.image_share).float()
    dropped = torch.rand(count, 1, device=device) < recipe.drop_share
    condition = video.new_zeros(count, CONDITION_CHANNELS, *video.shape[2:])
    condition[:, :1, 0] = pictured.view(-1, 1, 1, 1)
    condition[:, 1:, 0] = video[:, :, 0] * pictured.view(-1, 1, 1, 1)
    noise, share = torch.randn_like(video), level.view(-1, 1, 1, 1, 1)
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        found = bed.transformer(
            torch.cat([(1 - share) * video + share * noise, condition], 1),
            level * 1000,
            bed.captions(torch.where(dropped, ABSENT, captions)),
            return_dict=False,
        )[0]
    loss: Tensor = (found.float() - (noise - video)).square().mean()
    return loss


def rate_share(elapsed: float, step: int) -> float:
    """Warm up for 150 steps, hold until 45 % of the time, then fall linearly to 2 %."""
    return min(1.0, (step + 1) / 150) * (1.0 if elapsed < 0.45 else max(0.02, 1 - (elapsed - 0.45) / 0.55))


@dataclass
class Training:
    """One run; `average` is the exponential moving average that is saved."""

    bed: VideoBed
    recipe: Recipe
    average: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        named = dict(self.bed.transformer.named_parameters())
        matrices = [p for name, p in named.items() if p.ndim == 2 and name.startswith("blocks.")]
        sharpness = [p for name, p in named.items() if "attn1.norm_" in name]
        taken = {id(p) for p in (*matrices, *sharpness)}
        self.parameters = [*named.values(), *self.bed.captions.parameters()]
        self.others = [p for p in self.parameters if id(p) not in taken]
        self.muon = Muon(matrices, weight_decay=self.recipe.weight_decay)
        groups: list[dict[str, Any]] = [{"params": self.others, "factor": 1.0}, {"params": sharpness, "factor": 3.0}]
        self.adam = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0)
        self.clipped = [*self.others, *sharpness]
        self.average = [p.detach().clone() for p in self.parameters]

    def step(self, index: int, elapsed: float, video: Tensor, captions: Tensor) -> float:
        """One step; returns its loss."""
        loss = flow_loss(self.bed, video, captions, self.recipe)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.clipped, 1.0)
        share = rate_share(elapsed, index)
        self.muon.step(self.recipe.matrix_rate * share)
        for group in self.adam.param_groups:
            group["lr"] = self.recipe.other_rate * share * group["factor"]
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)
        weight = 1 - min(self.recipe.averaging, (index + 1) / (index + 10))
        torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], weight)
        return float(loss.detach())

    @torch.no_grad()
    def take_average(self) -> None:
        """Put the average into the model."""
        for parameter, average in zip(self.parameters, self.average, strict=True):
            parameter.copy_(average)


def train(
    recipe: Recipe, device: torch.device | str, progress: Callable[[int, float, float], None] = lambda *_: None
) -> VideoBed:
    """Train until the time is up.

    Args:
        recipe: how.
        device: where; the recipe's time is meant for an H100.
        progress: called with (step, elapsed share, loss).
    """
    torch.manual_seed(0)
    training = Training(new_bed(recipe, device), recipe)
    if recipe.compiled:
        for block in training.bed.transformer.blocks:
            block.compile()
    generator = torch.Generator(device=device).manual_seed(recipe.seed)
    start, index, elapsed = time.monotonic(), 0, 0.0
    while elapsed < 1:
        clips = render_clips(recipe.batch, frames=recipe.frames, side=recipe.side, device=device, generator=generator)
        loss = training.step(index, elapsed, clips.video, clips.captions)
        progress(index, elapsed, loss)
        index, elapsed = index + 1, (time.monotonic() - start) / recipe.seconds
    training.take_average()
    return training.bed


def save_bed(bed: VideoBed, folder: Path) -> None:
    """Write config, weights in shards below 16 MB, and the caption embedding, all in bf16."""
    bed.transformer.to(torch.bfloat16).save_pretrained(folder, max_shard_size="14MB")
    weight = bed.captions.weight.detach().cpu().to(torch.bfloat16).contiguous()
    write_bytes(folder / "caption_embedding.safetensors", save({"embedding.weight": weight}))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to write the model to")
    parser.add_argument("--seconds", type=float, default=Recipe.seconds, help="of training")
    parser.add_argument("--device", default="cuda")
    given = parser.parse_args()

    def progress(step: int, elapsed: float, loss: float) -> None:
        if step % 100 == 0:
            sys.stderr.write(f"step {step}, {elapsed:.0%}, loss {loss:.4f}\n")

    save_bed(train(Recipe(seconds=given.seconds), given.device, progress), given.out)


if __name__ == "__main__":
    main()
