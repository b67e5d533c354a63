"""The runs that the pages stand on, in the order in which they are wanted: each is done once and
kept for good.

    python results/evidence.py [--minutes 60] [--workers 2] [--data ../shared/data]

Does what is missing, one thread a run, and starts nothing that cannot end in `--minutes`; 0: only
says how far it is. What a run left stands in results/runs/NAME.json.gz and is never made again,
also not by newer code: it names the commit that made it. As soon as all methods or settings of a
part are there for a seed, the part's file is written, of which `show.py` makes pages.
"""

import argparse
import concurrent.futures
import dataclasses
import gzip
import json
import os
import pathlib
import subprocess
import time
from collections.abc import Callable

from sidlab.files import read_json, write, write_json
from sidlab.research import studies
from sidlab.research.compare import Comparison, folder_of
from sidlab.research.runs import frame_of, grid_specs, run_all

HERE = pathlib.Path(__file__).parent
RECORDS = HERE / "runs"
FOLDER = pathlib.Path("runs", "evidence")  # checkpoints and models, by part
HEADLINE = "unpadded rastp rastp-visible recent random map stamp"
# Minutes of a run of which no other is known yet: trained from nothing, continued, recommending
UNKNOWN = {"from nothing": 60, "continued": 15, "recommending": 5}


@dataclasses.dataclass(frozen=True)
class Part:
    """Runs that are written into one file."""

    title: str
    name: str  # of its folder, and in front of the names of its records
    specs: dict[str, dict]  # by name of the run, those that others start from first
    seeds: int  # how many there are to be
    enough: int  # from how many whole ones on the part is written
    # Makes the part's file from {run: its record} and the number of whole seeds
    write: Callable[[dict[str, pathlib.Path], int], None]

    def record(self, run: str) -> pathlib.Path:
        return RECORDS / f"{self.name}-{run}.json.gz"

    @property
    def missing(self) -> list[str]:
        return [run for run in self.specs if not self.record(run).exists()]

    def whole_seeds(self) -> int:
        """How many seeds, from 0 on, have all their runs."""
        lacking = [int(run.rpartition("seed")[2]) for run in self.missing]
        return min(lacking, default=self.seeds)


def comparison(title, dataset, preset, methods, seeds, sids="", arch="t5", protocol=""):
    """A part that is a comparison, as `compare` makes them."""
    arguments = dict(preset=preset, methods=methods, sids=sids, arch=arch, protocol=protocol)
    asked = Comparison(str(dataset), seeds=seeds, **arguments)
    folder = folder_of(str(dataset), preset, "", arch, protocol)

    def write_part(records, seeds):
        whole = Comparison(str(dataset), seeds=seeds, **arguments)
        found = [read_json(records[run]) for run in whole.specs]
        results = whole.results(found, FOLDER / folder.name)
        # Of the machine that ran them, not of the one that writes this
        made_on = {part: found[0][part] for part in ("hardware", "versions") if part in found[0]}
        write_json(HERE / f"{folder.name}.json", results | made_on)

    return Part(title, folder.name, asked.specs, seeds, 1, write_part)


def study(name, dataset, preset, seeds, sids="", arch="t5", continued=False, folder=""):
    """A part that is a study. Those of one `folder` share the runs that they have in common."""
    settings = studies.settings_of(name, str(dataset), arch, sids)
    asked = dict(dataset=str(dataset), preset=preset, continued=continued)
    specs, rows = grid_specs(list(settings.values()), seeds=seeds, **asked)

    def write_part(records, seeds):
        of_seeds = [run for run, row in rows.items() if row["seed"] < seeds]
        found = {run: read_json(records[run]) for run in of_seeds}
        frame = frame_of(
            [rows[run] | {"file": str(records[run])} | found[run]["row"] for run in of_seeds]
        )
        made = dict(dataset=str(dataset), preset=preset, seeds=seeds, arch=arch, sids=sids)
        frame = studies.described(frame, settings, str(dataset), preset)
        studies.save(name, frame, FOLDER / folder, only=None, keep=True, **made)

    title = f"study {name}, {pathlib.Path(dataset).name}"
    return Part(title, folder, specs, seeds, seeds, write_part)


def parts(data: pathlib.Path) -> list[Part]:
    """All parts, the first wanted first."""
    beauty = data / "amazon-beauty"
    sports = data / "amazon-sports"
    own = dict(sids="behaviour")
    one = dict(preset="long", arch="qwen", **own)
    return [
        comparison(
            "Beauty, decoder-only, continued",
            beauty,
            methods=f"{HEADLINE} norm centrality pool sasrec",
            seeds=5,
            **one,
        ),
        *(
            study(name, "planted", "quick", 3, folder="planted-quick-studies")
            for name in studies.STUDIES
        ),
        comparison(
            "Beauty, T5, continued",
            beauty,
            "long",
            "unpadded rastp recent random map stamp",
            5,
            **own,
        ),
        *(
            study(name, beauty, seeds=3, continued=True, folder="amazon-beauty-long-qwen", **one)
            for name in ("strategies", "layer-ratio", "granularity", "map", "strata", "inference")
        ),
        comparison(
            "Beauty, decoder-only, from scratch",
            beauty,
            methods="unpadded rastp stamp map",
            seeds=3,
            protocol="scratch",
            **one,
        ),
        comparison("Sports, decoder-only, continued", sports, methods=HEADLINE, seeds=3, **one),
    ]


def kind_of(spec: dict) -> str:
    """What a run's minutes depend on most."""
    if "recommend" in spec["config"]:
        return "recommending"
    return "continued" if "start" in spec else "from nothing"


def minutes_of(part: Part, run: str) -> float:
    """An upper estimate: the longest of the part's runs of this kind."""
    kind = kind_of(part.specs[run])
    known = [
        read_json(part.record(other)).get("minutes", 0)
        for other, spec in part.specs.items()
        if kind_of(spec) == kind and part.record(other).exists()
    ]
    return max(known, default=0) or UNKNOWN[kind]


def do(part: Part, run: str, tag: str) -> float:
    """Do a run and keep its record; returns the minutes that it took."""
    begin = time.monotonic()
    spec = part.specs[run]
    asked = {name: part.specs[name] for name in {run, spec.get("start", run)}}
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        results = run_all(asked, FOLDER / part.name, pool)
        result = dict(zip(asked, results))[run]
    minutes = (time.monotonic() - begin) / 60
    content = json.dumps(result | {"commit": tag, "minutes": round(minutes, 2)})
    write(part.record(run), gzip.compress(content.encode(), mtime=0))
    return minutes


def commit() -> str:
    """The tag or commit of the code here, "-dirty" where it was changed."""
    where = pathlib.Path(__file__).parent
    asked = ["git", "-C", where, "describe", "--tags", "--always", "--dirty"]
    return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--data", type=pathlib.Path, default=pathlib.Path("../shared/data"))
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    asked = parts(args.data)
    end = time.monotonic() + 60 * args.minutes
    tag = commit()
    with concurrent.futures.ThreadPoolExecutor(args.workers) as pool:
        running = {}
        while True:
            names = {(part.name, run) for part, run in running.values()}
            for part in asked:
                for run in part.missing:
                    start = part.specs[run].get("start")
                    waits = start is not None and not part.record(start).exists()
                    left = (end - time.monotonic()) / 60
                    if (
                        len(running) < args.workers
                        and (part.name, run) not in names
                        and not waits
                        and minutes_of(part, run) < left
                    ):
                        running[pool.submit(do, part, run, tag)] = part, run
                        names.add((part.name, run))
            if not running:
                break
            done = concurrent.futures.wait(
                running, return_when=concurrent.futures.FIRST_COMPLETED
            ).done
            for future in done:
                part, run = running.pop(future)
                print(f"{part.record(run).name}: {future.result():.1f} minutes", flush=True)
    for part in asked:
        whole = part.whole_seeds()
        there = len(part.specs) - len(part.missing)
        print(f"{part.title}: {there} of {len(part.specs)} runs, {whole} of {part.seeds} seeds")
        if args.minutes and whole >= part.enough:
            part.write({run: part.record(run) for run in part.specs}, whole)


if __name__ == "__main__":
    main()
