"""What the two papers claim, and what came out here: `make paper` runs the comparisons and writes
the claims page from their files.

    python -m sidlab.research.claims DATASET … [--preset paper] [--seeds 3] [--arch t5 qwen]
        [--methods "unpadded rastp"] [--sids FILE] [--output runs/paper] [--evidence results]

A claim is judged by rules alone, from every results.json, study.json and benchmark below `--output`
and `--evidence`; nothing is typed in. A saving is confirmed where ours is at least the published
one over the whole of its spread (`faster`), and not where all of it is less; pruned and unpruned
model pad alike, so that padding saved is not pruning's. Quality counts as kept where the difference
to the unpruned model is above −5 % of its recall@10, as lost where it is below, and as better or
worse where it is above or below 0; all other findings are undecided (`p_of`). What decides is
tested at 5 %, corrected for the number of tests that a claim takes (false discovery rate). One seed
decides nothing about quality, nor does a model that is far from the published one (`MATURE`). RASTP
is judged by encoders with decoders, the only models that it had. Without a DATASET nothing is run.
"""

import argparse
import json
import pathlib

from scipy import stats

from sidlab.files import reading, write_json
from sidlab.metrics import METRICS
from sidlab.research.compare import DEFAULT_METHODS, compare
from sidlab.research.findings import (
    LEVEL,
    MARGIN,
    UNDECIDED,
    Claim,
    against,
    choice_matters,
    decoder_only,
    dilution,
    faster,
    less_memory,
    nothing,
    of_t5,
    seeds_of,
    stages_help,
    too_low_hurts,
    two_thirds_go,
)
from sidlab.research.jobs import cluster
from sidlab.research.page import write_claims, write_page
from sidlab.research.papers import PUBLISHED, RASTP_CLAIMS, STAMP_CLAIMS, data_name, published

METHODS = f"{DEFAULT_METHODS} rastp-reference"
NOT_RUN = "not run"
UNTESTABLE = "not testable here"
CLAIMS = (
    Claim(
        "RASTP",
        f"Training takes {RASTP_CLAIMS['time_saved']:.1%} less time ({RASTP_CLAIMS['speedup']}"
        " times as fast).",
        of_t5(
            faster([("rastp-reference", "padded"), ("rastp", "unpadded")], RASTP_CLAIMS["speedup"])
        ),
        "needs `padded` and `rastp-reference`, or `unpadded` and `rastp`",
    ),
    Claim(
        "RASTP",
        "Quality is kept or slightly better.",
        of_t5(against(MARGIN, "rastp", "rastp-reference")),
        "needs `unpadded` and `rastp`",
    ),
    Claim(
        "RASTP",
        "A ratio that changes with the stage of learning helps (a summary of the paper; its code"
        " has none).",
        stages_help,
        "needs the study `adaptive`",
    ),
    Claim(
        "both",
        "Centrality × saliency finds the tokens that matter: better than a random third.",
        choice_matters,
        "needs the study `strategies`",
    ),
    Claim(
        "STAMP",
        "Training is {}–{} times as fast.".format(*STAMP_CLAIMS["speedup"]),
        faster([("stamp", "unpadded")], STAMP_CLAIMS["speedup"][0]),
        "needs `unpadded` and `stamp`",
    ),
    Claim(
        "STAMP",
        "Training takes {:.1%}–{:.1%} less memory.".format(*STAMP_CLAIMS["memory_saved"]),
        less_memory("stamp", "unpadded", STAMP_CLAIMS["memory_saved"][0]),
        "needs `unpadded` and `stamp` on a GPU",
    ),
    Claim(
        "STAMP",
        "Quality is kept or better.",
        against(MARGIN, "stamp"),
        "needs `unpadded` and `stamp`",
    ),
    Claim(
        "STAMP",
        "MAP alone beats the baseline.",
        against(0, "map"),
        "needs `unpadded` and `map`",
    ),
    Claim(
        "STAMP",
        "Up to two thirds of the tokens can go without a loss of accuracy.",
        two_thirds_go,
        "needs the study `layer-ratio`",
    ),
    Claim(
        "STAMP", "Too low a retention ratio hurts.", too_low_hurts, "needs the study `layer-ratio`"
    ),
    Claim(
        "STAMP",
        "Accuracy moves non-monotonically as SIDs get finer (Semantic Dilution Effect).",
        dilution,
        "needs the study `granularity`",
    ),
    Claim(
        "STAMP",
        "It holds for decoder-only models, too.",
        decoder_only,
        "needs a comparison with arch=qwen",
    ),
    Claim(
        "STAMP",
        "It holds on AL-GR-Tiny with a pretrained Qwen.",
        nothing,
        "needs the 61 GB of AL-GR-Tiny, a pretrained checkpoint and GPUs (`sidlab.data.algr` and"
        " `SidQwen.from_checkpoint` take them)",
    ),
)


def judge(files: list[dict]) -> list[dict]:
    """Every claim with its findings in the loaded results and studies: {"paper", "claim",
    "verdict", "verdicts", "findings", "missing"}. The verdict is that of all findings which decide,
    where they agree, and "mixed" where not; "verdicts" has it for each data set.
    """
    out = []
    for claim in CLAIMS:
        findings = [
            finding
            for results in files
            if results.get("preset") != "smoke"
            for finding in claim.check(results)
        ]
        _correct(findings)
        of_data = {
            data: _verdict(finding["verdict"] for finding in findings if finding["data"] == data)
            for data in dict.fromkeys(finding["data"] for finding in findings)
        }
        verdict = _verdict(finding["verdict"] for finding in findings) or (
            UNTESTABLE if claim.check is nothing else NOT_RUN
        )
        out.append(
            {
                "paper": claim.paper,
                "claim": claim.text,
                "verdict": verdict,
                "verdicts": of_data,
                "findings": findings,
                "missing": claim.missing,
            }
        )
    return out


def _correct(findings):
    """Undecided is every test that does not hold once it is corrected for how many there are."""
    tests = [finding for finding in findings if "p" in finding]
    if tests:
        for finding, p in zip(tests, stats.false_discovery_control([one["p"] for one in tests])):
            finding["p"] = float(p)
            if p >= LEVEL:
                finding["verdict"] = UNDECIDED


def _verdict(verdicts):
    found = set(verdicts)
    decided = found - {UNDECIDED} or found
    return decided.pop() if len(decided) == 1 else "mixed" if decided else None


def evidence(*folders) -> list[dict]:
    """All results of comparisons, studies and whole benchmarks below the folders, loaded; of equal
    commands on equal machines the one found last, of equal studies the one with most seeds. Not
    what was run for a quick look.
    """
    found = {}
    for folder in folders:
        for path in sorted(pathlib.Path(folder).rglob("*.json")):
            if path.name.endswith(
                ("results.json", "study.json", "bench.json")
            ) or path.parent.name in ("results", "studies"):
                with reading(path):
                    content = json.loads(path.read_text())
                if not isinstance(content, dict):  # as that of tools/run.py
                    continue
                look = content.get("only") or "--quick" in content.get("command", "")
                if content.keys() & {"summary", "study", "targets"} and not look:
                    names = ("study", "dataset", "preset", "arch", "sids")
                    same = str([content.get(name) or "" for name in names])
                    key = same if "study" in content else str(content.get("command"))
                    key += str(content["hardware"]) if "hardware" in content else ""
                    if key not in found or seeds_of(content) >= seeds_of(found[key]):
                        found[key] = content
    return list(found.values())


def beside_published(files: list[dict]) -> list[dict]:
    """Published rows of each data set, with ours of the same method: {"dataset", "method",
    "source", metrics, "METRIC_interval"}.
    """
    rows = []
    run = [data_name(results["dataset"]) for results in files if "summary" in results]
    for name in dict.fromkeys([*run, *PUBLISHED]):
        rows += [{"dataset": name, **row} for row in published(name).to_dict("records")]
        for results in files:
            if "summary" in results and data_name(results["dataset"]) == name:
                source = f"here: {results.get('arch', 't5')}, preset {results['preset']}"
                fields = [*METRICS, *(f"{metric}_interval" for metric in METRICS)]
                rows += [
                    {
                        "dataset": name,
                        "method": row["method"],
                        "source": source,
                        **{field: row[field] for field in fields},
                    }
                    for row in results["summary"]
                ]
    return rows


def main(arguments=None) -> None:
    parser = argparse.ArgumentParser(
        "sidlab.research.claims",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("datasets", nargs="*", metavar="DATASET")
    parser.add_argument("--preset", default="paper")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--arch", nargs="+", default=["t5"])
    parser.add_argument("--methods", default=METHODS)
    parser.add_argument("--sids", default="", help="a published SID file, or behaviour")
    parser.add_argument("--cluster", default="", help="the address of a Dask scheduler")
    parser.add_argument("--output", default="runs/paper")
    parser.add_argument(
        "--evidence", nargs="*", default=["results", "runs/studies", "runs/bench", "runs/bench-gpu"]
    )
    args = parser.parse_args(arguments)
    output = pathlib.Path(args.output)
    executor = cluster(args.cluster)
    for dataset in args.datasets:
        for arch in args.arch:
            methods = [
                name for name in args.methods.split() if arch == "t5" or name != "rastp-reference"
            ]
            if arch == "qwen" and args.methods == METHODS:
                methods.append("rastp-visible")
            folder = output / f"{data_name(dataset)}-{args.preset}-{arch}"
            results = compare(
                dataset,
                args.preset,
                methods,
                args.seeds,
                str(folder),
                args.sids,
                arch=arch,
                executor=executor,
            )
            write_page(results, folder / "index.html")
    files = evidence(*args.evidence, output)
    claims = judge(files)
    rows = beside_published(files)
    write_json(output / "claims.json", {"claims": claims, "published": rows})
    write_claims(claims, rows, output / "index.html")
    for claim in claims:
        own = "; ".join(
            f"{name}: {claim['verdicts'][name]}"
            for name in map(data_name, args.datasets)
            if name in claim["verdicts"]
        )
        print(f"{claim['verdict']:18} {claim['paper']}: {claim['claim']}{own and f' ({own})'}")
    if args.datasets and args.preset == "smoke":
        print(
            "Runs with the preset smoke are too short to judge anything by: these verdicts rest on"
            " the other files."
        )
    print(f"{len(files)} files of evidence; {output / 'index.html'}")


if __name__ == "__main__":
    main()
