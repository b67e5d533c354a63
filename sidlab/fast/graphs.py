"""Passes of a small model on a GPU without waiting for Python: recorded once for each shape of
batch, then replayed.

A training step of a model this small is some thousand short kernels, and starting them takes longer
than running them. A CUDA graph starts them all at once. `batches.StratifiedBatches` cuts the same
shapes in every update, so a few dozen graphs do (23 for all of Beauty in 16 batches an update, two
epochs).
"""

import warnings

import torch
from torch import nn

from sidlab.pruning import PruningConfig
from sidlab.saliency import SCORERS

GRAPHS = 128  # at most; batches of further shapes run as ever


def recordable(pruning: PruningConfig | None) -> bool:
    """Whether a model that prunes so never waits for the device in a training pass: not where the
    number of slots is read from the scores. A custom scorer may do anything.
    """
    return pruning is None or (
        pruning.unit == "token"
        and not pruning.protect_separators
        and pruning.mass is None
        and isinstance(pruning.scorer, str)
        and pruning.scorer in SCORERS
    )


class ReplayedPasses:
    """Forward and backward passes of `model`: the first of a shape runs as it is, the second is
    recorded, all further ones are replayed.

    `passes`: a function of a batch {name: tensor, or what decides how they run} that runs both
    passes of `model`, so that gradients add up, and returns a tuple of tensors, without waiting for
    the device (see `recordable`). What it returns of a batch is the same with and without a graph;
    random numbers go on from the generator of the device. Gradients are added to the same tensors
    every time, whoever sets them to None. Where recording fails there is a warning, and from then
    on nothing is recorded.
    """

    def __init__(self, model: nn.Module, passes):
        self.model = model
        self.passes = passes
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.gradients = [torch.zeros_like(p) for p in self.parameters]
        self.met = set()
        self.recorded = {}
        self.pool = None
        self.room = GRAPHS

    def __call__(self, batch: dict) -> tuple:
        tensors = {name: x for name, x in batch.items() if isinstance(x, torch.Tensor)}
        others = {name: x for name, x in batch.items() if name not in tensors}
        shape = (
            self.model.pruning,
            *others.items(),
            *((name, tuple(x.shape), x.dtype) for name, x in tensors.items()),
        )
        self._claim_gradients()
        if shape not in self.recorded:
            if (
                shape not in self.met
                or len(self.recorded) >= self.room
                or not recordable(self.model.pruning)
            ):
                # This pass warms up what must not be done while recording, such as compiling a
                # kernel
                self.met.add(shape)
                return self.passes(batch)
            try:
                self.recorded[shape] = self._record(tensors, others)
            # Out of memory, or something in the passes that a graph cannot hold
            except RuntimeError as error:
                warnings.warn(
                    "no CUDA graph of the training passes, which run as they are from now on:"
                    f" {error}",
                    stacklevel=2,
                )
                self.room = 0
                return self.passes(batch)
        graph, inputs, outputs = self.recorded[shape]
        for name, x in tensors.items():
            inputs[name].copy_(x, non_blocking=True)
        graph.replay()
        return tuple(x.clone() for x in outputs)  # the next replay overwrites them

    def _claim_gradients(self):
        dropped = [own for p, own in zip(self.parameters, self.gradients) if p.grad is None]
        if dropped:
            torch._foreach_zero_(dropped)
        for parameter, own in zip(self.parameters, self.gradients):
            if parameter.grad is not None and parameter.grad is not own:
                own.copy_(parameter.grad)
            parameter.grad = own

    def _record(self, tensors, others):
        inputs = {name: x.clone() for name, x in tensors.items()}
        graph = torch.cuda.CUDAGraph()
        # Graphs never run at once, so they share memory
        self.pool = torch.cuda.graph_pool_handle() if self.pool is None else self.pool
        # A notebook may use the GPU beside
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            outputs = self.passes(inputs | others)
        return graph, inputs, outputs
