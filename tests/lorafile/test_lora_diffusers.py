"""D1-D4: real diffusers + peft on tiny SD1, SD2 and SDXL, and that our verdict says what diffusers then does."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from spf_plugin.lorafile import inspect, loaders, reader, writer
from spf_plugin.lorafile.convert import to_diffusers
from spf_plugin.lorafile.normalise import normalise
from tests.lorafile import helpers as h

BASES = ("sd1", "sd2", "sdxl")
StateDict = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def _quiet(monkeypatch) -> None:
    for name in ("diffusers", "transformers", "peft"):
        monkeypatch.setattr(logging.getLogger(name), "disabled", True)
    logging.getLogger("diffusers.loaders.peft").setLevel(logging.CRITICAL)


def applied(pipe: Any) -> dict[tuple[str, str], torch.Tensor]:
    """(component, path) -> the weight delta peft would merge, flattened to [out, -1], for every patched module."""
    out = {}
    for component, model in h.components(pipe).items():
        for path, module in model.named_modules():
            if hasattr(module, "get_delta_weight"):
                adapter = next(iter(module.scaling))
                out[(component, path)] = module.get_delta_weight(adapter).detach().double().flatten(1)
    return out


POOL: dict[str, Any] = {}  # pipelines between tests; one that failed or kept a trace of a LoRA is thrown away


def load(base: str, *source: Any, **options: Any) -> dict[tuple[str, str], torch.Tensor]:
    """`applied` after load_lora_weights(*source, **options) into a pristine pipeline."""
    pipe = POOL.pop(base, None) or h.pipeline(base)
    pipe.load_lora_weights(*source, **options)
    got = applied(pipe)
    pipe.unload_lora_weights()
    if not applied(pipe):
        POOL[base] = pipe
    return got


def expected(base: str, state_dict: StateDict, style: str = "kohya") -> dict[tuple[str, str], torch.Tensor]:
    """The same from the file, by the slow sum over ranks."""
    by_name = h.module_names(base, style)
    return {by_name[name]: delta for name, delta in h.deltas(state_dict).items()}


def assert_same(
    got: dict[tuple[str, str], torch.Tensor], want: dict[tuple[str, str], torch.Tensor], eps: float = 1e-5
) -> None:
    assert got.keys() == want.keys()
    for key, delta in want.items():
        assert (got[key] - delta).abs().max() <= eps * delta.abs().max() + 1e-9, key


def verdict(state_dict: StateDict, base: str) -> Any:
    contents = inspect.gather(state_dict.items(), h.metadata_for(base))
    return next(v for v in loaders.verdicts(contents, inspect.describe(contents)) if v.loader == "diffusers")


# peft's cost grows with the square of the number of modules: complete files once, a few blocks for the rest.
FEW = ("mid_block.", "down_blocks.1.", "up_blocks.1.attentions.2", "text_model.encoder.layers.1")


def few(component: str, path: str) -> bool:
    return path.startswith(FEW)


CASES = [
    ("plain", {}),
    ("locon", {"conv": True, "keep": lambda c, p: c == "unet"}),
    ("no-alpha", {"alpha": None, "keep": few}),
    ("bf16", {"dtype": torch.bfloat16, "keep": few}),
    ("fp16", {"dtype": torch.float16, "keep": few}),
    ("attn2", {"keep": lambda c, p: ".attn2." in p}),
    ("attn2-kv", {"keep": lambda c, p: p.endswith(("attn2.to_k", "attn2.to_v"))}),
    ("one-block", {"keep": lambda c, p: p.startswith("mid_block.attentions.0.transformer_blocks.0")}),
    ("unet-only", {"keep": lambda c, p: c == "unet"}),
    ("text-only", {"keep": lambda c, p: c != "unet"}),
]


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(("case", "options"), CASES, ids=[c[0] for c in CASES])
def test_every_delta_is_loaded(tmp_path: Path, base: str, case: str, options: dict[str, Any]) -> None:
    """Write, read back through diffusers' own file path, compare every module (D1, D2, D4)."""
    pipe = h.reference(base)
    state_dict, metadata, _ = normalise(h.make_lora(pipe, base, **options), h.metadata_for(base))
    writer.save(tmp_path / "lora.safetensors", state_dict, metadata)
    got = load(base, str(tmp_path), weight_name="lora.safetensors")
    eps = 2e-2 if "16" in case else 1e-5  # peft multiplies in the file's dtype
    assert_same(got, expected(base, state_dict), eps)
    assert verdict(state_dict, base).status == "loads"
    assert all(t.abs().max() < 65504 and t.isfinite().all() for t in state_dict.values())


@pytest.mark.parametrize("conv", [False, True])
def test_sdxl_in_diffusers_names(conv: bool) -> None:
    pipe = h.reference("sdxl")
    state_dict = h.make_lora(pipe, "sdxl", style="diffusers", conv=conv, keep=few)
    assert_same(load("sdxl", dict(state_dict)), expected("sdxl", state_dict, "diffusers"))
    assert verdict(state_dict, "sdxl").status == "loads"


def outcome(base: str, state_dict: StateDict, want: dict[tuple[str, str], torch.Tensor]) -> str:
    """What diffusers really does: ``loads``, ``differs`` or ``fails`` (an error, or nothing applied)."""
    try:
        got = load(base, dict(state_dict))
    except Exception:  # any error is the failure looked for
        return "fails"
    if not got:
        return "fails"
    same = got.keys() == want.keys() and all(torch.allclose(got[k], want[k], atol=1e-6) for k in want)
    return "loads" if same else "differs"


def edit(change: Callable[[str, torch.Tensor], tuple[str, torch.Tensor] | None]) -> Callable[[StateDict], StateDict]:
    return lambda sd: dict(pair for k, t in sd.items() if (pair := change(k, t)) is not None)


def _alpha_of(part: str, value: float | None) -> Callable[[StateDict], StateDict]:
    def change(key: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor] | None:
        if key.endswith(".alpha") and part in key:
            return None if value is None else (key, torch.tensor(value))
        return key, tensor

    return edit(change)


def _foreign(key: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor]:
    return (f"bundle_emb.{key}" if "attentions_0_proj_in" in key or "_1_proj_in" in key else key), tensor


def _unknown(key: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor]:
    return key.replace("attn2_to_q", "attn2_to_z"), tensor


def _four_dimensions(key: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor]:
    return key, tensor[..., None, None] if "proj_in" in key and tensor.dim() == 2 else tensor


def _mixed(key: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor]:
    return key.replace("input_blocks_4_1_", "down_blocks_1_attentions_0_"), tensor


def _no_down(key: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor] | None:
    return None if key.endswith("ff_net_0_proj.lora_down.weight") else (key, tensor)


def _no_up(key: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor] | None:
    return None if key.endswith("ff_net_0_proj.lora_up.weight") else (key, tensor)


def _extra_mid(sd: StateDict) -> StateDict:
    """3x3 convolutions as LyCORIS's Tucker form keeps them: 1x1 factors around a 3x3 core."""
    tucker = {k: t[..., :1, :1] for k, t in sd.items() if k.endswith("conv1.lora_down.weight")}
    return sd | tucker | {k.replace("lora_down", "lora_mid"): torch.ones(4, 4, 3, 3) for k in tucker}


def _flat_text(key: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor]:
    return key.replace("text_model_", ""), tensor


# (id, bases, change, what diffusers does, the code our verdict gives)
DAMAGE = [
    ("mixed-alpha-attention", BASES, _alpha_of("attn2_to_k", 8.0), "differs", "mixed-alpha"),
    ("mixed-alpha-ff-is-fine", BASES, _alpha_of("ff_net", 8.0), "loads", None),
    ("mixed-alpha-text", BASES, _alpha_of("self_attn_q_proj", 8.0), "differs", "mixed-alpha"),
    ("partial-alpha", BASES, _alpha_of("ff_net", None), "differs", "mixed-alpha"),
    ("foreign-prefix", BASES, edit(_foreign), "fails", "prefix"),
    ("unknown-module", BASES, edit(_unknown), "differs", "names"),
    ("sd2-4d", ("sd2", "sdxl"), edit(_four_dimensions), "fails", "dimensions"),
    ("mixed-names", ("sdxl",), edit(_mixed), "fails", "mixed-names"),
    ("no-down", ("sd1", "sdxl"), edit(_no_down), "fails", "no-pair"),
    ("no-up", ("sd1", "sdxl"), edit(_no_up), "fails", "no-pair"),
    ("tucker", ("sd1",), _extra_mid, "fails", "algorithm"),
    ("flat-text-names", ("sd1", "sd2"), edit(_flat_text), "fails", "text-names"),
]


@pytest.mark.parametrize(
    ("base", "change", "does", "code"),
    [
        pytest.param(b, change, does, code, id=f"{name}-{b}")
        for name, bases, change, does, code in DAMAGE
        for b in bases
    ],
)
def test_damage(base: str, change: Callable[[StateDict], StateDict], does: str, code: str | None) -> None:
    """D3: the documented failure still occurs (tells us when upstream mends it), and the verdict says so.

    Where the file can be mended, diffusers loads the mended one with every delta right.
    """
    pipe = h.reference(base)
    healthy = h.make_lora(pipe, base, conv=change is _extra_mid, keep=few)
    damaged = change(dict(healthy))
    intended = healthy
    if code in ("mixed-alpha", None):  # a missing alpha means the rank
        intended = {k: damaged.get(k, t) for k, t in healthy.items() if not k.endswith(".alpha") or k in damaged}
    want = expected(base, intended)
    really = outcome(base, damaged, want)
    assert really == does or (does == "fails" and code == "mixed-names" and really == "differs")
    found = verdict(damaged, base)
    assert found.status == does
    assert code is None or code in {f.code for f in found.findings}
    if code in ("mixed-alpha", "dimensions", "mixed-names", "text-names"):
        mended, _, _ = normalise(damaged, h.metadata_for(base))
        assert outcome(base, mended, want) == "loads"
        assert verdict(mended, base).status == "loads"


def test_sgm_names_on_sd1() -> None:
    """Original block names are mapped for SDXL only."""
    pipe = h.reference("sd1")
    modules = [(c, p) for c, p in h.model_modules(pipe) if c == "unet" and "attentions" in p and few(c, p)]
    healthy = h.make_lora(pipe, "sd1", keep=lambda c, p: c == "unet" and few(c, p))
    sgm = dict(healthy)
    for _, path in modules:
        for suffix in ("alpha", "lora_down.weight", "lora_up.weight"):
            old = f"{h.file_name('sd1', 'unet', path)}.{suffix}"
            sgm["lora_unet_" + h.sgm_path(path).replace(".", "_") + f".{suffix}"] = sgm.pop(old)
    want = expected("sd1", healthy)
    assert outcome("sd1", sgm, want) == verdict(sgm, "sd1").status == "fails"
    mended, _, _ = normalise(sgm, h.metadata_for("sd1"))
    assert outcome("sd1", mended, want) == "loads"


@pytest.mark.parametrize("path", ["conv_in", "conv_out", "time_embedding.linear_1"])
def test_layers_outside_the_blocks_are_left_out(path: str) -> None:
    """LyCORIS presets train them; diffusers maps none of them."""
    pipe = h.reference("sd1")
    healthy = h.make_lora(pipe, "sd1", keep=lambda c, p: p.startswith("mid_block"))
    down, up = h.factors(pipe.unet.get_submodule(path), 4, torch.Generator().manual_seed(0))
    name = "lora_unet_" + path.replace(".", "_")
    more = healthy | {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
    more[f"{name}.alpha"] = torch.tensor(2.0)
    assert outcome("sd1", more, expected("sd1", healthy)) == "loads"  # the rest, that is
    assert {f.code for f in verdict(more, "sd1").findings if f.level == "warn"} == {"names"}


def test_dora_is_dropped() -> None:
    """The scales are filtered out and plain LoRA is loaded."""
    pipe = h.reference("sd1")
    plain = h.make_lora(pipe, "sd1", keep=few)
    dora = plain | {
        k.replace("lora_up.weight", "dora_scale"): torch.ones(t.shape[0], 1) for k, t in plain.items() if "lora_up" in k
    }
    assert outcome("sd1", dora, expected("sd1", plain)) == "loads"  # = the plain LoRA, not the DoRA
    assert {f.code for f in verdict(dora, "sd1").findings if f.level == "warn"} == {"dora"}


def test_mixed_ranks() -> None:
    """diffusers 0.32 ignores alpha where ranks differ; --one-rank helps there and changes no delta."""
    import diffusers

    pipe = h.reference("sdxl")
    state_dict = h.make_lora(pipe, "sdxl", rank=4, alpha=2.0, keep=few)
    wide = h.make_lora(pipe, "sdxl", rank=8, alpha=2.0, keep=few)
    state_dict |= {k: t for k, t in wide.items() if "_ff_net_" in k}
    want = expected("sdxl", state_dict)
    old = diffusers.__version__.startswith("0.32.")
    assert outcome("sdxl", state_dict, want) == ("differs" if old else "loads")
    assert {f.code for f in verdict(state_dict, "sdxl").findings} == {"mixed-rank"}
    padded, _, notes = normalise(state_dict, h.metadata_for("sdxl"), one_rank=True)
    assert any("padded" in note for note in notes)
    assert outcome("sdxl", padded, want) == "loads"


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("peft", [False, True])
def test_convert(base: str, peft: bool) -> None:
    """kohya -> diffusers or peft names -> loaded with the same deltas; and back to kohya's names."""
    pipe = h.reference(base)
    state_dict, metadata, _ = normalise(h.make_lora(pipe, base, alpha=2.0, conv=True, keep=few), h.metadata_for(base))
    want = expected(base, state_dict)
    converted = to_diffusers(state_dict, peft=peft)
    assert not any(key.startswith("lora_") for key in converted)
    assert all(("lora_A" in key or "lora_B" in key) == peft for key in converted)
    assert outcome(base, converted, want) == "loads"
    assert verdict(converted, base).status == "loads"
    back, _, _ = normalise(converted, metadata)
    assert {k for k in back if not k.endswith(".alpha")} == {k for k in state_dict if not k.endswith(".alpha")}
    assert_same(expected(base, back), want, 1e-6)


def test_peft_state_dict_loads_in_peft(tmp_path: Path) -> None:
    """The peft form fits peft's own loader, component by component."""
    import peft

    pipe = h.pipeline("sd1")
    state_dict = h.make_lora(pipe, "sd1", rank=4, alpha=4.0, keep=lambda c, p: c == "unet" and few(c, p))
    converted = to_diffusers(state_dict, peft=True)
    writer.save(tmp_path / "peft.safetensors", converted, {})
    loaded, _ = reader.load(tmp_path / "peft.safetensors")
    weights = {key.removeprefix("unet."): t for key, t in loaded.items()}
    targets = sorted({key.split(".lora_")[0] for key in weights})
    config = peft.LoraConfig(r=4, lora_alpha=4, target_modules=targets)
    peft.inject_adapter_in_model(config, pipe.unet, adapter_name="default")
    result = peft.set_peft_model_state_dict(pipe.unet, weights, adapter_name="default")
    assert not result.unexpected_keys
    assert_same(applied(pipe), expected("sd1", state_dict))
