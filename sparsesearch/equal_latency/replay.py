"""A plan's attention time by replay of its schedules: what budgets start from before anything is timed."""

from sparsesearch.cost.layer_calls import CallCosts
from sparsesearch.cost.layer_costs import LayerCosts
from sparsesearch.cost.predict import predict_layers
from sparsesearch.model_shapes import heads_alone
from sparsesearch.plan import Plan
from sparsesearch.profiling.record import Profile
from sparsesearch.workload import Workload


class Replay:
    """Attention time of a plan over dense's, by replay of its schedules or calls: the sums that a search works with are off by several per cent."""

    def __init__(self, profile: Profile, workload: Workload, costs: LayerCosts | CallCosts) -> None:
        info = profile.manifest.base_model
        self._shape = heads_alone(info.name_or_path, info.geometry)
        self._workload, self._costs = workload, costs
        self._dense_s = self._seconds(None)

    def __call__(self, plan: Plan) -> float:
        """The share."""
        return self._seconds(plan) / self._dense_s

    def _seconds(self, plan: Plan | None) -> float:
        layers = predict_layers(plan, self._shape, self._workload, self._costs)
        return sum(layer.attention_s + layer.index_s for layer in layers)
