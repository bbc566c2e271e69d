"""Commands that measure a model: a profile, and its proxies."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from . import options as o
from . import pipelines, prune
from .errors import guarded
from .render import emit_json, pairs, progress_bar, say, table

if TYPE_CHECKING:
    from sparsesearch.profiling.record import Profile
    from sparsesearch.profiling.world import World
    from sparsesearch.search_space import SearchSpace


FOR_TEXT = (
    "block_tokens",
    "data",
    "text_column",
    "lengths",
    "num_samples",
    "num_probes",
    "revision",
    "trust_remote_code",
    "stream",
    "device_map",
    "seed",
)
"""Options of `profile` that mean nothing for diffusers pipelines, which are sampled as --run says."""
LARGE = "For models larger than a device"
DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
FOR_PIPELINES = ("run", "sensitivity", "under")
MOST_HOURS = 12
NOT_FOR_REMOVALS = ("revision", "trust_remote_code")
NOT_FOR_REMOVALS_ALONE = ("block_tokens", "text_column", "stream", "device_map")


def profile(
    context: typer.Context,
    model: o.Model,
    out: Annotated[Path, typer.Option("-o", "--out", help="Profile directory to write.")] = Path("profile"),
    space: Annotated[str, typer.Option(help="Search space: a shipped name or a YAML file.")] = "mixture",
    block_tokens: Annotated[
        int | None,
        typer.Option(help="Side of a tile; the space's own by default. 128 is cheaper per key on Hopper, and coarser."),
    ] = None,
    data: o.Data = "needle",
    text_column: Annotated[
        str, typer.Option(help="Field of a .jsonl, .parquet or hub dataset that holds the text.")
    ] = "text",
    lengths: o.Lengths = "2048",
    num_samples: Annotated[int, typer.Option(help="Sequences per length.", min=1)] = 6,
    num_probes: Annotated[
        int,
        typer.Option(
            help="Random probes of the output per sequence; more of them estimate losses more closely.", min=1
        ),
    ] = 4,
    device: o.Device = "cpu",
    dtype: o.Dtype = "auto",
    revision: o.Revision = None,
    trust_remote_code: o.TrustRemoteCode = False,
    learn_masks: Annotated[
        int,
        typer.Option(
            help="Also optimise mask gates for so many steps; criterion `learned`.", min=0, rich_help_panel=o.REMOVALS
        ),
    ] = 0,
    stream: Annotated[
        bool,
        typer.Option(
            "--stream",
            help="One layer at a time from safetensors, activations on disk below --out.",
            rich_help_panel=LARGE,
        ),
    ] = False,
    device_map: Annotated[
        str | None,
        typer.Option(
            help="Spread the model over devices by accelerate: auto, balanced, sequential.", rich_help_panel=LARGE
        ),
    ] = None,
    run: o.RunFile = None,
    sensitivity: Annotated[
        Literal["none", "layer", "head"],
        typer.Option(
            help="Replay the run per layer or head to learn what its errors matter.", rich_help_panel=o.PIPELINES
        ),
    ] = "none",
    under: Annotated[
        Path | None,
        typer.Option(help="Profile while this plan runs, on the activations it meets.", rich_help_panel=o.PIPELINES),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted profile.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it would take, and stop.")] = False,
    seed: o.Seed = 0,
    json: o.Json = False,
) -> None:
    """Score every candidate rule in every head. Under torchrun, processes share the sequences between them."""
    if pipelines.is_pipeline(model):
        _in_one_process("diffusers pipelines")
        o.refuse_given(context, "is not for diffusers pipelines", *FOR_TEXT, "learn_masks")
        pipelines.profile(
            model, out, run, space=space, sensitivity=sensitivity, under=under, device=device, dtype=dtype, resume=resume,
            dry_run=dry_run, json=json,
        )  # fmt: skip
        return
    o.refuse_given(context, f"is for diffusers pipelines, and {model} is none", *FOR_PIPELINES)
    from sparsesearch.profiling.estimate import estimate
    from sparsesearch.profiling.record import summary
    from sparsesearch.profiling.world import World, own_device

    menu, wanted = _menu(context, space, block_tokens, stream, device_map), o.parsed_lengths(lengths)
    origin: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    if dry_run:
        needs = estimate(
            model, menu, wanted, num_samples=num_samples, num_probes=num_probes, stream=stream, device=o.device_name(device), dtype=dtype,
            **origin,
        )  # fmt: skip
        emit_json(needs) if json else _show_needs(model, needs)
        return
    if menu.pruning is not None:
        _in_one_process("spaces that remove")
        prune.profile_cuts(
            model, menu.pruning, out, device=device, dtype=dtype, data=data, length=max(wanted), num_samples=num_samples,
            num_probes=num_probes, learn_masks=learn_masks, resume=resume, seed=seed, json=json,
        )  # fmt: skip
        if len(menu.candidates) == 1:
            return
    if stream:
        _in_one_process("--stream")
    if device_map is not None:
        _in_one_process("--device-map")
    world = World.joined()
    try:
        found = _profiled(
            model, menu, wanted, out, world,
            loading={"dtype": dtype, "device": o.present_device(own_device(device, world)), **origin},
            sampling={"data": data, "text_column": text_column, "num_samples": num_samples, "seed": seed},
            num_probes=num_probes, stream=stream, device_map=device_map, resume=resume,
        )  # fmt: skip
        if world.rank == 0:
            content = summary(found)
            emit_json(content) if json else pairs(f"profile in {out}", content)
    finally:
        world.leave()


def _show_needs(model: str, needs: dict[str, Any]) -> None:
    """What a profile takes, and what makes it take less where that is more than half a day."""
    pairs(f"a profile of {model} needs", needs)
    hours = needs.get("time_s_on_this_cpu", 0) / 3600
    if hours > MOST_HOURS:
        say(
            f"on this CPU that is {hours:.0f} hours: run it on a GPU (--device cuda), or take shorter --lengths, fewer --num-samples, or a smaller "
            "--space such as duo_attention"
        )


def _in_one_process(what: str) -> None:
    """Refuse processes that would all do the same."""
    from sparsesearch.profiling.world import launched

    if launched() > 1:
        raise typer.BadParameter(
            f"processes share the sequences of a model that each of them holds, but torchrun started {launched()} for {what}. Start one."
        )


def _menu(
    context: typer.Context, space: str, block_tokens: int | None, stream: bool, device_map: str | None
) -> "SearchSpace":
    """The space in the blocks asked for; options that contradict it or each other are refused."""
    from sparsesearch.search_space import SearchSpace

    if stream and device_map is not None:
        raise typer.BadParameter("holds one layer at a time, so no --device-map goes with it.", param_hint="--stream")
    if device_map not in (None, *DEVICE_MAPS):
        raise typer.BadParameter(
            f"must be one of {', '.join(DEVICE_MAPS)}, but got {device_map!r}.", param_hint="--device-map"
        )
    menu = SearchSpace.load(space)
    menu = menu if block_tokens is None else menu.in_blocks_of(block_tokens)
    if menu.pruning is None:
        o.refuse_given(context, f"is for spaces that remove, and {space} does not", "learn_masks")
    else:
        alone = NOT_FOR_REMOVALS_ALONE if len(menu.candidates) == 1 else ()
        o.refuse_given(context, f"is not for spaces that remove, such as {space}", *NOT_FOR_REMOVALS, *alone)
    return menu


def _profiled(
    model: str,
    menu: "SearchSpace",
    lengths: list[int],
    out: Path,
    world: "World",
    *,
    loading: dict[str, Any],
    sampling: dict[str, Any],
    num_probes: int,
    stream: bool,
    device_map: str | None,
    resume: bool,
) -> "Profile":
    """Load the model as asked for, make its calibration sequences, profile."""
    from sparsesearch.calibration import check_context, load
    from sparsesearch.profiling.run import Request, profile_model
    from sparsesearch.profiling.streamed_model import open_streamed
    from sparsesearch.profiling.streaming import profile_streamed
    from sparsesearch.runtime.fingerprint import describe
    from sparsesearch.runtime.loading import load_model, load_tokenizer

    source = sampling.pop("data")
    origin = {name: loading[name] for name in ("revision", "trust_remote_code")}

    def request_of(info: Any, config: Any, tokenizer: Any) -> Request:
        check_context(config, lengths)
        sets = {length: load(source, tokenizer, length_tokens=length, **sampling) for length in lengths}
        return Request(info, menu, sets, num_probes=num_probes, seed=sampling["seed"])

    with progress_bar() as progress:
        if stream:
            streamed = open_streamed(model, **loading)
            request = request_of(streamed.info, streamed.model.config, load_tokenizer(model, **origin))
            return profile_streamed(streamed, request, out, resume=resume, progress=progress)
        live, tokenizer = load_model(model, device_map=device_map, with_plan=False, **loading)
        request = request_of(describe(live, model), live.config, tokenizer)
        return profile_model(live, request, out, resume=resume, progress=progress, world=world)


def validate_proxy(
    profile: o.ProfileDir,
    model: o.OptionalModel = None,
    num_plans: Annotated[int, typer.Option(help="Whole plans to draw and measure.", min=10)] = 60,
    num_sequences: Annotated[int, typer.Option(help="Held-out sequences per plan.", min=1)] = 12,
    unit: Annotated[o.Unit, typer.Option(help="What decides.")] = "query_head",
    device: o.Device = "cpu",
    seed: o.Seed = 0,
    json: o.Json = False,
) -> None:
    """Measure how well each proxy ranks whole plans. The figure is Kendall's tau."""
    from dataclasses import asdict

    from sparsesearch import calibration
    from sparsesearch.profiling.record import Profile
    from sparsesearch.proxy_validation import validate_proxies
    from sparsesearch.runtime.loading import load_model

    if prune.has_cuts(profile):
        prune.validate_cuts(profile, model, num_plans=num_plans, num_sequences=num_sequences, seed=seed, json=json)
    if prune.only_cuts(profile):
        return
    opened = Profile.load(profile)
    name = model or opened.manifest.base_model.name_or_path
    live, tokenizer = load_model(name, device=o.present_device(device), with_plan=False)
    length = max(opened.manifest.lengths)
    held_out = calibration.load(
        "needle", tokenizer, length_tokens=length, num_samples=num_sequences, seed=seed, split="heldout"
    )
    with progress_bar() as progress:
        found = validate_proxies(
            live,
            opened,
            held_out.samples,
            num_plans=num_plans,
            granularity=unit,
            seed=seed,
            progress=progress,
        )
    if json:
        emit_json(asdict(found))
        return
    truths = list(next(iter(found.tau.values())))
    table(
        f"Kendall's tau over {len(found.plans)} plans at {length} tokens",
        ["proxy", *truths],
        [[proxy, *(row[truth] for truth in truths)] for proxy, row in found.tau.items()],
    )


def register(app: typer.Typer) -> None:
    """Add this file's commands."""
    for name, command in (
        ("profile", profile),
        ("validate-proxy", validate_proxy),
    ):
        app.command(name)(guarded(command))
