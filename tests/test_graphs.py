"""Passes that are replayed from CUDA graphs give what the passes themselves give, and nothing in
them waits for the device.

Without a GPU a stand-in that runs the recorded passes anew takes the graph's place: it has the same
inputs, outputs and gradients.
"""

import dataclasses

import pytest
import test_qwen
import test_t5
import torch
from conftest import CUDA
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.utils import import_utils

from sidlab.config import TrainConfig
from sidlab.data.planted import planted_catalogue
from sidlab.fast.graphs import GRAPHS, ReplayedPasses, recordable
from sidlab.map_loss import MapConfig
from sidlab.pruning import PruningConfig
from sidlab.research.sid_tables import sid_table
from sidlab.saliency import SCORERS
from sidlab.training import train

gpu = pytest.mark.skipif(not CUDA, reason="no CUDA device: CUDA graphs have not run")
PRUNINGS = [
    None,
    *(PruningConfig(scorer=name) for name in SCORERS),
    PruningConfig(unit="item"),
    PruningConfig(mass=0.5),
    PruningConfig(protect_separators=True),
    PruningConfig(positions="compact"),
    PruningConfig(reduce="pool"),
    PruningConfig(mode="reference"),
]
CASES = [
    (arch, pruning)
    for arch in (test_t5, test_qwen)
    for pruning in PRUNINGS
    if arch is test_t5
    or pruning is None
    or (pruning.reduce, pruning.mode) == ("select", "corrected")
]
LABELS = test_t5.LABELS
FULL = [test_t5.HISTORIES[0], test_t5.HISTORIES[0][::-1]]  # as many items as fit


class NoWaiting(TorchDispatchMode):
    """Notes every operation that makes a GPU tell the CPU a value, or the number of elements
    of a result.
    """

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__.split(".")[0]
        if name.startswith(self.WAITS):
            self.found.append(name)
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("arch, pruning", CASES, ids=str)
def test_what_may_be_recorded_never_waits(arch, pruning, monkeypatch):
    # What the library asks before it looks at a mask
    monkeypatch.setattr(import_utils, "is_cuda_stream_capturing", lambda: True)
    model = arch.build(pruning, MapConfig(steps=2)).train()
    inputs = arch.batch() | {
        "labels": LABELS,
        "map_labels": LABELS[:, None].expand(-1, 2, -1),
        "num_items_in_batch": torch.tensor(12),
        "map_items_in_batch": torch.tensor([12, 0]),
    }
    if pruning is not None and pruning.scorer == "oracle":
        inputs["truth"] = torch.rand(inputs["input_ids"].shape)
    with NoWaiting() as waits:
        model(**inputs).loss.backward()
    assert bool(waits.found) == (not recordable(pruning)), waits.found


@pytest.mark.parametrize("arch", [test_t5, test_qwen], ids=["t5", "qwen"])
@pytest.mark.parametrize(
    "pruning",
    [None, PruningConfig(keep=0.4), PruningConfig(unit="item"), PruningConfig(keep=1.0, mass=0.5)],
    ids=["unpruned", "tokens", "items", "mass"],
)
def test_without_padding_no_mask_is_written_out(arch, pruning, monkeypatch):
    """Nor while recording, where the library cannot see that none is needed."""
    model = arch.build(pruning).train()
    inputs = arch.batch(FULL) | {"labels": LABELS[:2]}
    expected = test_t5.gradients(model, inputs)
    monkeypatch.setattr(import_utils, "is_cuda_stream_capturing", lambda: True)
    seen = []
    attend = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda *args, attn_mask=None, **options: (
            seen.append(attn_mask) or attend(*args, attn_mask=attn_mask, **options)
        ),
    )
    for padded in (True, False):
        seen.clear()
        test_t5.assert_same_gradients(
            test_t5.gradients(model, inputs | {"padded": padded}), expected
        )
        if pruning is None:  # behind a pruner of T5 each row has a position bias of its own
            assert any(mask is not None and len(mask) == 2 for mask in seen) == padded


class Anew:
    """The stand-in for a graph."""

    def __init__(self, passes, inputs, outputs):
        self.passes = passes
        self.inputs = inputs
        self.outputs = outputs
        self.replays = 0

    def replay(self):
        self.replays += 1
        for old, new in zip(self.outputs, self.passes(self.inputs)):
            old.copy_(new)


class StandIn(ReplayedPasses):
    def _record(self, tensors, others):
        if CUDA:
            return super()._record(tensors, others)
        inputs = {name: x.clone() for name, x in tensors.items()}
        gradients = [g.clone() for g in self.gradients]
        outputs = self.passes(inputs | others)
        for own, before in zip(self.gradients, gradients):
            own.copy_(before)  # recording runs nothing
        return Anew(self.passes, inputs | others, outputs), inputs, outputs


def passes_of(model):
    def passes(inputs):
        out = model(**inputs)
        out.loss.backward()
        return out.loss.detach(), out.encoder_attention_mask.sum()

    return passes


def batches(seed, device):
    """Histories of two lengths and three sizes, in a mixed order: shapes come back."""
    draw = torch.Generator().manual_seed(seed)
    for items, rows in ((8, 4), (3, 4), (8, 4), (8, 2), (3, 4), (8, 4), (8, 2), (3, 4), (8, 2)):
        histories = torch.randint(1, 51, (rows, items), generator=draw).numpy()
        inputs = test_t5.batch(list(histories)) | {
            "labels": test_t5.TABLE.item_tokens[torch.randint(1, 51, (rows,), generator=draw)]
        }
        yield {name: x.to(device) for name, x in inputs.items()}


@pytest.mark.parametrize(
    "pruning",
    [None, PruningConfig(keep=0.4), PruningConfig(unit="item")],
    ids=["unpruned", "a part kept", "items"],
)
@pytest.mark.parametrize("none", [True, False])
def test_replayed_updates_are_those_of_the_passes(pruning, none):
    device = "cuda" if CUDA else "cpu"
    plain, model = (test_t5.build(pruning).train().to(device) for _ in range(2))
    optimisers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (plain, model)]
    run = passes_of(plain)
    replayed = StandIn(model, passes_of(model))
    for number, batch in enumerate(batches(0, device)):
        expected = run(batch)
        found = replayed(batch)
        torch.testing.assert_close(found, expected, **test_t5.CLOSE)
        if number % 2:  # an update of two batches
            for optimiser in optimisers:
                optimiser.step()
                optimiser.zero_grad(set_to_none=none)
    for (name, one), other in zip(model.named_parameters(), plain.parameters()):
        torch.testing.assert_close(
            one, other, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )
    assert len(replayed.recorded) == (3 if recordable(pruning) else 0)


def test_what_changes_the_passes_makes_another_graph():
    model = test_t5.build(PruningConfig(keep=0.5)).train().to("cuda" if CUDA else "cpu")
    replayed = StandIn(model, passes_of(model))
    one, *_ = batches(0, model.device)

    def kept():
        return [int(replayed(one)[1]) for _ in range(3)]

    assert kept() == [4 * 16] * 3
    model.set_pruning(PruningConfig(keep=0.25))
    assert kept() == [4 * 8] * 3 and len(replayed.recorded) == 2
    earlier = replayed(one)[1]
    model.set_pruning(None)
    assert kept() == [4 * 32] * 3 and int(earlier) == 4 * 8, "what was returned stays"
    for _ in range(3):
        replayed(one | {"padded": False})
    assert len(replayed.recorded) == 4
    replayed.room = 4
    model.set_pruning(PruningConfig(keep=0.75))
    assert kept() == [4 * 24] * 3 and len(replayed.recorded) == 4 < GRAPHS


def test_where_recording_fails_the_passes_run_as_they_are():
    class Broken(ReplayedPasses):
        def _record(self, tensors, others):
            raise RuntimeError("operation not permitted when stream is capturing")

    plain, model = (test_t5.build().train() for _ in range(2))
    run = passes_of(plain)
    replayed = Broken(model, passes_of(model))
    one, *_ = batches(0, model.device)
    with pytest.warns(
        UserWarning, match="no CUDA graph of the training passes.*not permitted"
    ) as told:
        found = [replayed(one) for _ in range(4)]
    assert len(told) == 1
    for outputs in found:
        torch.testing.assert_close(outputs, run(one), **test_t5.CLOSE)
    for one, other in zip(model.parameters(), plain.parameters()):
        torch.testing.assert_close(one.grad, other.grad, **test_t5.CLOSE)


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize("arch", ["t5", "qwen"])
def test_on_a_gpu_training_replays_and_learns_the_same(arch, monkeypatch, tmp_path):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    catalogue = planted_catalogue(n_users=300)
    table, _ = sid_table(catalogue, tmp_path)
    # Few shapes, so that most batches are replayed
    config = TrainConfig.preset(
        "smoke",
        arch=arch,
        precision="fp32",
        max_updates=60,
        eval_every=30,
        accumulation=2,
        max_items=10,
        pruning=PruningConfig(keep=0.5),
        map=MapConfig(),
    )
    found = {}
    recorded = []
    seen = ReplayedPasses._record
    monkeypatch.setattr(
        ReplayedPasses, "_record", lambda self, *batch: recorded.append(batch) or seen(self, *batch)
    )
    for name, most in (("replayed", GRAPHS), ("as they are", 0)):
        monkeypatch.setattr("sidlab.fast.graphs.GRAPHS", most)
        found[name] = [
            entry["main_loss"]
            for entry in train(config, catalogue, table, progress=False).log
            if "main_loss" in entry
        ]
        print(name, found[name])
    assert recorded
    assert found["replayed"] == pytest.approx(found["as they are"], rel=0.02)
    model = test_t5.build(dropout=0.5).train().cuda()
    replayed = ReplayedPasses(model, passes_of(model))
    one, *_ = batches(0, "cuda")
    pairs = []
    for _ in range(2):
        for _ in range(2):
            replayed(one)
        torch.manual_seed(0)
        pairs.append([float(replayed(one)[0]) for _ in range(2)])
    assert pairs[0] == pairs[1] and pairs[0][0] != pairs[0][1], (
        "each replay draws anew, from the generator of the device"
    )
    dropping = dataclasses.replace(config, dropout=0.3, max_updates=20, eval_every=10)
    monkeypatch.setattr("sidlab.fast.graphs.GRAPHS", GRAPHS)
    losses = [
        [
            entry["main_loss"]
            for entry in train(dropping, catalogue, table, progress=False).log
            if "main_loss" in entry
        ]
        for _ in range(2)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=0.02), "dropout repeats with the seed"
