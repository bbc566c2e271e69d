"""What a plan does while decoding: how many heads follow each rule there, what they keep of the cache and what a token reads of it."""

from collections import Counter
from dataclasses import dataclass

from sparsesearch.block_mask import BlockGrid
from sparsesearch.plan import Plan


@dataclass(frozen=True)
class DecodeShare:
    """One rule while decoding, behind a prompt of some length.

    Attributes:
        rule: its label.
        heads: query heads that follow it.
        kept: share of the keys that stay cached for such a head.
        read: share of the keys that it reads for one token; the most, where the data decide.
    """

    rule: str
    heads: int
    kept: float
    read: float


def decode_shares(plan: Plan, length_tokens: int) -> tuple[DecodeShare, ...]:
    """The rules of decoding, those of most heads first; empty where the plan says nothing of decoding that its prefill does not."""
    rules = Counter(plan.decode_rule(module, head) for module, head, _ in plan.heads())
    if plan.layout is not None or not (plan.decode or any(rule.decodes for rule in rules)):
        return ()
    grid = BlockGrid(1, length_tokens, plan.block_tokens)
    found = [
        DecodeShare(rule.label, count, rule.kept_tokens(grid) / length_tokens, rule.step_tokens(grid) / length_tokens)
        for rule, count in rules.items()
    ]
    return tuple(sorted(found, key=lambda share: (-share.heads, share.rule)))
