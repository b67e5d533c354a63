"""What the published code does otherwise, shown by running it beside the corrected way."""

import copy
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from sidlab.models.t5 import SidT5
from sidlab.pruning import PruningConfig
from sidlab.viz.pruning_game import level_names
from sidlab.windows import history_tokens, pad_histories

AFTER = 2
DROPOUT = 0.15
DRAWS = 12  # pruned after this encoder layer; RASTP's dropout; so many draws of it
LENGTHS = (10, 6, 4, 2)  # items of the histories; all are padded to the first
MODES = ("reference", "corrected")
KEPT = 1.0
PRUNED = 0.6
FILLED = 0.3
EMPTY = 0.0  # what becomes of a slot, as numbers for a colour


class Evidence(NamedTuple):
    """What a quirk does in one mode. `z` float [rows, columns], a picture, NaN where blank; `rows`:
    their names; `columns`: what they are; `legend`: {fate: meaning} where z holds fates, else what
    its numbers are; `bars`: {name: number}, of what `measure` says.
    """

    z: np.ndarray
    rows: list[str]
    columns: str
    legend: dict | str
    bars: dict[str, float]
    measure: str


class Subject:
    """The longest history of `catalogue`, cut to its last 10, 6, 4 and 2 items and padded to 10, in
    copies of `model` that keep a third after the second encoder layer: "reference", "corrected",
    and "items" (corrected, by whole items).

    `right`, `left` int64 [4, N]: the tokens, padded on that side; `real` bool [4, N], of `right`.
    """

    def __init__(self, model, catalogue):
        longest = max(catalogue.histories, key=len)
        slots = LENGTHS[0]
        if model.config.num_layers <= AFTER or len(longest) <= slots:
            raise ValueError(
                f"model must have more than {AFTER} encoder layers and catalogue a history of more"
                f" than {slots} items, got {model.config.num_layers} layers and at most"
                f" {len(longest)} items"
            )
        items = pad_histories([longest[:-1][-n:] for n in LENGTHS], slots, model.table.n_items)
        self.right = history_tokens(items, model.table, model.config.separators)
        self.left = torch.stack([row.roll(int((row == 0).sum())) for row in self.right])
        self.real = self.right != 0
        self.labels = model.table.item_tokens[[int(longest[-1])] * len(LENGTHS)]  # the next item
        third = {
            "reference": PruningConfig(mode="reference"),
            "corrected": PruningConfig(),
            "items": PruningConfig(unit="item"),
        }
        self.models = {name: self._copy(model, pruning, slots) for name, pruning in third.items()}

    @staticmethod
    def _copy(model, pruning, slots):
        config = copy.deepcopy(model.config)
        config.pruning = pruning.to_dict()
        config.max_items = slots
        config.padded_items = None
        config.dropout_rate = DROPOUT
        config.map = None
        out = SidT5(config, model.table)
        out.load_state_dict(
            {
                name: value
                for name, value in model.state_dict().items()
                if not name.startswith("map_head.")
            }
        )
        return out.eval()

    def encode(self, mode, tokens=None):
        """The encoder's output and bool [4, N], which slots got through the pruner, padding
        included.
        """
        tokens = self.right if tokens is None else tokens
        with torch.no_grad():
            out = self.models[mode].encoder(input_ids=tokens, attention_mask=(tokens != 0).long())
        used = torch.ones_like(out.positions) if mode == "reference" else out.attention_mask
        return out, torch.zeros_like(tokens).scatter_add(1, out.positions, used) > 0

    def log_p(self, mode, tokens=None):
        """Log-probability of the next item's SID: float32 [4]."""
        tokens = self.right if tokens is None else tokens
        with torch.no_grad():
            # [4, L, V]
            logits = self.models[mode](
                input_ids=tokens, attention_mask=(tokens != 0).long(), labels=self.labels
            ).logits
        return logits.log_softmax(-1).gather(-1, self.labels.unsqueeze(-1)).sum((1, 2))


def padded_length(subject: Subject, mode: str) -> Evidence:
    """Row 1: the kept share is one of the padded length."""
    _, kept = subject.encode(mode)
    z = np.where(subject.real, np.where(kept, KEPT, PRUNED), np.where(kept, FILLED, EMPTY))
    share = (kept & subject.real).sum(1) / subject.real.sum(1)
    legend = {
        KEPT: "real, kept",
        PRUNED: "real, pruned",
        FILLED: "padding, kept",
        EMPTY: "padding, dropped",
    }
    return Evidence(
        z,
        _names(),
        "slot",
        legend,
        dict(zip(_names(), share.tolist())),
        "share of its real tokens that a history keeps",
    )


def positions(subject: Subject, mode: str) -> Evidence:
    """Row 2: no position bias after the pruner. What does it change if kept tokens swap places?"""
    model = subject.models[mode]
    seen = {}
    with model.encoder.block[AFTER].register_forward_pre_hook(
        lambda block, args: seen.update(bias=args[2][0])
    ):
        before = subject.log_p(mode)
    n = len(seen["bias"][0])
    order = list(range(n))
    bars = {}
    orders = {
        "last two": [*order[:-2], n - 1, n - 2],
        "the ends": [n - 1, *order[1:-1], 0],
        "all": order[::-1],
    }
    for name, order in orders.items():
        with model.encoder.block[AFTER].register_forward_pre_hook(
            lambda block, args, order=order: (args[0][:, order], *args[1:])
        ):
            bars[name] = float((subject.log_p(mode) - before)[0].abs())
    places = [f"kept token {i}" for i in range(1, n + 1)]
    return Evidence(
        seen["bias"].mean(0).numpy(),
        places,
        "kept token looked at",
        "position bias, mean over heads",
        bars,
        "change of log p(next item) if kept tokens swap places",
    )


def mask_of_the_first(subject: Subject, mode: str) -> Evidence:
    """Row 3: the decoder gets the mask of the first K slots, which is wrong where padding stands on
    the left. (The encoder's layers after the pruner get that of the kept slots in either mode.)
    """
    out, _ = subject.encode(mode, subject.left)
    used = torch.ones_like(out.positions) if mode == "reference" else out.attention_mask
    real = subject.left.gather(1, out.positions) * used != 0
    seen = out.attention_mask == 1
    z = np.where(real, np.where(seen, KEPT, PRUNED), np.where(seen, FILLED, EMPTY))
    legend = {
        KEPT: "real, seen by the decoder",
        PRUNED: "real, hidden from it",
        FILLED: "padding, seen",
        EMPTY: "padding, hidden",
    }
    change = (subject.log_p(mode) - subject.log_p(mode, subject.left)).abs()
    return Evidence(
        z,
        _names(),
        "kept slot, padding on the left",
        legend,
        dict(zip(_names(), change.tolist())),
        "change of log p(next item) from right to left padding",
    )


def padded_votes(subject: Subject, mode: str) -> Evidence:
    """Row 4: queries that are padding vote in the centrality."""
    record = {}

    def keep_attention(block, args, kwargs):
        kwargs["record"]["keep_attention"] = True
        record.update(of_layer=kwargs["record"])

    with (
        subject.models[mode]
        .encoder.block[AFTER - 1]
        .register_forward_pre_hook(keep_attention, with_kwargs=True)
    ):
        out, _ = subject.encode(mode)
    attention = record["of_layer"]["attention"].sum(1)  # [4, N, N]
    votes = attention.sum(2)
    counted = out.centrality.sum(1)
    shown = attention[2].clone()
    row = subject.real[2]
    if mode == "corrected":
        shown[~row] = torch.nan
    from_padding = 1 - ((votes * subject.real).sum(1) / counted).clamp(max=1)
    queries = [
        f"{'token' if real else 'padding'} {i}" for i, real in enumerate(row.tolist(), start=1)
    ]
    return Evidence(
        shown[:, row].numpy(),
        queries,
        f"token looked at, in the history of {LENGTHS[2]} items",
        "attention that is counted, summed over heads",
        dict(zip(_names(), from_padding.tolist())),
        "share of the votes that padded queries cast",
    )


def noisy_scores(subject: Subject, mode: str) -> Evidence:
    """Row 5: scores come from the attention after its dropout. How much do two draws agree?"""
    model = subject.models[mode]
    _, clean = subject.encode(mode)
    chosen = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for name, part in (
            ("attention", model.encoder.block[AFTER - 1].layer[0].SelfAttention),
            ("everywhere", model),
        ):
            part.train()
            # [draws, N]
            chosen[name] = torch.stack([subject.encode(mode)[1][0] for _ in range(DRAWS)]).float()
            model.eval()
    kept = chosen["attention"]
    bars = {}
    for name, draws in chosen.items():
        # Share of one draw's tokens that the other has, too
        together = draws @ draws.T / draws.sum(1)
        bars[name] = float((together.sum() - DRAWS) / (DRAWS * (DRAWS - 1)))
    z = np.where(torch.cat([clean[:1], kept.bool()]), KEPT, EMPTY)
    names = ["no dropout", *(f"draw {i}" for i in range(1, DRAWS + 1))]
    return Evidence(
        z,
        names,
        f"token of the history of {LENGTHS[0]} items",
        {KEPT: "kept", EMPTY: "pruned"},
        bars,
        "share of kept tokens that two draws have in common; dropout in this attention, or"
        " everywhere",
    )


def separators_compete(subject: Subject, mode: str) -> Evidence:
    """Row 6: separators and codes compete, so items are cut apart. Corrected here by scoring whole
    items.
    """
    _, kept = subject.encode("items" if mode == "corrected" else mode)
    cells = kept[0].view(LENGTHS[0], -1)  # [items, tokens an item]
    names = level_names(subject.models[mode])
    whole = cells.all(1)
    none = ~cells.any(1)
    bars = {"kept whole": whole, "cut apart": ~whole & ~none, "dropped": none}
    return Evidence(
        np.where(cells.T, KEPT, EMPTY),
        names,
        "item of the history, oldest first",
        {KEPT: "kept", EMPTY: "pruned"},
        {name: float(of.sum()) for name, of in bars.items()},
        f"of {LENGTHS[0]} items",
    )


class _Fused(TorchFunctionMode):
    """Counts the calls of PyTorch's attention function, which a GPU runs as one fused kernel."""

    calls = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.calls += function is F.scaled_dot_product_attention
        return function(*args, **kwargs or {})


def attention_kernels(subject: Subject, mode: str) -> Evidence:
    """Row 7: attention weights are asked of every layer, so no layer's attention can be fused."""
    model = subject.models[mode]
    fused = {}
    modules = {
        f"encoder, layer {i}": block.layer[0].SelfAttention
        for i, block in enumerate(model.encoder.block, start=1)
    }
    modules |= {
        f"decoder, layer {i}, own tokens": block.layer[0].SelfAttention
        for i, block in enumerate(model.decoder.block, start=1)
    }
    modules |= {
        f"decoder, layer {i}, history": block.layer[1].EncDecAttention
        for i, block in enumerate(model.decoder.block, start=1)
    }
    with _Fused() as counter:
        hooks = []
        for name, module in modules.items():
            hooks.append(
                module.register_forward_pre_hook(
                    lambda module, args, name=name: fused.update({name: -counter.calls})
                )
            )
            hooks.append(
                module.register_forward_hook(
                    lambda module, args, out, name=name: fused.update(
                        {name: fused[name] + counter.calls}
                    )
                )
            )
        subject.log_p(mode)
    for hook in hooks:
        hook.remove()
    plain = {name: not calls for name, calls in fused.items()}
    z = np.array([[PRUNED if plain[name] else KEPT] for name in modules])
    bars = {
        where: float(sum(plain[name] for name in modules if name.startswith(where)))
        for where in ("encoder", "decoder")
    }
    legend = {KEPT: "asks for the fused kernel", PRUNED: "writes its weights out"}
    return Evidence(z, list(modules), "", legend, bars, "attentions that write their weights out")


def _names():
    return [f"{n} items" for n in LENGTHS]


# (name, the evidence; the published code …, so …; the corrected code …), in the order of the table
# in the notebook
QUIRKS = (
    (
        "1 a share of the padded length",
        padded_length,
        "keeps a third of the padded length, whatever the history's own length",
        (
            "histories that fit into the kept slots lose nothing, and in short ones most of what is"
            " pruned is padding"
        ),
        "keeps a third of each history's own tokens",
    ),
    (
        "2 positions are lost",
        positions,
        "drops the position bias after the pruner, for only the first layer owns one",
        "the layers after the pruner cannot tell in which order the kept tokens came",
        "gathers the bias at the kept tokens' original places",
    ),
    (
        "3 the mask of the first slots",
        mask_of_the_first,
        (
            "hands the unpruned mask on to the decoder, cut to the first K slots (its encoder's own"
            " layers get the mask of the kept ones)"
        ),
        (
            "the decoder looks at the wrong slots where padding stands on the left (on the right,"
            " as in the published code, it is harmless)"
        ),
        "hands on the mask of the kept tokens",
    ),
    (
        "4 padding votes",
        padded_votes,
        (
            "lets padded queries vote on which tokens are central; they read as the first code and"
            " the separator"
        ),
        "in a short history most of the votes come from padding",
        "counts the votes of real queries only",
    ),
    (
        "5 dropout in the scores",
        noisy_scores,
        "scores with the attention after its dropout while training",
        (
            "which tokens are kept is partly chance (dropout elsewhere shakes the choice as well,"
            " in both codes)"
        ),
        "scores with the clean attention",
    ),
    (
        "6 separators compete",
        separators_compete,
        "scores separators like codes",
        "items are cut apart: some tokens stay, others go",
        "scores whole items here (another way: protect the separators)",
    ),
    (
        "7 no fused attention",
        attention_kernels,
        "asks every layer of encoder and decoder for its attention weights",
        (
            "no layer can use a fused kernel, which never writes the weights out; that costs memory"
            " and time on a GPU"
        ),
        "asks the scoring layer alone",
    ),
)
