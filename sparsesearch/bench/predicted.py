"""The shipped cost model of the GPU that a bench runs on, so that every measured time stands beside its prediction."""

from sparsesearch.cost.device.model import DeviceCostModel
from sparsesearch.cost.shipped import shipped_for


def shipped_costs() -> DeviceCostModel | None:
    """None if nobody has measured this device."""
    model = shipped_for("cuda")
    return model if isinstance(model, DeviceCostModel) else None
