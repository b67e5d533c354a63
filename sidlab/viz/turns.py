"""Several trainings in one process, one at a time."""

import random
import threading

import numpy as np
import torch
from accelerate.state import AcceleratorState, GradientState
from transformers.utils import logging


class Turns:
    """Whose turn it is: one thread of all monitors trains at a time, in the order of a queue.

    With the turn goes what a process has once and a run takes for its own: the random state, how
    loud Hugging Face's libraries are, and what accelerate remembers about precision and batches.
    Afterwards all that is as it was before the turn.
    """

    def __init__(self):
        self.changed = threading.Condition()  # guards the queue and what runs want
        self.holder = None
        self.queue = []

    def has(self, run):
        return run is self.holder or run in self.queue

    def queue_up(self, run):
        """Let a run in that waits for the turn or soon will, unless it is there already."""
        with self.changed:
            if not self.has(run):
                self.queue.append(run)
            self.changed.notify_all()

    def take(self, run):
        """Wait until the run is first in the queue, and until the one before it is through."""
        with self.changed:
            self.changed.wait_for(lambda: self.holder is None and self.queue[:1] == [run])
            self.holder = self.queue.pop(0)
        self.outside = _process()
        if run.kept is not None:
            _restore(run.kept)

    def give(self, run, again=False):
        """End the run's turn. `again`: it queues up for another one, as does one that is wanted
        again by now."""
        run.kept = _process()
        _restore(self.outside)
        with self.changed:
            self.holder = None
            if again or run.wanted:
                self.queue.append(run)
            self.changed.notify_all()


_OF_ACCELERATE = (AcceleratorState, GradientState)


def _process():
    """What the process has once: see `Turns`."""
    numbers = random.getstate(), np.random.get_state(), torch.get_rng_state()
    on_gpu = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    of_accelerate = [dict(of._shared_state) for of in _OF_ACCELERATE]
    bars = logging.is_progress_bar_enabled()
    return numbers, on_gpu, logging.get_verbosity(), bars, of_accelerate


def _restore(kept):
    (python, numpy, on_cpu), on_gpu, verbosity, bars, of_accelerate = kept
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(on_cpu)
    if on_gpu is not None:
        torch.cuda.set_rng_state(on_gpu)
    logging.set_verbosity(verbosity)
    if bars != logging.is_progress_bar_enabled():
        (logging.enable_progress_bar if bars else logging.disable_progress_bar)()
    for of, content in zip(_OF_ACCELERATE, of_accelerate):
        of._shared_state.update(content)
        for name in of._shared_state.keys() - content.keys():
            del of._shared_state[name]
