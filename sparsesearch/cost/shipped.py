"""The shipped cost model of a device of this machine, so that what is measured on it can stand beside its prediction."""

import torch

from sparsesearch.cost import CostModel, load_cost_model
from sparsesearch.cost.calibrate import short_name
from sparsesearch.cost.device.model import DeviceCostModel
from sparsesearch.cost.device.sibling import SIBLINGS
from sparsesearch.presets import preset_names


def shipped_for(device: str | torch.device) -> CostModel | None:
    """`cpu.json` for a CPU; for a GPU the file of that product, or what its measured sibling tells; None if nobody has measured either."""
    where = torch.device(device)
    if where.type != "cuda":
        return load_cost_model(where.type) if where.type in preset_names("cost_models") else None
    found = torch.cuda.get_device_properties(where)
    name = short_name(found.name)
    if name in preset_names("cost_models"):
        return load_cost_model(name)
    model = load_cost_model(name) if name in SIBLINGS else None
    alike = isinstance(model, DeviceCostModel) and model.workers.count == found.multi_processor_count
    return model if alike else None  # a PCIe card of the same name has fewer multiprocessors
