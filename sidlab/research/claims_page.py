"""The claims page: what both papers claim, the verdict of the runs at hand, and the figures it
rests on. One HTML file, no script.
"""

from sidlab.figures.charts import span
from sidlab.files import write
from sidlab.metrics import METRICS
from sidlab.research.page import captioned_table, document, escaped, with_code

SIGNS = {
    "confirmed": "✓",
    "not confirmed": "✗",
    "undecided": "?",
    "mixed": "±",
    "not run": "…",
    "not testable here": "–",
}
STYLE = """
thead th { text-align: left }
td:last-child { white-space: normal; text-align: left; min-width: 30rem }
ul { margin: 0; padding-left: 1.1rem }
"""


def write_claims(claims: list[dict], rows: list[dict], path) -> None:
    """Writes the page of `claims` (what `claims.judge` gives) and `rows` (what
    `claims.beside_published` gives) to `path`, atomically.
    """
    count = {verdict: sum(claim["verdict"] == verdict for claim in claims) for verdict in SIGNS}
    summary = ", ".join(f"{n} {verdict}" for verdict, n in count.items() if n)
    body = [
        [
            f"<b>{escaped(claim['paper'])}</b> {escaped(claim['claim'])}",
            f"{SIGNS[claim['verdict']]} {escaped(claim['verdict'])}"
            + "".join(
                f"<small>{SIGNS[verdict]} {escaped(data)}</small>"
                for data, verdict in claim["verdicts"].items()
            ),
            _findings(claim),
        ]
        for claim in claims
    ]
    tables = "\n".join(
        captioned_table(
            f"{name}: published beside ours",
            ["method", *METRICS],
            [
                [
                    f"<b>{escaped(row['method'])}</b><small>{escaped(row['source'])}</small>",
                    *(f"{row[m]:.4f}<small>{span(row, m)}</small>" for m in METRICS),
                ]
                for row in rows
                if row["dataset"] == name
            ],
        )
        for name in dict.fromkeys(row["dataset"] for row in rows)
    )
    write(
        path,
        document(
            "What RASTP and STAMP claim, and what came out here",
            f"""<p>{summary}.
Verdicts follow rules (<code>sidlab/research/claims.py</code>): a saving is confirmed where the whole spread of ours is at least the
published one, against an unpruned model that pads no more; quality is lost
where the interval of the difference to the unpruned model lies below 0,
kept where it does not and lies above −5 % of its recall@10, else undecided, as it is with one seed or a model that is not trained
enough. “Mixed”: runs that decide disagree; each data set has its own verdict below. Intervals are 95 %, over
test users, and over seeds where there are several. How to run what is missing: <code>make paper</code>.</p>
{captioned_table("Claims", ["claim", "verdict", "evidence"], body)}
<h2>Numbers</h2>
<p>Published numbers have no intervals and rest on other preparations of the data; honest reproductions of one method differ by more than
either paper gains.</p>
{tables}""",
            STYLE,
            plotly=False,
        ),
    )


def _findings(claim):
    if not claim["findings"]:
        return with_code(claim["missing"])
    items = "".join(
        f"<li>{SIGNS[found['verdict']]}"
        f" {escaped(found['figures'])}<small>{escaped(found['where'])}<br>"
        f"<code>{escaped(found['command'])}</code></small></li>"
        for found in claim["findings"]
    )
    return f"<ul>{items}</ul>"
