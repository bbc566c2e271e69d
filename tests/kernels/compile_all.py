"""Compile shipped kernel configurations for sm_90a and print one line of JSON each. Run by test_compile_gate.py with the interpreter off."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from triton.experimental.gluon import language as gl

from sparsesearch.kernels import (
    device_clock,
    device_deal,
    device_schedule,
    hopper_attention,
    hopper_prefill,
    triton_bounds,
    triton_cache,
    triton_decode,
    triton_index,
    triton_means,
    triton_prefill,
    triton_probe,
    triton_rotate,
    triton_running_mean,
    triton_select,
    triton_skinny,
)
from sparsesearch.kernels.compile_report import CompileReport, compile_report
from sparsesearch.kernels.skinny_tiling import EIGHT_ROWS, ONE_ROW, ONE_SHORT_ROW, SIXTEEN_ROWS


def hopper(
    head_dim: int,
    keys: int,
    *,
    causal: bool = True,
    long: bool = False,
    dtype: str = "bf16",
    bias: bool = False,
    masks: bool = False,
) -> CompileReport:
    config = hopper_prefill.CONFIGS[head_dim, keys]
    padded = hopper_prefill.padded_head_dim(head_dim)

    def descriptor(rows: int) -> str:
        layout = gl.NVMMASharedLayout.get_default_for([1, 1, rows, padded], gl.bfloat16)
        return f"tensordesc<{dtype}[1, 1, {rows}, {padded}],{layout!r}>"

    kernel = hopper_attention.hopper_attention
    types = dict.fromkeys(kernel.arg_names, "i32") | {
        **dict.fromkeys(("q_desc", "o_desc"), descriptor(64)),
        **dict.fromkeys(("k_desc", "v_desc"), descriptor(config.tile_keys)),
        **dict.fromkeys(("o_ptr", "parts"), f"*{dtype}"),
        **dict.fromkeys(("lse_ptr", "lse_parts", "bias"), "*fp32"),
        **dict.fromkeys(("masks", "words", "tiles", "entries", "bin_ptr"), "*i32"),
        "scale": "fp32",
    }
    constants = hopper_prefill.constants(
        config, num_heads=32, group=4, head_dim=head_dim, num_keys=hopper_prefill.LONG_KEYS - (not long), causal=causal, bias=bias, masks=masks
    )  # fmt: skip
    return compile_report(kernel, types, constants, options=hopper_prefill.OPTIONS)


def portable(head_dim: int, block: int, *, masks: bool = False) -> CompileReport:
    kernel = triton_prefill.tile_list_attention
    types = dict.fromkeys(kernel.arg_names, "i32") | {
        **dict.fromkeys(("q", "k", "v", "out", "parts"), "*bf16"),
        **dict.fromkeys(("lse", "lse_parts", "bias"), "*fp32"),
        **dict.fromkeys(("masks", "words", "tiles", "entries", "bin_ptr"), "*i32"),
        "scale": "fp32",
    }
    constants = triton_prefill.constants(
        rows=block, keys=block, group=4, head_dim=head_dim, causal=True, bias=False, masks=masks, fp32=False
    )
    return compile_report(kernel, types, constants, options=triton_prefill.options(block, block, head_dim))


def decode(page_tokens: int, num_pairs: int) -> CompileReport:
    kernel = triton_decode.ragged_decode_parts
    types = dict.fromkeys(kernel.arg_names, "i32") | {
        **dict.fromkeys(("q", "k", "v"), "*bf16"),
        **dict.fromkeys(("parts", "lse_parts"), "*fp32"),
        "kv_start": "*i64",
        "kv_lens": "*i32",
        "table": "*i32",
        "scale": "fp32",
    }
    constants = triton_decode.constants(
        group=4, head_dim=128, num_pairs=num_pairs, page_tokens=page_tokens, fp32=False, early=True
    )
    options = triton_decode.OPTIONS | triton_decode.register_limit(num_pairs)
    return compile_report(kernel, types, constants, options=options)


def decode_merge(num_pairs: int, group: int) -> CompileReport:
    """The merge that waits beside the workers of many heads."""
    kernel = triton_decode.merge_decode_parts
    types = dict.fromkeys(kernel.arg_names, "i32") | {
        "out": "*bf16",
        "kv_lens": "*i32",
        **dict.fromkeys(("lse", "parts", "lse_parts"), "*fp32"),
    }
    shared = triton_decode.constants(
        group=group, head_dim=128, num_pairs=num_pairs, page_tokens=0, fp32=False, early=True
    )
    constants = {name: shared[name] for name in triton_decode.MERGE_CONSTANTS}
    warps, heads, cols, chunk = triton_decode.merge_shape(num_pairs, group, 396, 128)
    return compile_report(
        kernel,
        types,
        constants | {"HEADS": heads, "COLS": cols, "CHUNK": chunk},
        options=triton_decode.OPTIONS | {"num_warps": warps, "num_stages": 1},
    )


def schedule() -> Iterator[tuple[str, CompileReport]]:
    lists, deal = device_schedule.list_entries, device_deal.deal_tiles
    types = (
        dict.fromkeys(lists.arg_names, "*i32")
        | {"bank": "*u8", "chosen": "*u8"}
        | dict.fromkeys(lists.arg_names[9:], "i32")
    )
    constants: dict[str, Any] = {"BLOCK": 64, "ROWS": 128, "KEYS": 64, "CAUSAL": True, "CHUNK": 256}
    yield "schedule lists", compile_report(lists, types, constants, options={"num_warps": 1})
    types = dict.fromkeys(deal.arg_names, "*i32") | {"share": "*fp32"} | dict.fromkeys(deal.arg_names[10:], "i32")
    constants = {"CLASSES": 512, "WORKERS": 256, "CHUNK": 8192, "ROUNDS": 16, "BITS": 8}
    yield "schedule deal", compile_report(deal, types, constants, options={"num_warps": 16})


def index() -> CompileReport:
    kernel = triton_index._tile_mass
    types = dict.fromkeys(kernel.arg_names, "i32") | {"q": "*bf16", "k": "*bf16", "lse": "*fp32", "mass": "*fp32"}
    sizes = {"GROUP": 4, "BLOCK": 128, "BM": 64, "BN": 64, "D": 128, "DV": 128, "CAUSAL": True, "PRECISION": "tf32"}
    return compile_report(kernel, types, sizes, options={"num_warps": 4})


def select() -> CompileReport:
    kernel = triton_select._keep_best
    types = dict.fromkeys(kernel.arg_names, "i32") | {"scores": "*fp32", "kept": "*i8", "budget": "*i32"}
    return compile_report(kernel, types, {"CAUSAL": True, "N": 1024}, options={"num_warps": 4})


def pages(head_dim: int) -> Iterator[tuple[str, CompileReport]]:
    """What chooses pages by bounds; rows of 64k tokens."""
    kernel = triton_bounds.bound_scores
    types = dict.fromkeys(kernel.arg_names, "i32") | dict.fromkeys(kernel.arg_names[:4], "*bf16")
    types |= {"start": "*i64", "seen": "*i32", "kv_heads": "*i64", "bounded": "*i64", "scores": "*fp32"}
    sizes = {"BLOCK": 64, "SIZE": 4, "N": triton_bounds.BLOCKS, "D": head_dim, "DV": head_dim}
    yield f"page bounds {head_dim}", compile_report(kernel, types, sizes, options={"num_warps": 4})
    if head_dim == 128:
        kernel = triton_bounds.choose_pages
        types = dict.fromkeys(kernel.arg_names, "i32") | {"scores": "*fp32", "kv_heads": "*i64", "places": "*i64"}
        types |= dict.fromkeys(("seen", "budget", "table", "lens"), "*i32")
        sizes = {"BLOCK": 64, "SIZE": 4, "N": 1024}
        yield "page choice", compile_report(kernel, types, sizes, options={"num_warps": 4})


def append() -> CompileReport:
    kernel = triton_cache.append
    types = dict.fromkeys(kernel.arg_names, "*i32") | dict.fromkeys(("k", "v", "keys", "values"), "*bf16")
    types |= {"start": "*i64", "slots": "*i64"} | dict.fromkeys(kernel.arg_names[11:], "i32")
    return compile_report(kernel, types, triton_cache.constants(128, 128), options=triton_cache.OPTIONS)


def means(head_dim: int, block: int) -> CompileReport:
    kernel = triton_means.add_means
    types = dict.fromkeys(kernel.arg_names, "i32") | dict.fromkeys(("q", "k", "v", "spread", "out"), "*bf16")
    types |= {"tiles": "*u8", "bias": "*fp32", "lse": "*fp32", "scale": "fp32", "spread_scale": "fp32"}
    constants = triton_means.constants(block, head_dim, first=True)
    return compile_report(kernel, types, constants, options=triton_means.options(block, head_dim))


def running_means(head_dim: int) -> Iterator[tuple[str, CompileReport]]:
    tile = triton_running_mean.constants(head_dim)
    for name, kernel in (("sums", triton_running_mean.sum_blocks), ("means", triton_running_mean.put_means)):
        types = dict.fromkeys(kernel.arg_names, "i32") | {"v": "*bf16", "kv_heads": "*i32", "sums": "*fp32"}
        types |= {"members": "*i32", "out": "*bf16"} if name == "means" else {}
        group = {"GROUP": 4} if name == "means" else {}
        yield f"running {name} {head_dim}", compile_report(kernel, types, tile | group, options={"num_warps": 4})


def fill() -> CompileReport:
    kernel = triton_cache.fill
    types = dict.fromkeys(kernel.arg_names, "*i32") | dict.fromkeys(("k", "v", "keys", "values"), "*bf16")
    types |= {"start": "*i64"} | dict.fromkeys(kernel.arg_names[11:], "i32")
    constants = {**triton_cache.constants(128, 128), "ROWS": triton_cache.FILL_ROWS}
    return compile_report(kernel, types, constants, options=triton_cache.OPTIONS)


def probe() -> Iterator[tuple[str, CompileReport]]:
    parts, flags, paint = triton_probe.probe_parts, triton_probe.probe_flags, triton_probe.paint_lines
    types = dict.fromkeys(parts.arg_names, "i32") | {"q": "*bf16", "k": "*bf16", "heads": "*i32", "kv_heads": "*i32"}
    types |= {"tops": "*fp32", "sums": "*fp32", "scale": "fp32"}
    sizes: dict[str, Any] = {"BLOCK": 128, "BM": 64, "BN": 64, "D": 128, "DV": 128, "PRECISION": "tf32"}
    yield "probe parts", compile_report(parts, types, sizes, options={"num_warps": 4})
    types = dict.fromkeys(flags.arg_names, "i32") | {"tops": "*fp32", "sums": "*fp32", "flags": "*i8"}
    yield "probe flags", compile_report(flags, types, {"BLOCK": 128, "BM": 8, "N": 1024}, options={"num_warps": 8})
    types = dict.fromkeys(paint.arg_names, "i32") | {"flags": "*i8", "kept": "*i8"}
    yield "probe paint", compile_report(paint, types, {"N": 1024}, options={"num_warps": 4})


def step() -> Iterator[tuple[str, CompileReport]]:
    """A fused decoding step's kernels."""
    linear, scale, rotate = triton_skinny.skinny_linear, triton_skinny.scale_rows, triton_rotate.rotate_heads
    types = dict.fromkeys(linear.arg_names, "i32") | dict.fromkeys(linear.arg_names[:8], "*bf16")
    types |= {"squares": "*fp32", "squares_out": "*fp32", "eps": "fp32"}
    for rows, ways in ((1, ONE_ROW), (1, ONE_SHORT_ROW), (8, EIGHT_ROWS), (16, SIXTEEN_ROWS)):
        for most, tiling in ways:
            for use in ("norm before", "gate", "norm after"):
                after = use == "norm after"
                constants = triton_skinny.constants(
                    tiling, num_rows=rows, num_parts=256, paired=use == "gate", normed=not after, biased=True, added=after, scaled=after,
                    even=True, fp32=False, early=True,
                )  # fmt: skip
                options = triton_skinny.options(tiling, early=False)
                yield f"skinny {most} {rows} {use}", compile_report(linear, types, constants, options=options)
    types = dict.fromkeys(scale.arg_names, "*bf16") | {"squares": "*fp32", "num_cols": "i32"}
    yield "step scale", compile_report(scale, types, {"COLS": 4096, "EARLY": True}, options={"num_warps": 8})
    types = dict.fromkeys(rotate.arg_names, "*i32") | dict.fromkeys(rotate.arg_names[:8], "*bf16")
    types |= {"start": "*i64", "slots": "*i64", "eps": "fp32"}
    types |= {"num_kv_heads": "i32"}
    for cached in (True, False):
        constants = triton_rotate.constants(4, 128, 128, normed=True, cached=cached, early=True)
        yield f"step rotate {cached}", compile_report(rotate, types, constants, options=triton_rotate.OPTIONS)


def every() -> Iterator[tuple[str, CompileReport]]:
    for head_dim, keys in hopper_prefill.CONFIGS:
        yield f"gluon {head_dim} {keys} causal=True", hopper(head_dim, keys)
        if head_dim <= 64:
            yield f"gluon {head_dim} {keys} long", hopper(head_dim, keys, long=True)
    yield "clock", compile_report(device_clock.read_counters, {"out": "*i64"}, {}, options={"num_warps": 1})
    for head_dim, keys in ((64, 128), (128, 128), (256, 64)):  # of the others ptxas makes the same
        yield f"gluon {head_dim} {keys} causal=False", hopper(head_dim, keys, causal=False)
    yield "gluon 128 128 fp16", hopper(128, 128, dtype="fp16")
    yield "gluon 64 128 bias", hopper(64, 128, bias=True)
    yield "gluon 64 128 long bias", hopper(64, 128, long=True, bias=True)
    yield "gluon 64 128 long bitmaps", hopper(64, 128, long=True, masks=True)
    yield "gluon 128 128 bias", hopper(128, 128, bias=True)
    yield "gluon 64 128 bitmaps", hopper(64, 128, masks=True)
    yield "gluon 128 128 bitmaps", hopper(128, 128, masks=True)
    yield "triton 128 128 bitmaps", portable(128, 128, masks=True)
    for head_dim, block in ((64, 64), (64, 128), (128, 64), (128, 128)):
        yield f"triton {head_dim} {block}", portable(head_dim, block)
    for page_tokens in (0, 64):
        for num_pairs in (8, 64, triton_decode.THIN_PAIRS):
            yield f"decode {page_tokens} {num_pairs}", decode(page_tokens, num_pairs)
    for num_pairs, group in ((64, 4), (128, 4), (triton_decode.THIN_PAIRS, 4)):
        yield f"merge {num_pairs}", decode_merge(num_pairs, group)
    yield from schedule()
    yield "index mass", index()
    yield "select best", select()
    for head_dim in (64, 128):
        yield from pages(head_dim)
    yield "cache append", append()
    for head_dim, block in ((64, 64), (64, 128), (128, 64), (128, 128)):
        yield f"means {head_dim} {block}", means(head_dim, block)
    for head_dim in (64, 128):
        yield from running_means(head_dim)
    yield "cache fill", fill()
    yield from probe()
    yield from step()


def main() -> None:
    for name, report in every():
        row: dict[str, Any] = {"name": name, **asdict(report), "problems": report.problems}
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
