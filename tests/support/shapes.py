"""Array shapes in annotations, checked while tests run; the package itself never checks them and pays nothing."""

import typing
from collections.abc import Callable
from typing import Any

from beartype import beartype
from jaxtyping import AbstractArray, install_import_hook

ROOMS = ("engine.model", "engine.sampling", "engine.features")


def check_shapes() -> None:
    """Have every function and dataclass of the rooms check its arrays from now on; call it before they are imported."""
    install_import_hook(ROOMS, f"{__name__}.check_arrays")


def check_arrays(function: Callable[..., Any]) -> Callable[..., Any]:
    """Check what is annotated with a shape and nothing else: tests pass doubles for everything but arrays."""
    said = function.__annotations__
    function.__annotations__ = {name: hint for name, hint in said.items() if _has_shape(hint)}
    if not function.__annotations__:
        function.__annotations__ = said
        return function
    checked = beartype(function)
    function.__annotations__ = said
    return checked


def _has_shape(hint: object) -> bool:
    if isinstance(hint, type) and issubclass(hint, AbstractArray):
        return True
    return any(_has_shape(inner) for inner in typing.get_args(hint))
