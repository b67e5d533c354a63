"""How fast the explorers answer: python tools/latency.py [--moves 60] [--only NAME …]

For each explorer, in a process of its own: seconds from starting Python to the first picture being
ready to send, then milliseconds from a slider's move to the new picture (median and 95th percentile
over random moves along the slider that its exported page has), the most messages and the most
kilobytes of a move, and the peak memory.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time

EXPLORERS = [
    "PruningExplorer",
    "AttentionExplorer",
    "SidExplorer",
    "DilutionExplorer",
    "MapExplorer",
    "FrontierExplorer",
    "PaddingExplorer",
    "QuirkExplorer",
    "CostCalculator",
]
ROW = "{:20} {:>10} {:>11} {:>10} {:>9} {:>8} {:>8}"


class Comm:
    """Stands in for the connection to a browser; `sent` gets the bytes of each message. NaN is no
    JSON and would be refused.
    """

    comm_id = kernel = "none"

    def __init__(self, sent):
        self.sent = sent

    def send(self, data=None, metadata=None, buffers=None):
        self.sent.append(
            len(json.dumps(data, allow_nan=False))
            + sum(memoryview(buffer).nbytes for buffer in buffers or ())
        )

    def on_msg(self, *args):
        """Nothing ever arrives."""

    on_close = close = on_msg


def connect(explorer, sent):
    """Let an explorer talk to a `Comm`."""
    for widget in (explorer.view.state, *explorer.controls.values()):
        widget.comm = Comm(sent)


def measure(name, moves):
    import numpy as np
    import psutil

    from sidlab import viz

    explorer = getattr(viz, name)()
    json.dumps(explorer.content)
    first = time.time() - psutil.Process().create_time()
    sent = []
    connect(explorer, sent)
    slider = explorer.controls[explorer.exported]
    rng = np.random.default_rng(0)
    if hasattr(slider, "_options_full"):
        places = [value for _, value in slider._options_full]
    else:
        places = (
            np.arange(slider.min, slider.max + slider.step / 2, slider.step)
            .clip(slider.min, slider.max)
            .tolist()
        )
    milliseconds = []
    messages = 0
    size = 0
    while len(milliseconds) < moves:
        value = places[rng.integers(len(places))]
        if value == slider.value:
            continue
        sent.clear()
        start = time.perf_counter()
        slider.value = value
        milliseconds.append(1000 * (time.perf_counter() - start))
        messages = max(messages, len(sent))
        size = max(size, sum(sent))
    middle, high = np.percentile(milliseconds, [50, 95])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )
    return {
        "first": first,
        "median": middle,
        "p95": high,
        "messages": messages,
        "kb": size / 1024,
        "mb": peak / 2**20,
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--moves", type=int, default=60)
    parser.add_argument("--only", nargs="+", default=EXPLORERS, choices=EXPLORERS, metavar="NAME")
    parser.add_argument("--one", choices=EXPLORERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one, args.moves)))
        return
    print(
        ROW.format("explorer", "first (s)", "median (ms)", "p95 (ms)", "messages", "KB", "peak MB")
    )
    for name in args.only:
        command = [sys.executable, __file__, "--one", name, "--moves", str(args.moves)]
        row = json.loads(
            subprocess.run(
                command, capture_output=True, check=True, text=True, env=os.environ
            ).stdout.splitlines()[-1]
        )
        print(
            ROW.format(
                name,
                f"{row['first']:.1f}",
                f"{row['median']:.0f}",
                f"{row['p95']:.0f}",
                row["messages"],
                f"{row['kb']:.0f}",
                f"{row['mb']:.0f}",
            ),
            flush=True,
        )


if __name__ == "__main__":
    main()
