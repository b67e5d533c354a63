"""Write the results section of the README, results/README.md, the studies' pictures and those of
the benchmark from the JSON files here, so that no number in them is typed: python results/show.py.
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
from sidlab.research.papers import published
from sidlab.research.studies import STUDIES
from sidlab.research.study_figures import strata_figure, study_figure

HERE = pathlib.Path(__file__).parent
README = HERE.parent / "README.md"
PAGE = HERE / "README.md"
COSTS = {
    "s per 1,000 windows": ("seconds_per_1k_windows", "#.3g"),
    "MB": ("peak_memory_mb", ",.0f"),
    "tokens kept": ("kept_token_fraction", ".0%"),
}
SECTION = re.compile(
    r"(<!-- results: made by results/show.py -->\n).*?(<!-- end of results -->)", re.DOTALL
)
MODELS = {"t5": "T5", "qwen": "decoder-only"}
# Whose difference to the unpruned model it tells
METHODS = ("rastp", "rastp-visible", "recent", "stamp", "map")


HEAD = """# Results

Made by `python results/show.py` from the files in this folder; commands are run in the repository's folder after
`source .venv/bin/activate`.

R, N: recall and NDCG at 5 or 10. A window is a history with the item that follows. Of a third a little more is kept, since each history's
share is rounded up. `bayes` is the best list for one who knows the planted world; the other methods are in the [README](../README.md).
Memory is told of GPUs: on a CPU it is that of the process, and repeats badly. Intervals are 95 % over test users: they are about the
trained models at hand, not about other seeds.
"""
OLDER = """**Older models.** All comparisons and studies below were trained before dense targets and equal weights, with the presets of that
time (on Beauty, SIDs of the kit's own are older, too). Their intervals hold an estimate of what seeds do, pooled over methods. Their unpruned models are far from published quality, so they say little about what
pruning costs a model that works; they will be run anew.
"""
STUDIES_HEAD = """**What the papers plot**: recall@10 on test users, intervals 95 %; preset `{}`, {}:
`make study STUDY=NAME DATASET=FOLDER SEEDS=N`.
The dotted line and the grey band of a figure are the first setting and its interval. "Clearly" rests on the same users compared in pairs,
so bars may overlap; of one seed, it holds for that seed. Of twenty pairs
without a difference one comes out "clearly", too. Levels: a further code that tells colliding items apart is not counted. *fast* has a
model of its own (d_model 128, dropout 0.1, at most 400 updates), not comparable with the others.
"""
CLAIMS_HEAD = """**What the papers claim**, by the rules of `sidlab/research/claims.py`, from the files of this folder (`make paper` runs
comparisons with the paper preset and writes a page with the commands). *Not confirmed*: the interval contradicts the
claim. *Undecided*: it allows both, or there is one seed, or the model is not trained enough. A data set's verdict is
that of its findings that decide. Brackets behind "times as fast": quartiles in the benchmark; lowest and highest of
three seeds or more; otherwise an assumed ±5 % of each time.
"""


def load() -> tuple[list[dict], list[dict]]:
    """All comparisons and all studies that are here."""
    comparisons = [
        json.loads(path.read_text())
        for path in sorted([*HERE.glob("amazon-*.json"), *HERE.glob("planted-*.json")])
    ]
    return comparisons, [
        json.loads(path.read_text()) for path in sorted(HERE.glob("studies/*.json"))
    ]


def section() -> str:
    """What the README holds: how pruning and MAP change recall, and five findings."""
    comparisons, studies = load()
    theirs = published("amazon-beauty").query("method == 'TIGER'")["recall@10"]
    ours = [
        _by_method(results)["unpadded"]["recall@10"]
        for results in comparisons
        if _name(results).startswith("amazon-beauty")
    ]
    head = f"""Test recall@10 of the unpruned model, the changes to it with their 95 % intervals, and how many times as fast `rastp` trains; `planted` is synthetic. What an
item-to-item table reaches is beside it. –: not run, or timed beside other jobs; \\*: see its note in results/README.md. Published
unpruned models of this kind (TIGER) reach {theirs.min():.4f} to {theirs.max():.4f} on Beauty, those here {min(ours):.4f} to
{max(ours):.4f}: what pruning costs a fully trained model stays open. Every table, command and machine, and a verdict on each claim of
both papers, is in [results/README.md](results/README.md).
"""
    today = (_mature(), _pruned(), _continued())
    findings = [_finding(name, studies) for name in FINDINGS]
    return "\n".join([*today, OLDER, head, *_differences(comparisons), "", *findings])


def page() -> str:
    """results/README.md: everything."""
    comparisons, studies = load()
    parts = [HEAD, _mature(), _pruned(), _continued(), OLDER, *map(_comparison, comparisons)]
    parts += [_bench(json.loads(path.read_text())) for path in sorted(HERE.glob("bench-*.json"))]
    for name, write in (("levers", _levers), ("scale", _scale)):
        if (HERE / f"{name}.json").exists():
            parts.append(write(json.loads((HERE / f"{name}.json").read_text())))
    return "\n".join(
        [*parts, *([_studies(studies)] if studies else []), _claims(judge(evidence(HERE)))]
    )


def _claims(claims):
    """The verdicts, each with the evidence it rests on."""
    lines = [CLAIMS_HEAD, "| claim | verdict | by data set | evidence |", "|---|---|---|---|"]
    for claim in claims:
        found = "<br>".join(
            f"{finding['verdict']}: {finding['figures']} ({finding['where']})"
            for finding in claim["findings"]
        )
        of_data = "<br>".join(f"{data}: {verdict}" for data, verdict in claim["verdicts"].items())
        lines.append(
            f"| {claim['paper']}: {claim['claim']} | {claim['verdict']} | {of_data} |"
            f" {found or claim['missing']} |"
        )
    return "\n".join([*lines, ""])


def _differences(comparisons):
    names = [
        name for name in METHODS if any(name in _by_method(results) for results in comparisons)
    ]
    head = ["run", "seeds", "unpruned", *names, "neighbours", "SASRec", "× as fast"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for results in comparisons:
        rows = _by_method(results)
        marks = ", published SIDs" * ("SIDS=" in results["command"]) + "\\*" * ("note" in results)
        marks = ", continued" * (results.get("protocol") == "continue") + marks
        cells = [
            _name(results) + f", `{results['preset']}`" + marks,
            str(rows["unpadded"]["seeds"]),
            f"{rows['unpadded']['recall@10']:.4f}",
        ]
        for name in names:
            cells.append(_change(rows.get(name, {})))
        cells += [
            f"{rows[name]['recall@10']:.4f}" if name in rows else "–"
            for name in ("neighbours", "sasrec")
        ]
        seconds = [
            rows.get(name, {}).get("seconds_per_1k_windows") for name in ("unpadded", "rastp")
        ]
        cells.append(
            "–" if results.get("busy") or not all(seconds) else f"{seconds[0] / seconds[1]:.2f}"
        )
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _by_method(results):
    return {row["method"]: row for row in results["summary"]}


def _name(results):
    return pathlib.PurePath(results["dataset"]).name + ", decoder-only" * (
        results.get("arch") == "qwen"
    )


def _finding(name, studies):
    """What a study found on each data set, in a sentence, and its picture on real data."""
    of_it = {_name(study): study for study in studies if study["study"] == name}
    said = [
        f"on {data} ({_count(study['seeds'], 'seed')})"
        f" {FINDINGS[name]({row['label']: row for row in study['rows']}, study)}"
        for data, study in of_it.items()
    ]
    pictures = {data: f"results/studies/{_picture_name(study)}" for data, study in of_it.items()}
    links = ", ".join(
        [
            *(f"[{data}]({path})" for data, path in pictures.items()),
            f"`make study STUDY={name}`",
        ]
    )
    shown = [f"![{STUDIES[name].title}, {data}]({path})" for data, path in pictures.items()][:1]
    return "\n".join(
        [
            f"**{STUDIES[name].title}**: {'; '.join(said) or 'not run yet'} ({links}).",
            "",
            *shown,
            "",
        ]
    )


def _comparison(results):
    costs_of = {
        name: cost for name, cost in COSTS.items() if name != "MB" or results["hardware"]["gpu"]
    }
    rows = []
    for row in results["summary"]:
        interval = "[{:.4f}, {:.4f}]".format(*row["recall@10_interval"])
        costs = [
            f"{row[field]:{form}}" if row.get(field) else "–" for field, form in costs_of.values()
        ]
        quality = [
            f"{row['recall@5']:.4f}",
            f"{row['recall@10']:.4f} {interval}",
            f"{row['ndcg@10']:.4f}",
        ]
        rows.append("| " + " | ".join([row["method"], *quality, *costs]) + " |")
    updates = max((row["updates"] for row in results["rows"] if row.get("updates")), default=0)
    seeds = _count(max(row["seeds"] for row in results["summary"]), "seed")
    setting = (
        f"**{_name(results)}, preset `{results['preset']}`**: {results['users']:,} test users,"
        f" {seeds}, at most {updates:,} updates; {_machine(results['hardware'])}, torch"
        f" {results['versions']['torch']}:"
    )
    remarks = [line for key in ("busy", "note") if key in results for line in (results[key], "")]
    head = ["method", "R@5", "R@10 [95 %]", "N@10", *costs_of]
    return "\n".join(
        [
            setting,
            f"`{results['command']}`",
            "",
            "| " + " | ".join(head) + " |",
            "|" + "---|" * len(head),
            *rows,
            "",
            *remarks,
            *_same_model(results),
        ]
    )


def _same_model(results):
    """`padded` and `unpadded` without dropout are one model in the same batches; how far apart they
    come out is a measure of chance.
    """
    rows = {row["method"]: row for row in results["summary"]}
    if TrainConfig.preset(results["preset"]).dropout or not {"padded", "unpadded"} <= rows.keys():
        return []
    of_seed = {
        row["seed"]: row["recall@10"] for row in results["rows"] if row["method"] == "unpadded"
    }
    apart = [
        f"{abs(row['recall@10'] - of_seed[row['seed']]):.4f}"
        for row in results["rows"]
        if row["method"] == "padded"
    ]
    text = (
        "`padded` and `unpadded` are the same model on the same batches, yet end"
        f" {', '.join(apart)} apart in recall@10, seed by seed: rounding, which grows in training,"
        " and the choice of a checkpoint by validation users. Smaller differences of single runs"
        " mean nothing."
    )
    return [text, ""]


def _machine(hardware):
    return (
        f"{hardware['processor']}, {_count(hardware['threads'], 'thread')},"
        f" {hardware['gpu'] or 'no GPU'}"
    )


def _count(n, noun):
    return f"{n:,} {noun}{'s' * (n != 1)}"


def _bench(bench):
    machine = bench["hardware"]
    rows = []
    for target in bench["targets"]:
        spread = "" if not target["spread"] else "{:.3g} – {:.3g}".format(*target["spread"])
        value = "–" if target["value"] is None else f"{target['value']:.3g}"
        rows.append(
            f"| {target['figure']} | {target['target']} | {value} | {spread} |"
            f" {target['verdict']} |"
        )
    # Where it stands by now
    command = bench["command"].replace("-m sidlab.bench", "-m sidlab.research.bench")
    title = (
        f"**What it costs**, in ratios of medians of runs that take turns; {_where(machine)}:"
        f" `{command}`"
    )
    seconds = [
        f"{row['workload']}: {row['seconds']:.3g} s." for row in bench["rows"] if "seconds" in row
    ]
    return "\n".join(
        [
            title,
            "",
            "| figure | target | value | 95 % | verdict |",
            "|---|---|---|---|---|",
            *rows,
            "",
            *seconds,
            "",
        ]
    )


def _levers(levers):
    rows = []
    for row in levers["rows"]:
        against = (
            "–"
            if "interval" not in row
            else "{:+.4f} [{:+.4f}, {:+.4f}]".format(row["difference"], *row["interval"])
        )
        rows.append(
            f"| {MODELS[row['arch']]} | {row['lever']} | {row['recall@5']:.4f} |"
            f" {row['recall@10']:.4f} | {against} | {row['train_seconds'] / 60:.1f} |"
        )
    title = (
        "**What makes a model work**: preset `long` with dense targets,"
        f" {levers['about']['epochs']:g} epochs, one change at a time, one seed, all validation"
        f" users (no test user was looked at); {_machine(levers['hardware'])}:"
        f" `{levers['command']}`. The differences to the first row of an architecture are over"
        " users, uncorrected."
    )
    return "\n".join(
        [
            title,
            "",
            "| model | lever | R@5 | R@10 | R@10 against as it is [95 %] | CPU minutes |",
            "|" + "---|" * 6,
            *rows,
            "",
        ]
    )


def _mature():
    """Models of published quality: every file that results/mature.py wrote, with what is published
    beside it.
    """
    rows = []
    commands = []
    for path in sorted(HERE.glob("mature-*.json")):
        found = json.loads(path.read_text())
        runs = found["runs"]
        ours = found["metrics"]
        seconds = [run["train_seconds"] for run in runs]
        minutes = "–".join(dict.fromkeys(f"{end / 60:.0f}" for end in (min(seconds), max(seconds))))
        theirs = published(found["dataset"]).query("method == 'TIGER'")["recall@10"]
        seeds = ", ".join(f"{run['recall@10']:.4f}" for run in runs)
        rows.append(
            f"| {found['dataset']} | {MODELS[found['arch']]} | {len(runs)} | {ours['recall@5']:.4f}"
            f" | {ours['recall@10']:.4f} | {seeds} | {minutes} |"
            f" {theirs.min():.4f}–{theirs.max():.4f} |"
        )
        commands.append(
            f"`{found['command']}` ({_machine(found['hardware'])},"
            f" {', '.join(sorted({run['precision'] for run in runs}))})"
        )
    if not rows:
        return ""
    title = (
        "**Models of published quality**: preset `long`, every item of every history taught"
        ' (`targets="all"`), nothing pruned; test users, every item ranked, nothing excluded. CPU'
        " minutes are those of training alone, one thread."
    )
    head = (
        "| data | model | seeds | R@5 | R@10 | R@10 of each seed | CPU minutes | R@10, published"
        " TIGER |"
    )
    return "\n".join(
        [title, "", head, "|" + "---|" * 8, *rows, "", "Commands: " + "; ".join(commands) + ".", ""]
    )


def _pruned():
    """What such a model gives up for free: every file that results/pruned.py wrote."""
    parts = []
    for path in sorted(HERE.glob("pruned-*.json")):
        found = json.loads(path.read_text())
        base = found["rows"][0]
        rows = found["rows"][1:]
        scorers, keeps = (
            list(dict.fromkeys(row[name] for row in rows)) for name in ("scorer", "keep")
        )
        cells = {
            (row["scorer"], row["keep"]): "{:+.4f} [{:+.4f}, {:+.4f}]".format(
                row["difference"], *row["interval"]
            )
            for row in rows
        }
        title = (
            f"**What such a model gives up for free**: {MODELS[found['arch']]}, {found['dataset']},"
            f" seed 0, pruned after layer {found['after_layer']} when it recommends, nothing"
            f" trained; R@10 against {base['recall@10']:.4f} unpruned, on all"
            f" {len(base['ranks']):,} test users (95 % over users; of other seeds it says nothing);"
            f" `{found['command']}`."
        )
        parts += [
            title,
            "",
            "| kept | " + " | ".join(scorers) + " |",
            "|" + "---|" * (1 + len(scorers)),
            *(
                f"| {keep} | "
                + " | ".join(cells.get((scorer, keep), "–") for scorer in scorers)
                + " |"
                for keep in keeps
            ),
            "",
        ]
    return "\n".join(parts)


def _continued():
    """What it gives up after it has gone on, pruned, for a few updates: every comparison here under
    the protocol "continue".
    """
    parts = []
    for path in sorted(HERE.glob("continued-*.json")):
        found = json.loads(path.read_text())
        rows = _by_method(found)
        names = [
            name
            for name in rows
            if rows[name]["difference"] is not None
            and not name.startswith("base")
            and rows[name]["train_seconds"]
        ]
        title = (
            f"**What it gives up once it has gone on**: {_name(found)}, seeds:"
            f" {found['summary'][0]['seeds']}; the unpruned base has R@10"
            f" {rows['base']['recall@10']:.4f}, and every row goes on from it for the same updates."
            f" Differences are to `unpadded`, which went on unpruned, on all {found['users']:,}"
            " test users (95 % over users); beside them, to the base, what it gives up untrained;"
            f" `{found['command']}` ({_machine(found['hardware'])})."
        )
        lines = []
        for name in names:
            free = rows.get(f"base-{name}")
            lines.append(
                f"| {name} | {rows[name]['recall@10']:.4f} | {_change(rows[name])} |"
                f" {_change(free) if free else '–'} |"
            )
        parts += [
            title,
            "",
            "| method | R@10 | against unpadded | base, only pruned |",
            "|" + "---|" * 4,
            *lines,
            "",
        ]
    return "\n".join(parts)


def _change(row):
    if row.get("difference") is None:
        return "–"
    return f"{row['difference']:+.4f} {_span(row['difference_interval'])}"


def _scale(scale):
    rows = [
        "| {} | {:,} | {:.0f} | {:.1f} | {:.0%} | {:.1f} / {:.1f} | {:.1f} / {:.1f} | {:,.0f} /"
        " {:,.0f} | {:,.0f} / {:,.0f} | {:,.0f} |".format(
            row["catalogue"],
            row["items"],
            row["encoder_seconds"] + row["table_and_trie_seconds"],
            row["trie_mb"],
            row["share_their_sid"],
            *(
                row[f"{arch}_{what}_{share}"]
                for what in ("ms_per_user", "recommend_mb")
                for arch in ("t5", "qwen")
                for share in ("all", "third")
            ),
            row["peak_mb"],
        )
        for row in scale["rows"]
    ]
    columns = (
        "catalogue",
        "items",
        "SIDs, s",
        "trie, MB",
        "share a SID",
        "T5, ms a user: all tokens / a third",
        "Qwen, the same",
        "T5, MB to recommend: all / a third",
        "Qwen, the same",
        "peak MB of all",
    )
    head = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    title = (
        "**Large catalogues**, beam 20, histories of up to 30 items;"
        f" {_machine(scale['hardware'])}: `{scale['command']}`"
    )
    return "\n".join([title, "", *head, *rows, ""])


def picture(study: dict) -> go.Figure:
    """The figure of a study's file."""
    figure = (
        strata_figure(pd.DataFrame(study["groups"]))
        if "groups" in study
        else study_figure(
            pd.DataFrame(study["rows"]),
            STUDIES[study["study"]].x,
            STUDIES[study["study"]].panels(study["hardware"]["gpu"] is not None),
        )
    )
    title = (
        f"{STUDIES[study['study']].title}: {_name(study)}, preset {study['preset']},"
        f" {_count(study['seeds'], 'seed')}"
    )
    title += "; seconds beside other jobs" * (
        "groups" not in study and any(row.get("busy") for row in study["rows"])
    )
    return figure.update_layout(title={"text": title, "font_size": 16}, width=900, margin_t=80)


def pictures() -> dict:
    """{path: figure} of all that is drawn."""
    drawn = {HERE / "studies" / _picture_name(study): picture(study) for study in load()[1]}
    for device, name in (("cpu", "waterfall"), ("gpu", "waterfall-gpu")):
        bench = json.loads((HERE / f"bench-{device}.json").read_text())
        title = {
            "text": f"From the published configuration to this kit: {_where(bench['hardware'])}",
            "font_size": 16,
        }
        drawn[HERE.parent / "docs" / f"{name}.svg"] = waterfall.figure(bench).update_layout(
            title=title, width=900, margin_t=90
        )
    return drawn


def _where(machine):
    return (
        machine["gpu"] or f"{machine['processor']}, {_count(machine['threads'], 'thread')}, no GPU"
    )


def digest(figure: go.Figure) -> str:
    """What stands as a comment in the SVG of a figure: equal figures, whatever the template, have
    the same.
    """
    return (
        "<!--"
        f" {hashlib.sha256(go.Figure(figure).update_layout(template=None).to_json().encode()).hexdigest()} -->"
    )


def _picture_name(study):
    return f"{study['study']}-{_name(study)}.svg"


def _studies(studies):
    """A sentence and a picture a study, every number from its file; what it says of better and
    worse follows from the intervals.
    """
    first = studies[0]
    lines = [STUDIES_HEAD.format(first["preset"], _machine(first["hardware"]))]
    for study in studies:
        say = SENTENCES[study["study"]]
        seeds = _count(study["seeds"], "seed")
        note = f". {study.get('note', '')}".rstrip(". ")
        lines += [
            (
                f"* *{study['study']}* on {_name(study)}, {seeds}:"
                f" {say({row['label']: row for row in study['rows']}, study)}{note}."
            ),
            "",
            f"  ![{STUDIES[study['study']].title}, {_name(study)}](studies/{_picture_name(study)})",
            "",
        ]
    return "\n".join([*lines, ""])


def _recall(row):
    return "{:#.3g} [{:#.3g}, {:#.3g}]".format(row["recall@10"], *row["recall@10_interval"])


def _against(row):
    low, high = row["difference_interval"]
    how = "clearly more" if low > 0 else "clearly less" if high < 0 else "no clear difference"
    how += " over this seed's users" * (row.get("seeds") == 1 and not low <= 0 <= high)
    return f"{row['difference']:+.4f} {_span((low, high))}, {how}"


def _extremes(rows):
    best, worst = (pick(rows.values(), key=lambda row: row["recall@10"]) for pick in (max, min))
    return f"best `{best['label']}`: {_recall(best)}, worst `{worst['label']}`: {_recall(worst)}"


def _strategies(rows, study):
    # The other shares are in the figure
    kept = [label for label in rows if label != "unpruned" and ", keep " not in label]
    return (
        _sides({"versus": _of_a_third(study)}, "a random third")
        + f"nothing pruned {_recall(rows['unpruned'])}; a third kept by "
        + ", ".join(
            f"`{label}`: {rows[label]['recall@10']:#.3g}"
            for label in sorted(kept, key=lambda label: -rows[label]["recall@10"])
        )
    )


def _layer_ratio(rows, study):
    shown = ("layer 1, keep 0.1", "layer 2, keep 0.33", "layer 3, keep 0.33")
    parts = [f"`{label}`: {_against(rows[label])}" for label in shown if label in rows]
    return f"against nothing pruned ({_recall(rows['unpruned'])}): " + "; ".join(parts)


def _efficiency(rows, study):
    base = rows["unpruned"]["seconds_per_1k_windows"]
    return "times as fast as nothing pruned: " + ", ".join(
        f"`{label}`: {base / row['seconds_per_1k_windows']:.2f}"
        for label, row in rows.items()
        if label != "unpruned"
    )


def _granularity(rows, study):
    plain = {label: row for label, row in rows.items() if "stamp" not in label}
    gain = {
        label: rows[f"{label}, stamp"]["recall@10"] - row["recall@10"]
        for label, row in plain.items()
        if f"{label}, stamp" in rows
    }
    clear = [
        pair["difference_interval"][0] > 0 for pair in study.get("versus", ()) if not _unclear(pair)
    ]
    pairs = (
        f"finer SIDs are clearly better in {sum(clear)} and clearly worse in"
        f" {len(clear) - sum(clear)} of {len(study['versus'])} pairs; "
        if study.get("versus")
        else ""
    )
    return (
        f"{pairs}levels × codes, {_extremes(plain)}; STAMP changes it by {min(gain.values()):+.4f}"
        f" to {max(gain.values()):+.4f}"
    )


def _span(interval):
    return "[{:+.4f}, {:+.4f}]".format(*interval)


def _unclear(pair):
    low, high = pair["difference_interval"]
    return low <= 0 <= high


def _sides(study, other):
    """Which of a study's pairs are clearly apart, in words; nothing, where it was written before
    there were pairs.
    """
    groups = {}
    for pair in study.get("versus", ()):
        side = (
            "no clear difference"
            if _unclear(pair)
            else "clearly better"
            if pair["difference"] > 0
            else "clearly worse"
        )
        groups.setdefault(side, []).append(pair["label"])
    sides = [
        f"{side}: {', '.join(f'`{label}`' for label in groups[side])}"
        for side in ("clearly better", "no clear difference", "clearly worse")
        if side in groups
    ]
    return f"against {other}: {'; '.join(sides)}; " if sides else ""


def _map(rows, study):
    others = {label: row for label, row in rows.items() if label != "no MAP"}
    clear = sum(row["difference_interval"][0] > 0 for row in others.values())
    return (
        f"without MAP {_recall(rows['no MAP'])}; {_extremes(others)}; clearly better in {clear} of"
        f" {len(others)} settings"
    )


def _inference(rows, study):
    return f"nothing pruned {_recall(rows['unpruned'])}; " + "; ".join(
        f"`{label}`: {row['recall@10']:#.3g}" for label, row in rows.items() if label != "unpruned"
    )


def _strata(rows, study):
    of = {(row["by"], row["group"]): row for row in study["groups"] if row["label"] == "unpruned"}
    return "of its unpruned recall RASTP keeps: " + ", ".join(
        f"{group} {by} {share:.0%} (of {_recall(of[by, group])})"
        for (by, group), share in _kept_recall(study).items()
    )


def _kept_recall(study):
    """{(by, group): recall with RASTP ÷ without pruning}, of the groups in which anybody is served
    without.
    """
    recall = {(row["label"], row["by"], row["group"]): row["recall@10"] for row in study["groups"]}
    return {
        (by, group): recall["rastp", by, group] / value
        for (label, by, group), value in recall.items()
        if label == "unpruned" and value
    }


def _fast(rows, study):
    first = next(iter(rows.values()))

    def cell(row):
        reached = (
            f"{row['seconds_to_recall']:.0f} s" if row["seconds_to_recall"] else "does not reach it"
        )
        return f"`{row['label']}`: {_against(row)}, {reached}"

    return (
        f"as it is {_recall(first)}, 95 % of its validation recall after"
        f" {first['seconds_to_recall']:.0f} s; against it, and to the same recall: "
        + "; ".join(cell(row) for row in rows.values() if row is not first)
    )


def _adaptive(rows, study):
    def cell(row):
        return f"`{row['label']}`: {row['recall@10']:#.3g} ({row['kept_token_fraction']:.0%} kept)"

    others = sorted(
        (row for label, row in rows.items() if label != "unpruned"),
        key=lambda row: row["kept_token_fraction"],
    )
    return _sides(study, "a constant share that costs the same") + (
        f"nothing pruned {_recall(rows['unpruned'])}; by the share kept in training: "
        + ", ".join(map(cell, others))
    )


SENTENCES = {
    "strategies": _strategies,
    "layer-ratio": _layer_ratio,
    "efficiency": _efficiency,
    "granularity": _granularity,
    "map": _map,
    "strata": _strata,
    "inference": _inference,
    "adaptive": _adaptive,
    "fast": _fast,
}


def _of_a_third(study):
    return [pair for pair in study.get("versus", ()) if pair["against"] == "random"]


def _found_strategies(rows, study):
    pairs = _of_a_third(study)
    better = [pair["label"] for pair in pairs if not _unclear(pair) and pair["difference"] > 0]
    return (
        f"{len(better)} of {len(pairs)} ways to choose a third beat a random third"
        + f" ({', '.join(better)})" * bool(better)
    )


def _found_layer_ratio(rows, study):
    said = [
        f"{what} changes it by {rows[label]['difference']:+.4f}"
        f" {_span(rows[label]['difference_interval'])}"
        for label, what in (
            ("layer 2, keep 0.33", "a third kept behind layer 2"),
            ("layer 1, keep 0.1", "a tenth behind layer 1"),
        )
        if label in rows
    ]
    return f"recall@10 is {rows['unpruned']['recall@10']:#.3g} unpruned; " + ", ".join(said)


def _found_efficiency(rows, study):
    base = rows["unpruned"]["seconds_per_1k_windows"]
    return "60 updates are " + " and ".join(
        f"{base / rows[label]['seconds_per_1k_windows']:.2f} times as fast with {what}"
        for label, what in (("keep 0.33", "a third kept"), ("keep 0.1", "a tenth"))
        if label in rows
    )


def _found_strata(rows, study):
    share = _kept_recall(study)
    hits = [
        sum(
            row["recall@10"] * row["users"]
            for row in study["groups"]
            if (row["label"], row["group"]) == (label, "tail")
        )
        for label in ("rastp", "unpruned")
    ]
    return (
        "RASTP leaves "
        + ", ".join(
            f"{share['target popularity', group]:.0%} of the recall of {group} items"
            for group in ("head", "middle", "tail")
        )
        + " ({:.0f} users served, of {:.0f})".format(*hits)
    )


def _found_granularity(rows, study):
    clear = [pair["difference"] > 0 for pair in study["versus"] if not _unclear(pair)]
    best = max(
        (row for label, row in rows.items() if "stamp" not in label),
        key=lambda row: row["recall@10"],
    )
    return (
        f"finer SIDs are clearly better in {sum(clear)} and clearly worse in"
        f" {len(clear) - sum(clear)} of {len(study['versus'])} pairs, and {best['label']} (levels ×"
        f" codes) is best with {_recall(best)}"
    )


# What the README tells of the studies.
FINDINGS = {
    "strategies": _found_strategies,
    "layer-ratio": _found_layer_ratio,
    "efficiency": _found_efficiency,
    "strata": _found_strata,
    "granularity": _found_granularity,
}


def updated(text: str) -> str:
    """`text` of the README with its results section made anew."""
    if not SECTION.search(text):
        raise ValueError(
            f"{README} has no line <!-- results: made by results/show.py --> with <!-- end of"
            " results --> behind it"
        )
    return SECTION.sub(lambda match: match[1] + section() + match[2], text)


if __name__ == "__main__":
    made = {README: updated(README.read_text(encoding="utf-8")), PAGE: page()}
    for path, figure in pictures().items():
        if not path.exists() or digest(figure) not in path.read_text():
            made[path] = figure.to_image("svg").decode() + digest(figure) + "\n"
    for path, text in made.items():
        path.write_text(text, encoding="utf-8")
