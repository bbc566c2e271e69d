"""`sparsesearch apply` on a diffusers model or pipeline directory: a copy that `from_pretrained` runs under its plans.

The plan lies in the component's config.json under a private key, which diffusers keeps through loading and saving; `sparse_plan.json` beside
it is a copy. Without `import sparsesearch` diffusers refuses the config (see `guard`). Weights are hard-linked.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparsesearch.artifacts import read_text, write_bytes
from sparsesearch.embedded_plan import embedded
from sparsesearch.errors import ArtifactError, PlanMismatchError, SpecError, nearest
from sparsesearch.plan import Plan
from sparsesearch.runtime.diffusion.guard import CONFIG_KEY, guarded
from sparsesearch.runtime.diffusion.live import AppliedTransformer
from sparsesearch.runtime.export import PLAN_FILE, check_target, complete_or_nothing, link_or_copy
from sparsesearch.runtime.fingerprint import parameters_sha256, plan_of_weights

_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".gguf")


def export_diffusers(
    plans: Mapping[str, Plan],
    source: Path,
    out: Path,
    *,
    overwrite: bool = False,
    allow_other_weights: bool = False,
) -> None:
    """Write a copy of a pipeline (or of a single model, whose component name is "") that carries plans.

    `out` appears complete or not at all. Weights share their bytes with the source: replace files, never edit them in place.

    Args:
        plans: component, such as `transformer` or `transformer_2`, -> its plan.
        source: a directory with model_index.json, or a model directory with config.json.
        out: directory to make.
        overwrite: replace a directory that is not empty.
        allow_other_weights: of a fine-tuned copy: the plan that is written is of its weights, and says for which it was searched.

    Raises:
        PlanMismatchError: a plan is for another model. `out` is as it was.
        ArtifactError: `source` is no such directory, or `out` is not empty.
        SpecError: no plan is given.
    """
    if not plans:
        raise SpecError("at least one component must get a plan. Name it with --component.")
    check_target(out, source, overwrite)
    plans = {name: plan_for_component(source, name, plan, allow_other_weights) for name, plan in plans.items()}
    with complete_or_nothing(out, overwrite) as staging:
        for file in sorted(path for path in source.rglob("*") if path.is_file()):
            target = staging / file.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            if file.suffix in _WEIGHT_SUFFIXES:
                link_or_copy(file, target)
            else:
                shutil.copyfile(file, target)
        for component, plan in plans.items():
            folder = staging / component
            config = json.loads(read_text(folder / "config.json"))
            carrying = guarded({**config, CONFIG_KEY: embedded(plan)})
            content = json.dumps(carrying, indent=2, sort_keys=True) + "\n"
            write_bytes(folder / "config.json", content.encode())
            plan.save(folder / PLAN_FILE)


def plan_for_component(source: Path, component: str, plan: Plan, allow_other_weights: bool = False) -> Plan:
    """Load one component, put the plan on it and take it off again; the plan of its weights.

    Raises:
        PlanMismatchError: there is no such component, or the plan is for another model.
        ArtifactError: it cannot be loaded.
    """
    folder = source / component
    if not (folder / "config.json").is_file():
        known = [path.parent.name for path in source.glob("*/config.json")]
        raise PlanMismatchError(f"{source} has no component {component!r}.{nearest(component, known)}")
    model = load_component(folder)
    AppliedTransformer(model, plan, "auto").remove()
    return plan_of_weights(plan, parameters_sha256(model), allow_other_weights=allow_other_weights)


def load_component(folder: Path) -> Any:
    """Load a diffusers model by the class that its config names, without a plan that it may carry.

    Raises:
        ArtifactError: diffusers has no such class, or files are missing.
    """
    import diffusers

    from sparsesearch.runtime.diffusion.loading import without_plans

    name = json.loads(read_text(folder / "config.json")).get("_class_name", "")
    kind = getattr(diffusers, name, None)
    if kind is None:
        raise ArtifactError(
            f"{folder}/config.json must name a class of diffusers, but names {name!r}. Update diffusers."
        )
    try:
        with without_plans():
            return kind.from_pretrained(folder)
    except OSError as error:
        raise ArtifactError(f"{folder}: the model could not be loaded: {error}") from error
