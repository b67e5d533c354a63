"""Predict before you see, check what you wrote: what the notebooks ask of a learner, and how they
answer.

    teach.predict("How many of 30 tokens …?", truth=10, range=(0, 30))
    teach.check("centrality_of", centrality_of)
    teach.quiz(teach.Question("What is …?", ["this", "that"], 0, "Because …"))
    teach.record({"recall@10": 0.31})

`predict` asks for a guess first and then shows the truth and a calibration score; `check` compares
one's own function with the package's; `record` keeps numbers that a run of the notebooks asserts
on.

With $SIDLAB_UNATTENDED set, predictions commit their default as soon as they are made. What is
asked and answered is kept for the session, so that a cell that is run again shows the answer it
had: `score()`, `checks()`, `reset()`. `Code between backticks` is set as code.
"""

import copy
import dataclasses
import html
import json
import math
import os
from collections.abc import Callable, Sequence

import numpy as np

from sidlab.checks import from_extra

# They register the package's own checks.
from sidlab.course import exercises, exercises_measure  # noqa: F401
from sidlab.course.checks import (
    Check,
    judge,
    register,  # noqa: F401 - for those who add a check
    registered,
    with_code,
)
from sidlab.course.labels import Labels
from sidlab.files import write_json

with from_extra("course"):
    import ipywidgets as widgets

_guesses: dict[str, tuple[bool, float]] = {}  # by question: right?, stated confidence in 0..1
_intervals: dict[str, bool] = {}  # did it hold the truth?
# By question and what can be answered: the answer that stands, of predictions and quizzes
_answers: dict[tuple, object] = {}
_checks: list[dict] = []


def score() -> dict:
    """The predictions of this session: `choices` committed, `right` among them, `mean_confidence`
    as stated (0..1, None without choices), `ranges` committed, and how many held the truth
    (`inside`; of 80 % ranges it should be four fifths). A question that is answered again, its
    truth known, counts as it was answered first.
    """
    return {
        "choices": len(_guesses),
        "right": sum(right for right, _ in _guesses.values()),
        "mean_confidence": (
            sum(sure for _, sure in _guesses.values()) / len(_guesses) if _guesses else None
        ),
        "ranges": len(_intervals),
        "inside": sum(_intervals.values()),
    }


def checks() -> list[dict]:
    """Every check made in this session, in order: {"name", "passed", "verdict"}."""
    return copy.deepcopy(_checks)


def reset() -> None:
    """Forget the predictions and checks of this session."""
    for kept in (_guesses, _intervals, _answers, _checks):
        kept.clear()


def record(metrics: dict) -> None:
    """Write {"metrics": metrics, "checks": checks()} as JSON to the file that $SIDLAB_RECORD names;
    without it, write nothing.

    ValueError where a metric is not JSON or not finite (a tensor or a NumPy integer, say: convert
    it by `float`).
    """
    for name, value in metrics.items():
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"metrics[{name!r}]={value!r} must be a finite Python number (or lists and dicts of"
                " them)"
            ) from error
    if os.environ.get("SIDLAB_RECORD"):
        write_json(os.environ["SIDLAB_RECORD"], {"metrics": metrics, "checks": checks()})


# ---- predictions and quizzes


class _Button(widgets.Button):
    """A button whose `click` raises what its action raises; ipywidgets itself only logs what an
    `on_click` handler raises.
    """

    def __init__(self, action: Callable[[], None], **options):
        super().__init__(**options)
        self._action = action

    def click(self):
        self._action()


# ipywidgets gives every choice one line; a long one in a narrow window needs more. A button that is
# done with stays enabled for the browser: a disabled one loses the focus, and with it the keys of
# the notebook.
_STYLE = """<style>.sidlab-choices .widget-radio-box label
{ height: auto; display: flex; flex-direction: row-reverse; justify-content: flex-end; \
align-items: flex-start }
.sidlab-choices .widget-radio-box input { flex: none }
.sidlab-question .jp-RenderedHTML td { max-width: 30rem; overflow-wrap: break-word }
.sidlab-question > .widget-html, .sidlab-choices .widget-radio-box label { overflow-wrap: anywhere }
.sidlab-inert { opacity: 0.5; pointer-events: none }</style>"""


def _output(thing) -> dict:
    """An output of a cell, as ipywidgets' Output holds it: text is Markdown, other things show
    themselves as in a cell.
    """
    if isinstance(thing, str):
        data = {"text/markdown": thing}
    elif hasattr(thing, "to_plotly_json"):  # its own bundle would first show all of plotly.js
        data = {"application/vnd.plotly.v1+json": json.loads(thing.to_json())}
    elif hasattr(thing, "_repr_mimebundle_"):
        data = thing._repr_mimebundle_()
    elif hasattr(thing, "_repr_html_"):
        data = {"text/html": thing._repr_html_()}
    else:
        raise TypeError(
            f"then={thing!r} must be Markdown, or show itself in a notebook (a DataFrame, a figure,"
            " a widget)"
        )
    return {"output_type": "display_data", "data": {"text/plain": "", **data}, "metadata": {}}


def _radio(description: str, options: Sequence, tooltip: str) -> widgets.RadioButtons:
    """Nothing is chosen at first; its value is the index of the choice. Its labels hold text alone:
    backticks are left out.
    """
    labels = [(str(option).replace("`", ""), i) for i, option in enumerate(options)]
    radio = widgets.RadioButtons(
        options=labels,
        value=None,
        description=description,
        tooltip=tooltip,
        style={"description_width": "initial"},
        layout={"width": "auto"},
    )
    return radio.add_class("sidlab-choices")


class Prediction(widgets.VBox):
    """Ask the learner for a guess; only then show the truth, and how well calibrated the guesses of
    this session are.

    Args: `truth`: the right choice or number, or a callable that returns it and is called when the
    learner commits; `choices`: two or more to choose one from, beside how sure one is; or `range` =
    (low, high) of a slider for the range that holds the truth with 80 % certainty; `default`: what
    an unattended run commits, a choice or (low, high) (None: the first choice, the middle half of
    the range); `unit` stands behind the numbers; `explain` is shown with the truth, and `then`
    below it: Markdown, or what shows itself in a notebook (a DataFrame, a figure, a widget), a list
    of such, or a callable that returns it, called when the learner commits. What would give the
    answer away belongs there. A widget: make it the last expression of a cell. `answer`
    (RadioButtons, its value an index, or FloatRangeSlider), `confidence` (IntSlider in percent;
    None with a range), `commit` (Button), `result` (HTML), `more` (Output with `then`) and `again`
    (Button to answer anew, shown after a commit) are its parts; `committed` says whether the truth
    is out. The same question asked again, as when its cell is run again, shows the answer that it
    has been given. Raises ValueError for a default or truth that is not among the choices, a
    default outside the range, a truth that is not a finite number; TypeError for a `then` that
    cannot be shown. What a callable raises is shown to the reader, and raised.
    """

    def __init__(
        self,
        question: str,
        truth,
        *,
        choices: Sequence | None = None,
        range: tuple | None = None,
        default=None,
        unit: str = "",
        explain: str = "",
        then=(),
    ):
        super().__init__()
        if (choices is None) == (range is None):
            raise ValueError(
                f"give either choices or range, got choices={choices!r} and range={range!r}"
            )
        self._question = question
        self._truth = truth
        self._choices = choices and list(choices)
        self._unit = unit
        self._explain = explain
        self._then = then
        self._key = (question, repr(self._choices or range))
        self.committed = False
        self.confidence = None
        if choices is not None:
            self._check_choices(default)
            chance = math.ceil(100 / len(choices))
            self.answer = _radio("Your answer", choices, question)
            self.confidence = widgets.IntSlider(
                value=chance,
                min=chance,
                max=100,
                tooltip=f"{chance} % is guessing",
                description="How sure are you, in percent?",
                style={"description_width": "initial"},
                layout={"width": "40rem", "max_width": "97%"},
            )
        else:
            low, high = self._check_range(range, default)
            width = high - low
            of = f" ({unit})" if unit else ""
            # Between whole numbers one guesses whole numbers.
            step = (
                max(1, width // 200)
                if all(isinstance(bound, int) for bound in range)
                else width / 200
            )
            self.answer = widgets.FloatRangeSlider(
                value=(
                    (low + width // 4, high - width // 4)
                    if step == int(step)
                    else (low + width / 4, high - width / 4)
                ),
                min=low,
                max=high,
                step=step,
                tooltip=question,
                description=f"I am 80 % sure that it lies in{of}",
                readout_format=",.0f" if width >= 1000 else ".3g",
                style={"description_width": "initial"},
                layout={"width": "40rem", "max_width": "97%"},
            )
        if not callable(truth):
            self._check_truth(truth)
        self.commit = _Button(self._commit, tooltip="Commit your guess and see the truth")
        self.again = _Button(
            self._ask_anew, description="Answer anew", tooltip="Hide the truth and answer once more"
        )
        self.result = widgets.HTML()
        self.more = widgets.Output()
        self._buttons = widgets.HBox()
        self._open(True)
        asked = widgets.HTML(f"{_STYLE}<b>Predict first.</b> {with_code(question)}")
        parts = (
            asked,
            self.answer,
            self.confidence,
            self._buttons,
            self.result,
            self.more,
            Labels(),
        )
        self.children = [w for w in parts if w is not None]
        self.add_class("sidlab-question")
        if os.environ.get("SIDLAB_UNATTENDED"):
            if default is not None:
                self.answer.value = default if choices is None else self._choices.index(default)
            elif choices is not None:
                self.answer.value = 0
            self._commit()
        elif self._key in _answers:
            self.answer.value, sure = _answers[self._key]
            if self.confidence is not None:
                self.confidence.value = sure
            self._commit()

    def _check_choices(self, default):
        if len(self._choices) < 2 or len(set(map(str, self._choices))) < len(self._choices):
            raise ValueError(f"choices must be two or more that differ, got {self._choices}")
        if default is not None and default not in self._choices:
            raise ValueError(f"default={default!r} must be one of the choices {self._choices}")

    def _check_range(self, bounds, default):
        low, high = map(float, bounds)
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise ValueError(f"range={bounds!r} must be (low, high), finite, with low < high")
        if default is not None and not (
            np.shape(default) == (2,) and low <= default[0] <= default[1] <= high
        ):
            raise ValueError(f"default={default!r} must be (low, high) within range={bounds!r}")
        return low, high

    def _check_truth(self, truth):
        if self._choices is not None and truth not in self._choices:
            raise ValueError(f"truth={truth!r} must be one of the choices {self._choices}")
        if self._choices is None and not (np.ndim(truth) == 0 and math.isfinite(truth)):
            raise ValueError(f"truth={truth!r} must be a finite number")

    def _open(self, asking: bool):
        """Let the answer be changed and committed, or neither. The button of the commit keeps the
        browser's focus in any case.
        """
        for control in filter(None, (self.answer, self.confidence)):
            control.disabled = not asking
        (self.commit.remove_class if asking else self.commit.add_class)("sidlab-inert")
        self.commit.description = "Commit" if asking else "Committed"
        anew = self.committed and not os.environ.get("SIDLAB_UNATTENDED")
        self._buttons.children = (self.commit, self.again) if anew else (self.commit,)

    def _ask_anew(self):
        del _answers[self._key]
        self.committed = False
        self.result.value = ""
        self.more.outputs = ()
        self._open(True)
        self.commit.focus()  # the button that was clicked is gone

    def _commit(self):
        if self.committed:
            return
        if self.answer.value is None:
            self.result.value = '<div role="status">Choose an answer first.</div>'
            return
        self._open(False)
        self.result.value = '<div role="status">working …</div>'
        try:
            truth = self._truth() if callable(self._truth) else self._truth
            self._check_truth(truth)
            then = self._then() if callable(self._then) else self._then
            outputs = [
                _output(thing) for thing in (then if isinstance(then, list | tuple) else [then])
            ]
        except Exception as error:
            self._open(True)
            self.result.value = (
                f'<div role="alert"><b>{type(error).__name__}:</b> {html.escape(str(error))}</div>'
            )
            raise
        self.committed = True
        _answers[self._key] = self.answer.value, self.confidence and self.confidence.value
        self._open(False)
        self._show(truth)
        self.more.outputs = outputs

    def _show(self, truth):
        if self._choices is not None:
            guess = self._choices[self.answer.value]
            sure = self.confidence.value
            right = bool(guess == truth)
            _guesses.setdefault(self._question, (right, sure / 100))
            verdict = "✓ Right." if right else "✗ Wrong."
            said = f"You said “{guess}” ({sure} % sure)"
            was = f"“{truth}”"
        else:
            low, high = self.answer.value
            right = bool(low <= truth <= high)
            _intervals.setdefault(self._question, right)
            verdict = "✓ Inside your range." if right else "✗ Outside your range."
            said = f"You said {_number(low)} to {_number(high)}"
            was = _number(truth)
        unit = f" {self._unit}" if self._unit else ""
        parts = [
            f"<b>{verdict}</b> "
            + with_code(
                f"{said}{unit if self._choices is None else ''}; the truth is {was}{unit}."
            ),
            with_code(self._explain),
            with_code(_calibration()),
        ]
        self.result.value = f'<div role="status">{"<br>".join(filter(None, parts))}</div>'


predict = Prediction


def _number(x) -> str:
    return f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.4g}"


def _calibration() -> str:
    s = score()
    parts = []
    if s["choices"]:
        parts.append(
            f"{s['right']} of {s['choices']} right, mean stated confidence"
            f" {s['mean_confidence']:.0%}".replace("%", " %")
        )
    if s["ranges"]:
        parts.append(f"{s['inside']} of {s['ranges']} of your 80 % ranges held the truth")
    return "So far: " + "; ".join(parts) + "."


@dataclasses.dataclass(frozen=True)
class Question:
    """A question of a quiz: `answers`, at least two texts; `right`, the index of the right one;
    `why`, a sentence shown with the result.
    """

    text: str
    answers: Sequence[str]
    right: int
    why: str

    def __post_init__(self):
        if len(self.answers) < 2:
            raise ValueError(f"answers={self.answers!r} must be two or more")
        if self.right not in range(len(self.answers)):
            raise ValueError(
                f"right={self.right!r} must be an index of the {len(self.answers)} answers, 0 to"
                f" {len(self.answers) - 1}"
            )


class Quiz(widgets.VBox):
    """A widget with `questions` and a button that says which answers are right, and why; it may be
    pressed again. `answers` (RadioButtons, value None or an index) and `feedback` (HTML), one a
    question; `check` (Button); `total` (HTML). What has been checked is kept: the same question,
    asked again, has its answer.
    """

    def __init__(self, *questions: Question):
        super().__init__()
        if not questions:
            raise ValueError("a quiz needs at least one Question")
        self.questions = questions
        self.answers = [
            _radio(f"Question {i}", q.answers, q.text) for i, q in enumerate(questions, start=1)
        ]
        self.feedback = [widgets.HTML() for _ in questions]
        self.total = widgets.HTML()
        self.check = _Button(self._check, description="Check", tooltip="Check your answers")
        rows = [
            (widgets.HTML(f"{_STYLE}<b>{i}.</b> {with_code(q.text)}"), answer, feedback)
            for i, (q, answer, feedback) in enumerate(
                zip(questions, self.answers, self.feedback), start=1
            )
        ]
        self.children = [*(part for row in rows for part in row), self.check, self.total]
        self.add_class("sidlab-question")
        for question, answer in zip(questions, self.answers):
            answer.value = _answers.get(_key(question))
        if any(answer.value is not None for answer in self.answers):
            self._check()

    def _check(self):
        right = 0
        for question, answer, feedback in zip(self.questions, self.answers, self.feedback):
            verdict = (
                "– No answer yet."
                if answer.value is None
                else "✓ Right."
                if answer.value == question.right
                else "✗ Not right."
            )
            right += answer.value == question.right
            why = "" if answer.value is None else with_code(question.why)
            feedback.value = f"<b>{verdict}</b> {why}"
            _answers[_key(question)] = answer.value
        self.total.value = (
            f'<div role="status"><b>{right} of {len(self.questions)}</b> right.</div>'
        )


quiz = Quiz


def _key(question: Question) -> tuple:
    return question.text, repr(list(question.answers))


def check(name: str, mine) -> Check:
    """Compare `mine`, a function, with the package's on fixed inputs
    (`checks.CHECKS[name].inputs`); of a check with one input `mine` may also be the result itself.

    Nothing that `mine` raises gets out: a stub is "not started". A failed check names the mistake
    if it is a classic one. Raises ValueError if there is no such check.
    """
    result = Check(name, *judge(registered(name), mine))
    _checks.append({"name": name, "passed": result.passed, "verdict": result.verdict})
    return result
