"""What limits the recall on real data: one change at a time from the preset `long`, short runs of equal length and a few long ones.

    python results/levers.py ../shared/data/amazon-beauty [--updates 400]

The folder must hold a published SID table, semantic_ids.rkmeans_zcr.txt.gz. Resumable (runs/levers); writes results/levers.json.
"""

import argparse
import json
import pathlib

import sidlab
from sidlab.comparison import hardware, versions
from sidlab.sweeps import write_json

HERE = pathlib.Path(__file__).parent


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset")
    parser.add_argument("--updates", type=int, default=400)
    args = parser.parse_args()
    published = {"sids.file": str(pathlib.Path(args.dataset, "semantic_ids.rkmeans_zcr.txt.gz").absolute())}
    adamw, short = published | {"muon": None}, {"max_updates": args.updates, "epochs": 100, "eval_every": args.updates // 4}
    levers = {
        "AdamW, published SIDs": adamw | short,
        "SIDs: residual k-means on TF-IDF": {"muon": None} | short,
        "learning rate 3e-3": adamw | {"learning_rate": 3e-3} | short,
        "d_model 64": adamw | {"d_model": 64, "d_kv": 16} | short,
        "two decoder layers": adamw | {"num_decoder_layers": 2} | short,
        # What keeps a model from learning by heart only shows in a long run.
        "six epochs, AdamW": adamw, "six epochs, dropout 0.1": adamw | {"dropout": 0.1},
        "four epochs, learning rate 3e-3": adamw | {"learning_rate": 3e-3, "epochs": 4},
        "six epochs, Muon for the matrices, as in `long`": published,
    }
    frame = sidlab.sweep(list(levers.values()), "runs/levers", dataset=args.dataset, preset="long", seeds=1)
    rows = [{"lever": name, **row} for name, row in zip(levers, json.loads(frame.drop(columns="file").to_json(orient="records")))]
    command = f"python results/levers.py {args.dataset} --updates {args.updates}"
    write_json(HERE / "levers.json", {"command": command, "hardware": hardware(), "versions": versions(), "rows": rows})


if __name__ == "__main__":
    main()
