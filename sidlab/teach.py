"""Predict before you see, check what you wrote: what the notebooks ask of a learner, and how they answer.

    teach.predict("How many of 30 tokens …?", truth=10, range=(0, 30))      a guess first, then the truth and a calibration score
    teach.check("centrality_of", centrality_of)                             one's own function against the package's
    teach.quiz(teach.Question("What is …?", ["this", "that"], 0, "Because …"))
    teach.record({"recall@10": 0.31})                                       numbers that a run of the notebooks asserts on

With $SIDLAB_UNATTENDED set, predictions commit their default as soon as they are made. What is asked and answered is kept for the
session, so that a cell that is run again shows the answer it had: `score()`, `checks()`, `reset()`. `Code between backticks` is set
as code.
"""

import copy
import dataclasses
import html
import json
import math
import os
import re
import traceback
from collections.abc import Callable, Sequence

import ipywidgets as widgets
import numpy as np

from sidlab.files import write_json
from sidlab.viz.labels import Labels

TOLERANCE = 1e-5  # of the right number, or of 1 where that is less

_guesses: dict[str, tuple[bool, float]] = {}  # by question: right?, stated confidence in 0..1
_intervals: dict[str, bool] = {}  # did it hold the truth?
_answers: dict[tuple, object] = {}  # by question and what can be answered: the answer that stands, of predictions and quizzes
_checks: list[dict] = []


def score() -> dict:
    """The predictions of this session: `choices` committed, `right` among them, `mean_confidence` as stated (0..1, None without
    choices), `ranges` committed, and how many held the truth (`inside`; of 80 % ranges it should be four fifths). A question that is
    answered again, its truth known, counts as it was answered first."""
    return {"choices": len(_guesses), "right": sum(right for right, _ in _guesses.values()),
            "mean_confidence": sum(sure for _, sure in _guesses.values()) / len(_guesses) if _guesses else None,
            "ranges": len(_intervals), "inside": sum(_intervals.values())}


def checks() -> list[dict]:
    """Every check made in this session, in order: {"name", "passed", "verdict"}."""
    return copy.deepcopy(_checks)


def reset() -> None:
    """Forget the predictions and checks of this session."""
    for kept in (_guesses, _intervals, _answers, _checks):
        kept.clear()


def record(metrics: dict) -> None:
    """Write {"metrics": metrics, "checks": checks()} as JSON to the file that $SIDLAB_RECORD names; without it, write nothing.

    ValueError where a metric is not JSON or not finite (a tensor or a NumPy integer, say: convert it by `float`)."""
    for name, value in metrics.items():
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"metrics[{name!r}]={value!r} must be a finite Python number (or lists and dicts of them)") from error
    if os.environ.get("SIDLAB_RECORD"):
        write_json(os.environ["SIDLAB_RECORD"], {"metrics": metrics, "checks": checks()})


# ---- predictions and quizzes


class _Button(widgets.Button):
    """A button whose `click` raises what its action raises; ipywidgets itself only logs what an `on_click` handler raises."""

    def __init__(self, action: Callable[[], None], **options):
        super().__init__(**options)
        self._action = action

    def click(self):
        self._action()


# ipywidgets gives every choice one line; a long one in a narrow window needs more. A button that is done with stays enabled for the
# browser: a disabled one loses the focus, and with it the keys of the notebook.
_STYLE = """<style>.sidlab-choices .widget-radio-box label
{ height: auto; display: flex; flex-direction: row-reverse; justify-content: flex-end; align-items: flex-start }
.sidlab-choices .widget-radio-box input { flex: none }
.sidlab-question .jp-RenderedHTML td { max-width: 30rem; overflow-wrap: break-word }
.sidlab-question > .widget-html, .sidlab-choices .widget-radio-box label { overflow-wrap: anywhere }
.sidlab-inert { opacity: 0.5; pointer-events: none }</style>"""


def _text(text: str) -> str:
    """As HTML, in which `code` is set as code and nothing else has a meaning."""
    return re.sub("`([^`]+)`", r"<code>\1</code>", html.escape(text))


def _output(thing) -> dict:
    """An output of a cell, as ipywidgets' Output holds it: text is Markdown, other things show themselves as in a cell."""
    if isinstance(thing, str):
        data = {"text/markdown": thing}
    elif hasattr(thing, "to_plotly_json"):  # its own bundle would first show all of plotly.js
        data = {"application/vnd.plotly.v1+json": json.loads(thing.to_json())}
    elif hasattr(thing, "_repr_mimebundle_"):
        data = thing._repr_mimebundle_()
    elif hasattr(thing, "_repr_html_"):
        data = {"text/html": thing._repr_html_()}
    else:
        raise TypeError(f"then={thing!r} must be Markdown, or show itself in a notebook (a DataFrame, a figure, a widget)")
    return {"output_type": "display_data", "data": {"text/plain": "", **data}, "metadata": {}}


def _radio(description: str, options: Sequence, tooltip: str) -> widgets.RadioButtons:
    """Nothing is chosen at first; its value is the index of the choice. Its labels hold text alone: backticks are left out."""
    labels = [(str(option).replace("`", ""), i) for i, option in enumerate(options)]
    radio = widgets.RadioButtons(options=labels, value=None, description=description, tooltip=tooltip,
                                 style={"description_width": "initial"}, layout={"width": "auto"})
    return radio.add_class("sidlab-choices")


class Prediction(widgets.VBox):
    """Ask the learner for a guess; only then show the truth, and how well calibrated the guesses of this session are.

    Args: `truth`: the right choice or number, or a callable that returns it and is called when the learner commits; `choices`: two or
    more to choose one from, beside how sure one is; or `range` = (low, high) of a slider for the range that holds the truth with 80 %
    certainty; `default`: what an unattended run commits, a choice or (low, high) (None: the first choice, the middle half of the range);
    `unit` stands behind the numbers; `explain` is shown with the truth, and `then` below it: Markdown, or what shows itself in a
    notebook (a DataFrame, a figure, a widget), a list of such, or a callable that returns it, called when the learner commits. What
    would give the answer away belongs there.
    A widget: make it the last expression of a cell. `answer` (RadioButtons, its value an index, or FloatRangeSlider), `confidence`
    (IntSlider in percent; None with a range), `commit` (Button), `result` (HTML), `more` (Output with `then`) and `again` (Button to
    answer anew, shown after a commit) are its parts; `committed` says whether the truth is out. The same question asked again, as
    when its cell is run again, shows the answer that it has been given.
    Raises ValueError for a default or truth that is not among the choices, a default outside the range, a truth that is not a finite
    number; TypeError for a `then` that cannot be shown. What a callable raises is shown to the reader, and raised.
    """

    def __init__(self, question: str, truth, *, choices: Sequence | None = None, range: tuple | None = None, default=None, unit: str = "",
                 explain: str = "", then=()):
        super().__init__()
        if (choices is None) == (range is None):
            raise ValueError(f"give either choices or range, got choices={choices!r} and range={range!r}")
        self._question, self._truth, self._choices = question, truth, choices and list(choices)
        self._unit, self._explain, self._then = unit, explain, then
        self._key = (question, repr(self._choices or range))
        self.committed, self.confidence = False, None
        if choices is not None:
            self._check_choices(default)
            chance = math.ceil(100 / len(choices))
            self.answer = _radio("Your answer", choices, question)
            self.confidence = widgets.IntSlider(
                value=chance, min=chance, max=100, tooltip=f"{chance} % is guessing", description="How sure are you, in percent?",
                style={"description_width": "initial"}, layout={"width": "40rem", "max_width": "97%"})
        else:
            low, high = self._check_range(range, default)
            width, of = high - low, f" ({unit})" if unit else ""
            self.answer = widgets.FloatRangeSlider(
                value=(low + width / 4, high - width / 4), min=low, max=high, step=width / 200, tooltip=question,
                description=f"I am 80 % sure that it lies in{of}", readout_format=",.0f" if width >= 1000 else ".3g",
                style={"description_width": "initial"}, layout={"width": "40rem", "max_width": "97%"})
        if not callable(truth):
            self._check_truth(truth)
        self.commit = _Button(self._commit, tooltip="Commit your guess and see the truth")
        self.again = _Button(self._ask_anew, description="Answer anew", tooltip="Hide the truth and answer once more")
        self.result, self.more, self._buttons = widgets.HTML(), widgets.Output(), widgets.HBox()
        self._open(True)
        asked = widgets.HTML(f"{_STYLE}<b>Predict first.</b> {_text(question)}")
        parts = (asked, self.answer, self.confidence, self._buttons, self.result, self.more, Labels())
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
        if default is not None and not (np.shape(default) == (2,) and low <= default[0] <= default[1] <= high):
            raise ValueError(f"default={default!r} must be (low, high) within range={bounds!r}")
        return low, high

    def _check_truth(self, truth):
        if self._choices is not None and truth not in self._choices:
            raise ValueError(f"truth={truth!r} must be one of the choices {self._choices}")
        if self._choices is None and not (np.ndim(truth) == 0 and math.isfinite(truth)):
            raise ValueError(f"truth={truth!r} must be a finite number")

    def _open(self, asking: bool):
        """Let the answer be changed and committed, or neither. The button of the commit keeps the browser's focus in any case."""
        for control in filter(None, (self.answer, self.confidence)):
            control.disabled = not asking
        (self.commit.remove_class if asking else self.commit.add_class)("sidlab-inert")
        self.commit.description = "Commit" if asking else "Committed"
        anew = self.committed and not os.environ.get("SIDLAB_UNATTENDED")
        self._buttons.children = (self.commit, self.again) if anew else (self.commit,)

    def _ask_anew(self):
        del _answers[self._key]
        self.committed, self.result.value, self.more.outputs = False, "", ()
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
            outputs = [_output(thing) for thing in (then if isinstance(then, list | tuple) else [then])]
        except Exception as error:
            self._open(True)
            self.result.value = f'<div role="alert"><b>{type(error).__name__}:</b> {html.escape(str(error))}</div>'
            raise
        self.committed = True
        _answers[self._key] = self.answer.value, self.confidence and self.confidence.value
        self._open(False)
        self._show(truth)
        self.more.outputs = outputs

    def _show(self, truth):
        if self._choices is not None:
            guess, sure = self._choices[self.answer.value], self.confidence.value
            right = bool(guess == truth)
            _guesses.setdefault(self._question, (right, sure / 100))
            verdict, said, was = ("✓ Right." if right else "✗ Wrong."), f"You said “{guess}” ({sure} % sure)", f"“{truth}”"
        else:
            low, high = self.answer.value
            right = bool(low <= truth <= high)
            _intervals.setdefault(self._question, right)
            verdict = "✓ Inside your range." if right else "✗ Outside your range."
            said, was = f"You said {_number(low)} to {_number(high)}", _number(truth)
        unit = f" {self._unit}" if self._unit else ""
        parts = [f"<b>{verdict}</b> " + _text(f"{said}{unit if self._choices is None else ''}; the truth is {was}{unit}."),
                 _text(self._explain), _text(_calibration())]
        self.result.value = f'<div role="status">{"<br>".join(filter(None, parts))}</div>'


predict = Prediction


def _number(x) -> str:
    return f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.4g}"


def _calibration() -> str:
    s, parts = score(), []
    if s["choices"]:
        parts.append(f"{s['right']} of {s['choices']} right, mean stated confidence {s['mean_confidence']:.0%}".replace("%", " %"))
    if s["ranges"]:
        parts.append(f"{s['inside']} of {s['ranges']} of your 80 % ranges held the truth")
    return "So far: " + "; ".join(parts) + "."


@dataclasses.dataclass(frozen=True)
class Question:
    """A question of a quiz: `answers`, at least two texts; `right`, the index of the right one; `why`, a sentence shown with the result."""

    text: str
    answers: Sequence[str]
    right: int
    why: str

    def __post_init__(self):
        if len(self.answers) < 2:
            raise ValueError(f"answers={self.answers!r} must be two or more")
        if self.right not in range(len(self.answers)):
            raise ValueError(f"right={self.right!r} must be an index of the {len(self.answers)} answers, 0 to {len(self.answers) - 1}")


class Quiz(widgets.VBox):
    """A widget with `questions` and a button that says which answers are right, and why; it may be pressed again. `answers`
    (RadioButtons, value None or an index) and `feedback` (HTML), one a question; `check` (Button);
    `total` (HTML). What has been checked is kept: the same question, asked again, has its answer."""

    def __init__(self, *questions: Question):
        super().__init__()
        if not questions:
            raise ValueError("a quiz needs at least one Question")
        self.questions = questions
        self.answers = [_radio(f"Question {i}", q.answers, q.text) for i, q in enumerate(questions, start=1)]
        self.feedback, self.total = [widgets.HTML() for _ in questions], widgets.HTML()
        self.check = _Button(self._check, description="Check", tooltip="Check your answers")
        rows = [(widgets.HTML(f"{_STYLE}<b>{i}.</b> {_text(q.text)}"), answer, feedback)
                for i, (q, answer, feedback) in enumerate(zip(questions, self.answers, self.feedback), start=1)]
        self.children = [*(part for row in rows for part in row), self.check, self.total]
        self.add_class("sidlab-question")
        for question, answer in zip(questions, self.answers):
            answer.value = _answers.get(_key(question))
        if any(answer.value is not None for answer in self.answers):
            self._check()

    def _check(self):
        right = 0
        for question, answer, feedback in zip(self.questions, self.answers, self.feedback):
            verdict = "– No answer yet." if answer.value is None else "✓ Right." if answer.value == question.right else "✗ Not right."
            right += answer.value == question.right
            why = "" if answer.value is None else _text(question.why)
            feedback.value = f"<b>{verdict}</b> {why}"
            _answers[_key(question)] = answer.value
        self.total.value = f'<div role="status"><b>{right} of {len(self.questions)}</b> right.</div>'


quiz = Quiz


def _key(question: Question) -> tuple:
    return question.text, repr(list(question.answers))


# ---- checks


@dataclasses.dataclass(frozen=True)
class Exercise:
    """What a check runs: `inputs`, a list of argument tuples; `oracle`, the right function; `mistakes`, {what to tell the learner: a
    function that makes this mistake, or several variants of it}."""

    inputs: list[tuple]
    oracle: Callable
    mistakes: dict[str, Callable | Sequence[Callable]]

    def run(self, function) -> list:
        """The results of `function` on fresh copies of all inputs, so that none can spoil another's."""
        return [function(*arguments) for arguments in copy.deepcopy(self.inputs)]


@dataclasses.dataclass(frozen=True)
class Check:
    """`verdict`: "exact", "close" (within `TOLERANCE`), "max difference …", "wrong shape", "not started" or "raised …"."""

    name: str
    passed: bool
    verdict: str
    hint: str = ""

    def __str__(self):
        if self.verdict == "not started":
            return f"– {self.name}: not started. {self.hint}"
        return f"{'✓' if self.passed else '✗'} {self.name}: {'' if self.passed else 'not '}passed, {self.verdict}. {self.hint}".rstrip()

    __repr__ = __str__

    def _repr_html_(self):
        said = _text(str(self)).replace(":", ":</b>", 1)
        return f'<p role="status" style="overflow-wrap: anywhere"><b>{said}</p>'


CHECKS: dict[str, Exercise] = {}


def register(name: str, inputs: Sequence[tuple], oracle: Callable, mistakes: dict | None = None) -> None:
    """Add a check (or replace it): see `Exercise`. Results are numbers, None, arrays, tensors, or nested lists of them.

    >>> register("double", [(1,), (4,)], lambda x: 2 * x, {"This squares.": lambda x: x * x})
    >>> check("double", lambda x: x ** 2)
    ✗ double: not passed, max difference 8. This squares.
    """
    if not inputs or not all(isinstance(arguments, tuple) for arguments in inputs):
        raise ValueError(f"inputs must be a list with at least one tuple of arguments, got {inputs!r}")
    CHECKS[name] = Exercise(list(inputs), oracle, mistakes or {})


def check(name: str, mine) -> Check:
    """Compare `mine`, a function, with the package's on fixed inputs (`CHECKS[name].inputs`); of a check with one input `mine` may also be
    the result itself.

    Nothing that `mine` raises gets out: a stub is "not started". A failed check names the mistake if it is a classic one.
    Raises ValueError if there is no such check.
    """
    if name not in CHECKS:
        raise ValueError(f"name={name!r} is no check; use one of {', '.join(CHECKS)}")
    result = Check(name, *_judge(CHECKS[name], mine))
    _checks.append({"name": name, "passed": result.passed, "verdict": result.verdict})
    return result


def _judge(exercise: Exercise, mine) -> tuple[bool, str, str]:
    if not callable(mine) and len(exercise.inputs) > 1:
        raise ValueError(f"this check runs your function on {len(exercise.inputs)} inputs: pass the function itself, got {mine!r}")
    try:
        results = exercise.run(mine) if callable(mine) else [mine]
    except NotImplementedError as error:
        return False, "not started", f"Write your code in place of the line that raises NotImplementedError({str(error)!r})."
    except Exception as error:  # noqa: BLE001 - it is the verdict, and the reader sees it
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]  # the learner's
        where = f"In line {frames[0].lineno} of your code: {frames[0].line}" if frames else f"Arguments it gets: {len(exercise.inputs[0])}."
        return False, f"raised {type(error).__name__}: {error}", where
    right = exercise.run(exercise.oracle)
    found = [_compare(*pair) for pair in zip(results, right)]
    if all(verdict in ("exact", "close") for verdict, *_ in found):
        return True, "close" if any(verdict == "close" for verdict, *_ in found) else "exact", ""
    worst = max((i for i, (verdict, *_) in enumerate(found) if verdict not in ("exact", "close")), key=lambda i: found[i][2])
    verdict, where, _ = found[worst]
    for message, variants in exercise.mistakes.items():
        for variant in [variants] if callable(variants) else variants:
            if all(_compare(*pair)[0] in ("exact", "close") for pair in zip(results, exercise.run(variant))):
                return False, verdict, message
    return False, verdict, f"Input {worst + 1} of {len(right)}: {where}" if len(right) > 1 else where


def _compare(mine, right) -> tuple[str, str, float]:
    """(verdict, where it differs, by how much at most)."""
    if mine is None and right is not None:
        return "wrong shape", "Your function returned None: is there a `return`?", math.inf
    (shape, got), (wanted, numbers) = _flat(mine), _flat(right)
    if shape != wanted:
        return "wrong shape", f"Expected {_described(wanted)}, got {_described(shape)}.", math.inf
    whole = all(n is None or isinstance(n, int) for n in numbers)  # codes, positions, counts: close is not enough
    a, b = np.array(got, float), np.array(numbers, float)  # None becomes NaN
    with np.errstate(invalid="ignore"):
        difference = np.where((a == b) | np.isnan(a) & np.isnan(b), 0, np.abs(a - b))
    difference[np.isnan(difference)] = np.inf  # NaN on one side
    if not difference.any():
        return "exact", "", 0.0
    far = difference > (0 if whole else TOLERANCE * np.maximum(1, np.where(np.isfinite(b), np.abs(b), 1)))
    if not far.any():
        return "close", "", float(difference.max())
    wrong = np.flatnonzero(far)
    where = f"{len(wrong)} of {len(b)} numbers differ; the first of them is {got[wrong[0]]}, and {numbers[wrong[0]]} is right."
    return f"max difference {difference.max():.3g}", where, float(difference.max())


def _flat(value) -> tuple[list, list]:
    """The shape of tensors, arrays and nested lists, and their numbers one after the other. A shape is [length, *shape of the parts], with
    the list of their shapes in place of it where they differ; of what is no number it is the name of the type."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, list | tuple):
        parts = [_flat(part) for part in value]
        shapes = [shape for shape, _ in parts]
        inner = [] if not shapes else shapes[0] if all(shape == shapes[0] for shape in shapes) else [shapes]
        return [len(value), *inner], [number for _, numbers in parts for number in numbers]
    known = value is None or isinstance(value, int | float)
    return ([], [value]) if known else ([type(value).__name__], [])


def _described(shape) -> str:
    if not shape or isinstance(shape[0], str):
        return shape[0] if shape else "a number"
    if isinstance(shape[-1], list):
        return f"{shape[0]} parts of the shapes {', '.join(map(str, shape[-1]))}"
    return f"the shape {shape}"


from sidlab import exercises  # noqa: F401 - it registers the checks that come with the package
