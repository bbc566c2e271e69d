"""The shipped cost model of a device of this machine, so that what is measured on it can stand beside its prediction."""

import torch

from sparsesearch.cost import CostModel, load_cost_model
from sparsesearch.cost.calibrate import short_name
from sparsesearch.presets import preset_names


def shipped_for(device: str | torch.device) -> CostModel | None:
    """`cpu.json` for a CPU, the file of that product for a GPU; None if nobody has measured it."""
    where = torch.device(device)
    name = short_name(torch.cuda.get_device_name(where)) if where.type == "cuda" else where.type
    return load_cost_model(name) if name in preset_names("cost_models") else None
