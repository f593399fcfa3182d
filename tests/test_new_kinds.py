"""A model family and a training loop that SPF has never seen, one file each (`tests/toy`): they train with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spf_plugin import lora, text
from spf_plugin.config import parse
from spf_plugin.errors import SPFError
from spf_plugin.families import known
from tests.toy import family, host
from tests.toy.family import Toy, pack, unpack
from tests.toy.host import LoopHost
from tests.toy.loop import Loop

CAPTIONS = ["a woman, red coat, blonde hair", "a man, blue shirt, blonde hair", "a man, blue shirt"]
OFF = {f"spf_{name}_multiplier": 0 for name in ("text_consistent", "fine_grained", "output", "base_preservation")}


class Adapter(nn.Module):
    """The least that an inner network is: a factor pair on every block's projection."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model, self.multiplier = [model], 1.0
        random = torch.Generator().manual_seed(3)
        self.down = nn.ParameterList(nn.Parameter(torch.randn(2, 16, generator=random)) for _ in range(2))
        self.up = nn.ParameterList(nn.Parameter(torch.zeros(48, 2)) for _ in range(2))

    def apply_to(self, text_encoder: Any, model: Any, *_: Any) -> None:
        for block, down, up in zip(model.blocks, self.down, self.up, strict=True):
            original = block.qkv.forward
            block.qkv.forward = lambda x, original=original, down=down, up=up: original(x) + x @ down.t() @ up.t()


def train(steps: int = 8, **settings: object) -> tuple[Loop, LoopHost, Adapter]:
    torch.manual_seed(0)
    loop = Loop(CAPTIONS, steps)
    toy, network = LoopHost(loop), Adapter(loop.model)
    config = parse({"spf_target": "blonde hair", "spf_log_every": 1, "spf_map_gain": 1, **settings})
    lora.attach(network, toy, config)
    network.apply_to(None, loop.model)
    loop.run([*network.parameters()])
    return loop, toy, network


@pytest.fixture(autouse=True)
def toy_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known, "FAMILIES", (*known.FAMILIES, Toy))


def test_packing_is_undone() -> None:
    latents = torch.randn(2, 4, 8, 12)
    assert torch.equal(unpack(pack(latents), (4, 6)), latents)


def test_each_is_one_short_file() -> None:
    for module in (family, host):
        assert len(Path(str(module.__file__)).read_text(encoding="utf-8").splitlines()) < 120


def test_it_trains_and_reports() -> None:
    loop, toy, network = train()
    assert all(float(up.detach().abs().max()) > 0 for up in network.up)
    assert {"drift", "map"} <= set(toy.reported)
    assert loop.losses[1] == loop.losses[0] != loop.losses[2]  # pairs: the second step repeats the first one's loss
    assert not vars(loop).keys() & {"train_step"}
    assert not loop.model._forward_hooks
    assert not loop.model._forward_pre_hooks


def test_without_weights_it_is_plain_training() -> None:
    loop, _, network = train(**OFF)
    torch.manual_seed(0)
    plain = Loop(CAPTIONS, 8)
    adapter = Adapter(plain.model)
    adapter.apply_to(None, plain.model)
    plain.run([*adapter.parameters()])
    assert loop.losses == plain.losses
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), adapter.parameters(), strict=True))


def test_the_reference_is_the_base_model_for_the_base_prompts() -> None:
    """Every reference pass, against an untouched copy with the same noise; what comes when is counted."""
    torch.manual_seed(0)
    untouched = Loop(CAPTIONS, 1)
    torch.manual_seed(0)
    loop = Loop(CAPTIONS, 4)
    toy, network = LoopHost(loop), Adapter(loop.model)
    lora.attach(network, toy, parse({"spf_target": "blonde hair", "spf_output_multiplier": 1}))
    seen: list[tuple[dict[str, Any], Tensor, bool]] = []
    loop.model.register_forward_hook(
        lambda _, args, kwargs, output: seen.append((kwargs, output.detach(), torch.is_grad_enabled())),
        with_kwargs=True,
    )
    network.apply_to(None, loop.model)
    encoder = loop.encoder
    loop.run([*network.parameters()])
    # Reference, response and the loop's preview; the second step of the pair and a preview. Twice.
    assert [graph for *_, graph in seen] == [False, True, False, True, False] * 2
    for captions, reference, second in (([CAPTIONS[0]] * 2, 0, 3), ([CAPTIONS[2], CAPTIONS[0]], 5, 8)):
        kwargs, output, _ = seen[reference]
        assert torch.equal(output, untouched.model(**kwargs))
        words, style = encoder([caption.replace(", blonde hair", "") for caption in captions])
        for call in (seen[reference][0], seen[second][0]):
            assert torch.equal(call["words"], words)
            assert torch.equal(call["style"], style)
        for name in ("patches", "sigma"):
            assert torch.equal(seen[second][0][name], kwargs[name])
            assert torch.equal(seen[reference + 1][0][name], kwargs[name])


def test_swapped_blocks_are_put_back_before_every_pass() -> None:
    """The loop puts them back before its own; of the reference's pass SPF does, and behind it for the loop's."""
    torch.manual_seed(0)
    loop = Loop(CAPTIONS, 4)
    happened: list[str] = []
    loop.model.prepare_block_swap_before_forward = lambda: happened.append("back")  # type: ignore[assignment]
    loop.model.register_forward_hook(lambda *_: happened.append("pass"))
    toy, network = LoopHost(loop), Adapter(loop.model)
    lora.attach(network, toy, parse({"spf_target": "blonde hair"}))
    network.apply_to(None, loop.model)
    loop.run([*network.parameters()])
    own = ["pass"]  # and previews
    assert happened == ["back", "pass", "back", *own, *own, *own, *own] * 2


def test_text_that_does_not_fit_is_said_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "EARLY_BYTES", 900)  # one prompt
    with pytest.raises(SPFError, match="frees its text encoders before training"):
        train()
