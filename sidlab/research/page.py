"""The results page: one self-contained HTML file of a comparison, with figures, tables and how to
read them; and the page of what both papers claim.

plotly.js is inside, once, so the page needs no network; its tables need no script. What stands on
the pages, stands in `templates`.
"""

from sidlab.figures.charts import COST, MEMORY, learning_curves
from sidlab.figures.theme import TEMPLATES
from sidlab.files import write
from sidlab.metrics import METRICS
from sidlab.research import figures
from sidlab.research.compare import describe, predicted_and_measured
from sidlab.research.papers import RASTP_CLAIMS, STAMP_CLAIMS, published
from sidlab.research.templates import render

# What the papers say of cost: method, field of a row, in words.
COST_CLAIMS = (
    ("rastp", COST, "RASTP: {}× speed".format(RASTP_CLAIMS["speedup"])),
    ("stamp", COST, "STAMP: {}–{}× speed".format(*STAMP_CLAIMS["speedup"])),
    ("stamp", MEMORY, "STAMP: {:.1%}–{:.1%} less memory".format(*STAMP_CLAIMS["memory_saved"])),
)
HARDWARE = {
    "gpu": "{}",
    "processor": "{}",
    "cores": "{} cores",
    "threads": "torch threads: {}",
    "memory_gb": "{} GB memory",
}


def write_page(results: dict, path) -> None:
    """Writes the HTML page of `results` (what results.json holds) to `path`, atomically."""
    rows = {row["method"]: row for row in results["summary"]}
    hardware = results.get("hardware") or {}
    costs = figures.with_cost(results)
    predicted = any(row.get("predicted_flops") for row in results["summary"])
    page = render(
        "comparison.html.j2",
        results=results,
        rows=rows,
        base=figures.reference(results) if costs else {"method": "unpadded"},
        metrics=list(METRICS),
        describe=describe,
        hardware=", ".join(
            form.format(hardware[part]) for part, form in HARDWARE.items() if hardware.get(part)
        ),
        claims=[claim for claim in COST_CLAIMS if rows.get(claim[0], {}).get(claim[1])],
        predicted=predicted_and_measured(results) if predicted else None,
        published=published(results["dataset"]).to_dict("records"),
        figures=_figures(results),
        curves=_curves(results),
    )
    write(path, page)


def write_claims(claims: list[dict], rows: list[dict], path) -> None:
    """Writes the page of `claims` (what `claims.judge` gives) and `rows` (what
    `claims.beside_published` gives) to `path`, atomically. It has no script.
    """
    write(path, render("claims.html.j2", claims=claims, published=rows, metrics=list(METRICS)))


def _figures(results):
    """{name: figure} of those for which there are data, all light."""
    drawn = {"quality": figures.quality(results)}
    if figures.with_cost(results):
        drawn["quality-cost"] = figures.quality_cost(results)
        drawn["cost"] = figures.cost_bars(results)
    if results.get("curves"):
        drawn["curves"] = learning_curves(results)
    return {
        name: figure.update_layout(template=TEMPLATES["light"]) for name, figure in drawn.items()
    }


def _curves(results):
    """Validation recall@10 and the last training loss before it, at every evaluation: a table."""
    curves = results.get("curves") or ()
    steps = sorted({step for curve in curves for step in curve["eval_step"]})
    rows = []
    for curve in curves:
        recall = dict(zip(curve["eval_step"], curve["recall@10"]))
        points = []
        for step in steps:
            losses = [loss for at, loss in zip(curve["step"], curve["loss"]) if at <= step]
            points.append((recall.get(step), losses[-1] if losses and step in recall else None))
        rows.append((f"{curve['method']}, seed {curve['seed']}", points))
    return {"head": ["run", *(f"update {step}" for step in steps)], "rows": rows}
