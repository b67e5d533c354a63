"""Large catalogues, the whole path: vectors, SIDs, trie, some training, recommending with and
without pruning.

    python results/scale.py [--data ../shared/data] [--million]

Ciao (105,114 items) and Epinions (296,277) where they stand in the data folder, and with --million
the planted world with a million items. Each catalogue in a process of its own; what recommending
needs beyond model and trie is measured with and without pruning. Writes results/scale.json.
Training is short: quality is not the point.
"""

import argparse
import json
import os
import pathlib
import resource
import subprocess
import sys
import time

import numpy as np

import sidlab
from sidlab.files import write_json
from sidlab.research.machine import hardware, versions
from sidlab.research.timing import GIVE_BACK, peak_mb
from sidlab.sids.fusion import collaborative_embeddings
from sidlab.windows import leave_one_out

HERE = pathlib.Path(__file__).parent
USERS = 200
ROUNDS = 3
UPDATES = 30


def one(source: str) -> dict:
    clock = time.perf_counter
    row = {"catalogue": pathlib.PurePath(source).name}

    def timed(name, function):
        begin = clock()
        out = function()
        row[f"{name}_seconds"] = clock() - begin
        return out

    million = source == "planted"
    catalogue = timed(
        "catalogue",
        lambda: sidlab.load_catalogue(
            source, **({"kinds": 25_000, "n_users": 5_000} if million else {})
        ),
    )
    split = leave_one_out(catalogue.histories)
    x = (
        catalogue.embeddings
        if million
        else timed(
            "vectors", lambda: collaborative_embeddings(split.train, catalogue.n_items, window=2)
        )
    )
    encoder = timed("encoder", lambda: sidlab.ResidualKMeans(levels=3, width=256, seed=0).fit(x))
    table = timed(
        "table_and_trie", lambda: sidlab.SidTable(encoder.encode(x), width=256, collisions="share")
    )
    row |= {
        "items": catalogue.n_items,
        "users": len(catalogue.histories),
        "interactions": int(sum(map(len, catalogue.histories))),
        "trie_mb": table.trie.nbytes / 2**20,
        "share_their_sid": table.report()["collision_rate"],
    }
    histories = [history[-30:] for history in split.cases("test")[0][:USERS]]
    for arch in ("t5", "qwen"):
        config = sidlab.TrainConfig.preset(
            "quick", arch=arch, max_updates=UPDATES, epochs=100, eval_every=UPDATES, eval_users=100
        )
        result = sidlab.train(config, catalogue, table, progress=False)
        row[f"{arch}_s_per_1k_windows"] = result.timing["seconds_per_1k_windows"]
        times = {name: [] for name in ("all", "third")}
        for _ in range(ROUNDS + 1):  # in turn, and the first round is to warm up
            for name, pruning in (("all", None), ("third", sidlab.PruningConfig())):
                result.model.set_pruning(pruning)
                begin = clock()
                items, _ = sidlab.recommend(result.model, histories, k=10, beam=20)
                times[name].append(1000 * (clock() - begin) / len(histories))
        assert items.max() <= catalogue.n_items and (items[:, 0] > 0).all()
        for name, values in times.items():
            row[f"{arch}_ms_per_user_{name}"] = float(np.median(values[1:]))
        for name, pruning in (("all", None), ("third", sidlab.PruningConfig())):
            result.model.set_pruning(pruning)
            row[f"{arch}_recommend_mb_{name}"] = peak_mb(
                lambda model=result.model: sidlab.recommend(model, histories, k=10, beam=20),
                result.model.device.type,
            )
    row["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return row


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default="../shared/data")
    parser.add_argument("--million", action="store_true")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(one(args.one)))
        return
    sources = [
        str(pathlib.Path(args.data, name))
        for name in ("ciao", "epinions")
        if pathlib.Path(args.data, name).is_dir()
    ]
    command = f"python results/scale.py --data {args.data}" + " --million" * args.million
    rows = []
    for source in sources + ["planted"] * args.million:
        done = subprocess.run(
            [sys.executable, __file__, "--one", source],
            capture_output=True,
            text=True,
            check=False,
            env=os.environ | GIVE_BACK,
        )
        if done.returncode:
            sys.exit(done.stderr)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(rows[-1], flush=True)
        write_json(
            HERE / "scale.json",
            {"command": command, "hardware": hardware(), "versions": versions(), "rows": rows},
        )


if __name__ == "__main__":
    main()
