"""The report stage: one self-contained HTML page, and the SVG figures of the README."""

from sparsesearch.report.corridor import corridor
from sparsesearch.report.page import render
from sparsesearch.report.plot import Curve, Panel, plot

__all__ = ["Curve", "Panel", "corridor", "plot", "render"]
