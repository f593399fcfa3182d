"""The only module that changes somebody else's objects, and puts back exactly what was there.

Every function is a context manager. Put several on one `contextlib.ExitStack`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
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
def hooked(hooks: Mapping[nn.Module, Callable[[nn.Module, Any, Any], None]]) -> Iterator[None]:
    """Register one forward hook per module for the duration of the block."""
    handles = []
    try:
        for module, hook in hooks.items():
            handles.append(module.register_forward_hook(hook))
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
