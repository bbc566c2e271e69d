"""Cost models: what a unit's attention takes on a device, in seconds."""

from pathlib import Path

from sparsesearch.artifacts import read_text
from sparsesearch.cost.base import CostModel, DecodeWork, UnitWork
from sparsesearch.cost.device.model import DeviceCostModel
from sparsesearch.cost.device.sibling import SIBLINGS, sibling_table
from sparsesearch.cost.device.table import FORMAT as DEVICE_FORMAT
from sparsesearch.cost.device.table import DeviceTable
from sparsesearch.cost.roofline import DATASHEETS, roofline
from sparsesearch.cost.table import CostTable, TableCostModel
from sparsesearch.errors import SpecError, nearest
from sparsesearch.presets import preset_names, preset_path

__all__ = ["NAME_ONE", "CostModel", "DecodeWork", "UnitWork", "caveat", "cost_model_names", "load_cost_model"]

DERIVED, ROOFLINE = "derived:", "roofline:"
NAME_ONE = (
    "Pass --device with cpu, h200, h100, roofline:b200 or the like, or a file that `sparsesearch calibrate` wrote."
)
"""What to do where seconds are asked for and no cost model was named."""


def cost_model_names() -> list[str]:
    """Every name that `load_cost_model` knows, measured ones first."""
    derived = [DERIVED + gpu for gpu in sorted(SIBLINGS)]
    return preset_names("cost_models") + derived + [ROOFLINE + gpu for gpu in sorted(DATASHEETS)]


def caveat(name: str | None) -> str:
    """What must stand beside the seconds of a cost model that nobody measured, by its name; empty for a measured one."""
    kind, _, gpu = (name or "").partition(":")
    match kind + ":":
        case "derived:" if gpu in SIBLINGS:
            return f"nobody has measured this device; its seconds are those of {SIBLINGS[gpu]} with the memory of {gpu}'s datasheet."
        case "roofline:":
            return "nobody has measured this device; its seconds are lower bounds from a datasheet."
    return ""


def load_cost_model(name_or_path: str | Path) -> CostModel:
    """A shipped model by name (`cpu`), a datasheet (`roofline:b200`), or a file that `sparsesearch calibrate` wrote.

    `h100` or `derived:h100`: what was measured on a sibling with the same multiprocessors, with this one's memory (`sibling_table`).

    Raises:
        SpecError: no model has that name; the message names the nearest one.
        ArtifactError: the file is missing or damaged.
    """
    name = str(name_or_path)
    if name.startswith(ROOFLINE):
        return roofline(name.removeprefix(ROOFLINE))
    if isinstance(name_or_path, Path) or name.endswith(".json"):
        return _opened(Path(name_or_path))
    gpu = name.lower().removeprefix(DERIVED)
    if gpu in SIBLINGS and gpu not in preset_names("cost_models"):
        table = DeviceTable.load(preset_path("cost_models", SIBLINGS[gpu]))
        return DeviceCostModel(sibling_table(table, gpu), measured=False)
    if name not in preset_names("cost_models"):
        if name.partition(":")[0] == "cuda":
            raise SpecError(
                f"a cost model must be called by what was measured, such as h200, and not by where torch runs ({name}). Known: "
                f"{', '.join(cost_model_names())}; or a file that `sparsesearch calibrate --device cuda` wrote."
            )
        if name.lower() in DATASHEETS:
            raise SpecError(
                f"a cost model must have been measured to be called {name!r}, but nobody has measured that GPU. Pass roofline:{name.lower()} "
                "for lower bounds from its datasheet, or the file that `sparsesearch calibrate` writes there."
            )
        raise SpecError(
            f"a cost model must be a shipped name or a .json file, but got {name!r}.{nearest(name, cost_model_names())}"
        )
    return _opened(preset_path("cost_models", name))


def _opened(path: Path) -> CostModel:
    """Of a CPU or of an accelerator, as the file says."""
    text = read_text(path)
    if f'"format": "{DEVICE_FORMAT}"' in text:
        return DeviceCostModel(DeviceTable.load(path))
    return TableCostModel(CostTable.load(path))
