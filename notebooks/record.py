"""Run the sweeps that the notebooks show as recorded data: python notebooks/record.py [granularity] [map] [frontier] [--folder runs/record]

Each writes notebooks/data/NAME.json: {"hardware", "command", "preset", "rows"}; a row is one run with its settings, seed, recall with
intervals, costs, the learning curve ("curve") and, where SIDs vary, their report ("sids"). A sweep that was stopped goes on where it was.
"""

import argparse
import json
import pathlib

import sidlab
from sidlab.comparison import hardware
from sidlab.sweeps import sid_table, write_json

HERE = pathlib.Path(__file__).parent
ADAMW = {"muon": None}  # as these were recorded
# Single runs: their intervals are those of other users, not of other seeds.
SWEEPS = {
    "granularity": {"sids.levels": [1, 2, 3, 4], "sids.width": [4, 8, 16, 32], "sids.collisions": ["extend"]},
    # Curves worth looking at: an evaluation every 25 updates.
    "map": [{"eval_every": 25}] + [{"eval_every": 25, "map.unit": unit, "map.steps": steps, "map.weight": weight}
                                   for unit, all_steps, weights in (("item", (1, 2, 4), (0.1, 0.3, 1.0)), ("token", (1, 2), (0.3,)))
                                   for steps in all_steps for weight in weights],
    # Longer than `quick`, since methods differ little before.
    "frontier": [{"epochs": 4}] + [{"epochs": 4, "pruning.scorer": scorer, "pruning.keep": keep} for scorer in ("rastp", "recent", "random")
                                   for keep in (0.1, 0.2, 1 / 3, 0.5, 0.7)],
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(SWEEPS), metavar="|".join(SWEEPS))
    parser.add_argument("--folder", default="runs/record")
    parser.add_argument("--preset", default="quick")
    args = parser.parse_args()
    for name in args.names:
        folder = pathlib.Path(args.folder) / name
        grid = SWEEPS[name] | {"muon": [None]} if isinstance(SWEEPS[name], dict) else [ADAMW | setting for setting in SWEEPS[name]]
        frame = sidlab.sweep(grid, folder, preset=args.preset, seeds=1)
        catalogue, rows = sidlab.load_catalogue("planted"), []
        for row in json.loads(frame.to_json(orient="records")):
            row["curve"] = json.loads(pathlib.Path(row.pop("file")).read_text())["curve"]
            sids = {key.removeprefix("sids."): value for key, value in row.items() if key.startswith("sids.")}
            if sids:
                row["sids"] = sid_table(catalogue, folder, sids)[1]
            rows.append(row)
        (HERE / "data").mkdir(exist_ok=True)
        write_json(HERE / "data" / f"{name}.json", {"hardware": hardware(), "preset": args.preset,
                                                    "command": f"python notebooks/record.py {name} --preset {args.preset}", "rows": rows})


if __name__ == "__main__":
    main()
