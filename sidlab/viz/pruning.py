"""The pruning explorer: one history as tokens, what is kept of it at each ratio, layer and scorer,
and what that does to the list.

Its picture is drawn by `pruning.js` from `PruningExplorer.state`. Besides, there is a game: prune
by hand, or make a rule of levels and recency, and be scored against the scorers.
"""

import functools
import html

import ipywidgets as widgets
import numpy as np

from sidlab.checks import integer, one_of
from sidlab.config import TrainConfig
from sidlab.figures.charts import shorten
from sidlab.metrics import rank_of_target
from sidlab.pruning import POSITIONS, UNITS, PruningConfig
from sidlab.research.cost import cost
from sidlab.saliency import SCORERS
from sidlab.viz.explorer import HistoryExplorer, moved, within
from sidlab.viz.pruning_game import beaten, level_names, play_rule
from sidlab.viz.pruning_svg import pruning_svg, without_tags
from sidlab.viz.view import View

RIVALS = ("rastp", "random", "recent", "oracle")  # whom the reader plays against
CROWD = 200  # how many users a rule is scored over
SEARCHED = 200  # how many items are scored: one that leaves the list still has a log-probability


class PruningView(View):
    """Draws what `PruningExplorer.state` gives."""

    file = "pruning.js"


class PruningExplorer(HistoryExplorer):
    """Prune one user's history live. `PruningExplorer()` shows the bundled demo.

    Args: `model`, `catalogue`: a `SidT5` with its table and the catalogue it was trained on
    (default: `sidlab.course.demo.load()`); `histories`: which to choose from (default: the
    catalogue's first 50); the last item of each is the one to be found; `scorers`: {name: callable}
    that join the menu; `simple`: only kept share, scorer and user are shown; other arguments set
    controls: `user` (1 is the first), `keep`, `layer`, `scorer`, `unit`, `positions`, `protect`.
    Moving `keep` selects anew and runs the layers after the pruner and the decoder; the layers
    before it run once per user.
    """

    heading = "Which tokens does a recommender need?"
    exported = "keep"
    kind = PruningView

    def __init__(
        self,
        model=None,
        catalogue=None,
        *,
        histories=None,
        scorers=None,
        simple=False,
        user=1,
        keep=1 / 3,
        layer=2,
        scorer="rastp",
        unit="token",
        positions="original",
        protect=False,
    ):
        self.take(model, catalogue, histories)
        everybody = self.catalogue.histories if histories is None else histories
        self._crowd = [history for history in everybody if len(history) > 1][:CROWD]
        # Where all tokens see all, "rastp-visible" is "rastp".
        without = {"rastp-visible"} if self.model.config.encoder_mask == "full" else set()
        without |= {"oracle"} if self.catalogue.truth is None else set()
        self._scorers = {name: name for name in SCORERS if name not in without} | (scorers or {})
        self._full = functools.lru_cache(8)(self._full)
        self._cost = functools.lru_cache(512)(self._cost)
        self._score = functools.lru_cache(256)(self._score)
        self._play = functools.lru_cache(64)(self._play)
        self._by_hand = None  # (user, tokens) while one prunes by hand
        self._rule = {}  # what the rule scored
        names = list(self._scorers)
        last = self.model.config.num_layers
        for name, value, valid in (
            ("scorer", scorer, names),
            ("unit", unit, UNITS),
            ("positions", positions, POSITIONS),
        ):
            one_of(name, value, valid)
        for name, value, low, high in (
            ("user", user, 1, len(self.histories)),
            ("keep", keep, 0.05, 1),
            ("layer", layer, 1, last),
        ):
            within(name, value, low, high)

        # In one row on 950 pixels.
        super().__init__(
            {
                "keep": widgets.FloatSlider(
                    value=keep,
                    min=0.05,
                    max=1,
                    step=0.01,
                    description="kept share",
                    readout_format=".0%",
                    layout=widgets.Layout(width="295px", max_width="97%"),
                ),
                "scorer": widgets.Dropdown(
                    options=names,
                    value=scorer,
                    description="scorer",
                    layout=widgets.Layout(width="155px"),
                ),
                "user": widgets.IntSlider(
                    value=user,
                    min=1,
                    max=len(self.histories),
                    description="user",
                    layout=widgets.Layout(width="200px"),
                ),
                "layer": widgets.IntSlider(
                    value=layer,
                    min=1,
                    max=last,
                    description="prune after layer",
                    layout=widgets.Layout(width="270px"),
                ),
                "unit": widgets.Dropdown(
                    options=UNITS,
                    value=unit,
                    description="unit",
                    layout=widgets.Layout(width="130px"),
                ),
                "positions": widgets.Dropdown(
                    options=POSITIONS,
                    value=positions,
                    description="positions",
                    layout=widgets.Layout(width="180px"),
                ),
                "protect": widgets.Checkbox(
                    value=protect,
                    description="keep all separators",
                    indent=False,
                    layout=widgets.Layout(width="170px"),
                ),
            },
            slow=("user", "layer"),
        )
        self._fold(simple, (layer, unit, positions, protect) != (2, "token", "original", False))

    def _fold(self, simple, unfolded):
        """Show three controls, and the others in a row that a checkbox shows and hides (simple:
        not at all)."""
        row, *rest = self.children
        shown = row.children[:3]
        hidden = row.children[3:]
        more = widgets.Checkbox(
            value=unfolded,
            description="more controls",
            indent=False,
            layout=widgets.Layout(width="115px"),
        )
        experts = widgets.Box(
            hidden,
            layout=widgets.Layout(flex_flow="row wrap", align_items="center", grid_gap="4px 16px"),
        )

        def show(change=None):
            experts.layout.display = None if more.value else "none"

        more.observe(show, "value")
        show()
        row.children = shown if simple else (*shown, more)
        self.children = (row, *rest) if simple else (row, experts, *rest)

    def pruning(self) -> PruningConfig:
        """The configuration that the controls say."""
        return PruningConfig(
            after_layer=self.value("layer"),
            keep=self.value("keep"),
            scorer=self._scorers[self.value("scorer")],
            unit=self.value("unit"),
            positions=self.value("positions"),
            protect_separators=self.value("protect"),
        )

    def hand(self) -> tuple[int, ...] | None:
        """Places of this user's tokens that the reader has pruned; None while the scorer prunes."""
        if self._by_hand is None:
            return None
        user, tokens = self._by_hand
        return tokens if user == self.value("user") else ()

    def _full(self, user):
        """Recommendations without pruning: item ids int64 [k]."""
        return self._probe(user).prune(None).items.numpy()

    def _cost(self, n_items, pruning):
        c = self.model.config
        config = TrainConfig(
            d_model=c.d_model,
            d_kv=c.d_kv,
            num_heads=c.num_heads,
            d_ff=c.d_ff,
            ffn_hidden_layers=c.ffn_hidden_layers,
            num_layers=c.num_layers,
            num_decoder_layers=c.num_decoder_layers,
            dropout=c.dropout_rate,
            separators=c.separators,
            max_items=c.max_items,
            pruning=pruning,
            precision="fp32",
        )
        return cost(config, self.model.table.widths, np.array([n_items]))

    def _plain(self, keep, scorer="recent"):
        """Keep a share of the single tokens, at the controls' layer and with their positions."""
        return PruningConfig(
            after_layer=self.value("layer"),
            keep=keep,
            scorer=scorer,
            positions=self.value("positions"),
        )

    def state(self) -> dict:
        """What the view draws, ready for JSON. Lists of `tokens` have N entries, in the order of
        the history; flags are 0 or 1.

        * `text`: HTML, how many tokens are kept and where the next item went; `label`: it without
          tags.
        * `layer`: prune after this one, from 1; `layers`: how many the encoder has; `levels`:
          names of an item's tokens, in order.
        * `items`: `title` of the history's items, [M].
        * `tokens`: `item` (from 0) and `level` (a place in `levels`) of each; its `code` as text;
          its `name`, "level 1 of item 2 (Dune …)"; `fact`, words on its importance; its
          `importance`, to four digits, and `scaled` to 0..1; `kept`; `informative` ([] where
          nobody knows).
        * `list`: the recommendations. `after`: ids of the items, best first; their `title`; how
          they `moved` ("=", "▲ 2", "▼ 1", "new"); `out`: titles that only the unpruned list has.
        * `target`: the next item: `item`, its `title`, and its places `before` and `after`
          pruning, 0 where it is not in the list.
        * `attention`, mean over heads, rows are queries: `before`, of the scoring layer, N × N;
          `after`, of the layer after the pruner, K × K of the kept tokens ("" after the last
          layer). A string with a character for each cell, row by row: its code minus 35 is the
          weight in units of 0.0001, so that most cells are one byte. `top`: the weight that is
          drawn brightest.
        * `meter`: `head` and `rows` of a table, texts.
        * `game`: whether there is somebody who hears what is played. `hand`: `on`; places of the
          `pruned` tokens; `rows` of the scores, texts (name, place, log-probability); a `verdict`;
          and `text` to copy. `rule`: `levels`, `newest`; `rows` (name, recall@10); `what` it
          keeps, its `share` of the tokens, over how many `users`; `text` to copy; and the `number`
          of rules scored. {} before the first.
        """
        user = self.value("user")
        hand = self.hand()
        pruning = self.pruning()
        probe = self._probe(user)
        before = self._full(user)
        target = int(self.histories[user - 1][-1])
        if hand is None:
            self.pruned = chosen = probe.prune(pruning)
        else:
            chosen = probe.prune(self._plain(1.0, pruning.scorer))  # for the importance
            self.pruned = probe.prune(self._plain(1.0), without=hand)
            pruning = self._plain(int(self.pruned.kept.sum()) / len(probe.tokens))
        after = self.pruned.items.numpy()
        places = rank_of_target(np.array([before, after]), np.array([target] * 2)).tolist()
        text = self._text(probe, self.pruned.kept.numpy(), target, places)
        left = [item for item in before.tolist() if item not in after]
        was = {item: place for place, item in enumerate(before.tolist(), start=1)}
        layer = pruning.after_layer
        attention = probe.attention[layer - 1].mean(0).numpy()
        behind = (
            _cells(self.pruned.attention[0].mean(0).numpy()) if len(self.pruned.attention) else ""
        )
        return {
            "text": text,
            "label": html.unescape(without_tags(text)),
            "layer": layer,
            "layers": self.model.config.num_layers,
            "levels": level_names(self.model),
            "items": {"title": self.titles(probe.history)},
            "tokens": self._tokens(probe, chosen.importance.numpy(), self.pruned.kept.numpy()),
            "list": {
                "after": after.tolist(),
                "title": self.titles(after),
                "out": self.titles(left),
                "moved": [
                    moved(was.get(item), place)
                    for place, item in enumerate(after.tolist(), start=1)
                ],
            },
            "target": {
                "item": target,
                "title": self.titles([target])[0],
                "before": places[0],
                "after": places[1],
            },
            "attention": {
                "before": _cells(attention),
                "after": behind,
                "top": round(float(np.quantile(attention, 0.995)), 4),
            },
            "meter": self._meter(probe, int(self.pruned.kept.sum()), pruning),
            "game": True,
            "hand": self._hand_state(user, hand, target),
            "rule": self._rule,
        }

    def _tokens(self, probe, importance, kept):
        levels = level_names(self.model)
        offsets = self.model.table.offsets
        titles = [shorten(title, 32) for title in self.titles(probe.history)]
        item = probe.item_index.tolist()
        level = probe.levels.tolist()
        n = len(kept)
        place = np.empty(n, int)
        place[np.argsort(-importance, kind="stable")] = np.arange(1, n + 1)
        fact = [f"importance {value:.3g} (place {p} of {n})" for value, p in zip(importance, place)]
        informative = [] if probe.truth is None else (probe.truth.numpy() > 0).astype(int).tolist()
        for token, says in enumerate(informative):
            fact[token] += ", truly informative" if says else ", holds nothing about the next item"
        # A custom scorer may say −inf, which JSON does not know.
        finite = np.nan_to_num(
            importance.astype(float), neginf=importance[np.isfinite(importance)].min(initial=0)
        )
        low = min(0.0, finite.min())
        high = finite.max()
        scaled = (finite - low) / (high - low) if high > low else np.zeros(n)
        return {
            "item": item,
            "level": level,
            "kept": kept.astype(int).tolist(),
            "informative": informative,
            "fact": fact,
            "code": [
                str(t - offsets[v]) if v < len(offsets) else "·"
                for t, v in zip(probe.tokens.tolist(), level)
            ],
            "name": [f"{levels[v]} of item {m + 1} ({titles[m]})" for m, v in zip(item, level)],
            "importance": [float(f"{value:.4g}") for value in finite],
            "scaled": scaled.round(3).tolist(),
        }

    def _text(self, probe, kept, target, places):
        found = ["not in the list" if place == 0 else f"place {place}" for place in places]
        truth = ""
        if probe.truth is not None:
            informative = probe.truth.numpy() > 0
            both = int((informative & kept).sum())
            truth = (
                f" Of {informative.sum()} truly informative tokens {both} are kept; "
                f"{kept.sum() - both} kept ones say nothing by themselves."
            )
        return (
            f"<p><b>{kept.sum()} of {len(kept)} tokens kept.</b>{truth}</p><p>The next item was "
            f"<b>★ {html.escape(shorten(self.titles([target])[0], 60))}</b>: "
            f"{found[1]} (unpruned: {found[0]}).</p>"
        )

    def _meter(self, probe, kept, pruning):
        ours = self._cost(len(probe.history), pruning)
        theirs = self._cost(len(probe.history), None)
        rows = (
            ("tokens after the pruner", "{}", kept, len(probe.tokens)),
            ("MFLOPs to train on it", "{:.1f}", ours.training / 1e6, theirs.training / 1e6),
            (
                "MB of activations",
                "{:.2f}",
                ours.activation_bytes / 2**20,
                theirs.activation_bytes / 2**20,
            ),
        )
        return {
            "head": ["meter", "pruned", "unpruned", "ratio"],
            "rows": [
                [what, form.format(a), form.format(b), f"{a / b:.0%}"] for what, form, a, b in rows
            ],
        }

    # The game: whom does the reader beat at the same number of tokens?

    def acted(self, content):
        """What the view says: {"hand": bool}, prune by hand or not; {"pruned": [places]}, the
        tokens pruned by hand; {"rule": {"levels": [places in `levels`], "newest": items}}, score
        this rule. ValueError for what cannot be."""
        user = self.value("user")
        if "hand" in content:
            self._by_hand = (user, ()) if content["hand"] else None
        if "pruned" in content:
            tokens = tuple(sorted({integer("pruned", token, 0) for token in content["pruned"]}))
            n = len(self._probe(user).tokens)
            if tokens and (tokens[-1] >= n or len(tokens) == n):
                raise ValueError(
                    f"pruned must hold places below {n}, and leave one token, got {list(tokens)}"
                )
            self._by_hand = (user, tokens)
        # By hand the scorer has no say.
        for name in ("keep", "scorer", "unit", "protect"):
            self.controls[name].disabled = self._by_hand is not None
        if "rule" in content:
            number = self._rule.get("number", 0) + 1
            levels = tuple(content["rule"]["levels"])
            newest = content["rule"]["newest"]
            found = self._play(levels, newest, self.value("layer"), self.value("positions"))
            self._rule = found | {"number": number}
        self.refresh()

    def _play(self, levels, newest, layer, positions):
        return play_rule(self.model, self._crowd, levels, newest, layer, positions)

    def _score(self, user, pruning, without=()):
        """(place, log-probability) of the next item: its place in the list, 0 where it is missing,
        and None where it is not among the first `SEARCHED`."""
        probe = self._probe(user)
        target = int(self.histories[user - 1][-1])
        items = probe.prune(pruning, without=without).items.numpy()
        place = rank_of_target(items[None], [target])[0]
        found = min(SEARCHED, self.model.table.n_items)
        wide = probe.prune(pruning, without=without, k=found, beam=found)
        score = wide.scores[wide.items == target]
        return int(place), float(score[0]) if len(score) else None

    def _hand_state(self, user, hand, target):
        if not hand:
            return {"on": hand is not None, "pruned": [], "rows": [], "text": "", "verdict": ""}
        n = len(self._probe(user).tokens)
        kept = n - len(hand)
        names = [name for name in RIVALS if name in self._scorers]
        if self.value("scorer") not in names:
            names.append(self.value("scorer"))
        scores = {"you": self._score(user, self._plain(1.0), hand)}
        scores |= {
            name: self._score(user, self._plain(kept / n, self._scorers[name])) for name in names
        }
        rows = [
            [name, str(place or "–"), "–" if score is None else f"{score:.2f}"]
            for name, (place, score) in scores.items()
        ]
        verdict = beaten(scores)
        said = "; ".join(f"{name} {place} ({score})" for name, place, score in rows)
        text = (
            f"sidlab: I kept {kept} of user {user}'s {n} tokens by hand, after layer "
            f"{self.value('layer')}. "
            f"Place (log-probability) of the next item: {said}."
        )
        return {"on": True, "pruned": list(hand), "rows": rows, "text": text, "verdict": verdict}

    def frames(self, values=None):
        """As in `Explorer`; nobody hears what is played on an exported page."""
        return [(value, state | {"game": False}) for value, state in super().frames(values)]

    def picture(self) -> dict:
        return {"image/svg+xml": pruning_svg(self.content), "text/plain": self.content["label"]}


def _cells(weights) -> str:
    """Weights in 0..1, any shape, as `state` describes."""
    return "".join(map(chr, (np.rint(10_000 * weights.astype(float)).astype(int) + 35).ravel()))
