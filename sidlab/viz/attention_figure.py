"""The attention of one layer as a figure: who looks at whom, and what makes a token's score."""

import html

import numpy as np
import plotly.graph_objects as go
from torch.nn.functional import max_pool2d

from sidlab.figures.theme import BLUE, GREY, ORANGE, SCALE, VERMILLION, template
from sidlab.saliency import attention_centrality, semantic_saliency

CELLS = 48
# Of a small heatmap: cells on a side at most, and how many shades can be told apart at this size
SHADES = 100
FAINT = 0.02  # what is looked at less than this gets no line


def factors(probe, layer: int, head: int = 0) -> dict[str, np.ndarray]:
    """Of one `layer` and `head` (both from 1; head 0: the mean of all) of a `Probe`: `attention`
    float32 [N, N], rows are queries; `centrality`, its column sums, `saliency`, the L1 norm of the
    state after the layer, and their product `importance`, float32 [N].
    """
    attention = probe.attention[layer - 1]
    attention = attention.mean(0) if head == 0 else attention[head - 1]
    centrality = attention_centrality(attention[None, None], probe.mask)[0]
    saliency = semantic_saliency(probe.hidden[layer])
    scores = {
        "attention": attention,
        "centrality": centrality,
        "saliency": saliency,
        "importance": centrality * saliency,
    }
    return {name: values.numpy() for name, values in scores.items()}


def attention_figure(
    probe, scores, layer: int, head: int, token: int, removed=(), names=None
) -> go.Figure:
    """Left, every layer (row) and head (column) small, the shown one framed; right, one large,
    above it lines from `token` to what it looks at, as thick as the weights, then the sums of the
    large one's columns, the saliency and the importance of the same tokens.

    Args: `probe`: a `Probe`; `scores`: what `factors` gives for `layer` and `head`; `token` is
    framed with dots, the `removed` ones (neighbours) with a line; `names` of the tokens, for hover
    labels. Traces: small heatmaps, large heatmap, bars of centrality, saliency and importance,
    stars of truly informative tokens, the lines and their ends.
    """
    n = len(probe.tokens)
    n_layers, n_heads = probe.attention.shape[:2]
    small = small_multiples(probe.attention)
    step, side = cells_of(n)
    names = [html.escape(name) for name in names or [f"token {i}" for i in range(n)]]
    heat = {"type": "heatmap", "colorscale": SCALE, "zmin": 0}
    traces = [
        heat
        | {
            "z": small,
            "zmax": SHADES,
            "showscale": False,
            "hovertemplate": "%{y} looks at %{x}: %{z} % of this map's yellow<extra></extra>",
        },
        heat
        | {
            "z": scores["attention"].astype(float).round(4),
            "zmax": float(np.quantile(scores["attention"], 0.995)),
            "xaxis": "x2",
            "yaxis": "y2",
            "colorbar": {
                "title": "weight",
                "len": 0.5,
                "y": 0,
                "yanchor": "bottom",
                "thickness": 14,
            },
            "hovertemplate": "%{y} looks at %{x}: %{z:.3f}<extra></extra>",
        },
    ]
    bars = ("centrality", "saliency", "importance")
    for number, name in enumerate(bars, start=3):
        traces.append(
            {
                "type": "bar",
                "x": np.arange(n),
                "y": scores[name],
                "marker": {"color": BLUE, "line": {"width": 0}},
                "showlegend": False,
                "hovertemplate": f"%{{x}}<br>{name} %{{y:.4g}}<extra></extra>",
                "xaxis": "x2",
                "yaxis": f"y{number}",
            }
        )
    informative = (
        np.flatnonzero(probe.truth.numpy() > 0) if probe.truth is not None else np.empty(0, int)
    )
    traces.append(
        {
            "type": "scatter",
            "x": informative,
            "y": np.full(len(informative), 1.13 * float(scores["importance"].max())),
            "mode": "markers",
            "name": "truly informative",
            "hoverinfo": "skip",
            "xaxis": "x2",
            "yaxis": "y5",
            "marker": {
                "symbol": "star",
                "size": 8,
                "color": ORANGE,
                "line": {"width": 0.8, "color": "#222222"},
            },
        }
    )
    traces += _lines(scores["attention"][token], token, names[token])

    # The layout at once: make_subplots and update_layout take longer than the model.
    bare = {"showgrid": False, "zeroline": False}
    per_item = int((probe.item_index == 0).sum())
    # Hover labels are aliases of the tokens' places, written "+3" so that no tick is taken for one.
    # A tick that stands on a token would lend it its own text: all stand a little beside.
    hover = {"hoverformat": "+d", "labelalias": {f"+{i}": name for i, name in enumerate(names)}}
    items = (
        bare
        | hover
        | {
            "tickvals": (
                (per_item * np.arange(len(probe.history)) + (per_item - 1) / 2 + 0.1).tolist()
            ),
            "ticktext": [str(m + 1) for m in range(len(probe.history))],
        }
    )
    cells = [name if step == 1 else f"{name} and the next" for name in names[::step]]
    tiles = [
        {
            "hoverformat": "+d",
            "ticks": "",
            "tickvals": [side * (t + 0.5) - 0.4 for t in range(count)],
            "ticktext": [f"{what} {t + 1}" for t in range(count)],
            "labelalias": {
                f"+{side * t + i}": form.format(name, t + 1)
                for t in range(count)
                for i, name in enumerate(cells)
            },
        }
        for what, count, form in (
            ("head", n_heads, "{} in head {}"),
            ("layer", n_layers, "layer {1}: {0}"),
        )
    ]
    title = {
        "xref": "x2 domain",
        "yref": "paper",
        "x": 0,
        "xanchor": "left",
        "yanchor": "bottom",
        "showarrow": False,
        "font": {"size": 12},
    }
    layout = {
        "template": template(),
        "height": 720,
        "bargap": 0.25,
        "margin": {"l": 20, "r": 20, "t": 50, "b": 55},
        "uirevision": "same",
        "legend": {"orientation": "h", "x": 1, "xanchor": "right", "y": 1.0, "yanchor": "bottom"},
        "xaxis": (
            bare
            | tiles[0]
            | {
                "domain": [0, 0.4],
                "range": [-0.5, side * n_heads - 0.5],
                "side": "top",
                "anchor": "y",
            }
        ),
        "yaxis": (
            bare
            | tiles[1]
            | {
                "domain": [0, 1],
                "range": [side * n_layers - 0.5, -0.5],
                "tickangle": -90,
                "anchor": "x",
            }
        ),
        "xaxis2": (
            items
            | {
                "domain": [0.48, 1],
                "range": [-0.5, n - 0.5],
                "title": {"text": "rows look at columns; items, oldest first"},
                "anchor": "y2",
            }
        ),
        "yaxis2": items | {"domain": [0, 0.5], "range": [n - 0.5, -0.5], "anchor": "x2"},
        "yaxis6": {
            "domain": [0.505, 0.64],
            "range": [-0.04, 1.04],
            "visible": False,
            "anchor": "x2",
        },
        # Titles above and not beside: beside there is the other heatmap.
        "annotations": [title | {"text": "what the chosen token looks at", "y": 0.64}],
    }
    for number, name in enumerate(bars, start=3):
        low = 0.685 + 0.11 * (number - 3)
        layout[f"yaxis{number}"] = {
            "domain": [low, low + 0.075],
            "range": [0, 1.25 * float(scores[name].max())],
            "nticks": 3,
            "anchor": "x2",
        }
        layout["annotations"].append(title | {"text": name, "y": low + 0.075})
    edges = [f"M{side * h - 0.5},-0.5V{side * n_layers - 0.5}" for h in range(1, n_heads)]
    edges += [f"M-0.5,{side * v - 0.5}H{side * n_heads - 0.5}" for v in range(1, n_layers)]
    first, last = (1, n_heads) if head == 0 else (head, head)
    low, high = (min(removed), max(removed)) if removed else (token, token)
    frame = {"type": "rect", "line": {"color": VERMILLION, "width": 2}}
    columns = {"xref": "x2", "yref": "paper", "y0": 0, "y1": 1}
    layout["shapes"] = [
        {"type": "path", "path": "".join(edges), "line": {"color": GREY, "width": 2}},
        frame
        | {
            "x0": side * (first - 1) - 0.5,
            "x1": side * last - 0.5,
            "y0": side * (layer - 1) - 0.5,
            "y1": side * layer - 0.5,
        },
        frame
        | columns
        | {
            "x0": token - 0.5,
            "x1": token + 0.5,
            "line": {"color": VERMILLION, "width": 2, "dash": "dot"},
        },
        frame | columns | {"x0": low - 0.5, "x1": high + 0.5, "visible": bool(removed)},
    ]
    return go.Figure(traces, layout)


def _lines(weights, token, name):
    """A band from the token on top to each that it looks at, as broad as the weight (the broadest:
    one token), and a mark at its end.
    """
    seen = np.flatnonzero(weights >= FAINT)
    half = 0.5 * weights[seen] / weights.max()
    corners = np.stack(
        [token - half, seen - half, seen + half, token + half, np.full(len(seen), np.nan)], axis=1
    )
    x = [None if np.isnan(value) else round(value, 3) for value in corners.ravel().tolist()]
    place = {"type": "scatter", "showlegend": False, "xaxis": "x2", "yaxis": "y6"}
    return [
        place
        | {
            "x": x,
            "y": [1, 0, 0, 1, None] * len(seen),
            "mode": "lines",
            "fill": "toself",
            "hoverinfo": "skip",
            "fillcolor": "rgba(213,94,0,0.55)",
            "line": {"color": VERMILLION, "width": 0.6},
        },
        place
        | {
            "x": seen,
            "y": np.zeros(len(seen)),
            "mode": "markers",
            "marker": {"color": VERMILLION, "size": 5},
            "customdata": weights[seen].astype(float).round(4),
            "hovertemplate": f"{name} looks at %{{x}}: %{{customdata:.3f}}<extra></extra>",
        },
    ]


def cells_of(n):
    """How many tokens share a cell of a small heatmap, and how many cells it has on a side."""
    step = -(-n // CELLS)
    return step, -(-n // step)


def small_multiples(attention) -> np.ndarray:
    """Attention [layers, H, N, N] side by side as uint8 [layers · n, H · n], n ≤ CELLS: of more
    tokens neighbours share a cell, that of the strongest. SHADES stands for the 98 % quantile of
    the layer and head, and above: each has a scale of its own, or heads that spread their attention
    would be black beside those that look at one token.
    """
    tops = attention.flatten(2).quantile(0.98, dim=2).clamp(min=1e-9)[..., None, None]
    shades = SHADES * (attention / tops).clamp(max=1)
    shades = max_pool2d(shades, cells_of(shades.shape[-1])[0], ceil_mode=True).byte()
    # [layers, n, H, n] → [layers · n, H · n]
    return shades.transpose(1, 2).flatten(2).flatten(0, 1).numpy()
