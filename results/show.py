"""Write the results section of the README from the JSON files here, so that no number in it is typed: python results/show.py [--check]"""

import json
import pathlib
import re
import sys

HERE = pathlib.Path(__file__).parent
README = HERE.parent / "README.md"
COSTS = (("seconds_per_1k_windows", "#.3g"), ("peak_memory_mb", ",.0f"), ("kept_token_fraction", ".0%"))
SECTION = re.compile(r"(<!-- results: made by results/show.py -->\n).*?(<!-- end of results -->)", re.DOTALL)


def section() -> str:
    parts = [_comparison(json.loads(path.read_text())) for path in sorted(HERE.glob("amazon-*.json"))]
    if (HERE / "levers.json").exists():
        parts.append(_levers(json.loads((HERE / "levers.json").read_text())))
    return "\n".join(parts)


def _comparison(results):
    name, machine = pathlib.PurePath(results["dataset"]).name, results["hardware"]
    rows = []
    for row in results["summary"]:
        interval = "[{:.4f}, {:.4f}]".format(*row["recall@10_interval"])
        costs = [f"{row[field]:{form}}" if row.get(field) else "–" for field, form in COSTS]
        quality = [f"{row['recall@5']:.4f}", f"{row['recall@10']:.4f} {interval}", f"{row['ndcg@10']:.4f}"]
        rows.append("| " + " | ".join([row["method"], *quality, *costs]) + " |")
    updates = max((row["updates"] for row in results["rows"] if row.get("updates")), default=0)
    seeds = max(row["seeds"] for row in results["summary"])
    machine = f"{machine['processor']}, {_count(machine['threads'], 'thread')}, {machine['gpu'] or 'no GPU'}"
    setting = (f"**{name}, preset `{results['preset']}`**: {results['users']:,} test users, {_count(seeds, 'seed')}, "
               f"at most {updates:,} updates; {machine}, torch {results['versions']['torch']}:")
    head = ["| method | R@5 | R@10 [95 %] | N@10 | s per 1,000 windows | MB | tokens kept |", "|---|---|---|---|---|---|---|"]
    return "\n".join([setting, f"`{results['command']}`", "", *head, *rows, "", *([results["note"], ""] if "note" in results else [])])


def _count(n, noun):
    return f"{n:,} {noun}{'s' * (n != 1)}"


def _levers(levers):
    rows = ["| {} | {:,} | {:.4f} | {:.4f} [{:.4f}, {:.4f}] | {:.1f} |".format(
        row["lever"], row["updates"], row["recall@5"], row["recall@10"], *row["recall@10_interval"], row["train_seconds"] / 60)
        for row in levers["rows"]]
    return "\n".join([f"**What limits it**: one change at a time, one seed: `{levers['command']}`", "",
                      "| lever | updates | R@5 | R@10 [95 %] | minutes |", "|---|---|---|---|---|", *rows, ""])


def updated(text: str) -> str:
    """`text` of the README with its results section made anew."""
    if not SECTION.search(text):
        raise ValueError(f"{README} has no line <!-- results: made by results/show.py --> with <!-- end of results --> behind it")
    return SECTION.sub(lambda match: match[1] + section() + match[2], text)


if __name__ == "__main__":
    new = updated(README.read_text(encoding="utf-8"))
    if "--check" in sys.argv:
        sys.exit(new != README.read_text(encoding="utf-8"))
    README.write_text(new, encoding="utf-8")
