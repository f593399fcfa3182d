"""Every kind of LoRA file that the rules know, with the weight deltas its author meant, by slow sums in float64.

Nothing of the package's code is used. `tests/lorafile/test_lora_lycoris.py` holds the sums against LyCORIS itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from tests.lorafile import helpers as h
from tests.lorafile.programs import sgm

StateDict = dict[str, torch.Tensor]
Weights = dict[str, torch.Tensor]  # "component/path" -> weight of the model

# peft's cost grows with the square of the number of modules: a few blocks of every part.
FEW = ("mid_block.attentions.0.proj", "mid_block.attentions.0.transformer_blocks.0.", "mid_block.resnets.0")
FEW += ("up_blocks.1.resnets.0", "up_blocks.0.upsamplers", "up_blocks.1.attentions.2.transformer_blocks.0.attn2")
FEW += ("text_model.encoder.layers.1.",)
OUTSIDE = ("conv_in", "time_embedding.linear_1")
ATTENTION = (".self_attn.q_proj", ".self_attn.k_proj", ".self_attn.v_proj", ".self_attn.out_proj")


@dataclass
class File:
    """A LoRA file and what it means.

    Attributes:
        tensors: what stands in it.
        meant: "component/path" -> the delta of its author, [out, in, ...].
        metadata: its metadata.
    """

    tensors: StateDict = field(default_factory=dict)
    meant: dict[str, torch.Tensor] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)


def model(base: str) -> Weights:
    """Weights of the tiny pipeline of `base` by "component/path", with what only LyCORIS trains."""
    out = {}
    for component, part in h.components(h.reference(base)).items():
        for path, module in part.named_modules():
            if component != "unet" and path.startswith("encoder."):
                path = f"text_model.{path}"  # transformers 5
            if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)):
                inside = any(p in path for p in (".attentions.", ".resnets.", "samplers.")) or path in OUTSIDE
                if inside if component == "unet" else ".layers." in path or path == "text_projection":
                    out[f"{component}/{path}"] = module.weight.detach().clone()
    return out


def depths(base: str) -> list[int]:
    """Transformer blocks per down block of the tiny UNet."""
    return [0, 1, 2] if base == "sdxl" else [1, 1, 1, 0]


def chosen(weights: Weights, *, conv: bool = False, text: bool = True) -> Weights:
    """The modules that a file of a test trains."""
    out = {}
    for name, weight in weights.items():
        component, _, path = name.partition("/")
        if not path.startswith(FEW) or (component != "unet" and not text):
            continue
        if conv or component != "unet" or ".attentions." in path:
            out[name] = weight
    return out


def kohya(base: str, name: str, style: str = "kohya") -> str:
    """Module name in a kohya file; `style` may force ``sgm`` or ``diffusers``."""
    component, _, path = name.partition("/")
    if component == "unet" and (style == "sgm" or (style == "kohya" and base == "sdxl")):
        return "lora_unet_" + sgm(base, path).replace(".", "_")
    prefix = {"unet": "lora_unet_", "te1": "lora_te1_" if base == "sdxl" else "lora_te_", "te2": "lora_te2_"}
    return prefix[component] + path.replace(".", "_")


def peft(name: str) -> str:
    """Module name in a file of diffusers or peft."""
    component, _, path = name.partition("/")
    return {"unet": "unet.", "te1": "text_encoder.", "te2": "text_encoder_2."}[component] + path


class Draw:
    """Random factors of one file, in its dtype."""

    def __init__(self, dtype: torch.dtype, seed: int = 0, scale: float = 0.1) -> None:
        self.dtype, self.scale = dtype, scale
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=self.generator) * self.scale).to(self.dtype)

    def number(self, value: float) -> torch.Tensor:
        return torch.tensor(value, dtype=self.dtype)


def rows(weight: torch.Tensor) -> tuple[int, int, tuple[int, ...]]:
    """Outputs, inputs and kernel of a module."""
    return weight.shape[0], weight.shape[1], tuple(weight.shape[2:])


# ---- one module of each algorithm: factors and delta ----------------------------------------------------------------

Module = tuple[StateDict, torch.Tensor]


def lora(draw: Draw, weight: torch.Tensor, rank: int = 4, alpha: float | None = 2.0) -> Module:
    outputs, inputs, kernel = rows(weight)
    down, up = draw(rank, inputs, *kernel), draw(outputs, rank, *(1 for _ in kernel))
    parts = {"lora_down.weight": down, "lora_up.weight": up}
    if alpha is not None:
        parts["alpha"] = draw.number(alpha)
    return parts, h.slow_delta(down, up, alpha)


def tucker(core: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """LyCORIS' Tucker product: core [r, r, h, w], a [r, out], b [r, in] -> [out, in, h, w]."""
    return torch.einsum("ijkl,ip,jq->pqkl", core.double(), a.double(), b.double())


def tucker_locon(draw: Draw, weight: torch.Tensor, rank: int = 4, alpha: float = 2.0) -> Module:
    outputs, inputs, kernel = rows(weight)
    if kernel != (3, 3):
        return lora(draw, weight, rank, alpha)
    down, up, mid = draw(rank, inputs, 1, 1), draw(outputs, rank, 1, 1), draw(rank, rank, 3, 3)
    parts = {"lora_down.weight": down, "lora_up.weight": up, "lora_mid.weight": mid, "alpha": draw.number(alpha)}
    return parts, alpha / rank * tucker(mid, up[..., 0, 0].T, down[..., 0, 0])


def loha(draw: Draw, weight: torch.Tensor, rank: int = 4, alpha: float = 2.0) -> Module:
    outputs, inputs, kernel = rows(weight)
    wide = inputs * torch.Size(kernel).numel()
    parts = {f"hada_w{i}_a": draw(outputs, rank) for i in (1, 2)} | {f"hada_w{i}_b": draw(rank, wide) for i in (1, 2)}
    one, two = (parts[f"hada_w{i}_a"].double() @ parts[f"hada_w{i}_b"].double() for i in (1, 2))
    return parts | {"alpha": draw.number(alpha)}, (alpha / rank * one * two).reshape(weight.shape)


def tucker_loha(draw: Draw, weight: torch.Tensor, rank: int = 4, alpha: float = 2.0) -> Module:
    outputs, inputs, kernel = rows(weight)
    if kernel != (3, 3):
        return loha(draw, weight, rank, alpha)
    parts = {f"hada_w{i}_a": draw(rank, outputs) for i in (1, 2)} | {f"hada_w{i}_b": draw(rank, inputs) for i in (1, 2)}
    parts |= {f"hada_t{i}": draw(rank, rank, 3, 3) for i in (1, 2)}
    one, two = (tucker(parts[f"hada_t{i}"], parts[f"hada_w{i}_a"], parts[f"hada_w{i}_b"]) for i in (1, 2))
    return parts | {"alpha": draw.number(alpha)}, alpha / rank * one * two


def lokr(
    draw: Draw, weight: torch.Tensor, form: str = "low", rank: int = 2, alpha: float = 1.0, factor: int = 4
) -> Module:
    """`form` of the second factor: ``low``, ``whole`` or ``tucker``; ``both`` cuts the first in two as well."""
    outputs, inputs, kernel = rows(weight)
    one = (factor, factor)
    two = (outputs // factor, inputs // factor)
    parts: StateDict = {}
    if form == "both":
        parts |= {"lokr_w1_a": draw(one[0], rank), "lokr_w1_b": draw(rank, one[1])}
        first = parts["lokr_w1_a"].double() @ parts["lokr_w1_b"].double()
    else:
        parts["lokr_w1"] = draw(*one)
        first = parts["lokr_w1"].double()
    if form == "whole":
        parts["lokr_w2"] = draw(*two, *kernel)
        second = parts["lokr_w2"].double()
    elif form == "tucker" and kernel == (3, 3):
        parts |= {"lokr_t2": draw(rank, rank, 3, 3), "lokr_w2_a": draw(rank, two[0]), "lokr_w2_b": draw(rank, two[1])}
        second = tucker(parts["lokr_t2"], parts["lokr_w2_a"], parts["lokr_w2_b"])
    else:
        wide = two[1] * torch.Size(kernel).numel()
        parts |= {"lokr_w2_a": draw(two[0], rank), "lokr_w2_b": draw(rank, wide)}
        second = parts["lokr_w2_a"].double() @ parts["lokr_w2_b"].double()
    second = second.reshape(*two, *kernel)
    delta = torch.zeros(weight.shape, dtype=torch.float64)
    for i in range(one[0]):
        for j in range(one[1]):
            place = slice(i * two[0], (i + 1) * two[0]), slice(j * two[1], (j + 1) * two[1])
            delta[place] = first[i, j] * second
    scale = 1.0 if form == "whole" else alpha / rank
    parts["alpha"] = draw.number(alpha)
    return parts, scale * delta


def full(draw: Draw, weight: torch.Tensor) -> Module:
    diff = draw(*weight.shape)
    return {"diff": diff}, diff.double()


def oft(draw: Draw, weight: torch.Tensor, constraint: float = 0.0, rescale: bool = False) -> Module:
    outputs = weight.shape[0]
    blocks = draw(outputs // 4, 4, 4)
    parts = {"oft_blocks": blocks, "alpha": draw.number(constraint)}
    q = blocks.double() - blocks.double().transpose(1, 2)
    bound = constraint * outputs
    if bound and q.norm() > bound:
        q = q * bound / q.norm()
    eye = torch.eye(4, dtype=torch.float64)
    turned = (eye + q) @ (eye - q).inverse()
    new = torch.zeros(weight.shape, dtype=torch.float64)
    for k, turn in enumerate(turned):
        rows_ = weight[4 * k : 4 * k + 4].double()
        new[4 * k : 4 * k + 4] = torch.einsum("nm,n...->m...", turn, rows_)
    if rescale:
        parts["rescale"] = 1 + draw(outputs, *(1 for _ in weight.shape[1:]))
        new = parts["rescale"].double() * new
    return parts, new - weight.double()


def glora(draw: Draw, weight: torch.Tensor, rank: int = 4, alpha: float = 2.0) -> Module:
    outputs, inputs, _ = rows(weight)
    tail = (1,) * (weight.dim() - 2)
    a1, a2 = draw(inputs, rank, *tail), draw(rank, inputs, *tail)
    b1, b2 = draw(outputs, rank, *tail), draw(rank, inputs, *tail)
    parts = {"a1.weight": a1, "a2.weight": a2, "b1.weight": b1, "b2.weight": b2, "alpha": draw.number(alpha)}
    flat = {key: t.double().flatten(1) for key, t in parts.items() if t.dim()}
    change = flat["a1.weight"] @ flat["a2.weight"]
    delta = torch.einsum("oi...,ij->oj...", weight.double(), change)
    return parts, alpha / rank * (delta + (flat["b1.weight"] @ flat["b2.weight"]).reshape(weight.shape))


def dora(draw: Draw, weight: torch.Tensor, per_output: bool, **options: Any) -> Module:
    parts, delta = lora(draw, weight, **options)
    new = weight.double() + delta
    axes = tuple(range(1, weight.dim())) if per_output else (0, *range(2, weight.dim()))
    norm = new.pow(2).sum(axes, keepdim=True).sqrt()
    parts["dora_scale"] = (weight.double().pow(2).sum(axes, keepdim=True).sqrt() * 1.1).to(draw.dtype)
    return parts, parts["dora_scale"].double() * new / norm - weight.double()


# ---- files ----------------------------------------------------------------------------------------------------------

Maker = Callable[[Draw, torch.Tensor], Module]


def of(base: str, weights: Weights, draw: Draw, make: Maker, style: str = "kohya") -> File:
    out = File(metadata=h.metadata_for(base) | {"modelspec.architecture": ARCHITECTURE[base]})
    for name, weight in weights.items():
        parts, out.meant[name] = make(draw, weight)
        out.tensors |= {f"{kohya(base, name, style)}.{suffix}": t for suffix, t in parts.items()}
    return out


ARCHITECTURE = {
    "sd1": "stable-diffusion-v1/lora",
    "sd2": "stable-diffusion-v2-512/lora",
    "sdxl": "stable-diffusion-xl-v1-base/lora",
}


def renamed(file: File, change: Callable[[str], str | None]) -> File:
    tensors = {new: t for key, t in file.tensors.items() if (new := change(key)) is not None}
    return File(tensors, file.meant, file.metadata)


def _is_conv(weight: torch.Tensor) -> bool:
    return weight.dim() == 4 and weight.shape[-1] == 3


def _mixed(base: str, w: Weights, d: Draw, rank: int, alpha: float | None, conv: tuple[int, float | None]) -> File:
    """LoCon whose convolutions have a rank and alpha of their own."""
    return of(base, chosen(w, conv=True), d, lambda d, x: lora(d, x, *conv) if _is_conv(x) else lora(d, x, rank, alpha))


def _alphas(base: str, w: Weights, d: Draw, part: str, alpha: float) -> File:
    picked = chosen(w)
    out = of(base, {n: x for n, x in picked.items() if part not in n}, d, lora)
    more = of(base, {n: x for n, x in picked.items() if part in n}, d, lambda d, x: lora(d, x, alpha=alpha))
    return File(out.tensors | more.tensors, out.meant | more.meant, out.metadata)


def _dora_of_peft(base: str, w: Weights, d: Draw) -> File:
    """DoRA of every output, in PEFT's spelling."""
    out = File(metadata={"format": "pt"})
    for name, weight in chosen(w, text=False).items():
        if weight.dim() != 2:
            continue
        parts, out.meant[name] = dora(d, weight, True, alpha=None)
        out.tensors[f"{peft(name)}.lora_A.weight"] = parts["lora_down.weight"]
        out.tensors[f"{peft(name)}.lora_B.weight"] = parts["lora_up.weight"]
        out.tensors[f"{peft(name)}.lora_magnitude_vector"] = parts["dora_scale"].flatten()
    return out


def _of_peft(base: str, w: Weights, d: Draw, a: str = ".lora_A.weight", b: str = ".lora_B.weight") -> File:
    out = File(metadata={"format": "pt"})
    for name, weight in chosen(w).items():
        parts, out.meant[name] = lora(d, weight, alpha=None)
        out.tensors[f"{peft(name)}{a}"] = parts["lora_down.weight"]
        out.tensors[f"{peft(name)}{b}"] = parts["lora_up.weight"]
    return out


def _outside(base: str, w: Weights, d: Draw, style: str) -> File:
    """With modules that lie outside the blocks."""
    return of(base, chosen(w, text=False) | {f"unet/{p}": w[f"unet/{p}"] for p in OUTSIDE}, d, lora, style)


def _scalar(base: str, w: Weights, d: Draw) -> File:
    file = of(base, chosen(w), d, lora)
    stems = [key[: -len(".alpha")] for key in file.tensors if key.endswith(".alpha")]
    tensors = file.tensors | {f"{stem}.scalar": d.number(0.25) for stem in stems}
    return File(tensors, {name: 0.25 * delta for name, delta in file.meant.items()}, file.metadata)


def _lone_down(base: str, w: Weights, d: Draw) -> File:
    file = of(base, chosen(w), d, lora)
    return renamed(file, lambda key: None if key.endswith("ff_net_2.lora_up.weight") else key)


def _lone_up(base: str, w: Weights, d: Draw) -> File:
    file = of(base, chosen(w), d, lora)
    return renamed(file, lambda key: None if key.endswith("ff_net_2.lora_down.weight") else key)


def _extra(base: str, w: Weights, d: Draw, count: int) -> File:
    file = of(base, chosen(w), d, lora)
    file.tensors |= {f"lora_unet_something_{i}.lora_note": d(2) for i in range(count)}
    return file


def _projection(base: str, w: Weights, d: Draw) -> File:
    """OneTrainer's text projection, beside a whole LoRA."""
    file = of(base, chosen(w), d, lora)
    parts, file.meant["te2/text_projection"] = lora(d, w["te2/text_projection"])
    file.tensors |= {f"lora_te2_text_projection.{s}": t for s, t in parts.items()}
    return file


def _narrow(base: str, w: Weights, d: Draw) -> File:
    """One module has too few inputs."""
    file = of(base, chosen(w), d, lora)
    key = next(k for k in file.tensors if k.endswith("attn2_to_k.lora_down.weight"))
    file.tensors[key] = file.tensors[key][:, :-8].clone()
    return file


def _queries(base: str, w: Weights, d: Draw) -> File:
    return of(base, {n: x for n, x in chosen(w).items() if n[:4] == "unet" or n.endswith("q_proj")}, d, lora)


def _no_outputs(base: str, w: Weights, d: Draw) -> File:
    """A text encoder of which only one of q, k, v, out and the first MLP layer is trained."""
    keep = ("q_proj", "mlp.fc1")
    return of(base, {n: x for n, x in chosen(w).items() if n[:4] == "unet" or n.endswith(keep)}, d, lora)


def _peft_ranks(base: str, w: Weights, d: Draw) -> File:
    """Convolutions of another rank, in PEFT's spelling, which keeps no alpha."""
    out = File(metadata=h.metadata_for(base) | {"modelspec.architecture": ARCHITECTURE[base]})
    for name, weight in chosen(w, conv=True, text=False).items():
        parts, out.meant[name] = lora(d, weight, 4 if _is_conv(weight) else 8, None)
        out.tensors[f"{peft(name)}.lora_A.weight"] = parts["lora_down.weight"]
        out.tensors[f"{peft(name)}.lora_B.weight"] = parts["lora_up.weight"]
    return out


def _block_ranks(base: str, w: Weights, d: Draw, alpha: float | None) -> File:
    """Ranks that differ between attention layers, as kohya's `block_dims` makes them; None: alphas are the ranks."""
    deep = lambda name: "mid_block" in name  # noqa: E731
    picked = chosen(w, text=False)
    out = of(base, {n: x for n, x in picked.items() if not deep(n)}, d, lambda d, x: lora(d, x, 8, alpha or 8.0))
    more = of(base, {n: x for n, x in picked.items() if deep(n)}, d, lambda d, x: lora(d, x, 4, alpha or 4.0))
    return File(out.tensors | more.tensors, out.meant | more.meant, out.metadata)


def _alpha_as(base: str, w: Weights, d: Draw, dtype: torch.dtype) -> File:
    file = of(base, chosen(w), d, lora)
    file.tensors |= {key: t.to(dtype) for key, t in file.tensors.items() if key.endswith(".alpha")}
    return file


def _lora_ab(key: str) -> str:
    return key.replace("lora_down", "lora_A").replace("lora_up", "lora_B")


BUILD: dict[str, Callable[[str, Weights, Draw], File]] = {
    "lora": lambda b, w, d: of(b, chosen(w), d, lora),
    "lora, UNet only": lambda b, w, d: of(b, chosen(w, text=False), d, lora),
    "locon": lambda b, w, d: of(b, chosen(w, conv=True), d, lora),
    "locon, tucker": lambda b, w, d: of(b, chosen(w, conv=True), d, tucker_locon),
    "loha": lambda b, w, d: of(b, chosen(w, conv=True), d, loha),
    "loha, tucker": lambda b, w, d: of(b, chosen(w, conv=True), d, tucker_loha),
    "lokr": lambda b, w, d: of(b, chosen(w, conv=True), d, lokr),
    "lokr, both cut": lambda b, w, d: of(b, chosen(w, conv=True), d, lambda d, x: lokr(d, x, "both")),
    "lokr, whole": lambda b, w, d: of(b, chosen(w, conv=True), d, lambda d, x: lokr(d, x, "whole", alpha=2.0)),
    "lokr, whole, infinite alpha": lambda b, w, d: of(
        b, chosen(w, conv=True), d, lambda d, x: lokr(d, x, "whole", alpha=float("inf"))
    ),
    "lokr, tucker": lambda b, w, d: of(b, chosen(w, conv=True), d, lambda d, x: lokr(d, x, "tucker")),
    "full": lambda b, w, d: of(b, chosen(w, conv=True), d, full),
    "oft": lambda b, w, d: of(b, chosen(w, text=False), d, oft),
    "oft, text encoder too": lambda b, w, d: of(b, chosen(w), d, oft),
    "oft, constraint": lambda b, w, d: of(b, chosen(w, text=False), d, lambda d, x: oft(d, x, 0.01)),
    "oft, rescale": lambda b, w, d: of(b, chosen(w, text=False), d, lambda d, x: oft(d, x, rescale=True)),
    "glora": lambda b, w, d: of(b, chosen(w), d, glora),
    "dora, per input": lambda b, w, d: of(b, chosen(w, conv=True), d, lambda d, x: dora(d, x, False)),
    "dora, per output": lambda b, w, d: of(b, chosen(w, conv=True), d, lambda d, x: dora(d, x, True)),
    "dora, peft": _dora_of_peft,
    "scalar": _scalar,
    "ranks differ, one alpha": lambda b, w, d: _mixed(b, w, d, 4, 2.0, (8, 2.0)),
    "ranks differ, alphas not the ranks": lambda b, w, d: _mixed(b, w, d, 8, 4.0, (4, 1.0)),
    "ranks differ, alphas among the ranks": lambda b, w, d: _mixed(b, w, d, 8, 4.0, (4, 4.0)),
    "ranks differ, alphas are the ranks": lambda b, w, d: _mixed(b, w, d, 8, 8.0, (4, 4.0)),
    "ranks differ, alphas in proportion": lambda b, w, d: _mixed(b, w, d, 8, 4.0, (4, 2.0)),
    "ranks differ, no alpha": lambda b, w, d: _mixed(b, w, d, 8, None, (4, None)),
    "ranks differ, peft": _peft_ranks,
    "ranks differ in attention, one alpha": lambda b, w, d: _block_ranks(b, w, d, 2.0),
    "ranks differ in attention, alphas are the ranks": lambda b, w, d: _block_ranks(b, w, d, None),
    "one rank, alphas differ": lambda b, w, d: _mixed(b, w, d, 4, 2.0, (4, 1.0)),
    "alphas differ in attention": lambda b, w, d: _alphas(b, w, d, "attn2.to_k", 8.0),
    "alphas differ in the MLP": lambda b, w, d: _alphas(b, w, d, "ff.net", 8.0),
    "no alpha": lambda b, w, d: of(b, chosen(w, conv=True), d, lambda d, x: lora(d, x, alpha=None)),
    "lora_A and lora_B with alpha": lambda b, w, d: renamed(of(b, chosen(w), d, lora), _lora_ab),
    "peft": _of_peft,
    "peft, default": lambda b, w, d: _of_peft(b, w, d, ".lora_A.default.weight", ".lora_B.default.weight"),
    "text encoder, queries only": _queries,
    "text encoder, queries and MLP only": _no_outputs,
    "lone lora_down": _lone_down,
    "lone lora_up": _lone_up,
    "SGM names": lambda b, w, d: of(b, chosen(w, text=False), d, lora, "sgm"),
    "diffusers names": lambda b, w, d: of(b, chosen(w, conv=True), d, lora, "diffusers"),
    "outside the blocks, SGM names": lambda b, w, d: _outside(b, w, d, "sgm"),
    "outside the blocks, diffusers names": lambda b, w, d: _outside(b, w, d, "diffusers"),
    "a few unknown keys": lambda b, w, d: _extra(b, w, d, 3),
    "many unknown keys": lambda b, w, d: _extra(b, w, d, 13),
    "too few inputs": _narrow,
    "OneTrainer's text projection": _projection,
    "int64 alpha": lambda b, w, d: _alpha_as(b, w, d, torch.int64),
    "float64 alpha": lambda b, w, d: _alpha_as(b, w, d, torch.float64),
}  # fmt: skip
ONLY = {"OneTrainer's text projection": ("sdxl",)}
BASES = ("sd1", "sdxl")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def of_base(base: str) -> list[str]:
    """The kinds that there are for `base`."""
    return [kind for kind in BUILD if base in ONLY.get(kind, BASES)]


def build(kind: str, base: str, weights: Weights, precision: str = "fp32", scale: float = 0.1) -> File:
    """The file of `kind`; factors are random, of the standard deviation `scale`, the same every time."""
    return BUILD[kind](base, weights, Draw(DTYPES[precision], scale=scale))
