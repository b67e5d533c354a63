"""Published numbers that a comparison shows beside its own, each with its source.

Leave-one-out on the Amazon 2014 5-core sets. Nobody published a deviation or an interval. The
spread between honest reproductions of TIGER is larger than any gain the pruning papers report, so
read a difference to these rows with care.
"""

import pathlib

import pandas as pd

from sidlab.metrics import METRICS

_TIGER = "paper (arXiv 2305.05065)"
_BASE = "RASTP's baseline (arXiv 2511.16943)"
_RASTP = "paper (arXiv 2511.16943)"
_CORNAC = "cornac, Sentence-T5 base"

# data set → rows of (method, source, recall@5, recall@10, ndcg@5, ndcg@10)
_ROWS = {
    "amazon-beauty": (
        ("TIGER", _TIGER, 0.0454, 0.0648, 0.0321, 0.0384),
        ("TIGER", _BASE, 0.0426, 0.0645, 0.0282, 0.0353),
        ("RASTP", _RASTP, 0.0441, 0.0656, 0.0289, 0.0358),
        ("TIGER", _CORNAC, 0.0419, 0.0634, 0.0270, 0.0338),
        ("TIGER", "cornac, Sentence-T5 XXL", 0.0419, 0.0660, 0.0266, 0.0344),
        ("TIGER", "cornac, OpenAI embeddings", 0.0405, 0.0678, 0.0265, 0.0353),
        ("TIGER", "tiger-cf", 0.0376, 0.0582, 0.0252, 0.0319),
        ("RPG", "a user's rerun", 0.0505, 0.0761, 0.0353, 0.0436),
        ("SASRec", "cornac, tuned", 0.0508, 0.0740, 0.0348, 0.0423),
    ),
    "amazon-sports": (
        ("TIGER", _TIGER, 0.0264, 0.0400, 0.0181, 0.0225),
        ("TIGER", _BASE, 0.0196, 0.0289, 0.0128, 0.0158),
        ("RASTP", _RASTP, 0.0187, 0.0278, 0.0123, 0.0153),
        ("TIGER", _CORNAC, 0.0240, 0.0394, 0.0155, 0.0204),
    ),
    "amazon-toys": (
        ("TIGER", _TIGER, 0.0521, 0.0712, 0.0371, 0.0432),
        ("TIGER", _BASE, 0.0345, 0.0499, 0.0238, 0.0287),
        ("RASTP", _RASTP, 0.0351, 0.0504, 0.0240, 0.0289),
        ("TIGER", _CORNAC, 0.0362, 0.0583, 0.0237, 0.0308),
    ),
}

PUBLISHED = tuple(_ROWS)

# Training cost relative to each paper's own model without pruning, which pads (RASTP: always to 150
# slots).
RASTP_CLAIMS = {"source": "RASTP, arXiv 2511.16943", "speedup": 1.36, "time_saved": 0.267}
STAMP_CLAIMS = {
    "source": "STAMP, arXiv 2604.05329",
    "speedup": (1.23, 1.38),
    "memory_saved": (0.172, 0.547),
}

# An unadvertised comparison in the history of RASTP's code, Beauty, recall@5: nothing done, and
# pooled to a third after layer 1, 2, 3.
RASTP_POOLING = {"none": 0.0427, 1: 0.0374, 2: 0.0400, 3: 0.0385}


def data_name(dataset: str) -> str:
    """A data set's name without folder and year: of "x/amazon-2014-beauty" "amazon-beauty"."""
    return pathlib.PurePath(dataset).name.replace("-2014-", "-")


def published(dataset: str) -> pd.DataFrame:
    """Published test results on `dataset` ("amazon-beauty", "amazon-sports", "amazon-toys", also
    with the year, or a folder of that name).

    Columns: method, source, recall@5, recall@10, ndcg@5, ndcg@10. Empty for any other data set.
    """
    rows = _ROWS.get(data_name(dataset), ())
    return pd.DataFrame(rows, columns=["method", "source", *METRICS])
