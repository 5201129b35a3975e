"""The type checks that tests/shapes runs under, at their least cost.

jaxtyping binds the arguments of every call and checks them twice, so that the axes of what goes in and comes out are
compared. Of our functions few name axes. The others get the same type checker directly, which tells as much and takes
a tenth of the time.

A closure is not checked. It would be decorated again each time it is made, so that the source had to do without.
"""

import inspect
from typing import Any, get_args

import jaxtyping
import jaxtyping._decorator as decorator

_full = decorator.jaxtyped


def names_axes(annotation: Any) -> bool:
    """Return whether an annotation, or a part of it, is jaxtyping's; unknown for one that is still text."""
    if isinstance(annotation, str):
        return True
    if isinstance(annotation, list):  # the parameters of a Callable
        return any(map(names_axes, annotation))
    if inspect.isclass(annotation) and issubclass(annotation, jaxtyping.AbstractArray):
        return True
    parts = getattr(annotation, "__value__", None)  # of `type Name = ...`
    return any(map(names_axes, get_args(annotation) if parts is None else [parts]))


def jaxtyped(function: Any = None, *, typechecker: Any) -> Any:
    """In jaxtyping's place: `typechecker` alone, for a function whose signature names no axes."""
    if function is None:
        return lambda decorated: jaxtyped(decorated, typechecker=typechecker)
    if inspect.isfunction(function) and "<locals>" in function.__qualname__:
        return function  # decorated each time it is made, it would cost more than what it does
    # Of a generator the typechecker would look at nothing before the first value is asked for.
    plain = inspect.isfunction(function) and not inspect.isgeneratorfunction(function)
    if plain and not any(map(names_axes, function.__annotations__.values())):
        return typechecker(function)
    return _full(function, typechecker=typechecker)


def install() -> None:
    """Before endwise is imported. jaxtyping itself looks for the second, for the `__init__` of a dataclass."""
    jaxtyping.jaxtyped = decorator.jaxtyped = jaxtyped
