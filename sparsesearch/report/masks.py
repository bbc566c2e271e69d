"""Thumbnails: what each rule in use computes, tile by tile."""

from collections import Counter
from html import escape

import torch
from jaxtyping import Bool
from torch import Tensor

from sparsesearch.block_mask import BlockGrid, density
from sparsesearch.layout import video_layout
from sparsesearch.plan import Plan
from sparsesearch.report.svg import figure
from sparsesearch.rules.base import LengthLaw, Rule
from sparsesearch.rules.dense_source import DenseSource
from sparsesearch.rules.pooled_topk import PooledTopk
from sparsesearch.rules.reuse import Reuse

_SIDE = 132.0
_MOST_BLOCKS = 32

EXAMPLE_VIDEO = video_layout(8, 16, 16)


def mask_cards(plan: Plan, length_tokens: int, *, most: int = 18) -> str:
    """One card per rule, the most used first: picture, name, heads, share of tiles, paper. HTML."""
    uses = Counter(rule.label for _, _, rule in plan.heads())
    by_label = {rule.label: rule for _, _, rule in plan.heads()}
    order = sorted(uses, key=lambda label: (-uses[label], label))
    cards = [_card(by_label[label], uses[label], plan.block_tokens, length_tokens) for label in order[:most]]
    rest = order[most:]
    more = (
        f'<p class="soft">and {len(rest)} more rules on {sum(uses[label] for label in rest)} heads.</p>' if rest else ""
    )
    return f'<div class="cards">{"".join(cards)}</div>{more}'


def _card(rule: Rule, heads: int, block_tokens: int, length_tokens: int) -> str:
    grid = example_grid(rule, length_tokens, block_tokens)
    tiles = example_tiles(rule, grid)
    said = f"{100 * density(tiles, grid):.0f} % of the tiles"
    if rule.needs_layout:
        said += f" of a video of {EXAMPLE_VIDEO.num_tokens} tokens, in its order {rule.token_order}"
    if rule.dynamic:
        said = "chosen from the data; shown on synthetic queries and keys"
    if isinstance(rule, Reuse):
        said = f"what layer {rule.layer} chose, nothing estimated; shown on synthetic queries and keys"
    if isinstance(rule, DenseSource):
        said = "all tiles are computed; shown is what it leaves for later layers, on synthetic queries and keys"
    if rule.replaces_output:
        said = "output 0, no tile" if rule.rest == "zero" else "mean of the values, no tile"
    elif rule.rest != "drop":
        said += f"; {rule.rest} rest"
    name, _, parameters = rule.label.partition("(")
    picture = thumbnail(
        grid.reachable() if rule.rest == "mean_value" else tiles, grid, rule.kind, faint=rule.replaces_output
    )
    return (
        f'<figure class="mask">{picture}<figcaption><b>{escape(name)}</b> <span class="count">{heads} '
        f"head{'s' if heads != 1 else ''}</span><br><code>{escape(parameters.rstrip(')') or 'no parameters')}</code><br>"
        f'<span class="soft">{escape(said)} · {escape(rule.source)}</span></figcaption></figure>'
    )


def example_grid(rule: Rule, length_tokens: int, block_tokens: int) -> BlockGrid:
    """The grid of a rule's picture: a short causal sequence, or a small video for rules over frames."""
    if rule.needs_layout:
        tokens = EXAMPLE_VIDEO.num_tokens
        return BlockGrid(tokens, tokens, 64, causal=False, layout=EXAMPLE_VIDEO)
    tokens = min(_MOST_BLOCKS, -(-length_tokens // block_tokens)) * block_tokens
    return BlockGrid(tokens, tokens, block_tokens)


def thumbnail(tiles: Bool[Tensor, "M N"], grid: BlockGrid, kind: str, *, faint: bool = False) -> str:
    """The tile grid as a picture: reachable tiles pale, `tiles` in the kind's colour, thin where they are not computed (`faint`)."""
    step = _SIDE / grid.num_k_blocks
    opacity = ' opacity="0.3"' if faint else ""
    body = (
        f'<g shape-rendering="crispEdges"><path d="{_runs(grid.reachable(), step)}" class="track"/>'
        f'<path d="{_runs(tiles, step)}" class="k-{kind}"{opacity}/></g>'
    )
    return figure(_SIDE, _SIDE, body, label=f"Tiles that {kind} computes, queries down, keys across")


def example_tiles(rule: Rule, grid: BlockGrid) -> Bool[Tensor, "M N"]:
    """What the rule chooses; a dynamic one on synthetic queries and keys: noise with a drift in time and a few keys that all queries like."""
    if not rule.dynamic:
        return rule.select(grid)
    generator = torch.Generator().manual_seed(7)
    place = torch.linspace(0, 3.0, grid.kv_len)[:, None]
    near = torch.cat([place.cos(), place.sin()], -1) * 3
    noise = torch.randn(2, grid.kv_len, 6, generator=generator)
    liked = (torch.rand(grid.kv_len, 1, generator=generator) < 0.003) * 9.0
    q = torch.cat([near, noise[0], torch.ones_like(place)], -1)
    k = torch.cat([near, noise[1], liked], -1)
    if isinstance(rule, Reuse):  # whatever an earlier layer chose
        return rule.select(grid, left=PooledTopk(keep=LengthLaw(b=0.15)).select(grid, q, k))
    return rule.left_behind(rule.select(grid, q, k), grid, q, k)


def _runs(tiles: Bool[Tensor, "M N"], step: float) -> str:
    """One rectangle per run of tiles in a row."""
    parts = []
    for row, line in enumerate(tiles.tolist()):
        column = 0
        while column < len(line):
            end = column
            while end < len(line) and line[end]:
                end += 1
            if end > column:
                parts.append(
                    f"M{column * step:.2f} {row * step:.2f}h{(end - column) * step:.2f}v{step:.2f}h{-(end - column) * step:.2f}z"
                )
            column = max(end, column + 1)
    return "".join(parts)
