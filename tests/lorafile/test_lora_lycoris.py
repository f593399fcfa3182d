"""L1: lycoris-lora reads what we write with the same deltas, and its own algorithms pass through untouched."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from spf_plugin.lorafile import names, reader, writer
from spf_plugin.lorafile.normalise import normalise
from tests.lorafile import helpers as h
from tests.lorafile import kinds
from tests.lorafile.test_lora_loaders import LOADERS, codes, complete, judge

lycoris = pytest.importorskip("lycoris.kohya")


@pytest.fixture(autouse=True)
def _lycoris(monkeypatch) -> Iterator[None]:
    """Quiet, and with targets of its own: LyCORIS 4.1 lists the time embedding twice and then stops at itself."""
    network = lycoris.LycorisNetworkKohya
    monkeypatch.setattr(network, "UNET_TARGET_REPLACE_MODULE", ["Transformer2DModel", "ResnetBlock2D", "Downsample2D"])
    monkeypatch.setattr(network, "UNET_TARGET_REPLACE_NAME", [])
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def trained(algo: str, **options: object) -> dict[str, torch.Tensor]:
    """State dict of a LyCORIS network on the tiny SD1, every factor random, as its save_weights hands it over."""
    pipe = h.pipeline("sd1")
    torch.manual_seed(0)
    network = lycoris.create_network(
        1.0, 4, 2.0, None, pipe.text_encoder, pipe.unet, algo=algo, conv_dim=4, conv_alpha=2.0,
        preset="unet-transformer-only", **options,
    )  # fmt: skip
    network.apply_to(pipe.text_encoder, pipe.unet, False, True)
    for name, parameter in network.named_parameters():
        if "dora" not in name:
            torch.nn.init.normal_(parameter, std=0.1)
    # The preset adds the time embedding, which has a test of its own below.
    return {k: t.detach().clone() for k, t in network.state_dict().items() if "time_embedding" not in k}


def lycoris_deltas(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Module name -> weight delta as lycoris-lora itself rebuilds it from a file."""
    pipe = h.pipeline("sd1")
    network, _ = lycoris.create_network_from_weights(
        1.0, None, None, pipe.text_encoder, pipe.unet, weights_sd=dict(state_dict)
    )
    out = {}
    for module in network.unet_loras + network.text_encoder_loras:
        delta, _ = module.get_diff_weight(1.0)
        out[module.lora_name] = delta.detach().double().flatten(1)
    return out


@pytest.mark.parametrize("conv", [False, True])
def test_lycoris_reads_our_files(tmp_path: Path, conv: bool) -> None:
    """Kohya LoRA -> normalise -> write -> read -> lycoris: the delta of every module is (alpha / r) up x down."""
    state_dict = h.make_lora(h.reference("sd1"), "sd1", conv=conv)
    state_dict |= {k: torch.tensor(8.0) for k in state_dict if k.endswith("attn2_to_k.alpha")}
    want = h.deltas(state_dict)
    fixed, metadata, _ = normalise(state_dict, complete("sd1"))
    writer.save(tmp_path / "x.safetensors", fixed, metadata)
    got = lycoris_deltas(reader.load(tmp_path / "x.safetensors")[0])
    assert got.keys() == want.keys()
    for name, delta in want.items():
        assert torch.allclose(got[name], delta, atol=1e-6), name


# (algo, options, who does not take it as meant)
ALGORITHMS = [
    ("locon", {}, {}),
    ("loha", {}, {"diffusers": "algorithm"}),
    ("lokr", {"factor": 4}, {"diffusers": "algorithm", "sd.cpp": "lokr-whole"}),
    ("lokr", {"factor": 4, "full_matrix": True}, {"diffusers": "algorithm", "sd.cpp": "lokr-whole"}),
    ("full", {}, {"diffusers": "algorithm"}),
    ("diag-oft", {}, {"Forge": "names", "diffusers": "algorithm", "sd.cpp": "names"}),
    ("locon", {"dora_wd": True, "wd_on_output": False}, {"diffusers": "dora", "sd.cpp": "dora"}),
    (
        "locon",
        {"dora_wd": True, "wd_on_output": True},
        {"A1111": "dora", "Forge": "dora", "ComfyUI": "dora", "diffusers": "dora", "sd.cpp": "dora"},
    ),
]


@pytest.mark.parametrize(("algo", "options", "refused"), ALGORITHMS)
def test_algorithms_pass_through(algo: str, options: dict[str, object], refused: dict[str, str]) -> None:
    """Not a bit changes, and the verdicts and notes name exactly the loaders that will mind."""
    state_dict = trained(algo, **options)
    fixed, strings, notes = normalise(state_dict, complete("sd1"))
    assert list(fixed) == list(state_dict)
    assert all(fixed[key] is tensor for key, tensor in state_dict.items())
    found = judge(fixed, strings)
    minding = {name: codes(found[name]) for name in LOADERS if found[name].status != "loads"}
    assert minding == {name: {code} for name, code in refused.items()}
    assert {note.split(":")[0] for note in notes} == set(refused)


def test_locon_of_lycoris_equals_kohyas() -> None:
    state_dict = trained("locon")
    got, want = lycoris_deltas(state_dict), h.deltas(state_dict)
    assert got.keys() == want.keys()
    assert all(torch.allclose(got[name], want[name], atol=1e-6) for name in want)


def test_tucker_core_is_multiplied_in() -> None:
    """lora_mid, which diffusers refuses, disappears; lycoris rebuilds the same delta from both forms."""
    generator = torch.Generator().manual_seed(0)
    name = "lora_unet_mid_block_resnets_0_conv1"
    width = h.reference("sd1").unet.get_submodule("mid_block.resnets.0.conv1").weight.shape[0]
    state_dict = {
        f"{name}.alpha": torch.tensor(2.0),
        f"{name}.lora_down.weight": torch.randn(4, width, 1, 1, generator=generator),
        f"{name}.lora_up.weight": torch.randn(width, 4, 1, 1, generator=generator),
        f"{name}.lora_mid.weight": torch.randn(4, 4, 3, 3, generator=generator),
    }
    assert "algorithm" in codes(judge(state_dict, complete("sd1"))["diffusers"], "fail")
    fixed, strings, notes = normalise(state_dict, complete("sd1"))
    assert set(fixed) == set(state_dict) - {f"{name}.lora_mid.weight"}
    assert fixed[f"{name}.lora_down.weight"].shape == (4, width, 3, 3)
    before, after = lycoris_deltas(state_dict)[name], lycoris_deltas(fixed)[name]
    assert torch.allclose(before, after, atol=1e-5)
    assert torch.allclose(after, h.deltas(fixed)[name], atol=1e-5)
    assert all(v.status == "loads" for v in judge(fixed, strings).values())
    assert any("Tucker" in note for note in notes)


@pytest.mark.parametrize("kind", ["lokr", "loha"])
def test_half_attention_of_other_algorithms(kind: str) -> None:
    """A missing projection of a fused encoder is completed in the same algorithm, with a zero delta."""
    layer = "lora_te2_text_model_encoder_layers_3_self_attn_"
    loha = {"hada_w1_a": (1280, 2), "hada_w1_b": (2, 1280), "hada_w2_a": (1280, 2), "hada_w2_b": (2, 1280)}
    shapes = {"lokr": {"lokr_w1": (8, 8), "lokr_w2": (160, 160)}, "loha": loha}
    state_dict = {}
    for part in ("q", "v", "out"):
        state_dict |= {f"{layer}{part}_proj.{suffix}": torch.ones(shape) for suffix, shape in shapes[kind].items()}
        state_dict[f"{layer}{part}_proj.alpha"] = torch.tensor(1.0)
    fixed, _, _ = normalise(state_dict, complete("sdxl"))
    added = {key: tensor for key, tensor in fixed.items() if key not in state_dict}
    assert {key.split(".")[1] for key in added} == {*shapes[kind], "alpha"}
    if kind == "lokr":
        delta = torch.kron(added[f"{layer}k_proj.lokr_w1"], added[f"{layer}k_proj.lokr_w2"])
    else:
        w = [added[f"{layer}k_proj.hada_w{i}_a"] @ added[f"{layer}k_proj.hada_w{i}_b"] for i in (1, 2)]
        delta = w[0] * w[1]
    assert not delta.any()
    assert delta.shape == (1280, 1280)


def test_names_of_lycoris_outside_the_blocks() -> None:
    """The current default preset trains the time embedding of SD1, a name that diffusers and sd.cpp do not map."""
    state_dict = {
        "lora_unet_time_embedding_linear_1.lora_down.weight": torch.ones(4, 320),
        "lora_unet_time_embedding_linear_1.lora_up.weight": torch.ones(1280, 4),
        "lora_unet_time_embedding_linear_1.alpha": torch.tensor(1.0),
    } | h.full_lora("sd1", keep=lambda n: "mid_block" in n)
    found = judge(state_dict, complete("sd1"))
    assert [found[name].status for name in LOADERS] == ["loads", "loads", "loads", "differs", "differs"]
    assert names.resolve("sd1", "lora_unet_time_embedding_linear_1") is not None


@pytest.mark.parametrize(
    "kind",
    ["locon", "locon, tucker", "loha", "loha, tucker", "full", "oft", "oft, constraint", "oft, rescale", "glora"],
)
def test_the_sums_of_the_kinds_are_lycoris(kind: str) -> None:
    """What `kinds` says a file means is what LyCORIS makes of it. (LoKr: `test_lora_trained`.)

    Its `get_diff_weight` has alpha / rank twice for LoHa, its forward pass once: half of what is meant, here.
    """
    file = kinds.build(kind, "sd1", kinds.model("sd1"))
    got = lycoris_deltas(file.tensors)
    for name, meant in file.meant.items():
        wanted = meant.flatten(1) * (0.5 if "loha" in kind else 1.0)
        assert (got[kinds.kohya("sd1", name)] - wanted).abs().max() <= 2e-4 * wanted.abs().max(), name
