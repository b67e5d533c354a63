"""What a training costs: seconds, peak memory and tokens of its steps alone, over all processes."""

import json
import os
import pathlib
import sys
import time
import warnings

import torch
from accelerate import PartialState
from accelerate.utils import gather_object


def clock() -> float:
    """Seconds of this thread's processor time where one thread does all the work, for other jobs do
    not disturb that; else of the wall.
    """
    return (
        time.thread_time()
        if torch.get_num_threads() == 1 and not torch.cuda.is_available()
        else time.perf_counter()
    )


class Meter:
    """Seconds (see `clock`), peak memory and tokens of the training steps alone.

    Memory is what was allocated on the GPU, or else the resident size of the process, at its
    highest above what it was when the meter was made (the libraries alone take hundreds of MB);
    Linux lets the highest mark be reset, so evaluation does not count.
    """

    def __init__(self):
        self._base = memory_mb(torch.cuda.is_available())
        self.seconds = 0.0
        self.peak = 0.0
        self.windows = 0
        self._since = None
        self._slots = self._real = self._kept = 0

    def count(self, mask, kept, targets):
        """A batch: its mask [B, N], that of the kept tokens [B, K] or their number, and the number
        of its targets, as a tensor.
        """
        self.windows += targets
        self._slots += mask.numel()
        # Tensors: no wait for the device here
        self._real, self._kept = self._real + mask.sum(), self._kept + kept.sum()

    def resume(self):
        if self._since is None:
            reset_highest_mb(torch.cuda.is_available())
            self._since = clock()

    def pause(self):
        if self._since is not None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.seconds += clock() - self._since
            self._since = None
            self.peak = max(self.peak, highest_mb(torch.cuda.is_available()) - self._base)

    def totals(self):
        """What all processes counted; seconds and peak are those of the slowest and the largest."""
        own = {
            "seconds": self.seconds,
            "peak": self.peak,
            "windows": int(self.windows),
            "slots": self._slots,
            "real": int(self._real),
            "kept": int(self._kept),
        }
        all_counts = gather_object([own])
        return {
            name: (max if name in ("seconds", "peak") else sum)(
                counts[name] for counts in all_counts
            )
            for name in own
        }

    def save(self, checkpoint):
        """Leave what was counted beside a checkpoint, so that a resumed run reports the whole."""
        counts = self.totals()
        if PartialState().is_main_process:
            checkpoint.mkdir(parents=True, exist_ok=True)
            (checkpoint / "meter.json").write_text(json.dumps(counts | {"device": device_name()}))

    def load(self, checkpoint):
        counts = json.loads((pathlib.Path(checkpoint) / "meter.json").read_text())
        if counts["device"] != device_name():
            warnings.warn(
                f"{checkpoint} was made on {counts['device']}, and this is {device_name()}: seconds"
                " and memory are those of both",
                stacklevel=2,
            )
        self.seconds = counts["seconds"]
        self.peak = counts["peak"]
        if PartialState().is_main_process:  # or every process would count them again
            self.windows = counts["windows"]
            self._slots = counts["slots"]
            self._real = counts["real"]
            self._kept = counts["kept"]

    def timing(self, updates):
        counts = self.totals()
        return {
            "train_seconds": counts["seconds"],
            "seconds_per_1k_windows": 1000 * counts["seconds"] / max(counts["windows"], 1),
            "windows": counts["windows"],
            "updates": updates,
        }

    def tokens(self):
        counts = self.totals()
        real = counts["real"] or 1
        return {
            "real_token_fraction": real / max(counts["slots"], 1),
            "kept_token_fraction": counts["kept"] / real,
        }


def device_name() -> str:
    """The GPU that trains, or "a CPU" and its threads, by which `clock` differs."""
    return (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"a CPU (threads: {torch.get_num_threads()})"
    )


def memory_mb(gpu: bool) -> float:
    """MB in use: allocated on the GPU, or resident in this process (everywhere but on Linux, that
    at its highest).
    """
    return torch.cuda.memory_allocated() / 2**20 if gpu else _resident_mb("VmRSS")


def highest_mb(gpu: bool) -> float:
    """The same at its highest since `reset_highest_mb`; waits for the GPU."""
    if gpu:
        torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() / 2**20 if gpu else _resident_mb("VmHWM")


def reset_highest_mb(gpu: bool) -> None:
    """Begin `highest_mb` anew, where that can be done; waits for the GPU."""
    if gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    elif os.access("/proc/self/clear_refs", os.W_OK):
        pathlib.Path("/proc/self/clear_refs").write_text("5")


def _resident_mb(field):
    status = pathlib.Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith(field))
        return int(line.split()[1]) / 1024
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (
        2**20 if sys.platform == "darwin" else 1024
    )
