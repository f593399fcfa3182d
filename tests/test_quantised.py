"""`spf_base`: what is stored, what is computed with it, what it shares with the adapter, and what it refuses."""

from __future__ import annotations

import copy
import gc
import importlib.util
import sys
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from benchmarks.steps import Setup, Workbench
from benchmarks.tracking import Tracker
from benchmarks.unets import base_model
from spf_plugin.adapter import bypass as adapter
from spf_plugin.adapter import quantised
from spf_plugin.adapter.bypass import Adapter
from spf_plugin.adapter.quantised import NAME, QuantisedBase, QuantisedWeight
from spf_plugin.config import SPFConfig
from spf_plugin.core.prompt import Target
from spf_plugin.errors import SPFError
from spf_plugin.families.unet import UNet
from spf_plugin.trainer import loop
from tests import tiny

CPU = torch.device("cpu")
WITHOUT = "NOT RUN: bitsandbytes is not installed; pip install --no-deps bitsandbytes"
needs_bitsandbytes = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason=WITHOUT)
KINDS = [pytest.param("int8"), pytest.param("nf4", marks=needs_bitsandbytes)]
CAPTION_TARGET = (Target("blonde hair"),)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def unet() -> Any:
    torch.manual_seed(0)
    return base_model("tiny", torch.float32).denoiser


def predict(model: Any) -> Tensor:
    return model(random(2, 4, 16, 16), torch.tensor([10, 700]), encoder_hidden_states=random(2, 77, 64, seed=1)).sample


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# -- the weights ------------------------------------------------------------------------------------------------------


def test_int8_is_off_by_half_a_step_at_most() -> None:
    weight = random(20, 50)
    weight[3] = 0
    stored = QuantisedWeight(weight, "int8")
    step = weight.abs().amax(1, keepdim=True) / 127
    assert torch.all((stored.dense(torch.float32) - weight).abs() <= step / 2 * 1.0001)
    assert stored.nbytes == 20 * 50 + 20 * 4


@needs_bitsandbytes
def test_nf4_is_bitsandbytes_own() -> None:
    from bitsandbytes import functional

    for shape in ((20, 50), (64, 128)):
        weight = random(*shape)
        expected = functional.dequantize_4bit(*functional.quantize_4bit(weight, blocksize=64, quant_type="nf4"))
        assert torch.equal(QuantisedWeight(weight, "nf4").dense(torch.float32), expected)
    assert QuantisedWeight(weight, "nf4").nbytes == 64 * 128 * 4.5 / 8


@pytest.mark.parametrize("kind", KINDS)
def test_a_hosts_cast_of_the_unet_changes_nothing(kind: str) -> None:
    stored = QuantisedWeight(random(64, 128), kind)
    before = stored.dense(torch.float32)
    stored.to(torch.bfloat16).half()
    assert torch.equal(stored.dense(torch.float32), before)


# -- one layer --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", ["float32", "autocast", "autocast before 2.4", "full bfloat16"])
@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_is_the_linear_layer_of_its_dense_weight(
    kind: str, precision: str, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, forward and backward, in every precision that a host trains in."""
    layer = nn.Linear(64, 32, bias=bias).requires_grad_(False)
    layer.weight.copy_(random(32, 64))
    dense = copy.deepcopy(layer)

    class Transformer2DModel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = layer

    QuantisedBase(UNet(Transformer2DModel()).linear_layers(), kind, CPU)
    dense.weight.copy_(getattr(layer, NAME).dense(torch.float32))
    dtype = torch.bfloat16 if precision == "full bfloat16" else torch.float32
    a, b = (random(3, 5, 64, seed=2).to(dtype).requires_grad_() for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16, enabled="autocast" in precision):
        expected = dense.to(dtype)(b)
        if precision == "autocast before 2.4":
            monkeypatch.delattr(torch, "get_autocast_dtype")
        out = layer.to(dtype)(a)
    assert out.dtype == expected.dtype == (torch.float32 if precision == "float32" else torch.bfloat16)
    assert torch.equal(out, expected)
    upstream = random(3, 5, 32, seed=3).to(out.dtype)
    out.backward(upstream)
    expected.backward(upstream)
    assert torch.equal(a.grad, b.grad)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_the_dense_weight_is_not_kept_for_backward(kind: str) -> None:
    stored = QuantisedWeight(random(256, 256), kind)
    x = random(2, 256).requires_grad_()
    with Tracker() as tracker:
        out = quantised._Linear.apply(x, stored, None)
        assert tracker.highest >= 256 * 256 * 4  # so the tracker would have seen it
        assert tracker.current <= 4 * 1024
        del out


# -- a UNet -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_transformers_linear_weights_shrink_and_nothing_else_changes(kind: str) -> None:
    model = unet()
    layers = list(UNet(model).linear_layers())
    freed = [weakref.ref(layer.weight.untyped_storage()) for layer in layers]
    assert all(ref() for ref in freed)
    others = {n: p.clone() for n, p in model.named_parameters() if not any(p is layer.weight for layer in layers)}
    before = sum(p.nbytes for p in model.parameters())
    base = QuantisedBase(UNet(model).linear_layers(), kind, CPU)
    gc.collect()
    assert not any(ref() for ref in freed)
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in others.items()}
    assert all(torch.equal(p, others[n]) for n, p in model.named_parameters())
    assert len(base) == len(layers) == 40
    held = sum(b.nbytes for n, b in model.named_buffers() if NAME in n)
    assert held == base.after
    assert before - sum(p.nbytes for p in model.parameters()) == base.before
    assert held / base.before < {"int8": 0.27, "nf4": 0.141}[kind]  # of float32


@pytest.mark.parametrize("kind", KINDS)
def test_removal_gives_plain_layers_with_the_same_values(kind: str) -> None:
    model = unet()
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    names = [name for name, _ in model.named_parameters()]
    base = QuantisedBase(UNet(model).linear_layers(), kind, CPU)
    with pytest.raises(AttributeError, match="weight"):  # twice is a mistake, not a rounding of roundings
        QuantisedBase(UNet(model).linear_layers(), kind, CPU)
    model.to(torch.float32)
    out = predict(model)
    base.remove()
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    assert sorted(name for name, _ in model.named_parameters()) == sorted(names)
    assert not any(p.requires_grad for p in model.parameters())
    assert torch.equal(predict(model), out)


def test_a_failure_halfway_leaves_plain_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    model, original, calls = unet(), quantised._quantise, []

    def fails_later(*words: Any) -> Any:
        calls.append(words)
        if len(calls) > 3:
            raise RuntimeError("out of memory")
        return original(*words)

    monkeypatch.setattr(quantised, "_quantise", fails_later)
    with pytest.raises(RuntimeError, match="out of memory"):
        QuantisedBase(UNet(model).linear_layers(), "int8", CPU)
    assert not any(hasattr(layer, NAME) for layer in UNet(model).linear_layers())
    assert torch.isfinite(predict(model)).all()


def test_a_failed_application_leaves_plain_layers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from spf_plugin import lora

    bench = Workbench(Setup("tiny", 64, 1, False, rank=4, weights="fp32", device="cpu"))
    network = nn.Module()
    network.apply_to = lambda *_, **__: None  # type: ignore[assignment]  # replaces nothing
    model = unet()
    config = SPFConfig(target=CAPTION_TARGET, base="int8", preview_every=0)
    bench.host.denoiser = model
    monkeypatch.setattr(bench.host.accelerator, "is_main_process", False, raising=False)
    lora.attach(network, bench.host, config)
    with pytest.raises(SPFError, match="replaced no module's forward"):
        network.apply_to([], model)  # type: ignore[operator]
    assert not any(hasattr(layer, NAME) for layer in UNet(model).linear_layers())
    assert all("forward" not in vars(layer) for layer in UNet(model).linear_layers())


# -- with an adapter --------------------------------------------------------------------------------------------------


def adapted(model: Any, **arguments: str) -> tuple[nn.Module, Adapter]:
    network = adapter.load_module("lycoris.kohya").create_network(
        1.0, 4, 4, None, [], model, **{"algo": "lora", "preset": "attn-mlp", "bypass_mode": "True", **arguments}
    )
    adapter.select(network, "_attentions_")
    return network, Adapter()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("algo", quantised.LYCORIS)
def test_the_bypassed_adapter_is_the_quantised_base_and_gradients_reach_it(kind: str, algo: str) -> None:
    """The reference bit for bit, before and after training, and the same gradient with checkpointing."""
    gradients = []
    for checkpointing in (False, True):
        model = unet()
        torch.manual_seed(0)
        network, switch = adapted(model, algo=algo)
        QuantisedBase(UNet(model).linear_layers(), kind, CPU)
        pristine = copy.deepcopy(model)
        with switch.watching([model]):
            network.apply_to([], model, apply_text_encoder=False, apply_unet=True)  # type: ignore[operator]
        network.requires_grad_(True).train()
        with torch.no_grad():
            for parameter in network.parameters():  # away from zero, where half of the gradients vanish
                parameter.add_(0.02 * random(*parameter.shape))
        model.train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        response = predict(model)
        response.square().mean().backward()
        with torch.no_grad(), switch.bypassed():
            reference = predict(model)
        assert torch.equal(reference, predict(pristine))
        assert float((response.detach() - reference).abs().max()) > 1e-4
        gradients.append({n: p.grad for n, p in network.named_parameters() if p.grad is not None})
    assert len(gradients[0]) >= 2 * 40
    assert all(float(g.abs().max()) > 0 for g in gradients[0].values())
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-7)


# -- spf train --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_spf_train(kind: str, tiny_sd15: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    original = quantised.QuantisedBase
    monkeypatch.setattr("spf_plugin.lora.QuantisedBase", lambda *words: seen.append(original(*words)) or seen[-1])
    spf = SPFConfig(target=CAPTION_TARGET, log_every=1, base=kind, preview_every=0)
    settings = loop.Settings(
        str(tiny_sd15), tiny.images(tmp_path / "images"), tmp_path / "lora.safetensors", spf,
        steps=3, rank=4, learning_rate=1e-2, gradient_checkpointing=True, device="cpu",
    )  # fmt: skip
    result = loop.train(settings)
    tensors = load_file(result.path)
    assert len(tensors) == 192 * 3
    assert all(torch.isfinite(t).all() for t in tensors.values())
    assert any(float(t.abs().max()) > 0 for name, t in tensors.items() if "lora_up" in name)
    assert result.history[-1]["spf/drift_outside"] > 0
    with safe_open(result.path, "pt") as file:
        assert f'"spf_base": "{kind}"' in file.metadata()["ss_network_args"]
    (base,) = seen
    assert len(base) == 160  # 16 transformers of 10 linear layers
    assert base.before == 4 * sum(q.shape.numel() for _, q in base._exchanges)


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("network", "arguments", "words"),
    [
        ("networks.oft", {}, ["works with spf_network=networks.lora"]),
        ("lycoris.kohya", {}, ["Add bypass_mode=True"]),
        ("lycoris.kohya", {"algo": "full", "bypass_mode": "True"}, ["cannot go with algo=full; use one of lora"]),
        ("lycoris.kohya", {"dora_wd": "True", "algo": "boft"}, ["algo=boft", "cannot go with dora_wd", "bypass_mode"]),
    ],
)
def test_adapters_that_read_the_weights(network: str, arguments: dict[str, str], words: list[str]) -> None:
    found = quantised.problems("int8", network, arguments)
    assert len(found) == len(words)
    assert all(word in text for word, text in zip(words, found, strict=True))
    assert quantised.problems("off", network, arguments) == []


def test_adapters_that_do_not() -> None:
    assert quantised.problems("int8", "networks.lora", {}) == []
    assert quantised.problems("nf4", "lycoris.kohya", {"bypass_mode": "True", "algo": "lokr"}) == []


def test_without_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in sys.modules if n.split(".")[0] == "bitsandbytes"]:
        monkeypatch.delitem(sys.modules, name)
    hidden = type("Hidden", (), {"find_spec": staticmethod(_hide)})
    monkeypatch.setattr(sys, "meta_path", [hidden, *sys.meta_path])
    assert quantised.device_problems("int8", CPU) == quantised.device_problems("off", CPU) == []
    (problem,) = quantised.device_problems("nf4", CPU)
    assert (
        problem
        == "spf_base=nf4 needs bitsandbytes: pip install --no-deps bitsandbytes. spf_base=int8 works without it."
    )


def _hide(name: str, *_: Any) -> None:
    if name.split(".")[0] == "bitsandbytes":
        raise ModuleNotFoundError(f"No module named {name!r}", name="bitsandbytes")


def test_a_bitsandbytes_that_does_not_work_here(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("no kernel\nfor this\n")

    monkeypatch.setattr(quantised, "_quantise", fails)
    (problem,) = quantised.device_problems("nf4", CPU)
    assert "bitsandbytes does not work on cpu here: no kernel. Update it" in problem


def test_a_model_without_such_layers() -> None:
    with pytest.raises(SPFError, match="no linear layers in a transformer"):
        QuantisedBase(UNet(nn.Sequential(nn.Linear(4, 4))).linear_layers(), "int8", CPU)


def test_spf_train_refuses_before_it_loads_a_model(tmp_path: Path) -> None:
    spf = SPFConfig(target=CAPTION_TARGET, base="int8", network="lycoris.kohya")
    settings = loop.Settings("nothing", tiny.images(tmp_path / "images"), tmp_path / "x.safetensors", spf, device="cpu")
    with pytest.raises(SPFError, match="dora_wd"):
        loop.train(replace(settings, network_args={"dora_wd": "True"}))


# -- how far it is from the original ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_distance_from_the_unquantised_model(kind: str) -> None:
    """docs/cost.md has the figures of the embedded model (`python -m benchmarks.base_error`)."""
    from benchmarks.base_error import inputs, predictions
    from benchmarks.base_error import quantised as with_base
    from portraitlab.model_files import MODEL_FOLDER
    from spf_plugin.trainer.models import load

    model = load(str(MODEL_FOLDER))
    latents, text, _ = inputs(model, 4)
    exact = predictions(model.denoiser, model, latents, text, 500)
    found = predictions(with_base(model.denoiser, kind), model, latents, text, 500)
    assert float((found - exact).norm() / exact.norm()) < {"int8": 0.01, "nf4": 0.06}[kind]
    assert F.mse_loss(found, exact) > 0
