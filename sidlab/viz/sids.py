"""The SID explorer: residual k-means at work. What each level takes away, which items come under
one prefix, and what is lost.
"""

import functools
import html

import ipywidgets as widgets
import numpy as np
import plotly.graph_objects as go
from scipy.sparse import csr_array

from sidlab.figures.charts import shorten
from sidlab.figures.tables import folded, table
from sidlab.figures.theme import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    SKY,
    VERMILLION,
    YELLOW,
    template,
)
from sidlab.sids.residual_kmeans import ResidualKMeans
from sidlab.sids.table import SidTable
from sidlab.viz.explorer import Explorer

LEVELS = 4
WIDTHS = (2, 4, 6, 8, 12, 16, 24, 32, 64, 128, 256)
NODES = 300  # of the tree, at most that many on a level
LARGE = 2000  # with more items than this a fit takes longer than a blink
# Of codes: as many as the planted widths have
COLORS = (BLUE, ORANGE, GREEN, VERMILLION, SKY, PURPLE, GREY, YELLOW)
PALE = "#C8C8C8"
# None with arcs: between those and others a browser cannot draw a marker that changes on its way.
SHAPES = (
    "octagon",
    "square",
    "diamond",
    "cross",
    "x",
    "triangle-up",
    "star",
    "triangle-down",
    "pentagon",
    "hourglass",
    "bowtie",
    "hexagram",
    "triangle-left",
    "diamond-tall",
    "triangle-right",
    "hexagon",
)
DARK_INK = (ORANGE, SKY, PURPLE, YELLOW)  # the others take white letters
# 32 codes can be told apart without their colours
SYMBOLS = (*SHAPES, *(f"{shape}-open" for shape in SHAPES))
AXES = ("of what is left", "of the embeddings")
ROOM = 72  # a part of the tree has room for a word if it is one 72nd of the round or more


class SidExplorer(Explorer):
    """Fit residual k-means live: a map of what each level leaves, the tree of prefixes, and how
    good the SIDs are.

    Args: `catalogue` with embeddings (default: "planted"); `sample`: how many items the map shows
    at most, drawn at random; `seed` of the k-means; `levels`, `width`, `after`, `axes` set
    controls. While the axes stay, those of the embeddings, items move from where they were to what
    the next level leaves of them. Each width is fitted once, with LEVELS levels: the first L of
    them are those of a fit with L.
    """

    heading = "What do the codes of a semantic ID stand for?"
    exported = "after"

    def __init__(
        self, catalogue=None, *, sample=300, seed=0, levels=3, width=8, after=0, axes=AXES[1]
    ):
        if catalogue is None:
            from sidlab.data.load import load_catalogue

            catalogue = load_catalogue("planted")
        self.catalogue = catalogue
        self.x = catalogue.embeddings
        self.seed = seed
        n = catalogue.n_items
        options = [w for w in WIDTHS if w <= max(2, n // 5)]
        if width not in options:
            raise ValueError(
                f"width={width} is not offered for {n} items; use one of"
                f" {', '.join(map(str, options))}"
            )
        self.shown = np.sort(np.random.default_rng(0).permutation(n)[:sample])
        self.titles = [
            title or f"item {i}" for i, title in enumerate(catalogue.items.title, start=1)
        ]
        # Here, since scikit-learn is slow to import.
        from sklearn.feature_extraction.text import CountVectorizer

        vectorizer = CountVectorizer(binary=True, max_features=2000, dtype=np.float32)
        self.has_word = vectorizer.fit_transform(
            text or title for text, title in zip(catalogue.items.text, self.titles)
        )
        self.words = vectorizer.get_feature_names_out()
        centred = self.x - self.x.mean(axis=0)
        self.reach = 1.1 * max(
            np.sqrt((centred**2).sum(axis=1).mean()), np.abs(centred @ main_plane(centred)).max()
        )
        for name in ("encoder", "codes", "report", "nodes"):
            setattr(self, name, functools.lru_cache(64)(getattr(self, name)))
        super().__init__(
            {
                "levels": widgets.IntSlider(
                    value=levels, min=1, max=LEVELS, description="levels (L)"
                ),
                "width": widgets.SelectionSlider(
                    options=options, value=width, description="codes per level (W)"
                ),
                "after": widgets.IntSlider(
                    value=after, min=0, max=LEVELS, description="map after level"
                ),
                "axes": widgets.Dropdown(options=AXES, value=axes, description="main directions"),
            },
            slow=("levels", "width", "after", "axes") if n > LARGE else (),
        )

    def encoder(self, width: int) -> ResidualKMeans:
        """Fitted with LEVELS levels."""
        return ResidualKMeans(LEVELS, width, self.seed).fit(self.x)

    def codes(self, width: int) -> np.ndarray:
        """int64 [n, LEVELS]"""
        return self.encoder(width).encode(self.x)

    def report(self, levels: int, width: int):
        """`SidTable.report` of the first `levels` levels."""
        return SidTable(self.codes(width)[:, :levels], width).report(self.encoder(width), self.x)

    def nodes(self, levels: int, width: int) -> list[dict]:
        """`prefix_nodes` of the first `levels` levels."""
        return prefix_nodes(self.codes(width)[:, :levels], self.has_word, self.words, self.titles)

    def left(self, level: int, width: int) -> np.ndarray:
        """What the first `level` levels leave of the embeddings, float32 [n, d]; without any level,
        what the mean leaves.
        """
        return self.x - (
            self.encoder(width).decode(self.codes(width)[:, :level])
            if level
            else self.x.mean(axis=0)
        )

    def draw(self):
        levels = self.value("levels")
        width = self.value("width")
        # There is nothing after the last level: the control goes there with it.
        if self.value("after") > levels:
            before = self._quiet
            self._quiet = True
            self.controls["after"].value = levels
            self._quiet = before
        after = self.value("after")
        # Whose codes mark the items: the next ones; at the end the last ones
        level = min(after + 1, levels)
        left = self.left(after, width)
        plane = main_plane(left if self.value("axes") == AXES[0] else self.left(0, width))
        size = np.linalg.norm(left, axis=1)
        code = self.codes(width)[:, level - 1]
        centroids = np.full((width, 2), np.nan)
        if after < levels:
            used = np.unique(code)
            centroids[used] = (
                self.encoder(width).codebooks_[after][used] - (0 if after else self.x.mean(axis=0))
            ) @ plane
        items = [
            ("-".join(map(str, self.codes(width)[i, :levels])), self.titles[i], f"{size[i]:.3f}")
            for i in self.shown
        ]
        hover = [
            f"<b>{html.escape(shorten(title, 60))}</b><br>SID {sid}<br>length {length}"
            for sid, title, length in items
        ]
        what = f"What is left after level {after}" if after else "The embeddings"
        figure = sid_figure(
            left[self.shown] @ plane,
            code[self.shown],
            hover,
            centroids,
            np.sqrt((size**2).mean()),
            self.reach,
            self.nodes(levels, width),
            level,
            f"{what},<br>{'marked by' if after < levels else 'still marked by'} code {level}",
            self.shown,
        )
        # On axes that change with the level a movement would say nothing
        if self.value("axes") == AXES[1]:
            figure.layout.transition = {"duration": 600}
        order = np.lexsort(self.codes(width)[self.shown, :levels].T[::-1])
        return figure, self._text(levels, width, after, level, [items[i] for i in order])

    def _text(self, levels, width, after, level, items):
        report = self.report(levels, width)
        nodes = self.nodes(levels, width)
        n = self.catalogue.n_items
        shared = report["collision_rate"]
        per_level = report["per_level"][:levels]
        least = _least(n)
        left = 1 if after == 0 else per_level[after - 1]["reconstruction_error"]
        meters = [
            (
                str(row["level"]),
                _meter(row["utilisation"], f"{row['used']} of {width}"),
                _meter(row["perplexity"] / width, f"{row['perplexity']:.1f}"),
                f"{row['prefixes']:,}",
                f"{row['mean_group']:.1f}",
                _meter(row["reconstruction_error"], f"{row['reconstruction_error']:.1%}"),
            )
            for row in per_level
        ]
        head = (
            "level",
            "used codes",
            "perplexity",
            "prefixes",
            "items per prefix",
            "error (squared length left)",
        )
        code = self.codes(width)[:, level - 1]
        word, share, _ = typical_words(code, self.has_word, self.words)
        count = np.bincount(code, minlength=width)
        codes = [
            (
                c,
                count[c],
                f"{word[c] or '–'} ({share[c]:.0%})" if count[c] else "dead: no item has it",
            )
            for c in range(width)
        ]
        together = [(node["id"], node["items"], node["titles"]) for node in nodes if node["shared"]]
        said = [
            (
                f"<p><b>{levels} level{'s' * (levels > 1)} of {width} codes make {width**levels:,}"
                " possible SIDs."
            ),
            (
                f"{n:,} items have {report['unique_sids']:,} different ones:</b>"
                f" {_meter(shared, f'{shared:.1%}')}"
            ),
            "of the items share theirs with another item.",
            (
                f"A de-duplication digit would have {report['largest_group']} values."
                if shared
                else ""
            ),
            f"After level {after}, {left:.1%} of the squared length of the embeddings is left.",
            (
                "The axes stay when the level changes: each item moves by the centroid that is"
                " subtracted."
                if self.value("axes") == AXES[1]
                else (
                    "The axes change with the level, so a place on one map is another place on the"
                    " next."
                )
            ),
            f"The map shows a random sample of {len(items)} items." if len(items) < n else "",
            f"The tree leaves out prefixes of fewer than {least} items." if least > 1 else "",
            "</p>",
        ]
        return (
            " ".join(said)
            + "<table><thead><tr>"
            + "".join(f'<th scope="col">{cell}</th>' for cell in head)
            + "</tr></thead><tbody>"
            + "".join(f"<tr><td>{'</td><td>'.join(row)}</td></tr>" for row in meters)
            + "</tbody></table>"
            + folded(
                f"Codes of level {level}, with the word that sets their items apart",
                table(("code", "items", "word (share of the code's items that have it)"), codes),
            )
            + folded(
                f"SIDs of several items in the tree: {len(together)}"
                + (", the first 50" if len(together) > 50 else ""),
                table(("SID", "items", "titles"), together[:50]),
            )
            + folded(
                "Items of the map, in the order of the tree",
                table(("SID", "item", "length of what is left"), items),
            )
        )


def main_plane(x) -> np.ndarray:
    """The two main directions of `x` float [n, d] (PCA without centring): float64 [d, 2],
    orthonormal, of the two signs always the same.
    """
    x = np.asarray(x, np.float64)
    axes = np.linalg.eigh(x.T @ x)[1][:, :-3:-1]
    return axes * np.sign(axes[np.abs(axes).argmax(axis=0), [0, 1]])


def typical_words(group, has_word, words, base=None):
    """The word that most sets each group of items apart: the one whose share rises most over
    `base`.

    Args: `group` int [n], of G groups; `has_word` sparse [n, V], 0 or 1; `words`: V of them; `base`
    float [G, V] or [V], shares to compare with (default: those of all items).
    Returns: G words, "" where no share rises; float [G], the share of the group's items that have
    it; float [G, V], all words' shares.
    """
    has_word = csr_array(has_word)
    size = np.bincount(group)
    shares = (csr_array((1 / size[group], (group, np.arange(len(group))))) @ has_word).toarray()
    rise = shares - (has_word.mean(axis=0) if base is None else base)
    best = rise.argmax(axis=1)
    rows = np.arange(len(size))
    rises = rise[rows, best] > 1e-6
    return np.where(rises, words[best], ""), np.where(rises, shares[rows, best], 0), shares


def prefix_nodes(codes, has_word, words, titles) -> list[dict]:
    """The tree of the prefixes of `codes` int [n, L], a dict per node, level by level: `id`
    ("3-0-7"), `parent` (its id), `level`, `code`, `items` (how many), `shared` (a whole SID of
    several items), `word` (what sets them apart within the parent) and its `share`, `titles` (of
    the first four). Prefixes of fewer than n / NODES items are left out.
    """
    nodes = []
    levels = codes.shape[1]
    least = _least(len(codes))
    parent = np.zeros(len(codes), int)
    names = ["all"]
    base = csr_array(has_word).mean(axis=0)[None]
    for level in range(1, levels + 1):
        _, first, group, count = np.unique(
            codes[:, :level], axis=0, return_index=True, return_inverse=True, return_counts=True
        )
        word, share, shares = typical_words(group, has_word, words, base[parent[first]])
        ids = ["-".join(map(str, codes[i, :level])) for i in first]
        members = np.split(np.argsort(group, kind="stable"), np.cumsum(count)[:-1])
        for g in np.flatnonzero(count >= least):
            some = "; ".join(shorten(titles[i], 60) for i in members[g][:4]) + (
                " …" if count[g] > 4 else ""
            )
            nodes.append(
                {
                    "id": ids[g],
                    "parent": names[parent[first[g]]],
                    "level": level,
                    "code": int(codes[first[g], level - 1]),
                    "items": int(count[g]),
                    "shared": level == levels and count[g] > 1,
                    "word": str(word[g]),
                    "share": float(share[g]),
                    "titles": some,
                }
            )
        parent = group
        names = ids
        base = shares
    return nodes


def sid_figure(
    points, code, hover, centroids, radius, reach, nodes, level: int, title: str, ids=None
) -> go.Figure:
    """What is left of items on a plane, marked by code, beside the tree of prefixes, whose ring of
    the same level has the same colours.

    Args: `points` [n, 2]; `code` int [n]; `hover`: n texts (HTML); `centroids` [W, 2], NaN where
    there is none; `radius` of a circle, the root mean square length of what is left; `reach`: where
    both axes end; `nodes` of `prefix_nodes`; `level` of the codes, from 1; `ids`: n names by which
    a view that animates knows the points again.
    """
    # All in dicts: made one by one, traces and subplots would take longer than all the rest.
    around = np.linspace(0, 2 * np.pi, 61)
    there = np.flatnonzero(np.isfinite(centroids[:, 0]))
    circle = {
        "type": "scatter",
        "x": radius * np.cos(around),
        "y": radius * np.sin(around),
        "mode": "lines",
        "hoverinfo": "skip",
        "line": {"color": GREY, "dash": "dash"},
        "name": "root mean square length, in all dimensions",
    }
    items = {
        "type": "scatter",
        "x": points[:, 0],
        "y": points[:, 1],
        "mode": "markers",
        "hovertext": hover,
        "hoverinfo": "text",
        "ids": [str(i) for i in (range(len(code)) if ids is None else ids)],
        "marker": {
            "size": 9,
            "opacity": 0.8,
            "color": [_color(c) for c in code],
            "symbol": [SYMBOLS[c % len(SYMBOLS)] for c in code],
        },
        "name": "item, a mark per code",
    }
    means = {
        "type": "scatter",
        "x": centroids[there, 0],
        "y": centroids[there, 1],
        "mode": "markers+text",
        "text": [str(c) if len(there) <= 16 else "" for c in there],
        "hovertext": [f"centroid of code {c}" for c in there],
        "textposition": [
            ("top center", "bottom center", "middle left", "middle right")[c % 4] for c in there
        ],
        "hoverinfo": "text",
        "marker": {
            "size": 18,
            "symbol": "circle-open",
            "line": {"width": 2},
            "color": [_color(c) for c in there],
        },
        "name": "centroid of a code",
    }
    texts = [
        f"<b>{node['id']}</b>: {node['items']}"
        f" item{'s share this SID' if node['shared'] else 's' * (node['items'] > 1)}<br>"
        + (
            f"{node['share']:.0%} have the word “{html.escape(shorten(node['word']))}”<br>"
            if node["word"]
            else ""
        )
        + html.escape(node["titles"])
        for node in nodes
    ]
    colors = [_color(node["code"]) if node["level"] == level else PALE for node in nodes]
    inks = [
        "#222222" if node["shared"] or color in (*DARK_INK, PALE) else "white"
        for node, color in zip(nodes, colors)
    ]
    total = sum(node["items"] for node in nodes if node["level"] == 1)
    words = [shorten(node["word"], 14) if ROOM * node["items"] >= total else "" for node in nodes]
    labels = [f"{node['code']} {html.escape(word)}".strip() for node, word in zip(nodes, words)]
    tree = {
        "type": "sunburst",
        "ids": ["all", *(node["id"] for node in nodes)],
        "parents": ["", *(node["parent"] for node in nodes)],
        "labels": ["all items", *labels],
        "branchvalues": "total",
        "sort": False,
        "values": [total, *(node["items"] for node in nodes)],
        "hovertext": ["", *texts],
        "hoverinfo": "text",
        "insidetextorientation": "radial",
        "leaf": {"opacity": 1},
        "insidetextfont": {"color": ["#222222", *inks]},
        "domain": {"x": [0.5, 1]},
        "marker": {
            "colors": ["rgba(0,0,0,0)", *colors],
            "line": {"width": 1, "color": "white"},
            "pattern": {
                "shape": ["", *("/" if node["shared"] else "" for node in nodes)],
                "bgcolor": "white",
                "solidity": 0.2,
                "size": 7,
            },
        },
    }
    axis = {"range": [-reach, reach], "showticklabels": False, "ticks": ""}
    head = {
        "y": 1.01,
        "xref": "paper",
        "yref": "paper",
        "xanchor": "center",
        "yanchor": "bottom",
        "showarrow": False,
        "font": {"size": 15},
    }
    return go.Figure(
        [circle, items, means, tree],
        {
            "template": template(),
            "height": 620,
            "margin": {"l": 10, "r": 10, "t": 50, "b": 50},
            "uirevision": "same",
            "xaxis": axis | {"domain": [0, 0.48]},
            "yaxis": axis | {"scaleanchor": "x"},
            "annotations": [
                head | {"text": title, "x": 0.24},
                head | {"text": "Prefixes of the SIDs,<br>level 1 innermost", "x": 0.76},
            ],
            "legend": {"orientation": "h", "x": 0, "y": -0.04, "yanchor": "top"},
        },
    )


def _color(code):
    return COLORS[code % len(COLORS)]


def _least(n):
    """The smallest prefix that the tree of n items shows."""
    return -(-n // NODES)


def _meter(share, shown):
    return (
        f'<span style="white-space: nowrap"><meter min="0" max="1" value="{share:.4f}"'
        f' aria-hidden="true"></meter> {shown}</span>'
    )
