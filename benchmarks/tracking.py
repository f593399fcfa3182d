"""FLOPs and peak memory of a GPU training step, on a machine without a GPU.

Everything runs on torch's meta device, whose tensors have a shape and a dtype and no data: SDXL at 1024 px needs no
memory and no GPU. What makes the figures those of a GPU is `MetaGpu`: the mixed precision rules of CUDA, not those of
the CPU, and fused attention.
"""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch._meta_registrations  # kernels of the meta device that are written in Python
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

ALLOCATION = 512  # bytes; the CUDA allocator rounds every tensor up to a multiple of it

# torch/aten/src/ATen/autocast_mode.h: what runs in the lower precision, and what in float32, of what these UNets call.
_LOWER = {
    F.linear,
    F.conv2d,
    torch.conv2d,
    F.conv3d,
    torch.conv3d,
    torch.matmul,
    Tensor.matmul,
    Tensor.__matmul__,
    torch.bmm,
    torch.baddbmm,
    F.scaled_dot_product_attention,
}
_FLOAT32 = {
    F.layer_norm,
    torch.layer_norm,
    F.group_norm,
    torch.group_norm,
    F.softmax,
    torch.softmax,
    Tensor.softmax,
    F.mse_loss,
    torch.exp,
    Tensor.exp,
    torch.sum,
    Tensor.sum,
    F.cosine_similarity,
}


_AUTOCAST = torch.amp.autocast


@contextmanager
def _autocast_to_float32() -> Iterator[None]:
    """What CUDA has and the CPU has not: products in float32, whatever the weights are in."""
    with _AUTOCAST("cpu", torch.bfloat16):
        torch.set_autocast_dtype("cpu", torch.float32)  # until the block ends, which puts the type back
        yield


class MetaGpu(TorchFunctionMode):
    """Applies CUDA's autocast rules to meta tensors wherever CPU autocast is on (and keeps CPU's own rules out).

    The difference matters: CUDA runs normalisations in float32 and the CPU in bfloat16, so the CPU's rules would count
    about half of those activations. Weights that are trained are cast once per autocast block, as CUDA does.

    Meta tensors have no values to decide anything by: a mask selects everything, and a condition is met. Attention is
    the fused kind (sdpa, xformers), which never holds a map of positions by positions.
    """

    def __init__(self) -> None:
        super().__init__()
        self._casts: dict[int, tuple[Tensor, Tensor]] = {}
        self._stack = ExitStack()

    def __enter__(self) -> MetaGpu:
        keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)
        self._stack.enter_context(torch._C._ExcludeDispatchKeyGuard(keys))
        for place in (torch, torch.amp):
            self._stack.enter_context(mock.patch.object(place, "autocast", self._autocast))
        for name in ("is_autocast_enabled", "get_autocast_dtype"):  # a quantised layer asks them
            answer = partial(self._of_cpu, getattr(torch, name))
            self._stack.enter_context(mock.patch.object(torch, name, answer))
        # torch.autocast calls this when its outermost block ends, also around what checkpointing recomputes.
        self._stack.enter_context(mock.patch.object(torch, "clear_autocast_cache", self._casts.clear))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._casts.clear()
        self._stack.close()

    @staticmethod
    def _autocast(device_type: str, dtype: torch.dtype | None = None, *args: Any, **kwargs: Any) -> Any:
        """`torch.autocast`, for a device that has none."""
        if dtype == torch.float32:
            return _autocast_to_float32()
        return _AUTOCAST("cpu" if device_type == "meta" else device_type, dtype, *args, **kwargs)

    @staticmethod
    def _of_cpu(ask: Callable[[str], Any], device_type: str) -> Any:
        return ask("cpu" if device_type == "meta" else device_type)

    def _cast(self, value: Any, dtype: torch.dtype) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.dtype in (dtype, torch.float64):
            return value
        if not (value.is_leaf and value.requires_grad and value.dtype == torch.float32):
            return value.to(dtype)
        if id(value) not in self._casts:
            self._casts[id(value)] = value, value.to(dtype)
        return self._casts[id(value)][1]

    def _backward(self, loss: Tensor, *_: Any, **__: Any) -> None:
        """`loss.backward()` with the mode on."""
        super().__enter__()
        try:
            options = {"allow_unreachable": True, "accumulate_grad": True}
            _engine_run_backward((loss,), (torch.ones_like(loss),), False, False, (), **options)
        finally:
            super().__exit__(None, None, None)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.is_autocast_enabled("cpu") and (func in _LOWER or func in _FLOAT32):
            dtype = torch.get_autocast_dtype("cpu") if func in _LOWER else torch.float32
            args = [self._cast(a, dtype) for a in args]
            kwargs = {name: self._cast(value, dtype) for name, value in kwargs.items()}
        if func is Tensor.backward or func is torch.autograd.backward:
            # A mode is off inside its own handler, and checkpointing recomputes inside backward.
            return self._backward(*args, **kwargs)
        if func is Tensor.__bool__ and args[0].is_meta:
            return True
        if func is Tensor.__getitem__ and isinstance(args[1], Tensor) and args[1].dtype == torch.bool:
            return func(args[0], slice(None))
        if func is F.scaled_dot_product_attention and args[0].is_meta:
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*args[:3])[0]
        return func(*args, **kwargs)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def _attention_flop(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _attention_backward_flop(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape)


# torch's FLOP formulas, and those for the CPU's fused attention, which FlopCounterMode does not know yet.
FORMULAS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flop,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flop,
}


_META, _EMPTY = torch.device("meta"), torch.ops.aten.empty_strided.default


class _Unknown(Exception):
    """An argument that does not tell by itself what comes out."""


def _described(value: Any) -> Any:
    """All of an argument that decides what shape an operator's outputs have."""
    if isinstance(value, Tensor):
        if not value.is_meta:
            raise _Unknown
        return value.dtype, value.shape, value.stride()
    if isinstance(value, list | tuple):
        return tuple(map(_described, value))
    return type(value), value


class Outputs:
    """Calls operators on tensors without data. What comes out of one depends on shapes and types alone, and a model
    repeats its blocks: it is asked once, and answered from then on, which takes half the time.

    Operators that change an input, or give a part of one, are called each time.
    """

    def __init__(self) -> None:
        self._known: dict[Any, Any] = {}
        self._plain: dict[Any, bool] = {}

    def __call__(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func not in self._plain:
            schema = func._schema
            self._plain[func] = not any(part.alias_info for part in (*schema.arguments, *schema.returns))
        if not self._plain[func]:
            return func(*args, **kwargs)
        try:
            key = (func, _described(args), tuple((name, _described(value)) for name, value in kwargs.items()))
        except _Unknown:
            return func(*args, **kwargs)
        if key in self._known:
            several, shapes = self._known[key]
            made = (shape and _EMPTY(shape[0], shape[1], dtype=shape[2], device=_META) for shape in shapes)
            return tuple(made) if several else next(made)
        out = func(*args, **kwargs)
        outs = out if isinstance(out, tuple) else (out,)
        given = {tensor.untyped_storage()._cdata for tensor in _tensors([*args, *kwargs.values()])}
        own = [tensor.untyped_storage()._cdata for tensor in _tensors(outs)]
        whole = all(part is None or (isinstance(part, Tensor) and part.is_meta) for part in outs)
        if whole and not given.intersection(own) and len({*own}) == len(own) > 0:
            shapes = [None if part is None else (part.shape, part.stride(), part.dtype) for part in outs]
            self._known[key] = (isinstance(out, tuple), shapes)
        return out


class Tracker(TorchDispatchMode):
    """Counts FLOPs, and the bytes of every storage that is made while the mode is on, until it is freed.

    torch's own FlopCounterMode and MemTracker do the same with a hook on every module, which takes three times as long;
    `tests/test_cost.py` compares.

    Args:
        device: the kind of device whose storages count; None: any.

    Attributes:
        flops: by operator; a multiply and an add count as two.
        current: bytes alive now.
        highest: the most that was alive at once.
        phases: name -> (peak in the phase, alive at its end), for every `mark`.
    """

    def __init__(self, device: str | None = None) -> None:
        super().__init__()
        self.device = device
        self._outputs = Outputs() if device == "meta" else lambda func, args, kwargs: func(*args, **kwargs)
        self.flops: Counter[str] = Counter()
        self.current = self.highest = self._peak = 0
        self.phases: dict[str, tuple[int, int]] = {}
        self._alive: set[int] = set()

    def _freed(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self.current -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = self._outputs(func, args, kwargs)
        packet = func._overloadpacket
        if packet in FORMULAS:
            self.flops[str(packet)] += FORMULAS[packet](*args, **kwargs, out_val=out)
        given: set[int] | None = None
        for tensor in _tensors(out):
            if self.device not in (None, tensor.device.type):
                continue
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key in self._alive:
                continue
            if given is None:
                given = {t.untyped_storage()._cdata for t in _tensors([*args, *kwargs.values()])}
            if key in given:  # a view of a weight, or a weight changed in place
                continue
            size = -(-storage.nbytes() // ALLOCATION) * ALLOCATION
            self._alive.add(key)
            self.current += size
            self._peak = max(self._peak, self.current)
            self.highest = max(self.highest, self.current)
            weakref.finalize(storage, self._freed, key, size).atexit = False
        return out

    def mark(self, name: str) -> None:
        """End a phase: note its peak under `name`, and start the next."""
        self.phases[name] = (self._peak, self.current)
        self._peak = self.current


def track_steps(
    tracker: Tracker,
    names: Iterable[str],
    trained: nn.Module,
    forward: Callable[[], tuple[Tensor, ...]],
    backward: Callable[[Tensor], None],
) -> dict[str, dict[str, int]]:
    """`peak`, bytes, and `flops` of steps one after the other; what waits in one for the next counts in that, too.

    Args:
        tracker: a fresh one.
        names: of the steps.
        trained: loses its gradients before each step.
        forward: a step's loss, and what the loop holds beside it until the step ends.
        backward: called with the loss.
    """
    found: dict[str, dict[str, int]] = {}
    before = 0
    with tracker:
        for name in names:
            trained.zero_grad(set_to_none=True)
            loss, *held = forward()
            tracker.mark("forward")
            backward(loss)
            del loss, held
            tracker.mark("backward")
            flops = sum(tracker.flops.values())
            peak = max(tracker.phases[phase][0] for phase in ("forward", "backward"))
            found[name], before = {"peak": peak, "flops": flops - before}, flops
    trained.zero_grad(set_to_none=True)
    return found


@dataclass(frozen=True)
class Cost:
    """What a step takes.

    Attributes:
        flops: of one step.
        peak: bytes at the peak, beyond what was there before the step (weights, optimizer state).
        phases: see `LiveMemory`.
        operators: FLOPs by operator.
    """

    flops: int
    peak: int
    phases: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    operators: Mapping[str, int] = field(default_factory=dict)


def track(step: Callable[[Callable[[str], None]], None]) -> Cost:
    """Run `step(mark)` once and count; `mark(name)` ends a phase."""
    gc.collect()
    with Tracker() as tracker:
        step(tracker.mark)
    return Cost(sum(tracker.flops.values()), tracker.highest, tracker.phases, dict(tracker.flops))


def total_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the tensors' storages, each once."""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())
