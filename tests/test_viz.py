"""Figures hold exactly the numbers they are given, nothing rests on colour, and the page is one
valid file.
"""

import copy
import functools
import html.parser
import json
import re
import runpy
import xml.etree.ElementTree

import numpy as np
import plotly.io as pio
import pytest
from conftest import ROOT, SHARED, needs_shared
from plotly.offline import get_plotlyjs

from sidlab.figures import charts, theme
from sidlab.research import figures, papers
from sidlab.research.page import write_page

METRICS = papers.METRICS
AMAZON = ("amazon-beauty", "amazon-sports", "amazon-toys")
TRAINED = (
    "padded",
    "unpadded",
    "recent",
    "random",
    "rastp",
    "map",
    "stamp",
    "norm",
    "centrality",
    "oracle",
)
BASELINES = ("popularity", "neighbours", "bayes")
PRUNERS = ("recent", "random", "rastp", "stamp", "norm", "centrality", "oracle")
RECALL = (
    0.0645,
    0.0650,
    0.061,
    0.052,
    0.0641,
    0.0668,
    0.0655,
    0.06,
    0.0635,
    0.066,
    0.0114,
    0.0682,
    0.08,
)
SECONDS = (4.1, 1.25, 1.02, 1.03, 1.11, 1.4, 1.24, 1.03, 1.1, None)  # oracle misses its costs
COSTS = (
    "train_seconds",
    figures.COST,
    "real_token_fraction",
    "kept_token_fraction",
    figures.MEMORY,
    "evaluation_seconds",
    "windows",
    "updates",
)


def fake_results(dataset="amazon-beauty", methods=TRAINED + BASELINES):
    """A results.json as `comparison.py` writes it: all methods, three seeds, baselines and one
    method without costs.
    """
    results = copy.deepcopy(_fake(dataset))
    for part in ("rows", "summary", "curves"):
        results[part] = [row for row in results[part] if row["method"] in methods]
    return results


@functools.cache
def _fake(dataset):
    rng = np.random.default_rng(0)
    seconds = dict(zip(TRAINED, SECONDS))
    rows = []
    summary = []
    curves = []
    for method, recall in zip(TRAINED + BASELINES, RECALL):
        costs = dict.fromkeys(COSTS)
        time = seconds.get(method)
        if time:
            values = (
                131 * time,
                time,
                0.22 if method == "padded" else 0.97,
                0.36 if method in PRUNERS else 1.0,
                700 + 300 * time,
                20.5,
                131000,
                900,
            )
            costs = dict(zip(COSTS, values))
        truth = (
            {"precision": float(rng.uniform(0.5, 0.9)), "recall": 0.5}
            if method in PRUNERS
            else None
        )
        mine = []
        for seed in range(3) if method in TRAINED else (None,):
            values = {
                m: float(recall * share + rng.normal(0, 0.0008))
                for m, share in zip(METRICS, (0.66, 1, 0.44, 0.55))
            }
            values |= {
                f"{m}_interval": [value - 0.0031, value + 0.0033]
                for m, value in list(values.items())
            }
            mine.append(
                {"method": method, "seed": seed, **values, **costs, "kept_informative": truth}
            )
            if seed is not None:
                at = np.arange(100, 1000, 100)
                curves.append(
                    {
                        "method": method,
                        "seed": seed,
                        "step": (at - 50).tolist(),
                        "eval_step": at.tolist(),
                        "loss": (9 * np.exp(-at / 700)).tolist(),
                        "recall@10": (
                            (recall * (1 - np.exp(-at / 250)) + rng.normal(0, 0.001, 9)).tolist()
                        ),
                    }
                )
        means = {m: float(np.mean([row[m] for row in mine])) for m in METRICS}
        means |= {
            f"{m}_interval": [value - 0.0024, value + 0.0026] for m, value in list(means.items())
        }
        change = means["recall@10"] - 0.065
        versus = {
            "difference": change,
            "difference_interval": [change - 0.003, change + 0.003],
            "against": "unpadded",
        }
        summary.append(
            {
                "method": method,
                "seeds": len(mine),
                **means,
                **costs,
                "kept_informative": truth,
                **(dict.fromkeys(versus) if method == "unpadded" else versus),
            }
        )
        rows += mine
    return {
        "dataset": dataset,
        "preset": "quick",
        "users": 22363,
        "command": 'make reproduce DATASET="a<b"',
        "hardware": {
            "processor": "Some CPU",
            "cores": 2,
            "memory_gb": 23.4,
            "gpu": None,
            "threads": 1,
        },
        "versions": {"sidlab": "0.1.0", "torch": "2.13.0"},
        "sids": {
            "n_items": 12101,
            "levels": 4,
            "collision_rate": 0.031,
            "largest_group": 9,
            "per_level": [],
        },
        "rows": rows,
        "summary": summary,
        "curves": curves,
    }


def _named(figure, name):
    return [trace for trace in figure.data if trace.name == name]


# Published numbers


def test_published_rows_are_tiger_rastp_and_reproductions():
    beauty = papers.published("amazon-beauty")
    assert list(beauty.columns) == ["method", "source", *METRICS]
    rastp = beauty[beauty.method == "RASTP"]
    assert rastp[list(METRICS)].to_numpy().tolist() == [[0.0441, 0.0656, 0.0289, 0.0358]]
    assert len(papers.published("/some/where/amazon-toys")) == 4
    assert papers.published("planted").empty and list(papers.published("planted").columns) == list(
        beauty.columns
    )
    assert 1 / (1 - papers.RASTP_CLAIMS["time_saved"]) == pytest.approx(
        papers.RASTP_CLAIMS["speedup"], abs=0.005
    )
    for name in AMAZON:
        frame = papers.published(name)
        assert frame.source.all() and (frame["recall@5"] < frame["recall@10"]).all()
        assert (frame["ndcg@10"] < frame["recall@10"]).all() and (
            frame["ndcg@5"] < frame["ndcg@10"]
        ).all()


@needs_shared
def test_published_rows_equal_the_notes_they_are_from():
    text = (SHARED.parent / "PAPERS.md").read_text()
    found = {name: [] for name in AMAZON}
    for cells in re.findall(r"^\|([^|\n]+(?:\|[^|\n]*)+)\|$", text, re.MULTILINE):
        first, *rest = (cell.strip() for cell in cells.split("|"))
        numbers = [
            [float(x) for x in cell.split("/")] if cell.count("/") == 3 else None for cell in rest
        ]
        if first in ("Beauty", "Sports", "Toys"):  # × and ✓ of RASTP's table
            found[f"amazon-{first.lower()}"] += numbers
        # Reproductions, in the order R@5, N@5, R@10, N@10; validation metrics are none
        elif len(numbers) == 3 and numbers[0] and "*validation*" not in first:
            for name, row in zip(AMAZON, numbers):
                found[name] += [[row[0], row[2], row[1], row[3]]] if row else []
    for name, rows in found.items():
        ours = papers.published(name)[list(METRICS)].to_numpy().tolist()
        assert len(rows) >= 5 and {tuple(row) for row in rows} == {tuple(row) for row in ours}


# Looks


def test_methods_are_told_apart_without_colour():
    methods = (*theme.MARKS, "rastp@1/2", "rastp@0.25", "own")
    looks = [theme.mark(name) for name in methods]
    assert len({(look.symbol, look.dash) for look in looks}) == len(looks)
    assert len({look.symbol for look in theme.MARKS.values()}) == len(theme.MARKS)
    assert not any("open" in look.symbol for look in looks)  # hollow means published


@pytest.mark.parametrize("template", ["sidlab", "sidlab_dark"])
def test_templates_are_registered_and_legible(template):
    layout = pio.templates[template].layout

    def luminance(color):
        parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        parts = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    def contrast(a, b):  # WCAG 2
        dark, light = sorted((luminance(a), luminance(b)))
        return (light + 0.05) / (dark + 0.05)

    assert contrast(layout.font.color, layout.paper_bgcolor) > 7
    assert contrast(theme.GREY, layout.paper_bgcolor) > 3  # outlines, intervals, hatching


def test_figures_are_dark_where_all_are(dark):
    assert (
        figures.quality(fake_results()).layout.template.layout.font.color
        == pio.templates["sidlab_dark"].layout.font.color
    )


# Figures


def test_quality_holds_means_intervals_seeds_and_published():
    results = fake_results()
    figure = figures.quality(results)
    paper = papers.published("amazon-beauty")
    labels = figure.layout.yaxis.ticktext
    for panel, metric in enumerate(("recall@10", "ndcg@10")):
        means, seeds, published = (
            _named(figure, name)[panel]
            for name in ("mean and 95 % interval", "single seeds", "published (no interval)")
        )
        for x, y, plus, minus, row in zip(
            means.x,
            means.y,
            means.error_x.array,
            means.error_x.arrayminus,
            results["summary"],
            strict=True,
        ):
            assert labels[y] == row["method"] and x == row[metric]
            assert [x - minus, x + plus] == pytest.approx(row[f"{metric}_interval"])
        trained = [row for row in results["rows"] if row["seed"] is not None]
        assert [(labels[int(y)], x) for x, y in zip(seeds.x, seeds.y)] == [
            (r["method"], r[metric]) for r in trained
        ]
        assert (
            list(published.x) == paper[metric].tolist() and published.marker.symbol == "circle-open"
        )
        assert [labels[y].split(",")[0] for y in published.y] == paper.method.tolist()
    assert not _named(figures.quality(fake_results("planted")), "published (no interval)")


def test_quality_tells_a_far_value_instead_of_squeezing_the_others():
    results = fake_results()
    figure = figures.quality(results)
    low, high = figure.layout.xaxis.range
    for row in results["summary"]:
        if row["method"] != "popularity":
            assert low < row["recall@10_interval"][0] and row["recall@10_interval"][1] < high
    far = next(row for row in results["summary"] if row["method"] == "popularity")
    place = results["summary"].index(far)
    assert far["recall@10"] < low
    told = [a.text for a in figure.layout.annotations if a.y == place and a.xref == "x"]
    assert told == [f"◂ {far['recall@10']:.4f}"]


def test_quality_cost_has_a_point_per_method_with_cost_and_a_line_per_method_without():
    results = fake_results()
    figure = figures.quality_cost(results)
    costly = {row["method"]: row for row in results["summary"] if row[figures.COST]}
    assert [trace.name for trace in figure.data] == list(costly)
    for trace in figure.data:
        row = costly[trace.name]
        assert (trace.x[0], trace.y[0]) == (row[figures.COST], row["recall@10"])
        assert [
            trace.y[0] - trace.error_y.arrayminus[0],
            trace.y[0] + trace.error_y.array[0],
        ] == pytest.approx(row["recall@10_interval"])
        assert trace.marker.symbol == theme.mark(trace.name).symbol
    free = [row for row in results["summary"] if not row[figures.COST]]
    assert [a.text.split()[:2] for a in figure.layout.annotations] == [
        [row["method"], f"{row['recall@10']:.4f}"] for row in free
    ]
    near = [row["recall@10"] for row in free if row["method"] != "popularity"]
    assert [shape.y0 for shape in figure.layout.shapes] == near
    with pytest.raises(ValueError, match="seconds_per_1k_windows"):
        figures.quality_cost(fake_results(methods=BASELINES))


def test_learning_curves_have_a_line_per_run_and_one_look_per_method():
    results = fake_results()
    figure = charts.learning_curves(results)
    recall = figure.data[::2]
    loss = figure.data[1::2]
    for curve, left, right in zip(results["curves"], recall, loss, strict=True):
        assert left.name == right.name == curve["method"]
        assert (list(left.x), list(left.y)) == (curve["eval_step"], curve["recall@10"])
        assert (list(right.x), list(right.y)) == (curve["step"], curve["loss"])
        look = theme.mark(curve["method"])
        assert (
            left.line.color,
            left.marker.symbol,
            left.line.dash,
        ) == look and right.line.dash == look.dash
    assert [trace.name for trace in figure.data if trace.showlegend] == list(TRAINED)
    with pytest.raises(ValueError, match="no curves"):
        charts.learning_curves(results | {"curves": []})


def test_cost_bars_are_relative_to_unpadded_and_claims_to_padded():
    results = fake_results()
    rows = {row["method"]: row for row in results["summary"] if row[figures.COST]}
    figure = figures.cost_bars(results)
    bars = [trace for trace in figure.data if trace.type == "bar"]
    for trace, field in zip(bars, (figures.COST, figures.MEMORY), strict=True):
        assert list(trace.x) == pytest.approx(
            [row[field] / rows["unpadded"][field] for row in rows.values()]
        )
    assert list(figure.layout.yaxis.ticktext) == [
        f"{name} ({row['kept_token_fraction']:.0%} kept)" for name, row in rows.items()
    ]
    time, memory = (rows["padded"][f] / rows["unpadded"][f] for f in (figures.COST, figures.MEMORY))
    claims = {
        trace.name.split(" than")[0]: sorted({round(x, 9) for x in trace.x})
        for trace in figure.data
        if trace.type == "scatter"
    }
    assert claims["RASTP: 26.7% less time"] == pytest.approx([time * (1 - 0.267)])
    assert claims["STAMP: 1.23–1.38× faster"] == pytest.approx([time / 1.38, time / 1.23])
    assert claims["STAMP: 17.2%–54.7% less memory"] == pytest.approx(
        [memory * (1 - 0.547), memory * (1 - 0.172)]
    )
    alone = figures.cost_bars(fake_results(methods=("rastp", "recent", "bayes")))
    # No padded model: nothing to draw the claims from
    assert [trace.type for trace in alone.data] == ["bar", "bar"]
    assert alone.data[0].x[0] == 1 and "× recent" in alone.layout.annotations[0].text


# The page


class Page(html.parser.HTMLParser):
    """Checks that tags are balanced, and collects what the tests ask for."""

    VOID = ("meta", "link", "br", "img", "hr", "input")

    def __init__(self, path):
        super().__init__()
        self.open = []
        self.tags = []
        self.scripts = []
        self.cells = []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "th":
            self.cells.append("")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, (
            f"</{tag}> closes {self.open[-1:]} at {self.getpos()}"
        )
        self.open.pop()

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)
        elif "th" in self.open and "small" not in self.open:
            self.cells[-1] += data

    def attributes(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "index.html"
    write_page(fake_results(), path)
    assert list(path.parent.iterdir()) == [path]  # one file, nothing beside it
    return Page(path)


def test_page_is_one_file_with_plotly_once(full):
    assert full.source.count(get_plotlyjs()) == 1
    for tag, attrs in full.tags:
        assert tag not in ("link", "iframe", "img") and not (tag == "script" and "src" in attrs), (
            tag,
            attrs,
        )
        assert not any(
            re.match(r"\s*(https?:)?//", attrs.get(name) or "") for name in ("src", "href")
        )
    style = full.source[full.source.index("<style>") : full.source.index("</style>")]
    assert "url(" not in style and "@import" not in style and "prefers-color-scheme: dark" in style


def test_page_holds_every_method_every_figure_and_the_published_numbers(full):
    heads = " ".join(full.cells).split()
    assert all(heads.count(method) >= 3 for method in TRAINED + BASELINES)
    own = [
        script for script in full.scripts if "Plotly.newPlot" in script and len(script) < 500_000
    ]
    assert len(own) == 4 and not any(re.search(r"\bNaN\b|\bInfinity\b", script) for script in own)
    for row in fake_results()["summary"]:
        low, high = row["recall@10_interval"]
        assert f"{row['recall@10']:.4f}<small>[{low:.4f}, {high:.4f}]</small>" in full.source
    for value in papers.published("amazon-beauty")["recall@10"]:
        assert f"<td>{value:.4f}</td>" in full.source
    assert "3.28×" in full.source
    assert "a&lt;b" in full.source and 'DATASET="a<b"' in html.unescape(full.source)
    # 4.1 / 1.11
    assert "here, against padded" in full.cells and "<td>3.69× speed</td>" in full.source


def test_page_is_accessible(full):
    assert full.attributes("html") == [{"lang": "en"}] and len(full.attributes("title")) == 1
    assert all(attrs.get("scope") in ("col", "row") for attrs in full.attributes("th"))
    assert len(full.attributes("caption")) == len(full.attributes("table")) >= 7
    charts = [attrs for attrs in full.attributes("div") if attrs.get("role") == "img"]
    assert len(charts) == len(full.attributes("figure")) == len(full.attributes("details")) == 4
    assert all(attrs["aria-label"] for attrs in charts)
    ids = [attrs["id"] for _, attrs in full.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert all(attrs["aria-labelledby"] in ids for attrs in full.attributes("figure"))


@pytest.mark.parametrize(
    "methods, charts", [(("unpadded", "rastp"), 4), (("rastp@1/2",), 4), (BASELINES, 1)]
)
def test_page_of_partial_results(tmp_path, methods, charts):
    results = fake_results(
        "planted", methods=(*methods, "rastp") if "rastp@1/2" in methods else methods
    )
    for row in results["rows"] + results["summary"] + results["curves"]:
        row["method"] = methods[0] if len(methods) == 1 else row["method"]
    results["rows"] = [row for row in results["rows"] if not row["seed"]]  # one seed
    results["curves"] = [curve for curve in results["curves"] if not curve["seed"]]
    write_page(json.loads(json.dumps(results)), tmp_path / "index.html")
    page = Page(tmp_path / "index.html")
    assert len(page.attributes("figure")) == charts and set(methods) <= set(
        " ".join(page.cells).split()
    )
    del (
        results["curves"],
        results["hardware"],
        results["versions"],
        results["sids"],
        results["command"],
    )
    for row in results["summary"]:
        row["difference"] = row["recall@10_interval"] = None
    write_page(results, tmp_path / "index.html")
    assert len(Page(tmp_path / "index.html").attributes("figure")) == max(charts - 1, 1)


def test_page_of_a_system_that_tells_no_memory(tmp_path):
    results = fake_results()
    for row in figures.with_cost(results):
        row |= {"peak_memory_mb": None, "predicted_flops": 1e6, "predicted_activation_mb": 2.0}
    write_page(results, tmp_path / "index.html")
    page = Page(tmp_path / "index.html")
    assert "measured memory ×" in page.cells
    text = page.source.replace(get_plotlyjs(), "")
    assert "<td>–</td>" in text and "None" not in text and "nan" not in text


def test_a_page_that_fails_leaves_the_old_one(tmp_path):
    path = tmp_path / "index.html"
    path.write_text("old")
    with pytest.raises(KeyError):
        write_page({**fake_results(), "summary": [{"method": "rastp"}]}, path)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


# The picture of the README


def test_picture_can_be_made_anew_and_marks_what_it_says():
    made = runpy.run_path(str(ROOT / "docs" / "make_picture.py"))["picture"]()
    for svg in (made, (ROOT / "docs" / "pruning.svg").read_text(encoding="utf-8")):
        tree = xml.etree.ElementTree.fromstring(svg)
        kept, pruned, stars = (
            tree.findall(f".//*[@class='{name}']") for name in ("kept", "pruned", "star")
        )
        # 30 tokens: 10 kept, shown again in the shorter row; 3 of the next item; one of each kind
        # in the legend.
        assert (len(kept), len(pruned)) == (10 + 10 + 3 + 1, 20 + 1) and len(stars) > 10
        assert all(token.get("fill") == "url(#hatch)" for token in pruned)
        assert len(svg.encode()) < 150_000 and "href" not in svg
