"""The seam between SPF and a training loop: one call of the denoiser, seen before and after, and made again.

A forward pre-hook and a forward hook on the unwrapped model. Whatever wraps it (accelerate, DDP) and whoever calls it,
they fire once a call, under gradient checkpointing too. An extra pass replays the call that was captured, with another
text, so noise, timesteps, sizes and masks are the same by construction.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from spf_plugin import patching

_TENSOR = "$tensor"


@dataclass(frozen=True)
class Call:
    """The arguments of one call of a denoiser, by position and by name."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def on(self, denoiser: nn.Module) -> Any:
        """Make this call."""
        return denoiser(*self.args, **self.kwargs)

    def part(self, position: int, *names: str) -> Any:
        """An argument, by position or under one of its names; None where it is missing."""
        if len(self.args) > position:
            return self.args[position]
        return next((self.kwargs[name] for name in names if name in self.kwargs), None)

    def with_part(self, value: Any, position: int, *names: str) -> Call:
        """The same call with another value for an argument that it has."""
        if len(self.args) > position:
            return Call((*self.args[:position], value, *self.args[position + 1 :]), self.kwargs)
        name = next(name for name in names if name in self.kwargs)
        return Call(self.args, {**self.kwargs, name: value})

    def map(self, function: Callable[[Tensor], Tensor]) -> Call:
        """The same call with `function` applied to every tensor in it."""
        return Call(_mapped(function, self.args), _mapped(function, dict(self.kwargs)))

    def flatten(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What JSON takes of it, and its tensors by the names that stand in their places there."""
        tensors: dict[str, Tensor] = {}

        def put(value: Any, name: str) -> Any:
            if isinstance(value, Tensor):
                tensors[name] = value
                return {_TENSOR: name}
            if isinstance(value, Mapping):
                return {key: put(part, f"{name}.{key}") for key, part in value.items()}
            if isinstance(value, list | tuple):
                return [put(part, f"{name}.{i}") for i, part in enumerate(value)]
            return value

        return {"args": put(self.args, "args"), "kwargs": put(self.kwargs, "kwargs")}, tensors

    @classmethod
    def unflatten(cls, structure: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Call:
        """What `flatten` gave, as a call again; tuples inside it come back as lists.

        Raises:
            KeyError: something is missing.
        """

        def get(value: Any) -> Any:
            if isinstance(value, Mapping):
                if set(value) == {_TENSOR}:
                    return tensors[value[_TENSOR]]
                return {key: get(part) for key, part in value.items()}
            return [get(part) for part in value] if isinstance(value, list) else value

        return cls(tuple(get(structure["args"])), get(structure["kwargs"]))


def _mapped(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        return {key: _mapped(function, part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_mapped(function, part) for part in value)
    return value


Around = Callable[[Call], "Generator[Call, Any, Any] | None"]
"""What happens around a call: a generator that yields the call to make, is sent its output, and returns the output that
the caller gets. None lets the call pass."""


class _Interception:
    def __init__(self, around: Around):
        self._around = around
        self._busy = False  # calls that `around` itself makes pass
        self._waiting: Generator[Call, Any, Any] | None = None

    def before(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._busy:
            return None
        self.abandon()  # an interrupt in the last call's forward, which no hook hears of
        self._busy = True
        try:
            generator = self._around(Call(args, kwargs))
            if generator is None:
                return None
            call = next(generator)
            self._waiting = generator
            return call.args, dict(call.kwargs)
        finally:
            self._busy = False

    def after(self, _module: nn.Module, _args: Any, _kwargs: Any, output: Any) -> Any:
        if self._busy or self._waiting is None:
            return None
        if output is None:  # the forward raised: torch calls this hook nevertheless
            self.abandon()
            return None
        generator, self._waiting, self._busy = self._waiting, None, True
        try:
            generator.send(output)
        except StopIteration as end:
            return end.value
        finally:
            self._busy = False
        raise RuntimeError("what happens around a call yields once")

    def abandon(self) -> None:
        """Leave every context that the generator of an unfinished call is in."""
        generator, self._waiting = self._waiting, None
        if generator is not None:
            generator.close()


@contextmanager
def intercepted(denoiser: nn.Module, around: Around) -> Iterator[None]:
    """Run `around` around every call of `denoiser` in the block, but for the calls that it makes itself.

    Args:
        denoiser: the unwrapped model.
        around: see `Around`. Contexts that are open where it yields are open while the model runs, and are left when
            that raises.
    """
    interception = _Interception(around)
    with patching.calls_hooked(denoiser, interception.before, interception.after):
        try:
            yield
        finally:
            interception.abandon()
