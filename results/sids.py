"""How much each part of an item's text should weigh in its embedding: `python results/sids.py
FOLDER …`, a minute a data set.

Residual k-means, 3 levels of 256 codes. No network is trained; three things tell what the SIDs are
worth: how many items share one, whether near neighbours share a prefix, and how often an item and
the next one in a training history do.
"""

import sys

import numpy as np
import pandas as pd

import sidlab
from sidlab.data.catalogue import WEIGHTS, text_parts
from sidlab.data.text import text_embeddings
from sidlab.windows import leave_one_out

GRID = [
    (1, 1, 1, 1),
    (1, 0.5, 0.5, 0.5),
    (1, 0.5, 0.25, 0.25),
    (1, 0.25, 0.25, 0.25),
    (1, 0.1, 0.1, 0.1),
    (1, 0, 0, 0),
]


def judge(embeddings, train) -> dict:
    """A row of the table."""
    encoder = sidlab.ResidualKMeans(levels=3, width=256, seed=0).fit(embeddings)
    table = sidlab.SidTable(encoder.encode(embeddings), width=256, collisions="share")
    report = table.report(encoder, embeddings)
    row = {
        "share their SID": report["collision_rate"],
        "error": report["per_level"][2]["reconstruction_error"],
    }
    before, after = (
        np.concatenate([history[part] - 1 for history in train])
        for part in (slice(-1), slice(1, None))
    )
    before, after = before[before != after], after[before != after]
    for level in (1, 2):
        _, prefix = np.unique(table.codes[:, :level], axis=0, return_inverse=True)
        usage = [
            np.bincount(prefix[items], minlength=prefix.max() + 1) / len(items)
            for items in (before, after)
        ]
        row[f"neighbours, {level}"] = report["per_level"][level - 1]["neighbour_overlap"]
        row[f"next item, {level}"] = (prefix[before] == prefix[after]).mean()
        row[f"chance, {level}"] = usage[0] @ usage[1]
    return row


def main():
    for folder in sys.argv[1:]:
        catalogue = sidlab.load_catalogue(folder)
        train = leave_one_out(catalogue.histories).train
        parts = text_parts(catalogue.items)
        rows = {"whole text": judge(text_embeddings(catalogue.items["text"], cache=False), train)}
        for weights in GRID:
            rows[" ".join(f"{weight:g}" for weight in weights)] = judge(
                text_embeddings(parts, cache=False, weights=weights), train
            )
        print(
            f"{catalogue.name}; weights of"
            f" {', '.join(WEIGHTS)}\n{pd.DataFrame(rows).T.round(4).to_string()}\n",
            flush=True,
        )


if __name__ == "__main__":
    main()
