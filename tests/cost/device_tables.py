"""A made-up accelerator for tests: round numbers, every part of the file filled."""

from typing import Any

from sparsesearch.cost.device.table import (
    Correction,
    DecodeCost,
    DeviceTable,
    EstimatorCost,
    LinearCost,
    PairPoints,
    Peaks,
    Points,
    TileKernelCost,
)


def tile_cost(head_dim: int = 128, tile_keys: int = 128, **changes: float) -> TileKernelCost:
    fields: dict[str, Any] = {
        "launch_s": 3e-6, "tile_s": 1e-6, "block_s": 1.5e-6, "partial_s": 1e-7, "tile_power_s": 5e-7, "block_power_s": 1.7e-6,
        "merge_s": 4e-6, "piece_s": 1e-8,
    }  # fmt: skip
    share = head_dim * tile_keys / 128**2
    per_block = {name: fields[name] * share for name in ("block_s", "block_power_s", "partial_s")}
    return TileKernelCost(head_dim=head_dim, tile_rows=128, tile_keys=tile_keys, **(fields | per_block | changes))


def device_table(**changes: Any) -> DeviceTable:
    moved = Points(amounts=(1e3, 1e9), seconds=(2e-6, 1e-3))
    fields: dict[str, Any] = {
        "name": "made-up",
        "device": "an accelerator",
        "backend": "gluon",
        "dtype_bytes": 2,
        "num_workers": 132,
        "l2_bytes": 6e7,
        "cache_bytes": 3e7,
        "memory_bytes": 141e9,
        "peaks": Peaks(matmul_flop_per_s=7e14, copy_bytes_per_s=4e12, read_bytes_per_s=4e12, launch_s=2e-6),
        "tiles": tuple(tile_cost(head_dim, keys) for head_dim in (64, 128) for keys in (64, 128)),
        "decode": tuple(
            DecodeCost(
                head_dim=d,
                curves=(
                    PairPoints(pairs=8, points=Points(amounts=(1e6, 1e9), seconds=(1e-5, 2.6e-4))),
                    PairPoints(pairs=256, points=Points(amounts=(1e6, 1e9), seconds=(2e-5, 2.8e-4))),
                ),
                pair_s=5e-8,
                call_s=1e-5,
                byte_s=2.5e-13,
            )
            for d in (64, 128)
        ),
        "linear": tuple(
            LinearCost(outputs=n, inputs=k, points=Points(amounts=(1, 64, 8192), seconds=(s, s * 1.5, s * 50)))
            for n, k, s in ((4096, 4096, 1e-5), (14336, 4096, 3e-5))
        ),
        "pointwise": dict.fromkeys(("norm", "rotation", "gate", "residual", "transpose"), moved),
        "estimators": tuple(
            EstimatorCost(kind=kind, heads=8, points=Points(amounts=(4096, 65536), seconds=(1e-6, 2e-5)))
            for kind in ("pooled_topk", "vertical_slash")
        ),
        "prefill_relief": Correction(amounts=(4096, 65536), values=(0.1, 0.3)),
        "decode_glue_s": Correction(amounts=(1, 32), values=(1e-6, 2e-5)),
        "permutation": moved,
        "fit": {"held_out_tiles_mape": 0.02},
        "provenance": {"torch": "2"},
    }
    return DeviceTable(**(fields | changes))
