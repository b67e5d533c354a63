"""The pruning explorer: one history as tokens, what is kept of it at each ratio, layer and scorer, and what that does to the list."""

import functools
import html
import time

import ipywidgets as widgets
import numpy as np
import plotly.graph_objects as go

from sidlab.checks import one_of
from sidlab.config import TrainConfig
from sidlab.cost import cost
from sidlab.metrics import rank_of_target
from sidlab.pruning import POSITIONS, UNITS, PruningConfig
from sidlab.saliency import SCORERS
from sidlab.viz.explorer import HistoryExplorer, folded, moved, within
from sidlab.viz.figures import short_title
from sidlab.viz.theme import BLUE, GREY, ORANGE, SCALE, template


class PruningExplorer(HistoryExplorer):
    """Prune one user's history live. `PruningExplorer()` shows the bundled demo.

    Args: `model`, `catalogue`: a `SidT5` with its table and the catalogue it was trained on (default: `sidlab.demo.load()`);
    `histories`: which to choose from (default: the catalogue's first 50); the last item of each is the one to be found; `scorers`:
    {name: callable} that join the menu; other arguments set controls: `user` (1 is the first), `keep`,
    `layer`, `scorer`, `unit`, `positions`, `protect`.
    Moving `keep` selects anew and runs the layers behind the pruner and the decoder; the layers before it run once per user.
    """

    heading = "Which tokens does a recommender need?"
    exported = "keep"

    def __init__(self, model=None, catalogue=None, *, histories=None, scorers=None, user=1, keep=1 / 3, layer=2,
                 scorer="rastp", unit="token", positions="original", protect=False):
        self.take(model, catalogue, histories)
        # Where all tokens see all, "rastp-visible" is "rastp".
        without = {"rastp-visible"} if self.model.config.encoder_mask == "full" else set()
        without |= {"oracle"} if self.catalogue.truth is None else set()
        self._scorers = {name: name for name in SCORERS if name not in without} | (scorers or {})
        self._full, self._cost = functools.lru_cache(8)(self._full), functools.lru_cache(512)(self._cost)
        names, last = list(self._scorers), self.model.config.num_layers
        for name, value, valid in (("scorer", scorer, names), ("unit", unit, UNITS), ("positions", positions, POSITIONS)):
            one_of(name, value, valid)
        for name, value, low, high in (("user", user, 1, len(self.histories)), ("keep", keep, 0.05, 1), ("layer", layer, 1, last)):
            within(name, value, low, high)
        super().__init__({
            "keep": widgets.FloatSlider(value=keep, min=0.05, max=1, step=0.01, description="kept share", readout_format=".0%",
                                        layout=widgets.Layout(width="400px", max_width="97%")),
            "scorer": widgets.Dropdown(options=names, value=scorer, description="scorer"),
            "layer": widgets.IntSlider(value=layer, min=1, max=last, description="prune after layer"),
            "unit": widgets.Dropdown(options=UNITS, value=unit, description="unit"),
            "positions": widgets.Dropdown(options=POSITIONS, value=positions, description="positions"),
            "protect": widgets.Checkbox(value=protect, description="keep all separators", indent=False),
            "user": widgets.IntSlider(value=user, min=1, max=len(self.histories), description="user"),
        }, slow=("user", "layer"))

    def pruning(self) -> PruningConfig:
        """The configuration that the controls say."""
        return PruningConfig(after_layer=self.value("layer"), keep=self.value("keep"), scorer=self._scorers[self.value("scorer")],
                             unit=self.value("unit"), positions=self.value("positions"), protect_separators=self.value("protect"))

    def _full(self, user, layer):
        """Recommendations without pruning, and how many milliseconds the layers behind `layer` and the decoder take for them."""
        items = self._probe(user).prune(None).items.numpy()  # also warms up
        return items, self._timed(user, PruningConfig(after_layer=layer, keep=1.0))[1]

    def _timed(self, user, pruning):
        begin = time.perf_counter()
        return self._probe(user).prune(pruning), 1000 * (time.perf_counter() - begin)

    def _cost(self, n_items, pruning):
        c = self.model.config
        config = TrainConfig(d_model=c.d_model, d_kv=c.d_kv, num_heads=c.num_heads, d_ff=c.d_ff, ffn_hidden_layers=c.ffn_hidden_layers,
                             num_layers=c.num_layers, num_decoder_layers=c.num_decoder_layers, dropout=c.dropout_rate,
                             separators=c.separators, max_items=c.max_items, pruning=pruning, precision="fp32")
        return cost(config, self.model.table.widths, np.array([n_items]))

    def draw(self):
        user, pruning = self.value("user"), self.pruning()
        probe, full = self._probe(user), self._full(user, pruning.after_layer)
        self.pruned, self.milliseconds = self._timed(user, pruning)
        kept, target = int(self.pruned.kept.sum()), int(self.histories[user - 1][-1])
        places = rank_of_target(np.array([full[0], self.pruned.items.numpy()]), np.array([target] * 2))
        found = ["not in the list" if place == 0 else f"place {place}" for place in places]
        # Above the figure, since the list itself stands below it, where a small screen does not show it beside the slider.
        title = f"{kept} of {len(probe.tokens)} tokens kept; next item: {found[1]} (unpruned: {found[0]})"
        figure = pruning_figure(probe, self.pruned, self.titles(probe.history), pruning.after_layer, title)
        return figure, self._text(probe, self.pruned, pruning, full, target, found)

    def _text(self, probe, pruned, pruning, full, target, found):
        (full, milliseconds), ours, theirs = full, self._cost(len(probe.history), pruning), self._cost(len(probe.history), None)
        kept, n = int(pruned.kept.sum()), len(probe.tokens)
        meter = table(("meter", "pruned", "unpruned", "ratio"), [
            (what, form.format(a), form.format(b), "" if what.startswith("ms") else f"{a / b:.0%}") for what, form, a, b in (
                ("tokens behind the pruner", "{}", kept, n),
                ("MFLOPs to train on it", "{:.1f}", ours.training / 1e6, theirs.training / 1e6),
                ("MB of activations", "{:.2f}", ours.activation_bytes / 2**20, theirs.activation_bytes / 2**20),
                ("ms from there to the list, noisy", "{:.0f}", self.milliseconds, milliseconds))])
        rows = []
        for place, (item, title) in enumerate(zip(pruned.items.tolist(), self.titles(pruned.items.tolist())), start=1):
            before = int(np.flatnonzero(full == item)[0]) + 1 if item in full else None
            rows.append((place, f"★ {title}" if item == target else title, moved(before, place)))
        left = [t for i, t in zip(full.tolist(), self.titles(full.tolist())) if i not in pruned.items.tolist()]
        truth = ""
        if probe.truth is not None:
            informative = probe.truth.numpy() > 0
            both = int((informative & pruned.kept.numpy()).sum())
            truth = f" Of {informative.sum()} truly informative tokens {both} are kept; {kept - both} kept ones say nothing by themselves."
        levels = _level_names(self.model)
        by_item = [(f"{m + 1}. {title}", ", ".join(levels[v] for v, k in zip(probe.levels[probe.item_index == m],
                                                                            pruned.kept[probe.item_index == m]) if k) or "–")
                   for m, title in enumerate(self.titles(probe.history))]
        dropped = f"<p>Dropped out: {html.escape('; '.join(left))}.</p>" if left else ""
        return (f"<p><b>{kept} of {n} tokens kept.</b>{truth}</p>"
                f"<p>The next item was <b>★ {html.escape(self.titles([target])[0])}</b>: {found[1]} (unpruned: {found[0]}).</p>"
                '<div style="display: flex; flex-wrap: wrap; gap: 0 3em; align-items: flex-start"><div style="max-width: 25em">'
                f"{table(('place', 'recommended', 'moved'), rows)}{dropped}</div>"
                f"<div>{meter}{folded('Kept tokens as a table', table(('item', 'kept'), by_item))}</div></div>")


def pruning_figure(probe, pruned, titles, layer: int, title: str = "") -> go.Figure:
    """A history as tokens, kept and pruned, above the attention (mean over heads) of the scoring layer and of the layer behind it.

    Args: `probe`: a `Probe`; `pruned`: what its `prune` returned; `titles` of the history's items; `layer`: the scoring one, from 1;
    `title` of the figure.
    """
    model, levels = probe.model, _level_names(probe.model)
    shape, n = (len(probe.history), len(levels)), len(probe.tokens)
    codes = [str(token - model.table.offsets[level]) if level < len(model.table.offsets) else "·"
             for token, level in zip(probe.tokens.tolist(), probe.levels.tolist())]
    kept = pruned.kept.numpy()
    informative = np.zeros(n, bool) if probe.truth is None else probe.truth.numpy() > 0
    hover = [f"<b>{html.escape(titles[token // len(levels)])}</b><br>{levels[token % len(levels)]}: {codes[token]}<br>"
             f"{'kept' if kept[token] else 'pruned'}<br>importance {pruned.importance[token]:.4g}"
             + ("" if probe.truth is None else "<br>truly informative" if informative[token] else "<br>holds nothing about the next item")
             for token in range(n)]
    filled = {"color": BLUE, "line": {"color": BLUE, "width": 1}}
    hatched = {"color": "rgba(127,127,127,0.10)", "line": {"color": GREY, "width": 1},
               "pattern": {"shape": "/", "fgcolor": GREY, "fgopacity": 0.45, "size": 9, "solidity": 0.12}}
    traces = []
    for state, chosen, look in (("kept", kept, filled), ("pruned", ~kept, hatched)):
        tokens = np.flatnonzero(chosen)
        item, level = np.divmod(tokens, len(levels))
        traces.append(go.Bar(x=item, y=np.full(len(item), 0.84), base=level + 0.08, width=0.88, marker=look, name=state,
                             hovertext=[hover[token] for token in tokens], hoverinfo="text"))
        # The colour of the text of pruned tokens is the template's, so that an exported page can be light or dark.
        traces.append(go.Scatter(x=item, y=level + 0.5, text=[codes[token] for token in tokens], mode="text", hoverinfo="skip",
                                 showlegend=False, textfont={"size": 12} | ({"color": "white"} if state == "kept" else {})))
    item, level = np.divmod(np.flatnonzero(informative), len(levels))
    traces.append(go.Scatter(x=item + 0.3, y=level + 0.24, mode="markers", name="truly informative", hoverinfo="skip",
                             showlegend=probe.truth is not None,
                             marker={"symbol": "star", "size": 9, "color": ORANGE, "line": {"width": 0.8, "color": "#222222"}}))

    before, after = probe.attention[layer - 1].mean(0).numpy(), np.full((n, n), None, object)  # not NaN, which JSON lacks
    behind = "no layer behind the pruner"
    if len(pruned.attention):
        after[np.ix_(kept, kept)] = _short(pruned.attention[0].mean(0).numpy())
        behind = f"attention in layer {layer + 1},<br>behind the pruner"
    # One scale for both, so that a colour means the same; few cells are far brighter than the rest.
    heat = {"zmin": 0, "zmax": float(np.quantile(before, 0.995)), "colorscale": SCALE, "hoverongaps": False,
            "hovertemplate": "token %{y} looks at token %{x}: %{z:.3f}<extra></extra>"}
    maps = [go.Heatmap(z=_short(before), showscale=False, xaxis="x2", yaxis="y2", **heat),
            go.Heatmap(z=after, xaxis="x3", yaxis="y3", **heat,
                       colorbar={"title": "weight", "len": 0.41, "y": -0.02, "yanchor": "bottom"})]

    # The layout at once: make_subplots and update_layout take twice as long as the model.
    bottom, top = (0.7, 0.36) if shape[0] > 6 else (0.62, 0.44)  # of the strip, whose slanted titles need room, and of the maps
    ticks = {"tickvals": list(range(0, n, len(levels))), "ticktext": [str(m + 1) for m in range(shape[0])], "showgrid": False,
             "zeroline": False}
    layout = {
        "template": template(), "barmode": "overlay", "height": 780, "margin": {"l": 40, "r": 20, "t": 60, "b": 40}, "uirevision": "same",
        "title": {"text": title, "x": 0, "xref": "paper", "y": 1, "pad": {"t": 10}, "yanchor": "top", "font": {"size": 15}},
        "legend": {"orientation": "h", "x": 0, "y": 1.01, "yanchor": "bottom"},
        "xaxis": {"tickvals": list(range(shape[0])), "ticktext": [f"{m}. {short_title(t, shape[0])}" for m, t in enumerate(titles, 1)],
                  "showgrid": False, "tickangle": -60 if shape[0] > 6 else 0, "range": [-0.6, shape[0] - 0.4], "anchor": "y"},
        "yaxis": {"tickvals": [v + 0.5 for v in range(shape[1])], "ticktext": levels, "range": [shape[1], 0], "showgrid": False,
                  "zeroline": False, "domain": [bottom, 1], "anchor": "x"}, "annotations": [],
    }
    for number, domain, name in ((2, [0, 0.46], f"attention in layer {layer},<br>before"), (3, [0.54, 1], behind)):
        across, down = {"range": [-0.5, n - 0.5], "domain": domain}, {"range": [n - 0.5, -0.5], "domain": [0, top]}
        layout[f"xaxis{number}"] = ticks | across | {"anchor": f"y{number}", "title": {"text": "looked at, by item"}}
        layout[f"yaxis{number}"] = ticks | down | {"anchor": f"x{number}", "title": {"text": "looking, by item" if number == 2 else ""}}
        layout["annotations"].append({"text": name, "x": sum(domain) / 2, "y": top + 0.005, "xref": "paper", "yref": "paper",
                                      "xanchor": "center", "yanchor": "bottom", "showarrow": False, "font": {"size": 14}})
    return go.Figure([*traces, *maps], layout)


def _short(weights):
    """Four decimals: of what is sent, most are these."""
    return weights.astype(float).round(4)


def _level_names(model):
    return [f"level {v + 1}" for v in range(model.table.levels)] + ["separator"] * model.config.separators


def table(head, rows) -> str:
    """An HTML table; all cells are escaped."""
    top = "".join(f'<th scope="col" style="text-align: left">{html.escape(str(cell))}</th>' for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<table cellpadding="4"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>'
