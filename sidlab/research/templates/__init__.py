"""The one set of jinja2 templates behind every page: HTML (comparison, claims, benchmark, exported
explorers) and Markdown (results/README.md and the results section of the README).

The templates stand beside this file. A template fails on a name it was not given.
"""

import functools
import html
import math
import pathlib
import re

import jinja2
import plotly.graph_objects as go
import plotly.io as pio
from plotly.offline import get_plotlyjs


def render(template: str, **data) -> str:
    """The text of `template`, a file beside this module, with `data` as its names.

    Raises jinja2.UndefinedError where the template asks for a name or field that is not there.
    """
    return environment().get_template(template).render(data)


@functools.cache
def environment() -> jinja2.Environment:
    """All templates, with what they share. What is put into an HTML page is escaped, but for what
    its template calls `safe`.
    """
    env = jinja2.Environment(
        loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent),
        autoescape=lambda name: name is not None and ".html" in name,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    filters = (chart, clear, cells, code, count, flowing, interval, number, signed, short)
    env.filters |= {function.__name__: function for function in filters}
    env.globals["plotlyjs"] = get_plotlyjs
    return env


def number(value, spec: str) -> str:
    """A number by its format specification, "–" where there is none, of a frame NaN."""
    return "–" if value is None or math.isnan(value) else format(value, spec)


def short(value) -> str:
    """Three significant digits, whole numbers from a thousand on, nothing where there is none."""
    return "" if value is None else format(value, ",.0f" if value >= 1000 else ".3g")


def signed(value, ends=None) -> str:
    """A difference with its sign and, where it is given, its interval; "–" where there is none."""
    return f"{number(value, '+.4f')} {interval(ends, '+.4f')}".rstrip()


def interval(ends, spec: str = ".4f") -> str:
    """Both ends in brackets, nothing where there is no interval."""
    return f"[{ends[0]:{spec}}, {ends[1]:{spec}}]" if ends else ""


def clear(ends) -> int:
    """1 where an interval lies above 0, -1 where it lies below, 0 where it holds 0."""
    return int(ends[0] > 0) - int(ends[1] < 0)


def count(n: int, noun: str) -> str:
    """ "1 seed", "1,000 seeds" """
    return f"{n:,} {noun}{'s' * (n != 1)}"


def code(text: str) -> str:
    """HTML of a text whose `backticks` mark code."""
    parts = html.escape(text).split("`")
    return "".join(f"<code>{part}</code>" if n % 2 else part for n, part in enumerate(parts))


def flowing(text: str) -> str:
    """A text of many lines in one, without spaces before commas and the like."""
    return re.sub(r"\s+(?=[,;:.)])", "", " ".join(text.split()))


def cells(row) -> str:
    """A row of a Markdown table."""
    return f"| {' | '.join(map(str, row))} |"


def chart(figure: go.Figure, name: str) -> str:
    """HTML of a figure without plotly's script; `name` becomes its id. In dark mode, too, figures
    keep their light template, on a white card.
    """
    config = {"responsive": True, "displayModeBar": False}
    return pio.to_html(figure, full_html=False, include_plotlyjs=False, div_id=name, config=config)
