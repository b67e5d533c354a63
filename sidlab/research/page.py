"""The results page: one self-contained HTML file of a comparison, with figures, tables and how to
read them.

plotly.js is inside, once, so the page needs no network; its tables need no script.
"""

import html
import math
import pathlib

import plotly.io as pio
from plotly.offline import get_plotlyjs

from sidlab.figures.charts import COST, MEMORY, learning_curves, span
from sidlab.figures.theme import TEMPLATES
from sidlab.files import write
from sidlab.metrics import METRICS
from sidlab.research import figures
from sidlab.research.compare import describe, predicted_and_measured
from sidlab.research.papers import RASTP_CLAIMS, STAMP_CLAIMS, published

GUIDE = {
    "recall@10": (
        """the share of test users whose next item, which no method saw, is among the ten recommended ones.
        NDCG@10 also rewards a high place in the list."""
    ),
    "interval": (
        """with other users and other seeds the mean would have come out a little different; 95 of 100 such
        repetitions would land about here. Few seeds say little about how much seeds differ, which makes it wide (of two, the
        models on semantic IDs tell that together, as if seeds moved all alike); one says nothing, and its interval is over users
        alone. Where two intervals overlap, the difference is the sharper question."""
    ),
    "difference and p": (
        """each method against `unpadded` on the same users, in recall@10. If the interval holds 0, do
        not call either better. With one seed there is also p: how often a difference as large would come about by chance,
        were the two trained models equally good. Of other seeds neither it nor its interval knows anything."""
    ),
    "padding is not pruning": (
        """a batch is a rectangle, so short histories are filled up with empty slots. `padded`
        fills all up to one fixed length, as published; `unpadded` batches histories of one length and needs hardly any
        filling. It loses nothing, so the time it saves is no merit of pruning: a pruner has to beat `unpadded`."""
    ),
    "base": (
        """the unpruned model, taught every item of every history, that each method continued for the same few updates.
        `base-rastp` and the like: that model as it is, pruned only when it recommends, and compared with `base`."""
    ),
    "real and kept": (
        "real: the share of slots that held a token. Kept: the share of those tokens that pruning"
        " left."
    ),
    "baselines": (
        """`popularity` and `neighbours` are tables that take a second to fit. A model below `neighbours`
        knows less than which items stand side by side. Items a user has seen may be recommended again, in every row
        alike."""
    ),
    "memory": (
        """the peak while training, each run in a process of its own: what was allocated on a GPU; on a processor
        how far the process grew beyond what it held before."""
    ),
    "a reading": (
        """STAMP's paper leaves open how many items MAP predicts, with which weight and by what heads. `map`
        and `stamp` are this kit's reading of it. `rastp` keeps a share of each history's own tokens, where the
        published code keeps a share of the padded length."""
    ),
}

# Results from before there were two have none.
PROTOCOLS = {
    "continue": "every method went on from the row base",
    "scratch": "every method was trained from nothing",
}

STYLE = """
:root { color-scheme: light dark; --ink: #222; --soft: #5a5a5a; --paper: #fff; --line: #c9ccd0; --link: #00568a }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e8e8; --soft: #b0b4b8; --paper: #14171a; --line: #4a5157; --link: #7cc4f2 }
}
body { font: 16px/1.5 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; color: var(--ink);
  background: var(--paper); max-width: 1240px; margin: 0 auto; padding: 1.5rem }
h1 { line-height: 1.2 }
h2 { margin-top: 2.5rem }
code { overflow-wrap: anywhere }
small, caption, figcaption, .soft { color: var(--soft) }
small { display: block }
.scroll { overflow-x: auto }
.scroll:focus-visible, summary:focus-visible { outline: 2px solid var(--link) }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .875rem; margin: .5rem 0 1.5rem }
caption { text-align: left; padding: .25rem 0 }
td { white-space: nowrap }
th, td { padding: .35rem .5rem; text-align: right; vertical-align: top; border-bottom: 1px solid var(--line) }
thead th { vertical-align: bottom; border-bottom: 2px solid var(--line) }
tbody th, thead th:first-child { text-align: left; font-weight: normal }
tbody th { min-width: 11rem }
tbody b { font-size: 1rem }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .4rem 1.2rem }
dt { font-weight: 600 }
dd { margin: 0; max-width: 56rem }
figure { margin: 1rem 0 }
.chart { background: #fff; border: 1px solid var(--line); border-radius: 8px; padding: .5rem; overflow-x: auto }
.plotly-graph-div { min-width: 680px }
figcaption { margin-top: .5rem; max-width: 56rem }
summary { cursor: pointer; padding: .3rem 0; width: max-content }
@media (max-width: 640px) { dl { display: block } dd { margin: 0 0 .6rem } }
"""


def write_page(results: dict, path) -> None:
    """Writes the HTML page of `results` (what results.json holds) to `path`, atomically."""
    name = pathlib.PurePath(results["dataset"]).name
    guide = "".join(
        f"<dt>{escaped(term)}</dt><dd>{with_code(meaning)}</dd>\n"
        for term, meaning in GUIDE.items()
    )
    tables = [
        table(results)
        for table in (_summary_table, _claims_table, _predicted_table, _published_table)
    ]
    write(
        path,
        document(
            f"Pruning semantic-ID histories: {name}, preset {results['preset']}",
            "\n".join(
                [
                    _run(results),
                    "<h2>Results</h2>",
                    *tables,
                    "<h2>How to read this</h2>",
                    f"<dl>\n{guide}</dl>",
                    _charts(results),
                ]
            ),
        ),
    )


def document(title: str, body: str, style: str = "", plotly: bool = True) -> str:
    """One HTML page that needs nothing else; `body` and `style` are HTML and CSS, `plotly`: with
    its script.
    """
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escaped(title)}</title>
<style>{STYLE}{style}</style>
{f"<script>{get_plotlyjs()}</script>" * plotly}
</head>
<body>
<main>
<h1>{escaped(title)}</h1>
{body}
</main>
</body>
</html>
"""


def _run(results):
    hardware = results.get("hardware") or {}
    sids = results.get("sids")
    parts = {
        "gpu": "{}",
        "processor": "{}",
        "cores": "{} cores",
        "threads": "torch threads: {}",
        "memory_gb": "{} GB memory",
    }
    facts = {
        "Data": results["dataset"],
        "Test users": f"{results['users']:,}" if results.get("users") else None,
        "Semantic IDs": (
            sids
            and (
                f"{sids['n_items']:,} items, {sids['levels']} levels; {sids['collision_rate']:.1%} "
                "of the items shared theirs before collisions were resolved"
            )
        ),
        "Preset": results["preset"],
        "Protocol": PROTOCOLS.get(results.get("protocol")),
        "Hardware": ", ".join(
            form.format(hardware[part]) for part, form in parts.items() if hardware.get(part)
        ),
        "Versions": ", ".join(
            f"{name} {version}" for name, version in (results.get("versions") or {}).items()
        ),
    }
    rows = "".join(
        f"<dt>{name}</dt><dd>{escaped(value)}</dd>\n" for name, value in facts.items() if value
    )
    command = escaped(results.get("command") or "unknown")
    smoke = (
        "<p><strong>The preset smoke only shows that everything runs. Its numbers mean"
        " nothing.</strong></p>\n"
    )
    busy = f"<p><strong>{escaped(results['busy'])}</strong></p>\n" if results.get("busy") else ""
    facts = f"<dl>\n{rows}<dt>Command</dt><dd><code>{command}</code></dd>\n</dl>"
    return smoke * (results["preset"] == "smoke") + busy + facts


def _summary_table(results):
    rows = results["summary"]
    base = figures.reference(results) if figures.with_cost(results) else {"method": "unpadded"}
    head = [
        "method",
        "seeds",
        *METRICS,
        "recall@10 against unpadded",
        "s per 1,000 windows",
        "peak MB",
        "real",
        "kept",
        "informative tokens kept",
    ]
    known = any(row.get("kept_informative") for row in rows)
    body = []
    for row in rows:
        cells = [
            f"<b>{escaped(row['method'])}</b><small>{escaped(describe(row['method']))}</small>",
            _number(row.get("seeds"), "d"),
        ]
        cells += [f"{row[metric]:.4f}<small>{span(row, metric)}</small>" for metric in METRICS]
        cells += [
            _versus(row.get("versus_unpadded")),
            _ratio(row, base, COST, "#.3g"),
            _ratio(row, base, MEMORY, ",.0f"),
            _number(row.get("real_token_fraction"), ".0%"),
            _number(row.get("kept_token_fraction"), ".0%"),
        ]
        truth = row.get("kept_informative")
        cells.append(
            f"{truth['recall']:.0%}<small>precision {truth['precision']:.0%}</small>"
            if truth
            else "–"
        )
        body.append(cells if known else cells[:-1])
    caption = (
        "Means over seeds with 95 % intervals; medians of costs, and how many times those of"
        f" {base['method']}"
    )
    return captioned_table(caption, head if known else head[:-1], body)


def _versus(test):
    if not test:
        return "–"
    low, high = (_number(end, "+.4f") for end in test["interval"])
    p = test["p_value"]
    p = (
        ""
        if p is None
        else "<small>p &lt; 0.001</small>"
        if p < 0.001
        else f"<small>p = {p:.3f}</small>"
    )
    p += (
        f"<small>against {test['against']}</small>"
        if test.get("against", "unpadded") != "unpadded"
        else ""
    )
    return f"{_number(test['difference'], '+.4f')}<small>[{low}, {high}]</small>{p}"


def _ratio(row, base, field, spec):
    """A cost, and below it how many times that of the reference it is."""
    ratio = (
        f"<small>{row[field] / base[field]:.2f}×</small>"
        if row.get(field) and base.get(field)
        else ""
    )
    return _number(row.get(field), spec) + ratio


def _claims_table(results):
    """What the papers claim of cost, and what came out here against the padded and the unpadded
    model.
    """
    rows = {row["method"]: row for row in results["summary"]}

    def here(method, base, field):
        ours, theirs = (rows.get(name, {}).get(field) for name in (method, base))
        if not ours or not theirs:
            return "–"
        if field == COST:
            return f"{theirs / ours:.2f}× speed"
        return f"{abs(1 - ours / theirs):.1%} {'less' if ours < theirs else 'more'}"

    claims = (
        ("rastp", COST, "RASTP: {}× speed".format(RASTP_CLAIMS["speedup"])),
        ("stamp", COST, "STAMP: {}–{}× speed".format(*STAMP_CLAIMS["speedup"])),
        ("stamp", MEMORY, "STAMP: {:.1%}–{:.1%} less memory".format(*STAMP_CLAIMS["memory_saved"])),
    )
    body = [
        [claim, here(method, "padded", field), here(method, "unpadded", field)]
        for method, field, claim in claims
        if rows.get(method, {}).get(field)
    ]
    caption = (
        "What the papers claim against their own padded models, and what came out here. What"
        " unpadded saves, too, is no merit of pruning."
    )
    return (
        captioned_table(caption, ["claim", "here, against padded", "here, against unpadded"], body)
        if body
        else ""
    )


def _predicted_table(results):
    if not any(row.get("predicted_flops") for row in results["summary"]):
        return ""
    frame = predicted_and_measured(results)
    body = [
        [escaped(name), *("–" if math.isnan(value) else f"{value:.3g}" for value in row)]
        for name, *row in frame.itertuples()
    ]
    caption = "Cost as predicted from configuration and lengths alone, beside what was measured"
    return captioned_table(caption, ["method", *frame.columns], body)


def _published_table(results):
    paper = published(results["dataset"])
    body = [
        [
            f"<b>{escaped(row['method'])}</b><small>{escaped(row['source'])}</small>",
            *(f"{row[m]:.4f}" for m in METRICS),
        ]
        for row in paper.to_dict("records")
    ]
    caption = (
        "Published on this data set, with other preparations of the data and without intervals."
        " Honest reproductions of one method differ by more than either pruning paper gains."
    )
    return captioned_table(caption, ["method", *METRICS], body) if body else ""


def _charts(results):
    """The figures for which there are data, each with its numbers as a table."""
    charts = [
        _chart(
            results,
            "quality",
            "How good are the recommendations?",
            figures.quality,
            _quality_rows,
            "Marks: the mean over seeds, the bar its 95 % interval; dots: single seeds; hollow"
            " circles: published numbers, without intervals. The dotted line is unpadded. A number"
            " with an arrow lies outside.",
        )
    ]
    if figures.with_cost(results):
        charts.append(
            _chart(
                results,
                "quality-cost",
                "What does quality cost?",
                figures.quality_cost,
                _cost_rows,
                "Up is better, left is cheaper. Dotted lines: what is no model on windows of SIDs.",
            )
        )
        charts.append(
            _chart(
                results,
                "cost",
                "Time and memory",
                figures.cost_bars,
                _cost_rows,
                "Kept is the share of real tokens. The papers compare with padded models, so their"
                " ratios are drawn from the bar of padded, if it was run.",
            )
        )
    if results.get("curves"):
        charts.append(
            _chart(
                results,
                "curves",
                "Learning curves",
                learning_curves,
                _curve_rows,
                "A line per method and seed; a click on a name hides it. The loss is that of the"
                " next item alone, without the auxiliary part of map and stamp.",
            )
        )
    return "\n".join(charts)


def _chart(results, name, heading, draw, rows, caption):
    # Figures keep their light template in dark mode, on a white card.
    config = {"responsive": True, "displayModeBar": False}
    figure = draw(results).update_layout(template=TEMPLATES["light"])
    chart = pio.to_html(figure, full_html=False, include_plotlyjs=False, div_id=name, config=config)
    return f"""<h2 id="{name}-heading">{heading}</h2>
<figure aria-labelledby="{name}-heading">
<div class="chart" role="img" aria-label="Chart: {heading} The numbers are in the table below it.">{chart}</div>
<figcaption>{escaped(caption)}</figcaption>
<details><summary>The numbers as a table</summary>
{captioned_table(heading, *rows(results))}
</details>
</figure>"""


def _quality_rows(results):
    body = [
        [
            escaped(row["method"]),
            _number(row["seed"], "d"),
            *(f"{row[metric]:.4f} {span(row, metric)}" for metric in ("recall@10", "ndcg@10")),
        ]
        for row in results["rows"]
    ]
    return ["method", "seed", "recall@10", "ndcg@10"], body


def _cost_rows(results):
    base = figures.reference(results)
    head = [
        "method",
        "recall@10",
        f"s per 1,000 windows (× {base['method']})",
        f"peak MB (× {base['method']})",
        "kept",
    ]
    body = [
        [
            escaped(row["method"]),
            f"{row['recall@10']:.4f} {span(row, 'recall@10')}",
            _ratio(row, base, COST, "#.3g"),
            _ratio(row, base, MEMORY, ",.0f"),
            _number(row.get("kept_token_fraction"), ".0%"),
        ]
        for row in results["summary"]
    ]
    return head, body


def _curve_rows(results):
    """Validation recall@10 and the last training loss before it, at every evaluation."""
    steps = sorted({step for curve in results["curves"] for step in curve["eval_step"]})
    body = []
    for curve in results["curves"]:
        recall = dict(zip(curve["eval_step"], curve["recall@10"]))
        cells = [escaped(f"{curve['method']}, seed {curve['seed']}")]
        for step in steps:
            losses = [loss for at, loss in zip(curve["step"], curve["loss"]) if at <= step]
            loss = f"<small>loss {losses[-1]:.3f}</small>" if losses and step in recall else ""
            cells.append(_number(recall.get(step), ".4f") + loss)
        body.append(cells)
    return ["run", *(f"update {step}" for step in steps)], body


def captioned_table(caption, head, body):
    """An HTML table. Cells of `body` are HTML, the first of a row its header; `head` and `caption`
    are plain text.
    """
    top = "".join(f'<th scope="col">{escaped(name)}</th>' for name in head)
    rows = "".join(
        f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>\n'
        for first, *cells in body
    )
    return f"""<div class="scroll" role="region" tabindex="0" aria-label="{escaped(caption)}">
<table><caption>{escaped(caption)}</caption>
<thead><tr>{top}</tr></thead>
<tbody>
{rows}</tbody></table></div>"""


def escaped(value):
    return html.escape(str(value))


def with_code(text):
    """Escaped, with `backticks` as <code>."""
    parts = escaped(" ".join(text.split())).split("`")
    return "".join(
        f"<code>{part}</code>" if place % 2 else part for place, part in enumerate(parts)
    )


def _number(value, spec):
    return "–" if value is None else format(value, spec).replace("-", "−")
