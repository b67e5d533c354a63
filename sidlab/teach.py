"""Predict before you see, check what you wrote: what the notebooks ask of a learner, and how they answer.

    teach.predict("How many of 30 tokens …?", truth=10, range=(0, 30))      a guess first, then the truth and a calibration score
    teach.check("centrality", my_centrality)                                one's own function against the package's
    teach.quiz(teach.Question("What is …?", ["this", "that"], 0, "Because …"))
    teach.record({"recall@10": 0.31})                                       numbers that a run of the notebooks asserts on

With $SIDLAB_UNATTENDED set, predictions commit their default as soon as they are made. What is asked and answered is kept for the
session: `score()`, `checks()`, `reset()`.
"""

import copy
import dataclasses
import html
import json
import math
import os
import pathlib
import traceback
from collections.abc import Callable, Sequence

import ipywidgets as widgets
import numpy as np
import torch

from sidlab import metrics
from sidlab.map_loss import map_loss
from sidlab.pruning import TokenPruner, kept_count
from sidlab.saliency import Signals, attention_centrality, semantic_saliency, token_importance
from sidlab.sids.encoder import residual_codes
from sidlab.sids.table import SidTable

TOLERANCE = 1e-5  # of the right number, or of 1 where that is less

_guesses: list[tuple[bool, float]] = []  # right?, stated confidence in 0..1
_intervals: list[bool] = []  # did it hold the truth?
_checks: list[dict] = []


def score() -> dict:
    """The predictions of this session: `choices` committed, `right` among them, `mean_confidence` as stated (0..1, None without
    choices), `ranges` committed, and how many held the truth (`inside`; of 80 % ranges it should be four fifths)."""
    return {"choices": len(_guesses), "right": sum(right for right, _ in _guesses),
            "mean_confidence": sum(sure for _, sure in _guesses) / len(_guesses) if _guesses else None,
            "ranges": len(_intervals), "inside": sum(_intervals)}


def checks() -> list[dict]:
    """Every check made in this session, in order: {"name", "passed", "verdict"}."""
    return copy.deepcopy(_checks)


def reset() -> None:
    """Forget the predictions and checks of this session."""
    for kept in (_guesses, _intervals, _checks):
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
        path = pathlib.Path(os.environ["SIDLAB_RECORD"])
        beside = path.with_name(f".{path.name}.{os.getpid()}")
        beside.write_text(json.dumps({"metrics": metrics, "checks": checks()}, indent=1), encoding="utf-8")
        os.replace(beside, path)


# ---- predictions and quizzes


class _Button(widgets.Button):
    """A button whose `click` raises what its action raises; ipywidgets itself only logs what an `on_click` handler raises."""

    def __init__(self, action: Callable[[], None], **options):
        super().__init__(**options)
        self._action = action

    def click(self):
        self._action()


# ipywidgets gives every choice one line; a long one in a narrow window needs more.
_STYLE = """<style>.sidlab-choices .widget-radio-box label
{ height: auto; display: flex; flex-direction: row-reverse; justify-content: flex-end; align-items: flex-start }
.sidlab-choices .widget-radio-box input { flex: none }</style>"""


def _radio(description: str, options: Sequence, tooltip: str) -> widgets.RadioButtons:
    """Nothing is chosen at first; its value is the index of the choice."""
    radio = widgets.RadioButtons(options=[(str(option), i) for i, option in enumerate(options)], value=None, description=description,
                                 tooltip=tooltip, style={"description_width": "initial"}, layout={"width": "auto"})
    return radio.add_class("sidlab-choices")


def predict(question: str, truth, *, choices: Sequence | None = None, range: tuple | None = None, default=None, unit: str = "",
            explain: str = "") -> "Prediction":
    """Ask the learner for a guess; only then show the truth, and how well calibrated the guesses of this session are.

    Args: `truth`: the right choice or number, or a callable that returns it and is called when the learner commits; `choices`: two or
    more to choose one from, beside how sure one is; or `range` = (low, high) of a slider for the range that holds the truth with 80 %
    certainty; `default`: what an unattended run commits, a choice or (low, high) (None: the first choice, the middle half of the range);
    `unit` stands behind the numbers; `explain` is shown with the truth.
    Returns a widget: make it the last expression of a cell. Raises ValueError for a default or truth that is not among the choices, a
    default outside the range, a truth that is not a finite number. What the callable raises is shown to the reader, and raised.
    """
    return Prediction(question, truth, choices, range, default, unit, explain)


class Prediction(widgets.VBox):
    """What `predict` returns. `answer` (RadioButtons, its value an index, or FloatRangeSlider), `confidence` (IntSlider in percent; None
    with a range), `commit` (Button) and `result` (HTML) are its parts; `committed` says whether the truth is out."""

    def __init__(self, question, truth, choices, bounds, default, unit, explain):
        super().__init__()
        if (choices is None) == (bounds is None):
            raise ValueError(f"give either choices or range, got choices={choices!r} and range={bounds!r}")
        self._truth, self._choices, self._unit, self._explain = truth, choices and list(choices), unit, explain
        self.committed, self.confidence = False, None
        if choices is not None:
            self._check_choices(default)
            chance = math.ceil(100 / len(choices))
            self.answer = _radio("Your answer", choices, question)
            self.confidence = widgets.IntSlider(
                value=chance, min=chance, max=100, tooltip=f"{chance} % is guessing", description="How sure are you, in percent?",
                style={"description_width": "initial"}, layout={"width": "40rem", "max_width": "97%"})
        else:
            low, high = self._check_range(bounds, default)
            width, of = high - low, f" ({unit})" if unit else ""
            self.answer = widgets.FloatRangeSlider(
                value=(low + width / 4, high - width / 4), min=low, max=high, step=width / 200, tooltip=question,
                description=f"I am 80 % sure that it lies in{of}", readout_format=",.0f" if width >= 1000 else ".3g",
                style={"description_width": "initial"}, layout={"width": "40rem", "max_width": "97%"})
        if not callable(truth):
            self._check_truth(truth)
        self.commit = _Button(self._commit, description="Commit", tooltip="Commit your guess and see the truth")
        self.result = widgets.HTML()
        asked = widgets.HTML(f"{_STYLE}<b>Predict first.</b> {html.escape(question)}")
        self.children = [w for w in (asked, self.answer, self.confidence, self.commit, self.result) if w is not None]
        if os.environ.get("SIDLAB_UNATTENDED"):
            if default is not None:
                self.answer.value = default if choices is None else self._choices.index(default)
            elif choices is not None:
                self.answer.value = 0
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

    def _commit(self):
        if self.committed:
            return
        if self.answer.value is None:
            self.result.value = '<div role="status">Choose an answer first.</div>'
            return
        controls = [w for w in (self.answer, self.confidence, self.commit) if w is not None]
        for control in controls:
            control.disabled = True
        self.result.value = '<div role="status">working …</div>'
        try:
            truth = self._truth() if callable(self._truth) else self._truth
            self._check_truth(truth)
        except Exception as error:
            for control in controls:
                control.disabled = False
            self.result.value = f'<div role="alert"><b>{type(error).__name__}:</b> {html.escape(str(error))}</div>'
            raise
        self.committed = True
        self._show(truth)

    def _show(self, truth):
        if self._choices is not None:
            guess, sure = self._choices[self.answer.value], self.confidence.value
            right = bool(guess == truth)
            _guesses.append((right, sure / 100))
            verdict, said, was = ("✓ Right." if right else "✗ Wrong."), f"You said “{guess}” ({sure} % sure)", f"“{truth}”"
        else:
            low, high = self.answer.value
            right = bool(low <= truth <= high)
            _intervals.append(right)
            verdict = "✓ Inside your range." if right else "✗ Outside your range."
            said, was = f"You said {_number(low)} to {_number(high)}", _number(truth)
        unit = f" {self._unit}" if self._unit else ""
        parts = [f"<b>{verdict}</b> " + html.escape(f"{said}{unit if self._choices is None else ''}; the truth is {was}{unit}."),
                 html.escape(self._explain), html.escape(_calibration())]
        self.result.value = f'<div role="status">{"<br>".join(filter(None, parts))}</div>'


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


def quiz(*questions: Question) -> "Quiz":
    """A widget with `questions` and a button that says which answers are right, and why. It may be pressed again after a change."""
    return Quiz(questions)


class Quiz(widgets.VBox):
    """What `quiz` returns. `answers` (RadioButtons, value None or an index) and `feedback` (HTML), one a question; `check` (Button);
    `total` (HTML)."""

    def __init__(self, questions: Sequence[Question]):
        super().__init__()
        if not questions:
            raise ValueError("a quiz needs at least one Question")
        self.questions = questions
        self.answers = [_radio(f"Question {i}", q.answers, q.text) for i, q in enumerate(questions, start=1)]
        self.feedback, self.total = [widgets.HTML() for _ in questions], widgets.HTML()
        self.check = _Button(self._check, description="Check", tooltip="Check your answers")
        rows = [(widgets.HTML(f"{_STYLE}<b>{i}.</b> {html.escape(q.text)}"), answer, feedback)
                for i, (q, answer, feedback) in enumerate(zip(questions, self.answers, self.feedback), start=1)]
        self.children = [*(part for row in rows for part in row), self.check, self.total]

    def _check(self):
        right = 0
        for question, answer, feedback in zip(self.questions, self.answers, self.feedback):
            verdict = "– No answer yet." if answer.value is None else "✓ Right." if answer.value == question.right else "✗ Not right."
            right += answer.value == question.right
            why = "" if answer.value is None else html.escape(question.why)
            feedback.value = f"<b>{verdict}</b> {why}"
        self.total.value = f'<div role="status"><b>{right} of {len(self.questions)}</b> right.</div>'


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
    """`verdict`: "exact", "close" (within `TOLERANCE`), "max difference …", "wrong shape", "not done yet" or "raised …"."""

    name: str
    passed: bool
    verdict: str
    hint: str = ""

    def __str__(self):
        return f"{'✓' if self.passed else '✗'} {self.name}: {'' if self.passed else 'not '}passed, {self.verdict}. {self.hint}".rstrip()

    __repr__ = __str__

    def _repr_html_(self):
        return f'<p role="status"><b>{html.escape(str(self)).replace(":", ":</b>", 1)}</p>'


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

    Nothing that `mine` raises gets out: a stub is "not done yet". A failed check names the mistake if it is a classic one.
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
        return False, "not done yet", f"Write your code in place of the line that raises NotImplementedError({str(error)!r})."
    except Exception as error:  # noqa: BLE001 - it is the verdict, and the reader sees it
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]  # the learner's
        where = f"In line {frames[0].lineno} of your code: {frames[0].line}" if frames else f"Arguments it gets: {len(exercise.inputs[0])}."
        return False, f"raised {type(error).__name__}: {error}", where
    right = exercise.run(exercise.oracle)
    found = [_compare(*pair) for pair in zip(results, right)]
    failed = [i for i, (verdict, _) in enumerate(found) if verdict not in ("exact", "close")]
    if not failed:
        return True, "close" if ("close", "") in found else "exact", ""
    verdict, where = found[failed[0]]
    for message, variants in exercise.mistakes.items():
        for variant in [variants] if callable(variants) else variants:
            if all(_compare(*pair)[0] in ("exact", "close") for pair in zip(results, exercise.run(variant))):
                return False, verdict, message
    return False, verdict, f"Input {failed[0] + 1} of {len(right)}: {where}" if len(right) > 1 else where


def _compare(mine, right) -> tuple[str, str]:
    """(verdict, where it differs)."""
    if mine is None and right is not None:
        return "wrong shape", "Your function returned None: is there a `return`?"
    (shape, got), (wanted, numbers) = _flat(mine), _flat(right)
    if shape != wanted:
        return "wrong shape", f"Expected {_described(wanted)}, got {_described(shape)}."
    whole = all(n is None or isinstance(n, int) for n in numbers)  # codes, positions, counts: close is not enough
    a, b = np.array(got, float), np.array(numbers, float)  # None becomes NaN
    with np.errstate(invalid="ignore"):
        difference = np.where((a == b) | np.isnan(a) & np.isnan(b), 0, np.abs(a - b))
    difference[np.isnan(difference)] = np.inf  # NaN on one side
    if not difference.any():
        return "exact", ""
    if not whole and (difference <= TOLERANCE * np.maximum(1, np.where(np.isfinite(b), np.abs(b), 1))).all():
        return "close", ""
    wrong = np.flatnonzero(difference)
    where = f"{len(wrong)} of {len(b)} numbers differ; the first of them is {got[wrong[0]]}, and {numbers[wrong[0]]} is right."
    return f"max difference {difference.max():.3g}", where


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


# ---- the checks that come with the package

_draw = torch.Generator().manual_seed(0)
_mask = (torch.arange(9) < torch.tensor([[9], [5], [1]])).long()  # [B, N]: rows of 9, 5 and 1 real tokens
_attention = torch.randn(3, 2, 9, 9, generator=_draw).masked_fill(_mask[:, None, None] == 0, -torch.inf).softmax(-1)  # [B, H, N, N]
_hidden = torch.randn(3, 9, 8, generator=_draw)  # [B, N, d]
_centrality = attention_centrality(_attention, _mask)  # [B, N]
_importance = token_importance(Signals(_hidden, _centrality, _mask))  # [B, N]
_numpy = np.random.default_rng(0)
_books = [_numpy.normal(size=(6, 4)).astype(np.float32) * scale for scale in (2, 1, 0.5)]
_codes = np.concatenate([_numpy.integers(0, 3, (20, 3)), [[0, 1, 2], [0, 1, 2], [2, 2, 1]]])  # [n, L]
_ranks = np.array([1, 0, 3, 10, 11, 0, 2, 5, 40])  # 0: the target was not among the recommended items


def _by_level(x, books, residual=lambda x, left, chosen: left - chosen, key=lambda left, book: ((left[:, None] - book) ** 2).sum(-1)):
    codes, left = [], x
    for book in books:
        codes.append(key(left, book).argmin(1))
        left = residual(x, left, book[codes[-1]])
    return np.stack(codes, axis=1)


register("residual_codes", [(_numpy.normal(size=(30, 4)).astype(np.float32) * 2, _books)], residual_codes, {
    "Every level quantises the same vector: subtract the chosen codebook row, so that the next level sees what is left.":
        lambda x, books: _by_level(x, books, lambda x, left, chosen: left),
    "Each level subtracts from the original vector: subtract from what the levels before have left.":
        lambda x, books: _by_level(x, books, lambda x, left, chosen: x - chosen),
    "This takes the row with the largest dot product, which favours long rows: take the one at the smallest distance.":
        lambda x, books: _by_level(x, books, key=lambda left, book: -left @ book.T),
})


def _groups(codes):
    return np.unique(codes, axis=0, return_counts=True)[1]


register("collisions", [(_codes,), (_codes[:4] * 0 + np.arange(4)[:, None],)],
         lambda codes: SidTable(codes, int(codes.max()) + 1, collisions="share").report()["collision_rate"], {
    "This is 1 - distinct / items: it leaves the first item of each group out, but that one shares its SID as well.":
        lambda codes: 1 - len(_groups(codes)) / len(codes),
    "This is the share of the distinct SIDs that are shared: count items, not SIDs.": lambda codes: (_groups(codes) > 1).mean(),
    "This is the share of items whose SID is their own: the share of the others is asked.":
        lambda codes: (_groups(codes) == 1).sum() / len(codes),
})


def _shares(codes, width):
    return np.bincount(codes, minlength=width) / len(codes)


def _entropy(codes, width, log=np.log):
    share = _shares(codes, width)
    return -(share[share > 0] * log(share[share > 0])).sum()


def _entropy_of_all(codes, width):
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.exp(-(_shares(codes, width) * np.log(_shares(codes, width))).sum())


register("perplexity", [(np.array([0, 0, 0, 1, 2, 2, 5]), 8), (_codes[:, 0], 4)],
         lambda codes, width: SidTable(codes[:, None], width, collisions="share").report()["per_level"][0]["perplexity"], {
    "The entropy is in bits, but exp undoes the natural logarithm: use log, not log2.":
        lambda codes, width: np.exp(_entropy(codes, width, np.log2)),
    "The entropy is in nats, but 2 ** undoes log2: use exp.": lambda codes, width: 2 ** _entropy(codes, width),
    "This is the entropy: perplexity is exp(entropy).": (_entropy, lambda codes, width: _entropy(codes, width, np.log2)),
    "This is the utilisation, used codes / width: it does not see how evenly the codes are used.":
        lambda codes, width: len(np.unique(codes)) / width,
    "This is the number of used codes: it does not see how evenly they are used.": lambda codes, width: len(np.unique(codes)),
    "An unused code gives 0 · log 0 = NaN: leave unused codes out of the sum.": _entropy_of_all,
})

register("centrality", [(_attention, _mask)], attention_centrality, {
    "This sums over the keys, which is attention given: rows are queries, so sum over them for the attention received.": (
        lambda attention, mask: attention.sum((1, 3)), lambda attention, mask: attention.sum((1, 3)) * mask,
        lambda attention, mask: attention.mean((1, 3)), lambda attention, mask: attention.mean((1, 3)) * mask),
    "Padding votes: leave padded queries out of the sum, or most of the attention comes from them in a short history.": (
        lambda attention, mask: attention.sum((1, 2)), lambda attention, mask: attention.mean(1).sum(1)),
    "This averages over the heads: sum over them.": lambda attention, mask: attention_centrality(attention, mask) / attention.shape[1],
    "This averages over queries: sum over them.": (
        lambda attention, mask: attention_centrality(attention, mask) / mask.sum(1, keepdim=True),
        lambda attention, mask: attention_centrality(attention, mask) / mask.shape[1]),
})

register("saliency", [(_hidden,)], semantic_saliency, {
    "This is the L2 norm: the L1 norm sums the absolute values.": lambda hidden: hidden.norm(dim=-1),
    "This sums the values with their signs, so that they cancel: take absolute values first.": lambda hidden: hidden.sum(-1),
    "This averages the absolute values: sum them.": lambda hidden: hidden.abs().mean(-1),
    "This sums over the tokens: sum over the last axis, the hidden size.": lambda hidden: hidden.abs().sum(1),
})


def _score(scorer):
    return lambda centrality, hidden, mask: token_importance(Signals(hidden, centrality, mask), scorer)


register("importance", [(_centrality, _hidden, _mask)], _score("rastp"), {
    "Padding has a finite score: set it to -inf, or it could be kept.":
        lambda centrality, hidden, mask: centrality * semantic_saliency(hidden),
    "This uses the L2 norm: RASTP's saliency is the L1 norm.": _score("rastp-l2"),
    "This adds the factors: multiply them.": _score(lambda s: s.centrality + semantic_saliency(s.hidden)),
    "This is the centrality alone: multiply by the saliency.": _score("centrality"),
    "This is the saliency alone: multiply by the centrality.": _score("norm"),
})


def _share_of(round_to):
    """The share of n rounded by `round_to`; at least 1 of what there is; at least 1."""
    return [lambda n, keep, least=least: max(least(n), round_to(n * keep)) for least in (lambda n: 0, lambda n: min(n, 1), lambda n: 1)]


register("kept_count", [(0, 0.5), (1, 1 / 3), (2, 1 / 3), (5, 1 / 3), (10, 0.25), (10, 1.0), (30, 1 / 3), (31, 1 / 3), (100, 0.07)],
         lambda n, keep: int(kept_count(torch.tensor(n), keep)), {
    "This rounds down (floor): a share is rounded up (ceil), so that a short history keeps a token.": _share_of(math.floor),
    "This rounds to the nearest: round up (ceil).": _share_of(round),
    "An empty history has nothing to keep: n = 0 gives 0.": (
        lambda n, keep: max(1, math.ceil(n * keep - 1e-6)), lambda n, keep: max(1, math.ceil(n * keep))),
    "In floating point 0.07 · 100 is 7.000000000000001, and ceil makes 8 of it: subtract 1e-6 before rounding up.":
        lambda n, keep: math.ceil(n * keep),
    "This is what is pruned: keep is the kept fraction.": lambda n, keep: n - int(kept_count(torch.tensor(n), keep)),
})


def _best_first(importance, counts):
    """The positions of the `counts[b]` best tokens of each row, the best first."""
    return [row.argsort(descending=True).tolist()[:count] for row, count in zip(importance, counts)]


def _counts(mask, keep):
    return kept_count(mask.sum(1), keep).tolist()


def _padded_share(importance, mask, keep):
    return [sorted(row) for row in _best_first(importance, [math.ceil(keep * mask.shape[1] - 1e-6)] * len(mask))]


register("keep_top", [(_importance, _mask, 1 / 3), (_importance, _mask, 0.5)],
         lambda importance, mask, keep: [row.nonzero().flatten().tolist() for row in TokenPruner(keep).choose(mask, importance)], {
    "The positions stand in order of importance: sort them ascending, or the kept tokens change their order.":
        lambda importance, mask, keep: _best_first(importance, _counts(mask, keep)),
    "The positions are lost: 0, 1, 2 … count the kept tokens; give the places that they had in the full row.":
        lambda importance, mask, keep: [list(range(count)) for count in _counts(mask, keep)],
    "This keeps a share of the padded length: keep a share of each row's own real tokens, mask.sum(1).": (
        _padded_share, lambda *a: [[p for p in row if real[p]] for row, real in zip(_padded_share(*a), a[1])]),
    "This rounds the share down (floor): round it up (ceil).": (
        lambda importance, mask, keep: [sorted(row) for row in _best_first(importance, (mask.sum(1) * keep + 1e-6).long())],
        lambda importance, mask, keep: [sorted(row) for row in _best_first(importance, (mask.sum(1) * keep + 1e-6).long().clamp_min(1))]),
    "These are the least important tokens: keep the most important ones.": lambda importance, mask, keep: [
        sorted(row) for row in _best_first((-importance).masked_fill(mask == 0, -torch.inf), _counts(mask, keep))],
})


def _after(items, target, steps, shift=0, absent=None):
    places = range(target + 1 + shift, target + 1 + shift + steps)
    return [items[place] if place < len(items) else absent for place in places]


_bought = [31, 12, 45, 7, 26, 18]
register("map_labels", [(_bought, 2, 2), (_bought, 3, 3), (_bought, 5, 2), ([9, 4], 0, 3)], _after, {
    "The labels begin at the target, one too early: step 1 predicts the item after it.":
        lambda items, target, steps: _after(items, target, steps, shift=-1),
    "The labels begin one too late: step 1 predicts the item right after the target.":
        lambda items, target, steps: _after(items, target, steps, shift=1),
    "Steps beyond the training part are left out: give None for each, so that there are always S labels.":
        lambda items, target, steps: items[target + 1 : target + 1 + steps],
    "Steps beyond the training part repeat its last item: they have no label, so give None.":
        lambda items, target, steps: _after(items, target, steps, absent=items[-1]),
})

_losses = torch.rand(3, 3, 2, generator=_draw) * 4  # [B, S, L]
_labels = torch.full((3, 3, 2), -100)  # step 1 has three items, step 2 has one, step 3 none
_labels[:, 0], _labels[0, 1] = 7, 8


def _step_sums(losses, labels):
    return torch.where(labels != -100, losses, 0).sum((0, 2))  # [S]


def _step_counts(losses, labels):
    return (labels != -100).sum((0, 2))  # [S]


def _step_means(losses, labels):
    return _step_sums(losses, labels) / _step_counts(losses, labels)  # [S], NaN without labels


register("map_loss", [(_losses, _labels), (_losses, torch.full_like(_labels, -100))], map_loss, {
    "This averages over all labels at once, so that later steps, which have fewer, weigh less: average each step, then the steps.": (
        lambda *a: _step_sums(*a).sum() / _step_counts(*a).sum(), lambda *a: _step_sums(*a).sum() / _step_counts(*a).sum().clamp_min(1)),
    "Places without a label (-100) count as a loss of 0: divide by the number of labels.": lambda *a: _step_sums(*a).sum() / a[0].numel(),
    "Places without a label (-100) count like the others: leave them out.": lambda losses, labels: losses.mean(),
    "A step without labels counts as a loss of 0: divide by the number of steps that have labels.":
        lambda *a: _step_means(*a).nan_to_num().mean(),
    "A step without labels gives 0 / 0 = NaN: leave such steps out.": lambda *a: _step_means(*a).mean(),
    "Without any label this is 0 / 0 = NaN: it has to be 0.": lambda *a: _step_means(*a).nanmean(),
    "This sums over the steps: average over those that have labels.": lambda *a: _step_means(*a).nansum(),
})


def _gather(hidden, positions):
    return hidden.gather(1, positions.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))  # [B, K, d]


register("gather", [(_hidden, torch.tensor([[1, 4, 7, 8], [1, 2, 3, 5], [2, 5, 6, 7]]))], _gather, {
    "These are the first K tokens: the positions are lost; take the tokens that stand at them.":
        lambda hidden, positions: hidden[:, : positions.shape[1]],
    "Every row takes the tokens at the first row's positions: each row has its own.": lambda hidden, positions: hidden[:, positions[0]],
    "hidden[:, positions] takes every row's positions in every row, [B, B, K, d]: index the batch axis as well, or use gather.":
        lambda hidden, positions: hidden[:, positions],
    "The positions are read as if they counted from 1: they count from 0.":
        lambda hidden, positions: _gather(hidden, (positions - 1).clamp_min(0)),
})


def _mean_at(gain, hit=lambda ranks, k: (ranks > 0) & (ranks <= k)):
    return lambda ranks, k: np.where(hit(ranks, k), gain(np.maximum(ranks, 1)), 0).mean()


_wrong_hits = {"Rank 0 counts as a hit: it means that the target is missing, and gives 0.": lambda ranks, k: ranks <= k,
              "Rank k is left out: ranks count from 1, so rank k is among the first k.": lambda ranks, k: (ranks > 0) & (ranks < k),
              "Ranks beyond k count: they give 0.": lambda ranks, k: ranks > 0}

register("recall_at", [(_ranks, 1), (_ranks, 5), (_ranks, 10)], lambda ranks, k: float(metrics.recall_at(ranks, k).mean()), {
    **{message: _mean_at(np.ones_like, hit) for message, hit in _wrong_hits.items()},
    "The mean is over found targets only: every user counts.": lambda ranks, k: (ranks[ranks > 0] <= k).mean(),
    "This is the number of hits: divide by the number of users.": lambda ranks, k: ((ranks > 0) & (ranks <= k)).sum(),
})

register("ndcg_at", [(_ranks, 1), (_ranks, 5), (_ranks, 10)], lambda ranks, k: float(metrics.ndcg_at(ranks, k).mean()), {
    **{message: _mean_at(lambda ranks: 1 / np.log2(1 + ranks), hit) for message, hit in _wrong_hits.items()},
    "The discount is log2(2 + rank), as if ranks counted from 0: rank 1 is the top, so log2(1 + rank).":
        _mean_at(lambda ranks: 1 / np.log2(2 + ranks)),
    "The discount uses the natural logarithm: use log2, so that the top gives 1.": _mean_at(lambda ranks: 1 / np.log(1 + ranks)),
    "This is the reciprocal rank: the discount is 1 / log2(1 + rank).": _mean_at(lambda ranks: 1 / ranks),
    "The mean is over found targets only: every user counts.": lambda ranks, k: metrics.ndcg_at(ranks[ranks > 0], k).mean(),
})

register("real_tokens", [([3, 10, 30, 45], 30, 4), ([1, 2, 3], 20, 5)],
         lambda lengths, max_items, tokens: float(np.minimum(lengths, max_items).mean() / max_items), {
    "Histories longer than max_items are counted whole: only their last max_items items get slots.":
        lambda lengths, max_items, tokens: np.mean(lengths) / max_items,
    "This pads to the longest history: every history is padded to max_items.":
        lambda lengths, max_items, tokens: np.minimum(lengths, max_items).mean() / max(np.minimum(lengths, max_items)),
    "This is the share of padding: the share of real slots is asked.":
        lambda lengths, max_items, tokens: 1 - np.minimum(lengths, max_items).mean() / max_items,
    "Items are compared with tokens: multiply both, or neither, by tokens_per_item.": (
        lambda lengths, max_items, tokens: np.minimum(lengths, max_items).mean() / (max_items * tokens),
        lambda lengths, max_items, tokens: np.minimum(lengths, max_items).mean() * tokens / max_items,
        lambda lengths, max_items, tokens: np.minimum(np.multiply(lengths, tokens), max_items).mean() / max_items),
})

register("attention_flops", [(150, 128), (50, 64)], lambda n, d: 4 * n * n * d, {
    "This is too small: there are two products of n · n · d (scores, and the weighted sum), and a multiply-add counts 2.": (
        lambda n, d: 2 * n * n * d, lambda n, d: n * n * d),
    "This counts the projections, which are linear in n: scores and weighted sum alone are asked.": (
        lambda n, d: 8 * n * d * d, lambda n, d: 4 * n * n * d + 8 * n * d * d),
})
