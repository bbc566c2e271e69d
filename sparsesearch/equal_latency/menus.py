"""Parts of the space of the family on trial, each searched by itself."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from sparsesearch.cost.base import CostModel
from sparsesearch.equal_latency.ladders import Ladder, SearchedLadder, ladders, question_of
from sparsesearch.measured_front import FAMILIES
from sparsesearch.profiling.record import Profile
from sparsesearch.rules import Rule
from sparsesearch.search_space import SearchSpace
from sparsesearch.workload import Workload


@dataclass(frozen=True)
class Menu:
    """A part of the family on trial that is searched by itself, and how much its answers weigh.

    Additive losses flatter some rules: heads that attend to nothing lose more together than the sum of what each loses alone, and bitmaps fit
    the text that they were made from. Which part of the space is best at a device and a budget is therefore decided by
    replaying each part's plan on calibration sequences that were not profiled.
    """

    bitmaps: bool = True
    silent_heads: bool = True
    dynamic: bool = True
    answer_weight: float = 1.0

    @property
    def label(self) -> str:
        """What it leaves out."""
        parts = {"bitmaps": self.bitmaps, "silent heads": self.silent_heads, "dynamic rules": self.dynamic}
        left_out = [name for name, there in parts.items() if not there]
        *most, last = left_out or [""]
        menu = f"without {', '.join(most)}{' and ' if most else ''}{last}" if left_out else "all rules"
        return menu if self.answer_weight == 1 else f"{menu}, answers x {self.answer_weight:g}"

    def allows(self, rule: Rule) -> bool:
        """Whether a rule is in it."""
        silent = rule.rest != "drop"
        return not (
            (rule.needs_calibration and not self.bitmaps)
            or (silent and not self.silent_heads)
            or (rule.dynamic and not self.dynamic)
        )


NOT_DYNAMIC = Menu(dynamic=False)
STATIC = Menu(bitmaps=False, silent_heads=False, dynamic=False)
MENUS = (
    Menu(),
    Menu(bitmaps=False, dynamic=False),
    *(replace(STATIC, answer_weight=weight) for weight in (0.1, 0.3, 1.0, 3.0, 8.0)),
)
ANSWERS = "mixture, answers"
"""The mixture for those whose tasks are judged by their answers, which weigh as in `FOR_ANSWERS` wherever its plans are found, chosen or improved.

Additive losses of so much weight can mislead: on needle-7m at density 0.3 their optimum lost more at answers than that of weight 1 (KL there 0.031
against 0.009). So it may take a plan of any part in `AROUND_ANSWERS`, if replays say so."""
FOR_ANSWERS = replace(STATIC, answer_weight=20.0)
AROUND_ANSWERS = replace(FOR_ANSWERS, silent_heads=True)


def answer_weight_of(family: str) -> float:
    """How much answers count in the loss by which a family's plans are chosen and improved."""
    return FOR_ANSWERS.answer_weight if family == ANSWERS else 1.0


def family_ladders(
    profile: Profile, families: Sequence[str], workload: Workload, cost_model: CostModel
) -> dict[str, Ladder]:
    """The ladder of every family, in their order; see `ladders`."""
    others = [family for family in families if family != ANSWERS]
    found = ladders(profile, others, workload, cost_model)
    if ANSWERS in families:
        found |= {ANSWERS: menu_ladders(profile, "mixture", (FOR_ANSWERS,), workload, cost_model)[FOR_ANSWERS.label]}
    return {family: found[family] for family in families}


def spaces_of(
    profile: Profile, first: str, ladder_of: Mapping[str, Ladder], workload: Workload, cost_model: CostModel
) -> dict[str, tuple[SearchedLadder, ...]]:
    """The spaces in which steps improve every searched family's plans, the smallest first.

    Of the family on trial also its space without dynamic rules: where the optimum of the whole has none, steps do not ask for them, whose tiles are chosen anew
    on every sequence.
    """
    spaces: dict[str, tuple[SearchedLadder, ...]] = {
        family: (ladder,) for family, ladder in ladder_of.items() if isinstance(ladder, SearchedLadder)
    }
    if first in spaces:
        spaces[first] = (*menu_ladders(profile, first, (NOT_DYNAMIC,), workload, cost_model).values(), *spaces[first])
    if ANSWERS in spaces:
        spaces[ANSWERS] += tuple(menu_ladders(profile, first, (AROUND_ANSWERS,), workload, cost_model).values())
    return spaces


def menu_ladders(
    profile: Profile, family: str, menus: Sequence[Menu], workload: Workload, cost_model: CostModel
) -> dict[str, SearchedLadder]:
    """A ladder for every part of a family's space, by label; parts that leave out nothing that was profiled are not repeated."""
    name, _, granularity = FAMILIES[family]
    manifest = profile.manifest
    whole = manifest.candidates if name is None else SearchSpace.load(name).candidates
    found: dict[str, SearchedLadder] = {}
    seen = set()
    for menu in menus:
        rules = tuple(rule for rule in whole if menu.allows(rule))
        if (rules, menu.answer_weight) not in seen:
            seen.add((rules, menu.answer_weight))
            part = SearchSpace(family, "", menu.label, manifest.block_tokens, granularity, rules)
            question = question_of(part, granularity, workload, cost_model, menu.answer_weight)
            found[menu.label] = SearchedLadder(profile, question)
    return found
