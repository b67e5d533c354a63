"""Figures and explorers: pure functions from data to a plotly Figure, and live widgets around them.
Names are imported on first use.
"""

import importlib

from sidlab.checks import from_extra

# Asked for here, so that whatever of this room is imported, an error names the extra.
with from_extra("course"):
    import anywidget  # noqa: F401
    import ipywidgets  # noqa: F401
    import plotly  # noqa: F401

_HOME = {
    "Explorer": "explorer",
    "PruningExplorer": "pruning",
    "AttentionExplorer": "attention",
    "SidExplorer": "sids",
    "TrainingMonitor": "training",
    "FrontierExplorer": "frontier",
    "DilutionExplorer": "recorded",
    "MapExplorer": "recorded",
    "CostCalculator": "cost",
    "PaddingExplorer": "padding",
    "QuirkExplorer": "quirks",
}

__all__ = [*_HOME, "use_theme"]


def __getattr__(name):
    if name == "use_theme":
        return importlib.import_module("sidlab.figures.theme").use_theme
    if name not in _HOME:
        raise AttributeError(f"module 'sidlab.viz' has no attribute {name!r}")
    module = importlib.import_module(f"sidlab.viz.{_HOME[name]}")
    globals()[name] = value = getattr(module, name)
    return value


def __dir__():
    return sorted({*globals(), *__all__})
