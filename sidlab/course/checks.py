"""Checks of what a learner wrote: inputs, the right function, and the classic mistakes with what to
say of them.
"""

import copy
import dataclasses
import html
import math
import re
import traceback
from collections.abc import Callable, Sequence

import numpy as np

TOLERANCE = 1e-5  # of the right number, or of 1 where that is less


def with_code(text: str) -> str:
    """As HTML, in which `code` is set as code and nothing else has a meaning."""
    return re.sub("`([^`]+)`", r"<code>\1</code>", html.escape(text))


@dataclasses.dataclass(frozen=True)
class Exercise:
    """What a check runs: `inputs`, a list of argument tuples; `oracle`, the right function;
    `mistakes`, {what to tell the learner: a function that makes this mistake, or several variants
    of it}.
    """

    inputs: list[tuple]
    oracle: Callable
    mistakes: dict[str, Callable | Sequence[Callable]]

    def run(self, function) -> list:
        """The results of `function` on fresh copies of all inputs, so that none can spoil
        another's.
        """
        return [function(*arguments) for arguments in copy.deepcopy(self.inputs)]


@dataclasses.dataclass(frozen=True)
class Check:
    """`verdict`: "exact", "close" (within `TOLERANCE`), "max difference …", "wrong shape", "not
    started" or "raised …".
    """

    name: str
    passed: bool
    verdict: str
    hint: str = ""

    def __str__(self):
        if self.verdict == "not started":
            return f"– {self.name}: not started. {self.hint}"
        return (
            f"{'✓' if self.passed else '✗'} {self.name}: {'' if self.passed else 'not '}passed,"
            f" {self.verdict}. {self.hint}".rstrip()
        )

    __repr__ = __str__

    def _repr_html_(self):
        said = with_code(str(self)).replace(":", ":</b>", 1)
        return f'<p role="status" style="overflow-wrap: anywhere"><b>{said}</p>'


CHECKS: dict[str, Exercise] = {}


def register(
    name: str, inputs: Sequence[tuple], oracle: Callable, mistakes: dict | None = None
) -> None:
    """Add a check (or replace it): see `Exercise`. Results are numbers, None, arrays, tensors, or
    nested lists of them.

    >>> cases = [(1,), (4,)]
    >>> mistakes = {"This squares.": lambda x: x * x}
    >>> register("double", cases, lambda x: 2 * x, mistakes)  # doctest: +SKIP
    >>> teach.check("double", lambda x: x ** 2)  # doctest: +SKIP
    ✗ double: not passed, max difference 8. This squares.
    """
    if not inputs or not all(isinstance(arguments, tuple) for arguments in inputs):
        raise ValueError(
            f"inputs must be a list with at least one tuple of arguments, got {inputs!r}"
        )
    CHECKS[name] = Exercise(list(inputs), oracle, mistakes or {})


def registered(name: str) -> Exercise:
    """The check of this name; ValueError where there is none."""
    if name not in CHECKS:
        raise ValueError(f"name={name!r} is no check; use one of {', '.join(CHECKS)}")
    return CHECKS[name]


def judge(exercise: Exercise, mine) -> tuple[bool, str, str]:
    if not callable(mine) and len(exercise.inputs) > 1:
        raise ValueError(
            f"this check runs your function on {len(exercise.inputs)} inputs: pass the function"
            f" itself, got {mine!r}"
        )
    try:
        results = exercise.run(mine) if callable(mine) else [mine]
    except NotImplementedError as error:
        return (
            False,
            "not started",
            (
                "Write your code in place of the line that raises"
                f" NotImplementedError({str(error)!r})."
            ),
        )
    except Exception as error:  # noqa: BLE001 - it is the verdict, and the reader sees it
        # The learner's
        frames = [
            frame
            for frame in traceback.extract_tb(error.__traceback__)
            if frame.filename != __file__
        ]
        where = (
            f"In line {frames[0].lineno} of your code: {frames[0].line}"
            if frames
            else f"Arguments it gets: {len(exercise.inputs[0])}."
        )
        return False, f"raised {type(error).__name__}: {error}", where
    right = exercise.run(exercise.oracle)
    found = [_compare(*pair) for pair in zip(results, right)]
    if all(verdict in ("exact", "close") for verdict, *_ in found):
        return True, "close" if any(verdict == "close" for verdict, *_ in found) else "exact", ""
    worst = max(
        (i for i, (verdict, *_) in enumerate(found) if verdict not in ("exact", "close")),
        key=lambda i: found[i][2],
    )
    verdict, where, _ = found[worst]
    for message, variants in exercise.mistakes.items():
        for variant in [variants] if callable(variants) else variants:
            if all(
                _compare(*pair)[0] in ("exact", "close")
                for pair in zip(results, exercise.run(variant))
            ):
                return False, verdict, message
    return (
        False,
        verdict,
        f"Input {worst + 1} of {len(right)}: {where}" if len(right) > 1 else where,
    )


def _compare(mine, right) -> tuple[str, str, float]:
    """(verdict, where it differs, by how much at most)."""
    if mine is None and right is not None:
        return "wrong shape", "Your function returned None: is there a `return`?", math.inf
    shape, got = _flat(mine)
    wanted, numbers = _flat(right)
    if shape != wanted:
        return "wrong shape", f"Expected {_described(wanted)}, got {_described(shape)}.", math.inf
    # Codes, positions, counts: close is not enough
    whole = all(n is None or isinstance(n, int) for n in numbers)
    a = np.array(got, float)
    b = np.array(numbers, float)  # None becomes NaN
    with np.errstate(invalid="ignore"):
        difference = np.where((a == b) | np.isnan(a) & np.isnan(b), 0, np.abs(a - b))
    difference[np.isnan(difference)] = np.inf  # NaN on one side
    if not difference.any():
        return "exact", "", 0.0
    far = difference > (
        0 if whole else TOLERANCE * np.maximum(1, np.where(np.isfinite(b), np.abs(b), 1))
    )
    if not far.any():
        return "close", "", float(difference.max())
    wrong = np.flatnonzero(far)
    where = (
        f"{len(wrong)} of {len(b)} numbers differ; the first of them is {got[wrong[0]]}, and"
        f" {numbers[wrong[0]]} is right."
    )
    return f"max difference {difference.max():.3g}", where, float(difference.max())


def _flat(value) -> tuple[list, list]:
    """The shape of tensors, arrays and nested lists, and their numbers one after the other. A shape
    is [length, *shape of the parts], with the list of their shapes in place of it where they
    differ; of what is no number it is the name of the type.
    """
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, list | tuple):
        parts = [_flat(part) for part in value]
        shapes = [shape for shape, _ in parts]
        inner = (
            []
            if not shapes
            else shapes[0]
            if all(shape == shapes[0] for shape in shapes)
            else [shapes]
        )
        return [len(value), *inner], [number for _, numbers in parts for number in numbers]
    known = value is None or isinstance(value, int | float)
    return ([], [value]) if known else ([type(value).__name__], [])


def _described(shape) -> str:
    if not shape or isinstance(shape[0], str):
        return shape[0] if shape else "a number"
    if isinstance(shape[-1], list):
        return f"{shape[0]} parts of the shapes {', '.join(map(str, shape[-1]))}"
    return f"the shape {shape}"
