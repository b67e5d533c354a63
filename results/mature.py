"""Models of published quality on real data: the preset `long` with dense targets, on test users,
every item ranked, nothing excluded.

    python results/mature.py ../shared/data/amazon-beauty [--arch qwen]
        [--seeds 3] [--sids FILE] [--folder runs/mature]

Test users are scored once a run. Resumable; writes results/mature-<data set>-<architecture>.json
with the ranks of every run.
"""

import argparse
import json
import pathlib

import sidlab
from sidlab.files import write
from sidlab.metrics import METRICS, ranks_of
from sidlab.research.machine import hardware, versions
from sidlab.research.summary import metrics_of

HERE = pathlib.Path(__file__).parent


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dataset")
    parser.add_argument("--arch", default="qwen", help="qwen (decoder-only) or t5")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--sids",
        default="",
        help="a published SID file, or behaviour: text and training histories (default: text)",
    )
    parser.add_argument("--folder", default="runs/mature")
    args = parser.parse_args()
    setting = {"arch": args.arch, "targets": "all"} | (
        {f"sids.{name}": value for name, value in sidlab.sid_tables.sids_of(args.sids).items()}
    )
    frame = sidlab.sweep(
        [setting], args.folder, dataset=args.dataset, preset="long", seeds=args.seeds
    )

    found = [json.loads(pathlib.Path(file).read_text()) for file in frame["file"]]
    name = pathlib.Path(args.dataset).resolve().name
    sids = f" --sids {args.sids}" if args.sids else ""
    made_of = {"": "text", "behaviour": "text and behaviour"}.get(args.sids)
    published = pathlib.Path(args.sids).name.removeprefix("semantic_ids.").partition(".")[0]
    content = {
        "command": (
            f"python results/mature.py {args.dataset} --arch {args.arch} --seeds {args.seeds}{sids}"
        ),
        "dataset": name,
        "arch": args.arch,
        "sids": made_of or f"published, {published}",
        "preset": "long",
        "hardware": hardware(),
        "versions": versions(),
        "metrics": metrics_of(ranks_of(found)),
        "runs": [
            {
                "seed": seed,
                "precision": one["precision"],
                "busy": one["busy"],
                **{metric: one["row"][metric] for metric in METRICS},
                "train_seconds": one["row"]["train_seconds"],
                "updates": one["row"]["updates"],
                "curve": one["curve"],
                "ranks": one["ranks"],
            }
            for seed, one in enumerate(found)
        ],
    }
    kind = f"-{published}" if args.sids else ""
    write(HERE / f"mature-{name}-{args.arch}{kind}.json", json.dumps(content))


if __name__ == "__main__":
    main()
