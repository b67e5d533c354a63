"""Published numbers that a comparison shows beside its own, each with its source.

Leave-one-out on the Amazon 2014 5-core sets. Nobody published a deviation or an interval. The spread between honest
reproductions of TIGER is larger than any gain the pruning papers report, so read a difference to these rows with care.
"""

import pathlib

import pandas as pd

from sidlab.metrics import METRICS

_TIGER = "paper (arXiv 2305.05065)"
_BASE = "RASTP's baseline (arXiv 2511.16943)"
_RASTP = "paper (arXiv 2511.16943)"
_GENREC = "GenRec, no de-duplication"
_CORNAC = "cornac, Sentence-T5 base"

# data set → rows of (method, source, recall@5, recall@10, ndcg@5, ndcg@10)
_ROWS = {
    "amazon-beauty": (
        ("TIGER", _TIGER, .0454, .0648, .0321, .0384),
        ("TIGER", _BASE, .0426, .0645, .0282, .0353),
        ("RASTP", _RASTP, .0441, .0656, .0289, .0358),
        ("TIGER", _GENREC, .0465, .0721, .0297, .0378),
        ("TIGER", _CORNAC, .0419, .0634, .0270, .0338),
        ("TIGER", "cornac, Sentence-T5 XXL", .0419, .0660, .0266, .0344),
        ("TIGER", "cornac, OpenAI embeddings", .0405, .0678, .0265, .0353),
        ("TIGER", "tiger-cf", .0376, .0582, .0252, .0319),
        ("RPG", "a user's rerun", .0505, .0761, .0353, .0436),
        ("SASRec", "cornac, tuned", .0508, .0740, .0348, .0423),
    ),
    "amazon-sports": (
        ("TIGER", _TIGER, .0264, .0400, .0181, .0225),
        ("TIGER", _BASE, .0196, .0289, .0128, .0158),
        ("RASTP", _RASTP, .0187, .0278, .0123, .0153),
        ("TIGER", _GENREC, .0266, .0414, .0176, .0224),
        ("TIGER", _CORNAC, .0240, .0394, .0155, .0204),
    ),
    "amazon-toys": (
        ("TIGER", _TIGER, .0521, .0712, .0371, .0432),
        ("TIGER", _BASE, .0345, .0499, .0238, .0287),
        ("RASTP", _RASTP, .0351, .0504, .0240, .0289),
        ("TIGER", _GENREC, .0420, .0647, .0280, .0350),
        ("TIGER", _CORNAC, .0362, .0583, .0237, .0308),
    ),
}

PUBLISHED = tuple(_ROWS)

# Training cost relative to each paper's own model without pruning, which pads (RASTP: always to 150 slots).
RASTP_CLAIMS = {"source": "RASTP, arXiv 2511.16943", "speedup": 1.36, "time_saved": .267}
STAMP_CLAIMS = {"source": "STAMP, arXiv 2604.05329", "speedup": (1.23, 1.38), "memory_saved": (.172, .547)}

# An unadvertised comparison in the history of RASTP's code, Beauty, recall@5: nothing done, and pooled to a third after layer 1, 2, 3.
RASTP_POOLING = {"none": .0427, 1: .0374, 2: .0400, 3: .0385}


def published(dataset: str) -> pd.DataFrame:
    """Published test results on `dataset` ("amazon-beauty", "amazon-sports", "amazon-toys", also with the year, or a folder of that name).

    Columns: method, source, recall@5, recall@10, ndcg@5, ndcg@10. Empty for any other data set."""
    rows = _ROWS.get(pathlib.PurePath(dataset).name.replace("-2014-", "-"), ())
    return pd.DataFrame(rows, columns=["method", "source", *METRICS])
