"""What is patched is put back exactly: presence, absence, stacking, exceptions."""

from __future__ import annotations

from contextlib import suppress

import pytest
import torch
from torch import nn

from spf_plugin.adapter.bypass import Adapter, select
from spf_plugin.errors import SPFError
from spf_plugin.families.unet import UNet
from spf_plugin.patching import bypassed, hooked, instance_attribute, patched


class Thing:
    def speak(self) -> str:
        return "class"


def test_patched_removes_an_attribute_that_was_not_there() -> None:
    thing = Thing()
    with patched(thing, "speak", lambda: "ours"):
        assert thing.speak() == "ours"
    assert vars(thing) == {}


def test_patched_puts_back_an_attribute_that_was_there() -> None:
    thing = Thing()
    mine = thing.speak = lambda: "mine"  # type: ignore[method-assign]
    with suppress(KeyError), patched(thing, "speak", lambda: "ours"):
        raise KeyError
    assert vars(thing) == {"speak": mine}


def test_patches_leave_in_any_order() -> None:
    """A wrapper that came after ours stays when ours goes."""
    thing = Thing()
    ours = patched(thing, "speak", lambda: "ours")
    ours.__enter__()
    inner = thing.speak
    thing.speak = theirs = lambda: "theirs+" + inner()  # type: ignore[method-assign]
    ours.__exit__(None, None, None)
    assert vars(thing) == {"speak": theirs}


def test_hooks_leave_on_exceptions_too() -> None:
    layer = nn.Linear(2, 2)
    seen: list[torch.Tensor] = []
    with suppress(KeyError), hooked([(layer, lambda _m, _i, o: seen.append(o))]):
        layer(torch.ones(1, 2))
        raise KeyError
    layer(torch.ones(1, 2))
    assert len(seen) == 1
    assert not layer._forward_hooks


def test_bypass_is_exact_and_comes_back() -> None:
    layer = nn.Linear(2, 2)
    x = torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
    base = layer(x)
    adapter = Adapter()
    original = layer.forward
    with adapter.watching([layer]):
        layer.forward = lambda value: original(value) + torch.randn_like(value)  # type: ignore[method-assign]
    adapted = instance_attribute(layer, "forward")
    state = torch.get_rng_state()
    with suppress(KeyError), adapter.bypassed():
        assert torch.equal(layer(x), base)
        assert "forward" not in vars(layer)
        raise KeyError
    assert torch.equal(torch.get_rng_state(), state)
    assert instance_attribute(layer, "forward") is adapted
    assert not torch.equal(layer(x), base)


def test_bypass_goes_back_to_an_earlier_adapter() -> None:
    """An adapter that was there before ours belongs to the reference."""
    layer = nn.Linear(2, 2)
    x = torch.ones(1, 2)
    plain = layer.forward
    layer.forward = lambda value: plain(value) + 1  # type: ignore[method-assign]
    with_earlier = layer(x)
    adapter = Adapter()
    with adapter.watching([layer]):
        earlier = layer.forward
        layer.forward = lambda value: earlier(value) + 10  # type: ignore[method-assign]
    with adapter.bypassed():
        assert torch.equal(layer(x), with_earlier)
    torch.testing.assert_close(layer(x), with_earlier + 10)


def test_nested_bypass() -> None:
    layer = nn.Linear(2, 2)
    before = instance_attribute(layer, "forward")
    layer.forward = adapted = lambda value: value  # type: ignore[method-assign]
    with bypassed({layer: before}), bypassed({layer: before}):
        pass
    assert instance_attribute(layer, "forward") is adapted


def test_an_adapter_that_replaces_nothing_is_refused() -> None:
    def take_all(model: nn.Linear) -> None:
        weight = model.weight
        del model.weight
        model.forward = lambda x: x @ weight.T  # type: ignore[method-assign]

    model = nn.Linear(2, 2)
    with pytest.raises(SPFError, match="took the weights of 1 modules out"), Adapter().watching([model]):
        take_all(model)
    with pytest.raises(SPFError, match="replaced no module's forward"), Adapter().watching([nn.Linear(2, 2)]):
        pass


class Lora:
    def __init__(self, name: str):
        self.lora_name = name


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        names = ("lora_unet_down_attn1_to_q", "lora_unet_down_attn2_to_q", "lora_unet_up_attn2_to_k")
        self.unet_loras = [Lora(n) for n in names]
        self.text_encoder_loras = [Lora("lora_te_layers_0_mlp_fc1")]


def test_select() -> None:
    network = Network()
    select(network, "cross_attention", UNet.cross_attention)
    assert [lora.lora_name for lora in network.unet_loras] == ["lora_unet_down_attn2_to_q", "lora_unet_up_attn2_to_k"]
    assert network.text_encoder_loras == []
    network = Network()
    select(network, "to_q$|mlp")
    assert len(network.unet_loras) == 2
    assert len(network.text_encoder_loras) == 1
    with pytest.raises(SPFError, match="lora_unet_down_attn2_to_q"):
        select(network, "lora_unet_down_attn3_to_q")
    with pytest.raises(SPFError, match="leaves only modules of text encoders"):
        select(network, "lora_te")
    assert len(network.unet_loras) == 2
    with pytest.raises(SPFError, match="does not list its modules"):
        select(nn.Linear(1, 1), "cross_attention")
