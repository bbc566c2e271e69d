"""Colours, light and dark, and the letter each rule kind carries, so that nothing is told by colour alone."""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Swatch:
    """How a kind looks: letter, fill and text colour in light and in dark."""

    letter: str
    light: str
    dark: str
    light_text: str = "#ffffff"
    dark_text: str = "#10151c"


_KNOWN = {
    "dense": Swatch("D", "#24447f", "#8fb0ff"),
    "sink_window": Swatch("W", "#17877a", "#45c4b4"),
    "vertical_slash": Swatch("V", "#b8620a", "#f0a54a"),
    "pooled_topk": Swatch("P", "#a63a72", "#e583b5"),
    "fixed_blocks": Swatch("F", "#6a4cb8", "#b39cf5"),
    "mean_value": Swatch("M", "#6b7683", "#98a4b1"),
    "dense_source": Swatch("S", "#3d5fa8", "#a9c1ff"),
    "reuse": Swatch("R", "#8a5a2b", "#d6a878"),
    "diagonal_band": Swatch("B", "#2c6e49", "#7fce9f"),
    "neighbourhood": Swatch("N", "#5a7d1e", "#b5d86a"),
    "stripes": Swatch("T", "#946c00", "#e3bd4f"),
    "radial_decay": Swatch("L", "#8f3f9e", "#d795e6"),
    "first_frames": Swatch("1", "#0f7c8f", "#5fd0e3"),
    "calibrated_tiles": Swatch("C", "#4b3fa0", "#a59cf0"),
    "union": Swatch("U", "#5c5346", "#c2b8a8"),
    "block_mass": Swatch("A", "#b0432f", "#f49a86"),
    "draft_attention": Swatch("Q", "#92304f", "#ee8fae"),
    "cached_rest": Swatch("O", "#7a4a12", "#deb078"),
    "pyramid": Swatch("3", "#44621f", "#b4d585"),
    "taylor_rest": Swatch("4", "#6a3f1d", "#d7a883"),
    "rectified_rest": Swatch("5", "#2b4c7e", "#93b5e8"),
    "pooled_mass": Swatch("6", "#7a2d5e", "#e094c6"),
    "cluster_mass": Swatch("7", "#31664f", "#84c9ab"),
    "frame_topk": Swatch("9", "#4d4a8c", "#a8a4ee"),
    "partition_gate": Swatch("8", "#6b5a10", "#d3bf5f"),
    "antidiagonal": Swatch("X", "#8c2f1b", "#f3a07f"),
    "bounds_topk": Swatch("Y", "#1b5f8c", "#7dbdf0"),
    "chunk_topk": Swatch("H", "#3f6b2a", "#a3d684"),
    "flex_prefill": Swatch("J", "#7d2f6f", "#e59bd8"),
    "power_lags": Swatch("2", "#2f5d62", "#86c9cf"),
    "segment_topk": Swatch("G", "#5b3b8f", "#c3a3f7"),
    "skip_softmax": Swatch("K", "#545b16", "#cdd563"),
    "strided_shards": Swatch("Z", "#8a2346", "#f58fb3"),
    "token_rows": Swatch("I", "#39506b", "#a5bcd9"),
    "tree_topk": Swatch("E", "#1e6b4f", "#6fd3ad"),
    "tri_shape": Swatch("^", "#1d5a73", "#79c4e0"),
    "zero": Swatch("0", "#dfe4ea", "#2f3843", "#4a5461", "#aeb8c3"),
}
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789+*#"
_OTHERS = (
    ("#3a7a24", "#8fcf74"),
    ("#a83232", "#f08f8f"),
    ("#1f7396", "#6fc3e8"),
    ("#7c6a13", "#d9c252"),
)

INK = """
:root{--bg:#f6f7f9;--card:#ffffff;--ink:#17202b;--soft:#566272;--line:#dde2e8;--faint:#eef1f4;--accent:#24447f;--good:#17724f;--bad:#a83232}
@media (prefers-color-scheme:dark){:root{--bg:#0f141a;--card:#171e27;--ink:#e8edf3;--soft:#a0acba;--line:#2b3541;--faint:#202934;
--accent:#8fb0ff;--good:#5fd0a0;--bad:#f08f8f}}
"""


def swatches(kinds: Iterable[str]) -> dict[str, Swatch]:
    """A swatch per kind; kinds this file does not know take the spare colours in alphabetical order and a letter that is free."""
    names = sorted(set(kinds))
    found = {name: _KNOWN[name] for name in names if name in _KNOWN}
    for index, name in enumerate(name for name in names if name not in _KNOWN):
        taken = {swatch.letter for swatch in found.values()}
        letter = next((one for one in name.upper() + _LETTERS if one not in taken), name[0].upper())
        found[name] = Swatch(letter, *_OTHERS[index % len(_OTHERS)])
    return found


def kind_css(kinds: Iterable[str]) -> str:
    """`.k-<kind>` fills and `.t-<kind>` text on top of them."""
    known = swatches(kinds)
    light = "".join(f".k-{k}{{fill:{s.light}}}.t-{k}{{fill:{s.light_text}}}" for k, s in known.items())
    dark = "".join(f".k-{k}{{fill:{s.dark}}}.t-{k}{{fill:{s.dark_text}}}" for k, s in known.items())
    return f"{light}\n@media (prefers-color-scheme:dark){{{dark}}}\n"


SERIES = (
    ("#24447f", "#8fb0ff"),
    ("#b8620a", "#f0a54a"),
    ("#17877a", "#45c4b4"),
    ("#a63a72", "#e583b5"),
    ("#6b7683", "#98a4b1"),
)


def series_css() -> str:
    """`.s<i>` for the i-th curve: stroke and fill."""
    light = "".join(f".s{i}{{--c:{colour}}}" for i, (colour, _) in enumerate(SERIES))
    dark = "".join(f".s{i}{{--c:{colour}}}" for i, (_, colour) in enumerate(SERIES))
    return f"{light}\n@media (prefers-color-scheme:dark){{{dark}}}\n"
