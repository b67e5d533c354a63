"""The tree of semantic IDs and the plane of embeddings as a figure."""

import html

import numpy as np
import plotly.graph_objects as go
from scipy.sparse import csr_array

from sidlab.figures.charts import shorten
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

NODES = 300  # of the tree, at most that many on a level
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
    least = least_shown(len(codes))
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


def least_shown(n):
    """The smallest prefix that the tree of n items shows."""
    return -(-n // NODES)
