"""The shipped cost model of the device that a bench runs on, so that every measured time stands beside its prediction."""

import torch

from sparsesearch.cost import load_cost_model
from sparsesearch.cost.calibrate import short_name
from sparsesearch.cost.device.model import DeviceCostModel
from sparsesearch.presets import preset_names


def shipped_costs() -> DeviceCostModel | None:
    """None if nobody has measured this device."""
    name = short_name(torch.cuda.get_device_name())
    if name not in preset_names("cost_models"):
        return None
    model = load_cost_model(name)
    return model if isinstance(model, DeviceCostModel) else None
