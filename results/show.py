"""Write the results section of the README, results/README.md, the studies' pictures and those of
the benchmark from the JSON files here, so that no number in them is typed: python results/show.py.
The sentences stand in sidlab/research/templates: readme, results, mature and studies.md.j2.
A picture that changed is drawn anew by kaleido, which needs Chrome or Chromium.
"""

import hashlib
import json
import pathlib
import re

import pandas as pd
import plotly.graph_objects as go

from sidlab.config import TrainConfig
from sidlab.research import waterfall
from sidlab.research.claims import evidence, judge
from sidlab.research.papers import data_name, published
from sidlab.research.studies import STUDIES
from sidlab.research.study_figures import strata_figure, study_figure
from sidlab.research.templates import count, environment, render

HERE = pathlib.Path(__file__).parent
README = HERE.parent / "README.md"
PAGE = HERE / "README.md"
SECTION = re.compile(
    r"(<!-- results: made by results/show.py -->\n).*?(<!-- end of results -->)", re.DOTALL
)


def load(*patterns: str) -> list[dict]:
    """What the files of that name hold, in the order of the patterns and of their names."""
    return [
        json.loads(path.read_text()) for pattern in patterns for path in sorted(HERE.glob(pattern))
    ]


def section() -> str:
    """What the README holds: the findings, a sentence each."""
    seconds = {row["variant"]: row.get("seconds_per_1k_windows") for row in _bench_rows()}
    steps = {
        "published": seconds["published, without pruning"],
        "unpadded": seconds["no padding, nothing pruned"],
        "fast": seconds["mixed precision"],
        "pruned": seconds["pruning to a third"],
    }
    beauty = [r for r in _comparisons() if data_name(r["dataset"]) == "amazon-beauty"]
    found = [_by_method(results) for results in beauty]
    baselines = {
        name: next(rows[name]["recall@10"] for rows in found if name in rows)
        for name in ("neighbours", "sasrec")
    }
    best = {}
    for file in sorted(load("mature-*.json"), key=lambda file: file["metrics"]["recall@10"]):
        best[file["dataset"], file["arch"]] = file
    return render(
        "readme.md.j2",
        best=list(best.values()),
        steps=steps,
        baselines=baselines,
        data_name=data_name,
        **_mature(),
        **HELPERS,
    )


def _bench_rows():
    """What the benchmark measured on a CPU, of Beauty's lengths."""
    (bench,) = load("bench-cpu.json")
    return [row for row in bench["rows"] if row["workload"] == waterfall.TRAINING]


def page() -> str:
    """results/README.md: everything."""
    return render(
        "results.md.j2",
        comparisons=_comparisons(),
        benches=load("bench-*.json"),
        levers=load("levers.json"),
        scale=load("scale.json"),
        studies=load("studies/*.json"),
        claims=judge(evidence(HERE)),
        **_mature(),
        **HELPERS,
    )


def _comparisons():
    return load("amazon-*.json", "planted-*.json")


def _mature():
    """Models of published quality, what they give up for free, and after they have gone on."""
    return {
        "mature": load("mature-*.json"),
        "free": load("pruned-*.json"),
        "gone_on": load("continued-*.json"),
    }


# What templates ask for


def _by_method(results):
    return {row["method"]: row for row in results["summary"]}


def _by_label(study):
    return {row["label"]: row for row in study["rows"]}


def _name(results):
    return pathlib.PurePath(results["dataset"]).name + ", decoder-only" * (
        results.get("arch") == "qwen"
    )


def _machine(hardware):
    return (
        f"{hardware['processor']}, {count(hardware['threads'], 'thread')},"
        f" {hardware['gpu'] or 'no GPU'}"
    )


def _where(hardware):
    return hardware["gpu"] or _machine(hardware)


def _tiger(dataset):
    """Published recall@10 of TIGER."""
    return list(published(dataset).query("method == 'TIGER'")["recall@10"])


def _same_model(results):
    """`padded` and `unpadded` without dropout are one model in the same batches; how far apart they
    come out, seed by seed, is a measure of chance.
    """
    if TrainConfig.preset(results["preset"]).dropout:
        return []
    recall = {(row["method"], row["seed"]): row["recall@10"] for row in results["rows"]}
    return [
        abs(value - recall["unpadded", seed])
        for (method, seed), value in recall.items()
        if method == "padded" and ("unpadded", seed) in recall
    ]


def _of_a_third(study):
    """The pairs of the study "strategies" that keep a third."""
    return [pair for pair in study.get("versus", ()) if pair["against"] == "random"]


def _plain(rows):
    """The rows of the study "granularity" without STAMP."""
    return [row for label, row in rows.items() if "stamp" not in label]


def _gains(rows):
    """By how much STAMP changes them."""
    return [
        rows[f"{row['label']}, stamp"]["recall@10"] - row["recall@10"]
        for row in _plain(rows)
        if f"{row['label']}, stamp" in rows
    ]


def _kept_recall(study):
    """The unpruned row of each group in which anybody is served, with `kept`: recall with RASTP ÷
    without pruning.
    """
    pruned = {
        (row["by"], row["group"]): row["recall@10"]
        for row in study["groups"]
        if row["label"] == "rastp"
    }
    return [
        row | {"kept": pruned[row["by"], row["group"]] / row["recall@10"]}
        for row in study["groups"]
        if row["label"] == "unpruned" and row["recall@10"]
    ]


def _title(study):
    return STUDIES[study["study"]].title


def _picture_name(study):
    return f"{study['study']}-{_name(study)}.svg"


HELPERS = {
    function.__name__.lstrip("_"): function
    for function in (
        _by_label,
        _by_method,
        _gains,
        _kept_recall,
        _machine,
        _name,
        _of_a_third,
        _picture_name,
        _plain,
        _same_model,
        _tiger,
        _title,
        _where,
    )
}


def sentences() -> dict:
    """{study: function of its rows by label and its results}, what results/README.md says of it."""
    return environment().get_template("studies.md.j2").make_module(HELPERS).sentences


# Pictures


def picture(study: dict) -> go.Figure:
    """The figure of a study's file."""
    busy = False
    if "groups" in study:
        figure = strata_figure(pd.DataFrame(study["groups"]))
    else:
        panels = STUDIES[study["study"]].panels(study["hardware"]["gpu"] is not None)
        rows = pd.DataFrame(study["rows"])
        figure = study_figure(rows, STUDIES[study["study"]].x, panels)
        busy = any(row.get("busy") for row in study["rows"])
    title = (
        f"{_title(study)}: {_name(study)}, preset {study['preset']},"
        f" {count(study['seeds'], 'seed')}" + "; seconds beside other jobs" * busy
    )
    return figure.update_layout(title={"text": title, "font_size": 16}, width=900, margin_t=80)


def pictures() -> dict:
    """{path: figure} of all that is drawn."""
    drawn = {
        HERE / "studies" / _picture_name(study): picture(study) for study in load("studies/*.json")
    }
    for device, name in (("cpu", "waterfall"), ("gpu", "waterfall-gpu")):
        bench = json.loads((HERE / f"bench-{device}.json").read_text())
        title = f"From the published configuration to this kit: {_where(bench['hardware'])}"
        drawn[HERE.parent / "docs" / f"{name}.svg"] = waterfall.figure(bench).update_layout(
            title={"text": title, "font_size": 16}, width=900, margin_t=90
        )
    return drawn


def digest(figure: go.Figure) -> str:
    """What stands as a comment in the SVG of a figure: equal figures, whatever the template, have
    the same.
    """
    content = go.Figure(figure).update_layout(template=None).to_json()
    return f"<!-- {hashlib.sha256(content.encode()).hexdigest()} -->"


def updated(text: str) -> str:
    """`text` of the README with its results section made anew."""
    if not SECTION.search(text):
        raise ValueError(
            f"{README} has no line <!-- results: made by results/show.py --> with <!-- end of"
            " results --> after it"
        )
    return SECTION.sub(lambda match: match[1] + section() + match[2], text)


if __name__ == "__main__":
    made = {README: updated(README.read_text(encoding="utf-8")), PAGE: page()}
    for path, figure in pictures().items():
        if not path.exists() or digest(figure) not in path.read_text():
            made[path] = figure.to_image("svg").decode() + digest(figure) + "\n"
    for path, text in made.items():
        path.write_text(text, encoding="utf-8")
