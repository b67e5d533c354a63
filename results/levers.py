"""What makes a model work: one change at a time from the preset `long` with dense targets, short
runs, judged by all validation users.

    python results/levers.py ../shared/data/amazon-beauty [--arch qwen t5]
        [--epochs 4] [--sids FILE]

Test users are not looked at. A row is written as soon as its run ends, and is not run again:
results/levers.json.
"""

import argparse
import json
import pathlib

import numpy as np

import sidlab
from sidlab.files import write_json
from sidlab.metrics import paired_test, recall_at, summary
from sidlab.research.machine import hardware, versions
from sidlab.training import evaluate
from sidlab.windows import leave_one_out

HERE = pathlib.Path(__file__).parent
BOTH = {
    "as it is": {},
    "zero-initialised outputs: off": {"zero_init": False},
    "heads tied to the embedding": {"tie_embeddings": True},
    "level embeddings: off": {"level_embeddings": False},
    "residual dropout .3": {"residual_dropout": 0.3},
    "label smoothing .1": {"label_smoothing": 0.1},
    "AdamW alone": {"muon": None},
    "average of the last third": {"average_last": 1 / 3},
    "MAP, two steps, weight .3": {"map": sidlab.MapConfig(steps=2, weight=0.3)},
}
OF_ARCH = {
    "qwen": {
        "normed embeddings: off": {"embedding_norm": False},
        "residual dropout .1": {"residual_dropout": 0.1},
        "d_model 192": {"d_model": 192, "num_heads": 6, "d_ff": 576},
        "6 layers": {"num_layers": 6},
    },
    "t5": {
        "normed embeddings": {"embedding_norm": True, "embedding_init": 0.02},
        "query and key norm": {"qk_norm": True},
        "cross-attention bias: off": {"cross_bias": False},
        "heads that look back: off": {"position_init": None},
        "residual dropout .2": {"residual_dropout": 0.2},
    },
}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dataset")
    parser.add_argument("--arch", nargs="+", default=["qwen", "t5"])
    parser.add_argument("--epochs", type=float, default=4)
    parser.add_argument(
        "--sids",
        default="",
        help="a published SID file, or behaviour: text and training histories (default: text)",
    )
    args = parser.parse_args()
    catalogue = sidlab.load_catalogue(args.dataset)
    sids = sidlab.sid_tables.sids_of(args.sids)
    table, _ = sidlab.sid_tables.sid_table(catalogue, "runs/levers", sids)
    histories, targets = leave_one_out(catalogue.histories).cases("validation")

    path = HERE / "levers.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    rows = known.get("rows", [])
    about = {
        "dataset": pathlib.Path(args.dataset).resolve().name,
        "epochs": args.epochs,
        "table": table.fingerprint(),
    }
    if rows and known["about"] != about:
        raise SystemExit(f"{path} is of {known['about']}, asked for {about}: move it away first")
    done = {(row["arch"], row["lever"]) for row in rows}

    for arch in args.arch:
        for lever, changes in {**BOTH, **OF_ARCH[arch]}.items():
            if (arch, lever) in done:
                continue
            settings = {
                "arch": arch,
                "targets": "all",
                "epochs": args.epochs,
                "eval_every": 10**6,
            } | changes
            result = sidlab.train(
                sidlab.TrainConfig.preset("long", **settings), catalogue, table, progress=False
            )
            ranks = evaluate(result.model, histories, targets, beam=20)
            hits = recall_at(ranks, 10)
            row = {
                "arch": arch,
                "lever": lever,
                **summary(ranks),
                "train_seconds": result.timing["train_seconds"],
                "precision": result.precision,
                "loss": next(e["loss"] for e in reversed(result.log) if "loss" in e),
                "hits": np.packbits(hits.astype(bool)).tolist(),
            }
            first = next((r for r in rows if r["arch"] == arch), None)
            if first is not None:
                before = np.unpackbits(np.array(first["hits"], np.uint8))[: len(targets)].astype(
                    float
                )
                test = paired_test(hits, before)
                row |= {"difference": test.difference, "interval": list(test.interval)}
            rows.append(row)
            command = f"python results/levers.py {args.dataset} --epochs {args.epochs:g}" + (
                f" --sids {args.sids}" if args.sids else ""
            )
            write_json(
                path,
                {
                    "command": command,
                    "about": about,
                    "hardware": hardware(),
                    "versions": versions(),
                    "rows": rows,
                },
            )
            print(
                f"{arch}, {lever}: {row['recall@10']:.4f}, {row['train_seconds']:.0f} s", flush=True
            )


if __name__ == "__main__":
    main()
