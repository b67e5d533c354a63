"""What a model that works gives up for free: pruned when it recommends, after layer 2, and nothing
trained; on all test users.

    python results/pruned.py MODEL ../shared/data/amazon-beauty [--keep 1/3 1/2]
        [--scorers rastp rastp-visible recent random]

MODEL: a folder that results/mature.py left, runs/mature/runs/NAME. Writes results/pruned-<data
set>-<architecture>.json with all ranks; what is there of the same model is not done again.
"""

import argparse
import fractions
import json
import pathlib

import numpy as np

import sidlab
from sidlab.files import write
from sidlab.metrics import paired_test, recall_at, summary
from sidlab.model_building import load_model, weights_digest
from sidlab.research.machine import hardware, versions
from sidlab.training import evaluate
from sidlab.windows import leave_one_out

HERE = pathlib.Path(__file__).parent


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("dataset")
    parser.add_argument("--keep", nargs="+", default=["1/3", "1/2"])
    parser.add_argument(
        "--scorers", nargs="+", default=["rastp", "rastp-visible", "recent", "random"]
    )
    args = parser.parse_args()
    model = load_model(args.model)
    catalogue = sidlab.load_catalogue(args.dataset)
    histories, targets = leave_one_out(catalogue.histories).cases("test")
    arch = model.config.model_type.removeprefix("sid_")
    path = HERE / f"pruned-{pathlib.Path(args.dataset).resolve().name}-{arch}.json"
    digest = weights_digest(args.model)
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    rows = [row for row in rows if row["model"] == digest]
    done = {(row["scorer"], row["keep"]) for row in rows}

    for scorer, keep in [
        (None, "1"),
        *((scorer, keep) for keep in args.keep for scorer in args.scorers),
    ]:
        if (scorer, keep) in done:
            continue
        model.set_pruning(
            None
            if scorer is None
            else sidlab.PruningConfig(keep=float(fractions.Fraction(keep)), scorer=scorer)
        )
        ranks = evaluate(model, histories, targets, beam=20)
        row = {
            "model": digest,
            "scorer": scorer,
            "keep": keep,
            **summary(ranks),
            "ranks": ranks.tolist(),
        }
        if rows:
            test = paired_test(recall_at(ranks, 10), recall_at(np.array(rows[0]["ranks"]), 10))
            row |= {"difference": test.difference, "interval": list(test.interval)}
        rows.append(row)
        content = {
            "command": f"python results/pruned.py {args.model} {args.dataset}",
            "arch": arch,
            "after_layer": 2,
            "dataset": pathlib.Path(args.dataset).resolve().name,
            "hardware": hardware(),
            "versions": versions(),
            "rows": rows,
        }
        write(path, json.dumps(content))
        print(f"{scorer} {keep}: {row['recall@10']:.4f} {row.get('interval', '')}", flush=True)


if __name__ == "__main__":
    main()
