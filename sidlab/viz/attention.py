"""The attention explorer: who looks at whom in every layer and head, what that makes of each token,
and what happens without one.
"""

import functools
import html

import ipywidgets as widgets
import numpy as np

from sidlab.checks import one_of
from sidlab.figures.charts import shorten
from sidlab.figures.tables import folded, table
from sidlab.pruning import PruningConfig
from sidlab.viz.attention_figure import attention_figure, cells_of, factors
from sidlab.viz.explorer import HistoryExplorer, moved, within
from sidlab.viz.pruning_game import level_names

SHOWN = 10
# Places of the list; how many items are scored, so that one that leaves the list is still found
SEARCHED = 200
REMOVALS = ("nothing", "this token", "its whole item")


class AttentionExplorer(HistoryExplorer):
    """Attention, centrality, saliency and importance of one user's tokens, and the recommendations
    without a chosen one. `AttentionExplorer()` shows the bundled demo.

    Args: `model`, `catalogue`, `histories` as in `PruningExplorer`; other arguments set controls:
    `user` (1 is the first), `layer` (from 1), `head` (from 1; 0 is the mean of all), `token` (its
    place from 0), `remove` (one of `REMOVALS`). A click on a column of the large heatmap, on a bar
    or on the end of a line chooses the token, a click on a small heatmap its layer and head.
    """

    heading = "Which tokens are looked at, and which ones matter?"
    exported = "token"

    def __init__(
        self,
        model=None,
        catalogue=None,
        *,
        histories=None,
        user=1,
        layer=2,
        head=0,
        token=2,
        remove="this token",
    ):
        self.take(model, catalogue, histories)
        within("user", user, 1, len(self.histories))
        within("layer", layer, 1, self.model.config.num_layers)
        within("head", head, 0, self.model.config.num_heads)
        one_of("remove", remove, REMOVALS)
        self._without = functools.lru_cache(256)(self._without)
        config = self.model.config
        users = widgets.IntSlider(value=user, min=1, max=len(self.histories), description="user")
        within("token", token, 0, len(self._options(user)) - 1)
        self._tokens = widgets.SelectionSlider(
            options=self._options(user),
            value=token,
            description="token",
            layout={"width": "700px", "max_width": "97%"},
        )
        # Before all other observers, so that these find the tokens of this user
        users.observe(self._other_tokens, "value")
        super().__init__(
            {
                "token": self._tokens,
                "remove": widgets.Dropdown(options=REMOVALS, value=remove, description="remove"),
                "layer": widgets.IntSlider(
                    value=layer, min=1, max=config.num_layers, description="layer"
                ),
                "head": widgets.Dropdown(
                    options=[("mean", 0), *((str(h + 1), h + 1) for h in range(config.num_heads))],
                    value=head,
                    description="head",
                ),
                "user": users,
            },
            slow=("user",),
        )

    def _without(self, user, layer, tokens):
        """{item: log-probability}, best first, when `tokens` are taken out after `layer`; no
        tokens: as it is.
        """
        found = min(SEARCHED, self.model.table.n_items)
        pruned = self._probe(user).prune(
            PruningConfig(keep=1.0, after_layer=layer), without=tokens, k=found, beam=found
        )
        return dict(zip(pruned.items.tolist(), pruned.scores.tolist()))

    def _options(self, user):
        probe = self._probe(user)
        levels = level_names(self.model)
        titles = self.titles(probe.history)
        return [
            (f"item {m + 1}, {levels[level]}: {shorten(titles[m])}", place)
            for place, (m, level) in enumerate(
                zip(probe.item_index.tolist(), probe.levels.tolist())
            )
        ]

    def _other_tokens(self, change):
        before = self._quiet
        token = self._tokens.value
        self._quiet = True
        try:
            with self._tokens.hold_sync():
                self._tokens.options = options = self._options(change["new"])
                self._tokens.value = min(token, len(options) - 1)
        finally:
            self._quiet = before

    def acted(self, content):
        """A click on a point x, y of the trace of that number chooses a token, or a layer and a
        head.
        """
        if content["trace"] == 0:
            _, side = cells_of(len(self._probe(self.value("user")).tokens))
            self.set(layer=int(content["y"]) // side + 1, head=int(content["x"]) // side + 1)
        else:
            self.set(token=round(content["x"]))

    def _names(self, probe):
        """Of the tokens, as a sentence has them."""
        levels = level_names(self.model)
        titles = self.titles(probe.history)
        return [
            f"{levels[level]} of item {m + 1} ({shorten(titles[m])})"
            for m, level in zip(probe.item_index.tolist(), probe.levels.tolist())
        ]

    def removed(self) -> tuple[int, ...]:
        """Places of the tokens that are taken out after the layer."""
        item_index = self._probe(self.value("user")).item_index
        token = self.value("token")
        whole = np.flatnonzero(item_index.numpy() == int(item_index[token]))
        return {"nothing": (), "this token": (token,), "its whole item": tuple(whole.tolist())}[
            self.value("remove")
        ]

    def draw(self):
        user, layer, head, token = (self.value(name) for name in ("user", "layer", "head", "token"))
        probe = self._probe(user)
        removed = self.removed()
        before = self._without(user, layer, ())
        after = self._without(user, layer, removed)
        scores = factors(probe, layer, head)
        figure = attention_figure(probe, scores, layer, head, token, removed, self._names(probe))
        return figure, self._text(probe, scores, before, after, int(self.histories[user - 1][-1]))

    def _text(self, probe, scores, before, after, target):
        layer = self.value("layer")
        head = self.value("head")
        token = self.value("token")
        removed = self.removed()
        names = [label for label, _ in self._tokens.options]
        n = len(probe.tokens)
        heads = self.model.config.num_heads
        weights = scores["attention"][token]
        said = self._names(probe)
        most = ", ".join(
            f"{html.escape(said[i])}: {weights[i]:.3f}"
            for i in np.argsort(-weights, kind="stable")[:3]
        )
        scores = {name: values for name, values in scores.items() if name != "attention"}
        truth = (
            [""] * n
            if probe.truth is None
            else [f"{nats:.2g} nats" if nats > 0 else "–" for nats in probe.truth.tolist()]
        )
        informative = {"": "", "–": ". As an input it adds nothing to what the others say"}.get(
            truth[token], f". As an input it is truly <b>informative: {truth[token]}</b>"
        )
        behind = (
            "the decoder has"
            if layer == self.model.config.num_layers
            else f"layer {layer + 1} and all after it have"
        )
        facts = ", ".join(
            f"{name} {values[token]:.3g} (place {1 + int((values > values[token]).sum())} of {n})"
            for name, values in scores.items()
        )
        of_heads = (
            "" if head else f" RASTP sums the heads: {heads} times this centrality, the same order."
        )
        places = [
            str(list(found).index(target) + 1) if target in found else f"below {len(found)}"
            for found in (before, after)
        ]
        change = f"place {places[0]} → {places[1]}"
        if target in before and target in after:
            gain = after[target] - before[target]
            change = (
                f"log-probability {before[target]:.3f} → {after[target]:.3f} (<b>{gain:+.3f}</b>),"
                f" {change}"
            )
        rows = [
            (name, *(f"{values[i]:.3g}" for values in scores.values()), truth[i])
            for i, name in enumerate(names)
        ]
        looked = [
            (f"layer {number}", *(names[i] for i in received.argmax(1)))
            for number, received in enumerate(probe.attention.sum(2), start=1)
        ]
        seen = (
            f" Layers up to {layer} have seen it all, {behind} not seen what is removed."
            if removed
            else ""
        )
        return (
            f"<p><b>{html.escape(names[token])}: {self.value('remove')} removed.</b>{seen}</p><p>In"
            f" layer {layer}, {f'head {head}' if head else 'mean of all heads'}:"
            f" {facts}{informative}.{of_heads}</p><p>It looks most at {most}. Each small map has a"
            " scale of its own: yellow is what its head looks at most.</p><p>The next item was"
            f" <b>★ {html.escape(self.titles([target])[0])}</b>: {change}.</p>"
            + table(
                ("place", "recommended", "probability", "before", "moved"),
                self._moves(before, after, target),
            )
            + folded("All tokens as a table", table(("token", *scores, "truth"), rows))
            + folded(
                "The token that each head looks at most",
                table(("", *(f"head {h + 1}" for h in range(heads))), looked),
            )
        )

    def _moves(self, before, after, target):
        """Rows of the list: place, title, probability, what it was before, how many places it rose
        or fell.
        """
        was = {item: place for place, item in enumerate(before, start=1)}
        rows = []
        for place, (item, score) in enumerate(list(after.items())[:SHOWN], start=1):
            title = self.titles([item])[0]
            chances = (f"{np.exp(value):.1%}" for value in (score, before.get(item, -np.inf)))
            rows.append(
                (
                    place,
                    f"★ {title}" if item == target else title,
                    *chances,
                    moved(was.get(item), place),
                )
            )
        return rows
