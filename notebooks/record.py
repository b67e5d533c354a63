"""Run the sweeps that the notebooks show as recorded data: python notebooks/record.py [granularity]
[map] [frontier] [--folder runs/record]

Each writes notebooks/data/NAME.json: {"hardware", "command", "preset", "seeds", "busy", "rows"}; a
row is a setting: recall over all seeds with intervals over users and seeds, medians of costs,
predicted "mflops" to train on a window, the mean learning curve ("curve"), where SIDs vary, their
report ("sids"), its "number" and "against": the difference of recall@10 to each of the rows on the
same users and seeds, [mean, low, high] (None to itself). "busy": whether other jobs ran beside. A
sweep that was stopped goes on where it was.
"""

import argparse
import json
import pathlib

import numpy as np

import sidlab
from sidlab.metrics import paired_test, ranks_of, recall_at
from sidlab.research.compare import hardware
from sidlab.research.cost import cost
from sidlab.research.runs import COSTS, config_with, fitted, metrics_of, sid_table, write_json
from sidlab.windows import Windows, leave_one_out

HERE = pathlib.Path(__file__).parent
SWEEPS = {
    "granularity": [
        {"sids.levels": levels, "sids.width": width, "sids.collisions": "extend"}
        for levels in (1, 2, 3, 4)
        for width in (4, 8, 16, 32)
    ],
    # Curves worth looking at: an evaluation every 25 updates.
    "map": (
        [{"eval_every": 25}]
        + [
            {"eval_every": 25, "map.unit": unit, "map.steps": steps, "map.weight": weight}
            for unit, all_steps, weights in (
                ("item", (1, 2, 4), (0.1, 0.3, 1.0)),
                ("token", (1, 2), (0.3,)),
            )
            for steps in all_steps
            for weight in weights
        ]
    ),
    "frontier": (
        [{}]
        + [
            {"pruning.scorer": scorer, "pruning.keep": keep}
            for scorer in ("rastp", "recent", "random")
            for keep in (0.1, 0.2, 1 / 3, 0.5, 0.7)
        ]
    ),
}


def pooled(name, folder, preset, seeds):
    """The rows of a sweep, and whether other jobs ran beside."""
    settings = SWEEPS[name]
    catalogue = sidlab.load_catalogue("planted")
    frame = sidlab.sweep(settings, folder, preset=preset, seeds=seeds)
    windows = leave_one_out(catalogue.histories).train
    rows = []
    hits = []
    busy = False
    for number, setting in enumerate(settings):
        runs = frame.iloc[number :: len(settings)]  # one a seed
        found = [json.loads(pathlib.Path(file).read_text()) for file in runs["file"]]
        ranks = ranks_of(found)
        busy = busy or any(one["busy"] for one in found)
        hits.append(np.array([recall_at(of_seed, 10) for of_seed in ranks]))  # [S, U]
        sids = {
            key.removeprefix("sids."): value
            for key, value in setting.items()
            if key.startswith("sids.")
        }
        table, report = sid_table(catalogue, folder, sids)
        config = fitted(
            config_with(
                preset,
                0,
                {key: value for key, value in setting.items() if not key.startswith("sids.")},
            ),
            catalogue,
        )
        rows.append(
            {
                "number": number,
                **dict.fromkeys(key for one in settings for key in one),
                **setting,
                **metrics_of(ranks),
                **{what: float(runs[what].median()) for what in COSTS},
                "mflops": (
                    cost(
                        config, table.widths, Windows(windows, config.max_items, config.windows)
                    ).training
                    / 1e6
                ),
                "curve": {
                    what: np.mean([one["curve"][what] for one in found], axis=0).tolist()
                    for what in found[0]["curve"]
                },
                **({"sids": report} if sids else {}),
            }
        )
    for row, own in zip(rows, hits):
        tests = [
            paired_test(own, other, resamples=1000) if other is not own else None for other in hits
        ]
        row["against"] = [test and [test.difference, *test.interval] for test in tests]
    return rows, busy


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", default=list(SWEEPS), metavar="|".join(SWEEPS))
    parser.add_argument("--folder", default="runs/record")
    parser.add_argument("--preset", default="quick")
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    for name in args.names:
        rows, busy = pooled(name, pathlib.Path(args.folder) / name, args.preset, args.seeds)
        (HERE / "data").mkdir(exist_ok=True)
        write_json(
            HERE / "data" / f"{name}.json",
            {
                "hardware": hardware(),
                "preset": args.preset,
                "seeds": args.seeds,
                "busy": busy,
                "command": (
                    f"python notebooks/record.py {name} --preset {args.preset} --seeds {args.seeds}"
                ),
                "rows": rows,
            },
        )


if __name__ == "__main__":
    main()
