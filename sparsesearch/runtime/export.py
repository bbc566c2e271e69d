"""`sparsesearch apply`: a checkpoint directory that plain `from_pretrained` runs under a plan."""

import copy
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from transformers import AutoModelForCausalLM, PreTrainedModel

from sparsesearch.artifacts import write_bytes
from sparsesearch.embedded_plan import embedded
from sparsesearch.errors import ArtifactError, SpecError, UnsupportedModelError
from sparsesearch.plan import Plan
from sparsesearch.runtime.attention import NAME
from sparsesearch.runtime.configuration import json_implementation, sparse_implementation
from sparsesearch.runtime.fingerprint import attention_sites, plan_of_weights, weights_sha256
from sparsesearch.runtime.live import check_geometry
from sparsesearch.runtime.loading import load_model, load_weights, locate
from sparsesearch.runtime.model_card import model_card

PLAN_FILE = "sparse_plan.json"
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
COMPANIONS = (
    "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model", "*.tiktoken",
    "chat_template*", "*.jinja", "*processor_config.json", "*.py", "LICENSE*", "NOTICE*",
)  # fmt: skip


@dataclass(frozen=True)
class ExportedCheckpoint:
    """What `export` wrote.

    Attributes:
        path: the directory.
        linked: weight files that share the base's bytes on disk (hard links).
        copied: weight files that had to be copied.
        heads_patched: query heads whose rule is not dense.
    """

    path: Path
    linked: tuple[str, ...]
    copied: tuple[str, ...]
    heads_patched: int


def export(
    plan: Plan,
    model: str | Path,
    out: str | Path,
    *,
    overwrite: bool = False,
    allow_other_weights: bool = False,
    dequantize: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
    command: str | None = None,
) -> ExportedCheckpoint:
    """Write a patched checkpoint: config with the plan inside, weights hard-linked, tokenizer, plan copy, model card.

    `out` appears complete or not at all. Weights share their bytes with the base: replace files, never edit them in place.

    Args:
        plan: the plan.
        model: local directory, hub id, embedded name, or (with `dequantize`) a GGUF file.
        out: directory to make.
        overwrite: replace a directory that is not empty.
        allow_other_weights: of a fine-tuned copy: the plan that is written is of its weights, and says for which it was searched.
        dequantize: for a GGUF file, write its weights dequantised.
        revision: of a hub id.
        trust_remote_code: run code that comes with the checkpoint, to look at its attention.
        command: command line, for the model card.

    Raises:
        PlanMismatchError: the plan is for another model.
        ArtifactError: the base has no safetensors weights, `out` is not empty, or the disk is full. `out` is as it was.
        SpecError: a GGUF base without `dequantize`.
    """
    out, place = Path(out), locate(model)
    check_target(out, place, overwrite)
    if isinstance(place, Path) and place.suffix == ".gguf":
        return _export_gguf(plan, place, out, dequantize, overwrite, allow_other_weights, command)
    source = place if isinstance(place, Path) else _download(place, revision)
    weights = _weight_files(source)
    base = load_weights(source, trust_remote_code=trust_remote_code)
    plan, implementation = _fitted(plan, base, allow_other_weights)
    with complete_or_nothing(out, overwrite) as staging:
        linked = [file.name for file in weights if link_or_copy(file, staging / file.name)]
        for pattern in COMPANIONS:
            for file in sorted(source.glob(pattern)):
                if file.is_file():
                    shutil.copy(file, staging / file.name)
        config = json.loads((source / "config.json").read_text(encoding="utf-8"))
        _write_ours(staging, plan, config, implementation, source / "README.md", command)
    copied = tuple(file.name for file in weights if file.name not in linked)
    return ExportedCheckpoint(out, tuple(linked), copied, _heads_patched(plan))


def check_target(out: Path, base: Path | str, overwrite: bool) -> None:
    """Refuse a place where a checkpoint cannot be written.

    Raises:
        ArtifactError: it is a file, holds files and `overwrite` is off, or lies inside the base model.
    """
    if out.exists() and not out.is_dir():
        raise ArtifactError(f"{out} must be a directory, but is a file. Choose another place with -o.")
    if isinstance(base, Path) and base.resolve() in (out.resolve(), *out.resolve().parents):
        raise ArtifactError(
            f"{out} must lie outside the base model {base}, but is it or inside it. Choose another place with -o."
        )
    if isinstance(base, Path) and out.resolve() in base.resolve().parents:
        raise ArtifactError(
            f"{out} must not hold the base model, but {base} lies inside it. Choose another place with -o."
        )
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise ArtifactError(f"{out} must be empty or new, but holds files. Choose another place, or pass --overwrite.")


def _download(hub_id: str, revision: str | None) -> Path:
    patterns = ["config.json", "README.md", *_WEIGHTS, *COMPANIONS]
    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=patterns))
    except (OSError, ValueError, HfHubHTTPError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise ArtifactError(
            f"{hub_id}: could not be fetched: {first} Check the name, or the network (HF_HUB_OFFLINE)."
        ) from error


def _weight_files(source: Path) -> list[Path]:
    found = sorted({file for pattern in _WEIGHTS for file in source.glob(pattern)})
    if not any(file.suffix == ".safetensors" for file in found):
        raise ArtifactError(
            f"{source} must hold safetensors weights, but has none. Load it with transformers and save_pretrained it to a new directory."
        )
    return found


def _fitted(plan: Plan, base: PreTrainedModel, allow_other_weights: bool) -> tuple[Plan, Any]:
    """The plan of these weights, compared with the model, and which of its parts are to run it."""
    sites = attention_sites(base)
    check_geometry(plan.base_model, sites)
    own = plan_of_weights(plan, weights_sha256(base), allow_other_weights=allow_other_weights)
    attending: list[Any] = [site.module.config for site in sites]
    return own, json_implementation(sparse_implementation(base.config, attending))


def _export_gguf(
    plan: Plan, file: Path, out: Path, dequantize: bool, overwrite: bool, allow_other_weights: bool, command: str | None
) -> ExportedCheckpoint:
    if not dequantize:
        raise SpecError(
            f"{file}: a patched checkpoint cannot be a GGUF file, because transformers cannot write one. Pass dequantize=True to write "
            "the weights dequantised to safetensors, or keep the plan file alone and use sparsesearch.apply."
        )
    base, tokenizer = load_model(file)
    plan, implementation = _fitted(plan, base, allow_other_weights)
    with complete_or_nothing(out, overwrite) as staging:
        _plain(base).save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        config = json.loads((staging / "config.json").read_text(encoding="utf-8"))
        _write_ours(staging, plan, config, implementation, file.parent / "README.md", command)
    weights = tuple(sorted(path.name for path in out.glob("*.safetensors")))
    return ExportedCheckpoint(out, (), weights, _heads_patched(plan))


def _plain(base: PreTrainedModel) -> PreTrainedModel:
    """The same weights in a model that knows nothing of its GGUF origin: transformers refuses to save one that does.

    Raises:
        UnsupportedModelError: transformers keeps this architecture's weights packed.
    """
    weights = base.state_dict()
    packed = [name for name, tensor in weights.items() if not tensor.is_floating_point()]
    if packed:
        raise UnsupportedModelError(
            f"GGUF weights must have been dequantised at load, but {packed[0]} is packed for model_type {base.config.model_type!r}. "
            "Use the original checkpoint."
        )
    config = copy.deepcopy(base.config)
    config.__dict__.pop("quantization_config", None)
    plain = _empty(config)
    plain.load_state_dict(weights, assign=True)
    return plain


def _empty(config: Any) -> PreTrainedModel:
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model


def _write_ours(
    staging: Path, plan: Plan, config: dict[str, Any], implementation: Any, base_card: Path, command: str | None
) -> None:
    """Config, plan copy and model card."""
    patched = {**config, "attn_implementation": implementation, NAME: embedded(plan)}
    write_bytes(staging / "config.json", (json.dumps(patched, indent=2, sort_keys=True) + "\n").encode())
    plan.save(staging / PLAN_FILE)
    write_bytes(staging / "README.md", model_card(plan, base_card, command).encode())


def _heads_patched(plan: Plan) -> int:
    return sum(rule.kind != "dense" for _, _, rule in plan.heads())


def link_or_copy(file: Path, target: Path) -> bool:
    """Hard-link a file (through symbolic links), or copy it where that is impossible; says whether it was linked."""
    try:
        target.hardlink_to(file.resolve())
    except OSError:
        shutil.copyfile(file, target)
        return False
    return True


@contextmanager
def complete_or_nothing(out: Path, overwrite: bool) -> Iterator[Path]:
    """A directory beside `out` that takes its place when the body ends well, and vanishes when it does not."""
    staging: Path | None = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
        yield staging
        staging.chmod(0o755)
        if out.exists() and overwrite:
            old = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}.old."))
            out.replace(old)
            try:
                staging.replace(out)
            except BaseException:
                old.replace(out)
                raise
            shutil.rmtree(old)
        else:
            staging.replace(out)
    except OSError as error:
        raise ArtifactError(
            f"{out} must be writable, but {error.strerror or error}; nothing was changed there. "
            "Free space or choose another folder with -o."
        ) from error
    finally:
        if staging is not None and staging.exists():
            shutil.rmtree(staging)
