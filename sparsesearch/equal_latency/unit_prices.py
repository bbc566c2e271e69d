"""Prices of single heads that add up to what a replay of whole layers says."""

from dataclasses import replace

import numpy as np

from sparsesearch.cost.layer_costs import LayerCosts
from sparsesearch.cost.predict import predict_layers
from sparsesearch.model_shapes import ModelShape, heads_alone
from sparsesearch.plan import uniform_plan
from sparsesearch.profiling.record import Profile
from sparsesearch.rules import LengthLaw, Rule
from sparsesearch.rules.dense import Dense
from sparsesearch.rules.sink_window import SinkWindow
from sparsesearch.rules.zero import Zero
from sparsesearch.scores import ScoreTable
from sparsesearch.scoring import Question
from sparsesearch.shapes import Unit
from sparsesearch.workload import Workload


def replayed(profile: Profile, question: Question, table: ScoreTable) -> ScoreTable:
    """The table with every static candidate priced at its share of a layer whose heads all follow it, as a replayed schedule has it.

    A line through tiles sees neither tiles that serve half of their queries (a short window costs up to 1.5 times its line) nor that a dense
    head beside sparse ones runs in their tiles, not in the model's own dense attention. What every layer pays that is not all dense counts for
    no head. Rules whose tiles differ from head to head cost what windows of as many tiles do beyond the line.

    Unchanged where the cost model does not know whole layers.
    """
    costs = question.cost_model
    if not isinstance(costs, LayerCosts) or len(question.workloads) != 1:
        return table
    layers = _Layers(profile, question.workloads[0], costs)
    rules = [profile.manifest.candidates[profile.labels.index(label)] for label in table.candidates]
    units = [unit for unit in table.units if isinstance(unit, Unit)]
    heads = np.array([float(len(unit.heads)) for unit in units])
    tiles = table.costs["density"][:, :, 0] / heads[:, None]
    extra = np.zeros_like(table.loss)
    of_windows: dict[float, float] = {}
    for column, rule in enumerate(rules):
        if not (rule.dynamic or rule.needs_calibration):
            extra[:, column] = layers.head_s(rule) * heads - table.costs["latency"][:, column, 0]
            if isinstance(rule, SinkWindow):
                of_windows[float(tiles[0, column])] = float((extra[:, column] / heads).mean())
    known = sorted(of_windows)
    for column, rule in enumerate(rules):
        if (rule.dynamic or rule.needs_calibration) and known:
            extra[:, column] = np.interp(tiles[:, column], known, [of_windows[count] for count in known]) * heads
    prices = {
        name: cost + extra[:, :, None] if name in ("latency", "ttft") else cost for name, cost in table.costs.items()
    }
    return replace(table, costs=prices)


def bound_for(profile: Profile, question: Question, table: ScoreTable, share: float) -> float | None:
    """The budget, as a share of the table's dense, whose plans take a share of the dense model's attention by these prices.

    None where the cost model does not know whole layers, and heads therefore cost what the table said.
    """
    costs = question.cost_model
    if not isinstance(costs, LayerCosts) or len(question.workloads) != 1:
        return None
    layers = _Layers(profile, question.workloads[0], costs)
    count = len(profile.manifest.base_model.modules)
    spent_s = share * count * layers.dense_s - count * layers.empty_s
    return max(0.0, spent_s / float(table.dense_cost("latency")[0]))


class _Layers:
    """Layers whose heads all follow one rule."""

    def __init__(self, profile: Profile, workload: Workload, costs: LayerCosts) -> None:
        self._info, self._block_tokens = profile.manifest.base_model, profile.manifest.block_tokens
        self._shape: ModelShape = heads_alone(self._info.name_or_path, self._info.geometry)
        self._workload, self._costs = workload, costs
        key = "layer_s", workload, id(costs)
        known: tuple[LayerCosts, dict[str, float]] = profile.derived.setdefault(key, (costs, {}))
        self._known = known[1]  # beside the costs, so that no others get their id
        self.empty_s = self._layer_s(Zero())

    @property
    def dense_s(self) -> float:
        """A layer in the model's own dense attention."""
        return self._layer_s(Dense())

    def head_s(self, rule: Rule) -> float:
        """Seconds of one head beyond what an empty layer takes."""
        if rule.kind == "dense":  # in tiles, as beside sparse heads
            rule = SinkWindow(sink=0, window=LengthLaw(a=self._workload.prompt_tokens))
        return max(0.0, self._layer_s(rule) - self.empty_s) / self._shape.num_heads

    def _layer_s(self, rule: Rule) -> float:
        if rule.label not in self._known:
            lengths = (self._workload.prompt_tokens,)
            plan = uniform_plan(self._info, rule, block_tokens=self._block_tokens, lengths_tokens=lengths)
            self._known[rule.label] = predict_layers(plan, self._shape, self._workload, self._costs)[0].attention_s
        return self._known[rule.label]
