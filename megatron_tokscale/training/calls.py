"""A call of one of Megatron's functions, before it is made: its arguments by their names."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_tokscale.training.events import Function


@dataclass(frozen=True)
class Call:
    """A call of a function of Megatron's, not made yet.

    Attributes:
        function: Megatron's own function.
        names: names of its arguments, in order.
        args: arguments by position.
        kwargs: arguments by name.
    """

    function: Function
    names: tuple[str, ...]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments by name, including the leading positional ones."""
        return {**dict(zip(self.names, self.args, strict=False)), **self.kwargs}

    def with_argument(self, name: str, value: object) -> "Call":
        """Return the call with another value for an argument that it has."""
        if name in self.kwargs:
            return Call(self.function, self.names, self.args, {**self.kwargs, name: value})
        place = self.names.index(name)
        args = (*self.args[:place], value, *self.args[place + 1 :])
        return Call(self.function, self.names, args, self.kwargs)

    def with_forward_step(self, name: str, change: Callable[[Function], Function]) -> "Call":
        """Return the call with its forward step changed, be it an argument or in a `context`.

        Args:
            name: name of the argument, or of the context's attribute.
            change: returns the forward step to use, from that of the call.
        """
        if name in self.arguments:
            return self.with_argument(name, change(self.arguments[name]))
        context = self.arguments["context"]
        setattr(context, name, change(getattr(context, name)))
        return self

    def result(self) -> Any:
        """Make the call."""
        return self.function(*self.args, **self.kwargs)
