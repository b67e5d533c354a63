"""Which precision trains faster here: float32, or mixed precision (autocast to bfloat16).

A CPU that multiplies bfloat16 twice as fast must first cast weights and activations, and what that
costs depends on the CPU and on the sizes of the model. No list of CPUs tells it, so a few passes in
each precision are timed, in turns.
"""

import contextlib
import random
import statistics

import numpy as np
import torch

from sidlab.fast.meter import clock

# Passes in each precision, of which the median counts.
ROUNDS = 5
# Seconds on the clock after which no further round begins, so that large models get fewer of them.
SECONDS = 6.0
# How many times as long fp32 must take before bf16 is chosen. bf16 rounds the operands of products
# to 8 bits, so it has to be worth something; and the ratio of one model on one machine moves by a
# few percent from one measurement to the next, beside other jobs at times by more, so that of
# nearly equal precisions it would be now one, now the other.
MARGIN = 1.1
# Fields of `TrainConfig` on which the faster precision of a device depends most.
SIZES = (
    "arch",
    "checkpoint",
    "d_model",
    "d_kv",
    "num_heads",
    "num_kv_heads",
    "d_ff",
    "ffn_hidden_layers",
    "num_layers",
    "num_decoder_layers",
)


def has_bf16(device) -> bool:
    """Whether the device itself multiplies bfloat16; elsewhere PyTorch computes it far slower.

    A GPU without emulation, a CPU with AVX512_BF16 or AMX.
    """
    if torch.device(device).type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def unmeasured(device) -> str | None:
    """The faster precision of a device where it is known without measuring, else None.

    "fp32" without bfloat16, and "bf16" on a GPU that has it: its products are many times as fast.
    """
    if not has_bf16(device):
        return "fp32"
    return "bf16" if torch.device(device).type == "cuda" else None


def uses_bf16(precision: str) -> bool:
    """Whether `TrainConfig.precision` means bfloat16 to those who measure nothing.

    "auto" is then what a GPU takes, and float32 on a CPU. The cost model and `calibration` ask.
    """
    if precision == "auto":
        return torch.cuda.is_available() and unmeasured("cuda") == "bf16"
    return precision == "bf16"


def sizes(config) -> str:
    """Architecture and sizes of the model of a `TrainConfig`, as text."""
    return " ".join(f"{name}={getattr(config, name)}" for name in SIZES)


def faster_precision(passes, device="cpu") -> str:
    """ "bf16" where it trains clearly faster on a device than float32 (see `MARGIN`), else "fp32".

    `passes(dtype)` runs one forward and one backward pass at the run's shapes, under autocast to
    `dtype`, or in float32 where that is None. What is known without measuring is not measured.
    The process's random state stays as it was.
    """
    if (answer := unmeasured(device)) is not None:
        return answer
    seconds = pass_seconds(passes)
    return "bf16" if seconds["fp32"] >= MARGIN * seconds["bf16"] else "fp32"


def pass_seconds(passes) -> dict[str, float]:
    """Median seconds of `passes` (see `faster_precision`) in "fp32" and "bf16", by `meter.clock`.

    After one pass each that warms up, `ROUNDS` of them, or as many as begin within `SECONDS`, but
    at least one. The precisions take turns, so that what else the machine does meets both.
    """
    dtypes = {"fp32": None, "bf16": torch.bfloat16}
    seconds = {name: [] for name in dtypes}
    with kept_random_state():
        begin = clock()
        for turn in range(1 + ROUNDS):
            # fp32 goes first in every other round
            for name in sorted(dtypes, reverse=turn % 2 == 1):
                start = clock()
                passes(dtypes[name])
                seconds[name].append(clock() - start)
            if turn > 0 and clock() - begin > SECONDS:
                break
    return {name: statistics.median(found[1:]) for name, found in seconds.items()}


@contextlib.contextmanager
def kept_random_state():
    """The random state of Python, NumPy and PyTorch's CPU is afterwards what it was before."""
    python = random.getstate()
    numpy = np.random.get_state()
    # No GPU: nothing is measured on one.
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
