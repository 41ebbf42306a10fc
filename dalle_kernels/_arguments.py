"""Arguments of a wrong type, told in one sentence by a function's annotations.

Nothing is asked before the call has failed: checks of every type would take longer than a small call may.
"""

from __future__ import annotations

import functools
import inspect
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from numbers import Integral, Real
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable)

_OF_TYPES = (AttributeError, IndexError, KeyError, TypeError)
"""What Python and torch raise at values of other types, beside torch's RuntimeError."""


class _WrongType(TypeError):
    """So that of calls within each other the outermost one names its own argument."""


def names_wrong_types(function: F) -> F:
    """``function``, whose errors name an argument that is not of its annotated type, in place of Python's own.

    An error that says in one line what was expected passes as it is, as does every one that is not of types.
    """

    @functools.wraps(function)
    def call(*args: Any, **named: Any) -> Any:
        # A compiler follows this line alone.
        if torch.compiler.is_dynamo_compiling():
            return function(*args, **named)
        try:
            return function(*args, **named)
        except (RuntimeError, *_OF_TYPES) as error:
            complaint = _wrong_type(function, args, named) if _may_be_of_types(error) else None
            if complaint is None:
                raise
            raise _WrongType(complaint) from error

    return call


def _may_be_of_types(error: Exception) -> bool:
    if isinstance(error, RuntimeError) and type(error) is not RuntimeError:  # ours, and out of memory
        return False
    message = str(error)
    return isinstance(error, _WrongType) or "expected " not in message or "\n" in message


def _wrong_type(function: Callable, args: tuple, named: Mapping[str, Any]) -> str | None:
    """The sentence on the first argument of a type that ``function`` does not ask for, if there is one."""
    try:
        given = inspect.signature(function).bind(*args, **named).arguments
    except TypeError:  # too many arguments or too few, of which Python tells best
        return None
    for name, value in given.items():
        hint = _hint(function, name)
        if not _fits(value, hint):
            held = None if isinstance(value, str) else _first_misfit(value, hint)
            got = type(value).__name__ + ("" if held is None else f" that holds {type(held).__name__}")
            owner = function.__qualname__.removesuffix(".__init__")
            return f"{owner}: expected {name} of type {function.__annotations__[name]}, got {got}"
    return None


def _hint(function: Callable, name: str) -> Any:
    """The annotation of an argument; object where there is none, or one that only type checkers can read."""
    try:
        return eval(function.__annotations__[name], function.__globals__)
    except (KeyError, NameError, TypeError):
        return object


def _fits(value: Any, hint: Any) -> bool:
    """Whether ``value`` may be of the type, or does in its place; for a type that is not understood it does."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, argument) for argument in arguments)
    if hint is None or hint is type(None):
        return value is None
    if hint in (float, int):
        scalar = isinstance(value, torch.Tensor) and value.dim() == 0
        return scalar or isinstance(value, Real if hint is float else Integral)
    if hint is torch.device:
        return isinstance(value, (torch.device, int))
    kind = origin or hint
    if not isinstance(kind, type) or kind is Any:
        return True
    kinds = (list, tuple) if kind in (list, tuple) else kind
    return isinstance(value, kinds) and _first_misfit(value, hint) is None


def _first_misfit(value: Any, hint: Any) -> Any:
    """What a list, tuple or text holds that its annotation does not allow, if anything."""
    arguments = [argument for argument in typing.get_args(hint) if argument is not ...]
    kind = typing.get_origin(hint)
    if not isinstance(value, (list, tuple, str)) or not isinstance(kind, type) or not issubclass(kind, Iterable):
        return None
    hints = arguments if len(arguments) == len(value) else arguments[:1] * len(value)
    return next((item for item, wanted in zip(value, hints) if not _fits(item, wanted)), None)
