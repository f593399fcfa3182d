"""How somebody else's objects are changed, and exactly what was there is put back: nothing else does it for a while.

What changes something for a while is a context manager: put several on one `contextlib.ExitStack`. `Exchange` stays
until it is undone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

_ABSENT = object()


def instance_attribute(obj: Any, name: str) -> Any:
    """What `obj.__dict__` holds under `name`, or a marker for "nothing": the state that `restore_attribute` takes."""
    return vars(obj).get(name, _ABSENT)


def restore_attribute(obj: Any, name: str, state: Any) -> None:
    """Put back a state read with `instance_attribute`.

    Deleting matters: setting the old bound method instead would leave an instance attribute that hides the class.
    """
    if state is not _ABSENT:
        setattr(obj, name, state)
    elif name in vars(obj):
        delattr(obj, name)


@contextmanager
def patched(obj: Any, name: str, value: Any) -> Iterator[None]:
    """Set `obj.name = value` on the instance (or module), and restore the previous state on exit.

    If somebody else has wrapped the same attribute on top of ours in the meantime, theirs stays: their wrapper still
    calls ours, so ours must keep working as a pass-through (see `spf_plugin.attachment`).
    """
    before = instance_attribute(obj, name)
    setattr(obj, name, value)
    try:
        yield
    finally:
        if instance_attribute(obj, name) is value:
            restore_attribute(obj, name, before)


@contextmanager
def hooked(hooks: Iterable[tuple[nn.Module, Callable[[nn.Module, Any, Any], None]]]) -> Iterator[None]:
    """Register forward hooks for the duration of the block."""
    handles = []
    try:
        for module, hook in hooks:
            handles.append(module.register_forward_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def calls_hooked(module: nn.Module, before: Callable[..., Any], after: Callable[..., Any]) -> Iterator[None]:
    """Register a forward pre-hook and a forward hook, both with keyword arguments, for the duration of the block.

    `after` is also called, with None for an output, when the forward raises an `Exception`.
    """
    handles = []
    try:
        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(module.register_forward_hook(after, with_kwargs=True, always_call=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def bypassed(originals: Mapping[nn.Module, Any]) -> Iterator[None]:
    """Give every module in `originals` the `forward` it had before an adapter replaced it.

    Args:
        originals: module -> the state of its `forward` before the adapter came (`instance_attribute`).

    Restores each module's present `forward` on exit, also when the block raises.
    """
    adapted = {module: instance_attribute(module, "forward") for module in originals}
    try:
        for module, original in originals.items():
            restore_attribute(module, "forward", original)
        yield
    finally:
        for module, present in adapted.items():
            restore_attribute(module, "forward", present)


class Exchange:
    """A module's parameter, replaced by a module that takes less memory, and its `forward`, for as long as it lives.

    Not a context manager: an abandoned one would undo itself when it is collected, and bring the memory back.

    Args:
        module: loses the parameter `name` (and its memory, if nobody else holds it), gets `instead` as its submodule
            `instead_name`, and `forward` on the instance.

    Raises:
        AttributeError: the module has no such parameter (any more).
    """

    def __init__(
        self, module: nn.Module, name: str, instead_name: str, instead: nn.Module, forward: Callable[..., Any]
    ):
        self._module, self._name, self._instead_name, self._forward = module, name, instead_name, forward
        self._before = instance_attribute(module, "forward")
        delattr(module, name)
        module.add_module(instead_name, instead)
        module.forward = forward

    def undo(self, parameter: nn.Parameter) -> None:
        """Give the module `parameter` under the old name, and its `forward` as it was (a later wrapper stays)."""
        delattr(self._module, self._instead_name)
        self._module.register_parameter(self._name, parameter)
        if instance_attribute(self._module, "forward") is self._forward:
            restore_attribute(self._module, "forward", self._before)
