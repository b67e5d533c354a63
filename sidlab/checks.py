"""What callers give, in the form that the rest counts on, or an error that names the parameter."""

import contextlib
import dataclasses
import numbers
import operator

import numpy as np

SHARE = r"\d+(/0*[1-9]\d*|\.\d+)?"  # a kept share as in the method rastp@1/2


@contextlib.contextmanager
def from_extra(extra: str):
    """Around imports of packages that only `pip install "sidlab[extra]"` brings: where one is
    missing, the ModuleNotFoundError says so.

    >>> with from_extra("course"):
    ...     import no_such_package
    Traceback (most recent call last):
    ModuleNotFoundError: No module named 'no_such_package': pip install "sidlab[course]"
    """
    try:
        yield
    except ModuleNotFoundError as error:
        message = f'{error}: pip install "sidlab[{extra}]"'
        raise ModuleNotFoundError(message, name=error.name) from error


def one_of(name, value, valid):
    if value not in valid:
        raise ValueError(f"{name}={value!r} is unknown; use one of {', '.join(map(repr, valid))}")


def integer(name: str, value, least: int = 1) -> int:
    """`value` as an int; TypeError where it is no integer, ValueError where it is below `least`."""
    try:
        value = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}") from None
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return value


def plain(config) -> None:
    """NumPy's numbers in a dataclass, frozen or not, become Python's: JSON and the libraries know
    no others. TypeError where a field of True and False holds something else.
    """
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, np.generic):
            value = value.item()
            object.__setattr__(config, field.name, value)
        if field.type is bool and not isinstance(value, bool):
            raise TypeError(f"{field.name} must be True or False, got {value!r}")


def number(name: str, value) -> None:
    """TypeError where `value` is no number."""
    if not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {value!r}")


def as_histories(histories) -> list[np.ndarray]:
    """Each of `histories` as int64 [n]; ValueError where one is no sequence of integers."""
    arrays = [np.asarray(history) for history in histories]
    for user, h in enumerate(arrays):
        if h.ndim != 1 or h.size and h.dtype.kind not in "iu":
            raise ValueError(
                f"histories[{user}] must be a one-dimensional array of integer item ids (of a"
                f" single one, give [history]), got shape {h.shape} and dtype {h.dtype}"
            )
    return [h.astype(np.int64, copy=False) for h in arrays]
