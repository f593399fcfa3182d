"""The frozen denoiser's linear weights in 8 or 4 bit (`spf_base`): a base that reference and response share.

Only the transformers' linear layers, which are most of a large model: convolutions and embeddings stay as they are. A
weight is made dense where it is used, in forward and again in backward, and never kept. Scales are held as bytes: a
host casts every floating-point tensor of the model to its own precision, and rounded scales would be another base.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spf_plugin.errors import SPFError
from spf_plugin.patching import Exchange

NAME = "spf_weight"
BLOCK = 64  # nf4: weights that share a scale
# These keep a layer's sizes and its forward, and nothing else of it.
KOHYA = (
    "networks.lora",
    "networks.lora_anima",
    "networks.lora_sd3",
    "networks.lora_flux",
    "networks.lora_lumina",
    "networks.lora_hunyuan_image",
)
# Adapters of LyCORIS that, in bypass mode, only add to the layer's output.
LYCORIS = ("lora", "locon", "loha", "lokr")


def problems(kind: str, network: str, arguments: Mapping[str, Any]) -> list[str]:
    """Why an inner network cannot be trained on a quantised base: it would read the weights that are gone.

    Args:
        kind: `off`, `int8` or `nf4`.
        network: the inner network module.
        arguments: its arguments.
    """
    found: list[str] = []
    if kind == "off" or network in KOHYA:
        return found
    if network != "lycoris.kohya":
        found.append(
            f"spf_base={kind} works with spf_network={', '.join(KOHYA)}, and with lycoris.kohya in bypass mode; "
            f"{network} may read the weights that are no longer there."
        )
        return found

    def on(name: str) -> bool:
        return str(arguments.get(name, "False")).lower() != "false"  # LyCORIS's rule: "0" is on

    algorithm = str(arguments.get("algo", "lora")).lower()
    if algorithm not in LYCORIS:
        found.append(f"spf_base={kind} cannot go with algo={algorithm}; use one of {', '.join(LYCORIS)}.")
    if on("dora_wd"):
        found.append(f"spf_base={kind} cannot go with dora_wd: it decomposes the weights themselves. Leave it out.")
    if not on("bypass_mode"):
        found.append(f"spf_base={kind}: LyCORIS would rebuild the weights at every step. Add bypass_mode=True.")
    return found


def device_problems(kind: str, device: torch.device) -> list[str]:
    """Why weights cannot be quantised on this device: bitsandbytes is missing, broken, or too old for it."""
    found: list[str] = []
    if kind != "nf4":
        return found
    try:
        weight = torch.linspace(-1, 1, 2 * BLOCK, device=device).view(2, BLOCK)
        QuantisedWeight(weight, kind).dense(torch.float32)
    except ModuleNotFoundError as error:
        if error.name != "bitsandbytes":
            found.append(f"spf_base=nf4: bitsandbytes cannot be imported: {error}. spf_base=int8 works without it.")
        else:
            found.append(
                "spf_base=nf4 needs bitsandbytes: pip install --no-deps bitsandbytes. spf_base=int8 works without it."
            )
    except Exception as error:  # broken builds fail with whatever their loader raises
        reason = (str(error) or type(error).__name__).splitlines()[0]
        found.append(
            f"spf_base=nf4: bitsandbytes does not work on {device.type} here: {reason}. Update it "
            "(on a CPU it must be 0.46 or newer), or use spf_base=int8, which works without it."
        )
    return found


def _quantise(weight: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Codes, and scales in float32."""
    if kind == "int8":  # bitsandbytes' int8_vectorwise_quant; it takes float16 only, and hosts pin releases without it
        scales = weight.float().abs().amax(1) / 127
        codes = (weight.float() / scales.clamp_min(torch.finfo(torch.float32).tiny)[:, None]).round().to(torch.int8)
        return codes, scales
    from bitsandbytes import functional

    codes, state = functional.quantize_4bit(weight.contiguous(), blocksize=BLOCK, quant_type="nf4")
    return codes, state.absmax


class QuantisedWeight(nn.Module):
    """A matrix in 8 or 4 bit.

    Args:
        weight: `[out, in]`, floating point; not kept.
        kind: `int8` (a float32 scale for each row) or `nf4` (a float32 scale for each 64 weights: 4.5 bits a weight).
    """

    codes: Tensor
    scale_bytes: Tensor

    def __init__(self, weight: Tensor, kind: str):
        super().__init__()
        self.shape, self.dtype, self.kind = weight.shape, weight.dtype, kind
        codes, scales = _quantise(weight.detach(), kind)
        self.register_buffer("codes", codes, persistent=False)
        self.register_buffer("scale_bytes", scales.float().contiguous().view(torch.uint8), persistent=False)

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scale_bytes.nbytes

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The matrix, `[out, in]`, without a graph."""
        scales = self.scale_bytes.view(torch.float32)
        if self.kind == "int8":
            out = torch.empty(self.shape, dtype=dtype, device=self.codes.device)
            return torch.mul(self.codes, scales[:, None], out=out)  # straight into `dtype`: no float32 copy
        from bitsandbytes import functional

        state = functional.QuantState(scales, shape=self.shape, blocksize=BLOCK, quant_type="nf4", dtype=dtype)
        return functional.dequantize_4bit(self.codes, state)


def _autocast_dtype(device: str) -> torch.dtype | None:
    """What matrix products are computed in under autocast; None without it."""
    if hasattr(torch, "get_autocast_dtype"):
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    if device == "cpu":  # PyTorch before 2.4 has a question for each kind of device
        return torch.get_autocast_cpu_dtype() if torch.is_autocast_cpu_enabled() else None
    return torch.get_autocast_gpu_dtype() if torch.is_autocast_enabled() else None


class _Linear(torch.autograd.Function):
    """`F.linear` with a quantised weight. Keeps nothing for backward: autograd's own would keep the dense weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: QuantisedWeight, bias: Tensor | None) -> Tensor:
        ctx.weight, ctx.dtype = weight, x.dtype
        return F.linear(x, weight.dense(_autocast_dtype(x.device.type) or x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = grads
        return (grad @ ctx.weight.dense(grad.dtype)).to(ctx.dtype), None, None


def _forward(layer: nn.Linear, input: Tensor) -> Tensor:
    """`nn.Linear.forward` on the quantised weight; the bias is frozen."""
    return _Linear.apply(input, getattr(layer, NAME), layer.bias)


class QuantisedBase:
    """A denoiser whose linear weights are quantised, in place; the original weights are given up.

    Works on whatever device a weight is on; codes move with the model. Must come before an adapter is applied, so that
    what the adapter takes for the original `forward` is the quantised one.

    Args:
        layers: the linear layers to quantise (`Family.linear_layers`).
        kind: `int8` or `nf4`.
        device: where to quantise, one weight at a time: a GPU is faster, and older bitsandbytes needs one.

    Raises:
        SPFError: there are none.
    """

    def __init__(self, layers: Iterable[nn.Linear], kind: str, device: torch.device):
        self.before = self.after = 0  # bytes
        self._exchanges: list[tuple[Exchange, QuantisedWeight]] = []
        try:
            for layer in list(layers):
                self._take(layer, kind, device)
        except BaseException:
            self.remove()
            raise
        if not self._exchanges:
            raise SPFError(f"spf_base={kind}: this model has no linear layers in a transformer; leave spf_base out.")

    def _take(self, layer: nn.Linear, kind: str, device: torch.device) -> None:
        weight = layer.weight
        quantised = QuantisedWeight(weight.to(device), kind).to(weight.device)
        exchange = Exchange(layer, "weight", NAME, quantised, partial(_forward, layer))
        self._exchanges.append((exchange, quantised))
        self.before, self.after = self.before + weight.nbytes, self.after + quantised.nbytes

    def __len__(self) -> int:
        return len(self._exchanges)

    def remove(self) -> None:
        """Plain layers again, dense and in the old precision, with the quantised values: the originals are gone."""
        for exchange, quantised in self._exchanges:
            exchange.undo(nn.Parameter(quantised.dense(quantised.dtype), requires_grad=False))
        self._exchanges.clear()
