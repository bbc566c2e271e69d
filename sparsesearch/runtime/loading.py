"""Finding and loading a model: hub id, local directory, GGUF file, or the embedded `needle-7m`."""

import json
import struct
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from sparsesearch.errors import ArtifactError, SpecError, UnsupportedModelError, nearest
from sparsesearch.presets import preset_names, preset_path
from sparsesearch.runtime.attention import NAME
from sparsesearch.runtime.configuration import plan_content
from sparsesearch.runtime.gguf_reading import parsed_once

DTYPES = ("auto", "float32", "bfloat16", "float16")


def embedded_models() -> dict[str, Path]:
    """Models that come with the package, by name."""
    return {name: preset_path("models", name) for name in preset_names("models")}


def locate(source: str | Path) -> Path | str:
    """The local path of a model, or its hub id.

    Raises:
        ArtifactError: it looks like a path but is not there, or the directory holds no model.
    """
    embedded = embedded_models()
    if str(source) in embedded:
        return embedded[str(source)]
    path = Path(source).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise ArtifactError(
                f"{path} must be a model directory or a .gguf file, but is another file. Give its directory."
            )
        return path
    if path.is_dir():
        if not (path / "config.json").is_file():
            packed = min(path.glob("*.gguf"), default=None)
            instead = "the directory that has one" if packed is None else f"the file {packed}"
            raise ArtifactError(f"{path} must hold a model, but has no config.json. Give {instead}.")
        return path
    text = str(source)
    if path.suffix == ".gguf" or text.startswith((".", "/", "~")) or text.count("/") > 1:
        raise ArtifactError(f"{path} must exist, but there is no such file or directory. Check the path.")
    return text


def load_model(
    source: str | Path,
    *,
    dtype: str = "auto",
    device: str = "cpu",
    device_map: str | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
    with_plan: bool = True,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model in evaluation mode, with its tokenizer.

    Args:
        source: hub id, local directory, GGUF file (dequantised), or `needle-7m`.
        dtype: `auto`, `float32`, `bfloat16` or `float16`; `auto` is float32 on the CPU, and the checkpoint's own elsewhere.
        device: where to put it.
        device_map: spread it over devices instead, by accelerate: `auto`, `balanced`, `sequential`.
        trust_remote_code: run code that comes with the checkpoint.
        revision: of a hub id.
        with_plan: whether a patched checkpoint comes with its plan active. False loads what it was made from: what plans are searched on and
            compared with must be dense, or every difference from "dense" would be zero.

    Raises:
        ArtifactError: it is missing, incomplete, damaged, or cannot be reached.
        SpecError: unknown dtype.
        UnsupportedModelError: it is no causal language model of a known architecture.
    """
    is_gguf = Path(source).suffix == ".gguf"
    with parsed_once() if is_gguf else nullcontext():
        # first: it takes moments to find missing, and the weights may take minutes
        tokenizer = load_tokenizer(source, trust_remote_code=trust_remote_code, revision=revision)
        model = load_weights(
            source,
            dtype=dtype,
            device=device,
            device_map=device_map,
            trust_remote_code=trust_remote_code,
            revision=revision,
            with_plan=with_plan,
        )
        return model, tokenizer


def load_tokenizer(
    source: str | Path, *, trust_remote_code: bool = False, revision: str | None = None
) -> PreTrainedTokenizerBase:
    """A model's tokenizer alone; arguments and errors as of `load_model`."""
    place = locate(source)
    _refuse_diffusers(place)
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    if isinstance(place, Path) and place.suffix == ".gguf":
        options["gguf_file"], place = place.name, place.parent
    tokenizer: PreTrainedTokenizerBase = _load(AutoTokenizer, source, place, **options)
    if not tokenizer("a", add_special_tokens=False)["input_ids"]:  # what transformers makes of a config alone
        raise _no_tokenizer(source)
    return tokenizer


def _no_tokenizer(source: str | Path) -> ArtifactError:
    return ArtifactError(
        f"{source}: there must be a tokenizer beside the weights, but there is none that makes tokens of text. Put tokenizer.json and "
        "tokenizer_config.json of this model into its directory."
    )


def load_weights(
    source: str | Path,
    *,
    dtype: str = "auto",
    device: str = "cpu",
    device_map: str | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
    with_plan: bool = True,
) -> PreTrainedModel:
    """Like `load_model`, without the tokenizer."""
    if dtype not in DTYPES:
        raise SpecError(f"unknown dtype {dtype!r}.{nearest(dtype, DTYPES)}")
    place = locate(source)
    _refuse_diffusers(place)
    origin: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    options = dict(origin)
    on_cpu = device == "cpu" and (device_map is None or not torch.cuda.is_available())
    options["dtype"] = "float32" if dtype == "auto" and on_cpu else dtype
    if isinstance(place, Path) and place.suffix == ".gguf":
        _require_gguf(place)
        # packed GGUF loading would choose an attention of its own
        options |= {"gguf_file": place.name, "attn_implementation": "sdpa"}
        place = place.parent
    elif not with_plan:
        # a config that is told the type "auto" keeps that word for its type
        options["config"] = _without_plan(_load(AutoConfig, source, place, **origin))
    if device_map is not None:
        _require_accelerate(device_map)
        options["device_map"] = device_map
    model: PreTrainedModel
    model, found = _load(AutoModelForCausalLM, source, place, output_loading_info=True, **options)
    if found["missing_keys"]:  # transformers would fill them with random numbers and say so in its log alone
        missing = sorted(found["missing_keys"])
        raise ArtifactError(
            f"{source} must hold every weight of a {type(model).__name__}, but lacks {len(missing)}, {missing[0]} first. "
            "Fetch the model again, or give a checkpoint with its language-model head."
        )
    if device_map is None:
        model.to(device)  # type: ignore[arg-type]
    model.train(False)
    return model


def _without_plan(config: PretrainedConfig) -> PretrainedConfig:
    """The config of the model that a patched checkpoint was made from; the attention is transformers' choice again."""
    if plan_content(config) is not None:
        for part in (config, *(getattr(config, name, None) for name in config.sub_configs)):
            if part is not None:
                part.__dict__.pop(NAME, None)
                part.__dict__.pop("attn_implementation", None)
                part._attn_implementation = None
    return config


def _refuse_diffusers(place: Path | str) -> None:
    if isinstance(place, Path) and place.is_dir():
        config = (place / "config.json").read_text(encoding="utf-8")
        if '"_class_name"' in config:
            raise UnsupportedModelError(
                f"{place.name} must be a causal language model here, but is a diffusers model. See `sparsesearch quickstart --video` and "
                "sparsesearch.apply_diffusers."
            )


def _load(kind: Any, source: str | Path, place: Path | str, **options: Any) -> Any:
    """`kind.from_pretrained`, with errors that say what to do."""
    what = {AutoTokenizer: "tokenizer", AutoConfig: "config"}.get(kind, "model")
    given = {key: value for key, value in options.items() if value is not None}
    once = parsed_once() if "gguf_file" in given else nullcontext()
    try:
        with once:
            return kind.from_pretrained(str(place), **given)
    except json.JSONDecodeError as error:
        raise ArtifactError(
            f"{source}: a JSON file of the {what} is damaged ({error}). Fetch the model again."
        ) from error
    except SafetensorError as error:
        raise ArtifactError(
            f"{source}: a weight file is damaged ({_first_line(error)}). Fetch or make the model again."
        ) from error
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise ArtifactError(
            f"{source}: the weights must have the shapes that config.json says, but have others. Fetch or make the model again."
        ) from error
    except (OSError, HFValidationError, struct.error) as error:
        if isinstance(place, Path):
            raise ArtifactError(f"{source}: the {what} could not be loaded: {_first_line(error)}") from error
        raise ArtifactError(
            f"{source!r} must be a local directory, a .gguf file, {', '.join(embedded_models())}, or a model on the hub that can be "
            f"reached or is cached, but its {what} was not found: {_first_line(error)} Check the name, or the network (HF_HUB_OFFLINE)."
        ) from error
    except ValueError as error:
        message = _first_line(error)
        if "trust_remote_code" in message or "custom code" in message:
            raise ArtifactError(
                f"{source} carries its own code. Read it, then pass --trust-remote-code (trust_remote_code=True)."
            ) from error
        if "backend tokenizer" in message:
            raise _no_tokenizer(source) from error
        raise UnsupportedModelError(
            f"{source}: the {what} is of a kind that transformers cannot load here: {message}"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _require_accelerate(device_map: str) -> None:
    if find_spec("accelerate") is None:
        raise ArtifactError(f"device map {device_map!r} needs accelerate. Install it: pip install accelerate.")


def _require_gguf(path: Path) -> None:
    missing = [name for name in ("gguf", "accelerate") if find_spec(name) is None]
    if missing:
        raise ArtifactError(
            f"{path} needs {' and '.join(missing)} to be read. Install them: pip install 'sparsesearch[gguf]'."
        )
