"""sidlab: understand, teach and explore semantic-ID generative recommendation and the pruning of
its input tokens.

An item is a short sequence of codes, its semantic ID (SID); a user's history is its items' SIDs; a
transformer generates the SID of the next item. RASTP and STAMP keep only the history tokens that
matter; STAMP also predicts further items ahead.

Axes, everywhere: B batch, N history tokens, K kept tokens, H heads, d hidden size, L levels of an
SID, W codes per level, S auxiliary steps. Masks are 1 for real and 0 for padding. Ratios are kept
fractions. Layers count from 1.

Names are imported on first use, so `import sidlab` itself costs next to nothing.
"""

import importlib

_HOME = {
    "Catalogue": "data.catalogue",
    "load_catalogue": "data.load",
    "catalogue_from_events": "data.events",
    "save_catalogue": "data.folder",
    "algr_catalogue": "data.algr",
    "ResidualKMeans": "sids.residual_kmeans",
    "RQVAE": "sids.rqvae",
    "OPQ": "sids.opq",
    "SidTable": "sids.table",
    "TokenPruner": "pruning",
    "PruningConfig": "pruning",
    "Strategy": "strategy",
    "MapConfig": "map_loss",
    "SidT5": "models.t5",
    "SidT5Config": "models.t5",
    "SidQwen": "models.qwen",
    "SidQwenConfig": "models.qwen",
    "TrainConfig": "config",
    "train": "training",
    "recommend": "decoding",
    "sweep": "research.runs",
}
# Modules by their last name, wherever they stand.
_ROOMS = {
    name: f"{room}.{name}" if room else name
    for room, names in (
        ("", "saliency pruning map_loss windows strategy metrics decoding training viz"),
        ("fast", "kernels"),
        ("research", "baselines compare cost papers runs sid_tables"),
        ("course", "demo probe teach"),
    )
    for name in names.split()
}

__all__ = [*_HOME, *_ROOMS]
__version__ = "0.1.0"


def __getattr__(name):
    if name in _HOME:
        value = getattr(importlib.import_module(f"sidlab.{_HOME[name]}"), name)
    elif name in _ROOMS:
        value = importlib.import_module(f"sidlab.{_ROOMS[name]}")
    else:
        raise AttributeError(f"module 'sidlab' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__():
    return sorted({*globals(), *__all__})
