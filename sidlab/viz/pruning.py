"""The pruning explorer: one history as tokens, what is kept of it at each ratio, layer and scorer, and what that does to the list."""

import functools
import html
import time

import ipywidgets as widgets
import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from sidlab.cost import cost
from sidlab.metrics import rank_of_target
from sidlab.probe import Probe
from sidlab.pruning import POSITIONS, UNITS, PruningConfig
from sidlab.saliency import SCORERS
from sidlab.training import TrainConfig
from sidlab.viz.explorer import Explorer
from sidlab.viz.figures import pruning_strip
from sidlab.viz.theme import SCALE


class PruningExplorer(Explorer):
    """Prune one user's history live. `PruningExplorer()` shows the bundled demo.

    Args: `model`, `catalogue`: a `SidT5` with its table and the catalogue it was trained on (default: `sidlab.demo.load()`); `histories`: which
    to choose from (default: the catalogue's first 50), each without its last item, which is the next one to be found;
    `scorers`: {name: callable} that join the menu; `theme` as in `Explorer`; other arguments set controls: `user` (1 is the first),
    `keep`, `layer`, `scorer`, `unit`, `positions`, `protect`.
    Moving `keep` selects anew and runs the layers behind the pruner and the decoder; the layers before it run once per user.
    """

    heading = "Which tokens does a recommender need?"
    exported = "keep"

    def __init__(self, model=None, catalogue=None, *, histories=None, scorers=None, theme=None, user=1, keep=1 / 3, layer=2,
                 scorer="rastp", unit="token", positions="original", protect=False):
        if (model is None) != (catalogue is None):
            raise ValueError("give model and catalogue, or neither for the bundled demo")
        if model is None:
            from sidlab.demo import load

            catalogue, model = (demo := load()).catalogue, demo.model
        self.model, self.catalogue = model, catalogue
        self.histories = catalogue.histories[:50] if histories is None else list(histories)
        self._scorers = {name: name for name in SCORERS if name != "oracle" or catalogue.truth is not None} | (scorers or {})
        self._probe, self._full = functools.lru_cache(8)(self._probe), functools.lru_cache(8)(self._full)
        self._cost = functools.lru_cache(512)(self._cost)
        names, last = list(self._scorers), model.config.num_layers
        super().__init__({
            "keep": widgets.FloatSlider(value=keep, min=0.05, max=1, step=0.01, description="kept share", readout_format=".0%"),
            "scorer": widgets.Dropdown(options=names, value=scorer, description="scorer"),
            "layer": widgets.IntSlider(value=layer, min=1, max=last, description="prune after layer"),
            "unit": widgets.Dropdown(options=UNITS, value=unit, description="unit"),
            "positions": widgets.Dropdown(options=POSITIONS, value=positions, description="positions"),
            "protect": widgets.Checkbox(value=protect, description="keep all separators", indent=False),
            "user": widgets.IntSlider(value=user, min=1, max=len(self.histories), description="user"),
        }, slow=("user", "layer"), theme=theme)

    def pruning(self) -> PruningConfig:
        """The configuration that the controls say."""
        return PruningConfig(after_layer=self.value("layer"), keep=self.value("keep"), scorer=self._scorers[self.value("scorer")],
                             unit=self.value("unit"), positions=self.value("positions"), protect_separators=self.value("protect"))

    def _probe(self, user):
        return Probe(self.model, self.histories[user - 1][:-1], self.catalogue.truth)

    def _full(self, user):
        """Recommendations without pruning, and how many milliseconds the decoder takes for them."""
        begin = time.perf_counter()
        return self._probe(user).prune(None).items.numpy(), 1000 * (time.perf_counter() - begin)

    def _cost(self, n_items, pruning):
        c = self.model.config
        config = TrainConfig(d_model=c.d_model, d_kv=c.d_kv, num_heads=c.num_heads, d_ff=c.d_ff, ffn_hidden_layers=c.ffn_hidden_layers,
                             num_layers=c.num_layers, num_decoder_layers=c.num_decoder_layers, dropout=c.dropout_rate,
                             separators=c.separators, max_items=c.max_items, pruning=pruning, precision="fp32")
        return cost(config, self.model.table.widths, np.array([n_items]))

    def draw(self):
        user, pruning = self.value("user"), self.pruning()
        probe, (full, _) = self._probe(user), self._full(user)
        begin = time.perf_counter()
        pruned = probe.prune(pruning)
        self.milliseconds = 1000 * (time.perf_counter() - begin)
        self.pruned = pruned
        target = int(self.histories[user - 1][-1])
        figure = pruning_figure(probe, pruned, self.titles(probe.history), pruning.after_layer, self.template)
        return figure, self._text(probe, pruned, pruning, full, target)

    def titles(self, items) -> list[str]:
        return [self.catalogue.items.title[i - 1] or f"item {i}" for i in items]

    def _text(self, probe, pruned, pruning, full, target):
        ours, theirs = self._cost(len(probe.history), pruning), self._cost(len(probe.history), None)
        kept, n = int(pruned.kept.sum()), len(probe.tokens)
        meter = _table(("", "pruned", "nothing pruned", "ratio"), [
            ("tokens behind the pruner", kept, n, f"{kept / n:.0%}"),
            ("MFLOPs to train on it", f"{ours.training / 1e6:.2f}", f"{theirs.training / 1e6:.2f}", f"{ours.training / theirs.training:.0%}"),
            ("KB of activations", f"{ours.activation_bytes / 1024:.0f}", f"{theirs.activation_bytes / 1024:.0f}",
             f"{ours.activation_bytes / theirs.activation_bytes:.0%}")])
        places = rank_of_target(np.array([full, pruned.items.numpy()]), np.array([target] * 2))
        rows = []
        for place, (item, title) in enumerate(zip(pruned.items.tolist(), self.titles(pruned.items.tolist())), start=1):
            before = int(np.flatnonzero(full == item)[0]) + 1 if item in full else None
            moved = "new" if before is None else "=" if before == place else f"▲ {before - place}" if before > place else f"▼ {place - before}"
            rows.append((place, f"★ {title}" if item == target else title, moved))
        left = [t for i, t in zip(full.tolist(), self.titles(full.tolist())) if i not in pruned.items.tolist()]
        found = ["not in the list" if p == 0 else f"place {p}" for p in places]
        truth = ""
        if probe.truth is not None:
            informative = probe.truth.numpy() > 0
            both = int((informative & pruned.kept.numpy()).sum())
            truth = f" Of {informative.sum()} truly informative tokens {both} are kept; {kept - both} of the kept ones hold nothing."
        levels = _level_names(self.model)
        by_item = [(title, ", ".join(levels[v] for v, k in zip(probe.levels[probe.item_index == m], pruned.kept[probe.item_index == m]) if k) or "–")
                   for m, title in enumerate(self.titles(probe.history))]
        return (f"<p><b>{kept} of {n} tokens kept.</b>{truth} The decoder and the layers behind took {self.milliseconds:.0f} ms here.</p>{meter}"
                f"<p>The next item was <b>★ {html.escape(self.titles([target])[0])}</b>: {found[1]} (nothing pruned: {found[0]}).</p>"
                + _table(("", "recommended", "moved"), rows) + (f"<p>Dropped out: {html.escape('; '.join(left))}.</p>" if left else "")
                + f"<details><summary>Kept tokens as a table</summary>{_table(('item', 'kept'), by_item)}</details>")


def pruning_figure(probe, pruned, titles, layer: int, template: str = "sidlab") -> go.Figure:
    """A history as tokens, kept and pruned, above the attention (mean over heads) of the scoring layer and of the layer behind it.

    Args: `probe`: a `Probe`; `pruned`: what its `prune` returned; `titles` of the history's items; `layer`: the scoring one, from 1.
    """
    model, levels = probe.model, _level_names(probe.model)
    shape = (len(probe.history), len(levels))
    codes = [str(token - model.table.offsets[level]) if level < len(model.table.offsets) else "·"
             for token, level in zip(probe.tokens.tolist(), probe.levels.tolist())]
    labels = list(zip(titles, np.array(codes, dtype=object).reshape(shape).tolist()))
    strip = pruning_strip(labels, pruned.kept.numpy().reshape(shape), pruned.importance.reshape(shape).tolist(),
                          probe.truth.numpy().reshape(shape) > 0 if probe.truth is not None else np.zeros(shape, bool), levels, template)
    n = len(probe.tokens)
    before, after = probe.attention[layer - 1].mean(0).numpy(), np.full((n, n), np.nan, np.float32)
    if len(pruned.attention):
        at = np.flatnonzero(pruned.kept.numpy())
        after[np.ix_(at, at)] = pruned.attention[0].mean(0).numpy()
    behind = f"layer {layer + 1}, behind the pruner" if len(pruned.attention) else "no layer behind the pruner"
    figure = make_subplots(2, 2, specs=[[{"colspan": 2}, None], [{}, {}]], row_heights=[0.42, 0.58], vertical_spacing=0.24, horizontal_spacing=0.08,
                           subplot_titles=("", f"attention in layer {layer}, before", f"attention in {behind}"))
    for trace in strip.data:
        figure.add_trace(trace, row=1, col=1)
    # One scale for both, so that a colour means the same; few cells are far brighter than the rest.
    top = float(np.quantile(before, 0.995))
    for column, weights in enumerate((before, after), start=1):
        figure.add_heatmap(z=weights, zmin=0, zmax=top, colorscale=SCALE, showscale=column == 2, row=2, col=column, hoverongaps=False,
                           colorbar={"title": "weight", "len": 0.5, "y": 0.24},
                           hovertemplate="token %{y} looks at token %{x}: %{z:.3f}<extra></extra>")
    ticks = {"tickvals": list(range(0, n, len(levels))), "ticktext": [str(m + 1) for m in range(shape[0])], "showgrid": False}
    for column in (1, 2):
        figure.update_xaxes(**ticks, title_text="looked at, by item", row=2, col=column)
        figure.update_yaxes(**ticks, autorange="reversed", row=2, col=column)
    figure.update_yaxes(title_text="looking, by item", row=2, col=1)
    figure.update_xaxes(strip.layout.xaxis.to_plotly_json() | {"title": {"text": ""}}, row=1, col=1)
    figure.update_yaxes(strip.layout.yaxis.to_plotly_json(), row=1, col=1)
    return figure.update_layout(template=template, barmode="overlay", height=720, margin={"l": 40, "r": 20, "t": 40, "b": 40},
                                legend={"orientation": "h", "x": 0, "y": 1.01, "yanchor": "bottom"}, uirevision="same")


def _level_names(model):
    return [f"level {v + 1}" for v in range(model.table.levels)] + ["separator"] * model.config.separators


def _table(head, rows):
    top = "".join(f'<th scope="col">{html.escape(str(cell))}</th>' for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"
