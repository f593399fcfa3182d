"""K3-K6, M1: the re-stated rules of A1111, Forge, ComfyUI and stable-diffusion.cpp, each with cases that must fail."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable

import pytest
import torch

from spf_plugin.errors import SPFError
from spf_plugin.lorafile import inspect, loaders, names, sdcpp
from spf_plugin.lorafile.findings import Verdict
from spf_plugin.lorafile.normalise import normalise
from tests.lorafile import helpers as h

LOADERS = ("A1111", "Forge", "ComfyUI", "diffusers", "sd.cpp")
StateDict = dict[str, torch.Tensor]


def complete(base: str) -> dict[str, str]:
    architecture = {
        "sd1": "stable-diffusion-v1/lora",
        "sd2": "stable-diffusion-v2-512/lora",
        "sdxl": "stable-diffusion-xl-v1-base/lora",
    }[base]
    return h.metadata_for(base) | {"modelspec.architecture": architecture}


def judge(state_dict: StateDict, metadata: dict[str, str] | None = None) -> dict[str, Verdict]:
    contents = inspect.gather(state_dict.items(), metadata or {})
    return {v.loader: v for v in loaders.verdicts(contents, inspect.describe(contents))}


def codes(verdict: Verdict, *levels: str) -> set[str]:
    return {f.code for f in verdict.findings if f.level in (levels or ("warn", "fail"))}


def statuses(found: dict[str, Verdict]) -> list[str]:
    return [found[name].status for name in LOADERS]


def renamed(state_dict: StateDict, change: Callable[[str], str]) -> StateDict:
    return {change(key): tensor for key, tensor in state_dict.items()}


@pytest.mark.parametrize("base", names.BASES)
@pytest.mark.parametrize("conv", [False, True])
def test_safe_subset_loads_everywhere(base: names.Base, conv: bool) -> None:
    found = judge(h.full_lora(base, conv=conv), complete(base))
    want = ["loads"] * 5
    if base == "sd2":
        want[-1] = "differs"  # q, k, v of the SD2 text encoder are unused by sd.cpp on original checkpoints
        assert codes(found["sd.cpp"]) == {"sd2-attention"}
    assert statuses(found) == want


@pytest.mark.parametrize(
    "keep",
    [
        lambda n: "attn2" in n,
        lambda n: n.endswith(("attn2_to_k", "attn2_to_v")),
        lambda n: "mid_block" in n or "middle_block" in n,
        lambda n: n.startswith("lora_unet"),
        lambda n: n.startswith("lora_te"),
        lambda n: "mlp" in n,
    ],
    ids=["attn2", "attn2-kv", "one-block", "unet", "text", "mlp"],
)
@pytest.mark.parametrize("base", ["sd1", "sdxl"])
def test_partial_files_load_everywhere(base: names.Base, keep: Callable[[str], bool]) -> None:
    assert statuses(judge(h.full_lora(base, keep=keep), complete(base))) == ["loads"] * 5


# ---- A1111 ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base", "name", "layer"),
    [
        # Worked out by hand from the block arithmetic of the original checkpoints.
        ("sd1", "lora_unet_down_blocks_2_attentions_1_proj_in", "diffusion_model_input_blocks_8_1_proj_in"),
        ("sd1", "lora_unet_up_blocks_3_attentions_2_proj_out", "diffusion_model_output_blocks_11_1_proj_out"),
        ("sd1", "lora_unet_mid_block_resnets_1_conv2", "diffusion_model_middle_block_2_out_layers_3"),
        ("sd1", "lora_unet_up_blocks_0_upsamplers_0_conv", "diffusion_model_output_blocks_2_1_conv"),
        ("sd1", "lora_unet_up_blocks_1_upsamplers_0_conv", "diffusion_model_output_blocks_5_2_conv"),
        ("sd1", "lora_unet_conv_in", "diffusion_model_input_blocks_0_0"),
        ("sd1", "lora_unet_time_embedding_linear_2", "diffusion_model_time_embed_2"),
        ("sd1", "lora_te_text_model_encoder_layers_3_mlp_fc1", "transformer_text_model_encoder_layers_3_mlp_fc1"),
        ("sd1", "lora_te1_text_model_encoder_layers_3_mlp_fc1", "transformer_text_model_encoder_layers_3_mlp_fc1"),
        ("sd2", "lora_te_text_model_encoder_layers_3_mlp_fc1", "model_transformer_resblocks_3_mlp_c_fc"),
        ("sd2", "lora_te_text_model_encoder_layers_3_self_attn_q_proj", "model_transformer_resblocks_3_attn_q_proj"),
        ("sdxl", "lora_unet_input_blocks_4_1_proj_in", "diffusion_model_input_blocks_4_1_proj_in"),
        ("sdxl", "lora_unet_down_blocks_1_attentions_0_proj_in", "diffusion_model_input_blocks_4_1_proj_in"),
        ("sdxl", "lora_te1_text_model_encoder_layers_0_mlp_fc2", "0_transformer_text_model_encoder_layers_0_mlp_fc2"),
        ("sdxl", "lora_te2_text_model_encoder_layers_31_mlp_fc2", "1_model_transformer_resblocks_31_mlp_c_proj"),
        ("sdxl", "lora_te_text_model_encoder_layers_0_mlp_fc2", None),
        ("sdxl", "lora_unet_up_blocks_0_upsamplers_0_conv", None),
        ("sd2", "lora_te1_text_model_encoder_layers_3_mlp_fc1", None),
        ("sd1", "unet", None),
    ],
)
def test_a1111_names(base: names.Base, name: str, layer: str | None) -> None:
    assert loaders.a1111_match(name, base) == layer


@pytest.mark.parametrize("base", ["sd1", "sdxl"])
def test_a1111_accepts_diffusers_names(base: names.Base) -> None:
    """722 of 722, but 787 of 788 with convolutions on SDXL."""
    lost = []
    for m in names.modules(base):
        if m.component == "unet" and m.group in ("attention", "conv"):
            name = f"lora_unet_{m.path.replace('.', '_')}"
            if loaders.a1111_match(name, base) is None:
                lost.append(name)
    assert lost == (["lora_unet_up_blocks_0_upsamplers_0_conv"] if base == "sdxl" else [])


def test_a1111_sdxl_needs_te1() -> None:
    found = judge(renamed(h.full_lora("sdxl"), lambda k: k.replace("lora_te1_", "lora_te_")), complete("sdxl"))
    assert codes(found["A1111"]) == {"names"}
    assert [found[n].status for n in LOADERS[1:]] == ["loads"] * 4


def test_a1111_skips_all_for_one_orphan() -> None:
    state_dict = h.full_lora("sd1")
    del state_dict["lora_unet_mid_block_attentions_0_proj_in.lora_up.weight"]
    found = judge(state_dict, complete("sd1"))
    assert found["A1111"].status == "fails"
    assert codes(found["A1111"]) == {"no-pair"}
    assert codes(found["diffusers"]) == {"no-pair"}
    del state_dict["lora_unet_mid_block_attentions_0_proj_in.lora_down.weight"]
    assert codes(judge(state_dict, complete("sd1"))["A1111"]) == {"no-pair"}  # an alpha alone


@pytest.mark.parametrize(("base", "prefix"), [("sdxl", "lora_te2"), ("sd2", "lora_te")])
def test_half_attention_groups(base: names.Base, prefix: str) -> None:
    missing = f"{prefix}_text_model_encoder_layers_5_self_attn_k_proj"
    found = judge(h.full_lora(base, keep=lambda n: n != missing), complete(base))
    assert "half-attention" in codes(found["A1111"])
    if base == "sdxl":
        assert codes(found["sd.cpp"]) == {"half-attention"}
    assert [found[n].status for n in ("Forge", "ComfyUI", "diffusers")] == ["loads"] * 3
    # CLIP-L keeps q, k and v apart: a hole there is fine
    te1 = "lora_te1" if base == "sdxl" else "lora_te"
    if base == "sdxl":
        hole = f"{te1}_text_model_encoder_layers_5_self_attn_k_proj"
        assert statuses(judge(h.full_lora(base, keep=lambda n: n != hole), complete(base))) == ["loads"] * 5


@pytest.mark.parametrize(
    ("metadata", "base", "a1111_warns", "forge_notes"),
    [
        ({"ss_base_model_version": "sdxl_base_v1-0"}, "sdxl", False, False),
        ({"format": "pt"}, "sdxl", True, False),  # any metadata at all reads as SD1 in A1111, unknown in Forge
        ({}, "sdxl", False, False),  # none at all is never hidden
        ({"ss_base_model_version": "sd_v1", "ss_v2": "False"}, "sd1", False, False),
        ({"ss_v2": "True"}, "sd1", True, True),
        ({"modelspec.architecture": "stable-diffusion-v1/lora"}, "sdxl", True, True),
        ({"ss_v2": "True"}, "sd2", False, False),
    ],
)
def test_card_rules(metadata: dict[str, str], base: names.Base, a1111_warns: bool, forge_notes: bool) -> None:
    found = judge(h.full_lora(base), metadata)
    assert ("card" in codes(found["A1111"])) == a1111_warns
    assert ("card" in codes(found["Forge"], "note")) == forge_notes


def test_output_name_read_as_json() -> None:
    found = judge(h.full_lora("sd1"), complete("sd1") | {"ss_output_name": "{my lora}"})
    assert statuses(found) == ["fails", "fails", "loads", "loads", "loads"]


@pytest.mark.parametrize(
    ("value", "good"),
    [
        ('{"10_me": {"hair": 3, "a": "4"}}', True),
        ("None", True),
        ('{"10_me": {"hair": "many"}}', False),
        ('{"10_me": 3}', False),
        ('{"10_me": {"hair": 1e400}}', False),
        ('{"10_me": {"hair": NaN}}', False),
    ],
)
def test_tag_frequency(value: str, good: bool) -> None:
    found = judge(h.full_lora("sd1"), complete("sd1") | {"ss_tag_frequency": value})
    assert ("tags" not in codes(found["A1111"], "note")) == good
    assert found["A1111"].status == "loads"


def test_factors_that_do_not_multiply() -> None:
    for up in ((8,), (8, 3), (8, 2, 1), (), (8, 0)):
        state_dict = h.full_lora("sd1", rank=2)
        state_dict["lora_unet_mid_block_attentions_0_proj_in.lora_up.weight"] = torch.ones(up)
        assert all(codes(v, "fail") == {"factors"} for v in judge(state_dict, complete("sd1")).values())


def test_any_shapes_are_survived() -> None:
    """Random shapes and suffixes: a verdict and a normalised file or our error, never a crash."""
    rng = random.Random(0)
    suffixes = [
        "alpha", "lora_down.weight", "lora_up.weight", "lora_mid.weight", "dora_scale", "lokr_w1", "lokr_w2_a",
        "lokr_w2_b", "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "diff", "oft_blocks", "lora_A.weight",
    ]  # fmt: skip
    modules = [
        "lora_unet_mid_block_attentions_0_proj_in", "lora_te2_text_model_encoder_layers_0_self_attn_q_proj",
        "lora_unet_middle_block_1_proj_out", "unet.mid_block.attentions.0.proj_out", "nothing", "",
    ]  # fmt: skip
    for _ in range(300):
        state_dict = {}
        for name in rng.sample(modules, rng.randint(1, 3)):
            for suffix in rng.sample(suffixes, rng.randint(1, 5)):
                shape = [rng.choice([0, 1, 2, 3]) for _ in range(rng.randint(0, 4))]
                state_dict[f"{name}.{suffix}"] = torch.ones(shape)
        judge(state_dict)
        with contextlib.suppress(SPFError):
            fixed, metadata, _ = normalise(state_dict, None, one_rank=rng.random() < 0.5)
            judge(fixed, metadata)


def test_fp16_overflow() -> None:
    state_dict = h.full_lora("sd1", dtype=torch.float32)
    state_dict["lora_unet_mid_block_attentions_0_proj_in.lora_up.weight"][0, 0] = 70000.0
    found = judge(state_dict, complete("sd1"))
    assert codes(found["A1111"]) == {"fp16-range"}
    assert statuses(found)[1:4] == ["loads"] * 3


# ---- ComfyUI and Forge ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", names.BASES)
def test_comfy_knows_both_styles(base: names.Base) -> None:
    ids = loaders.comfy_ids(base)
    for m in names.modules(base):
        if m.component == "unet":
            assert {f"lora_unet_{m.path.replace('.', '_')}", f"lora_unet_{m.sgm.replace('.', '_')}"} <= ids
    assert set(names.expected_names(base, conv=True)) <= ids


@pytest.mark.parametrize(("extra", "status"), [(4, "differs"), (5, "fails")])
def test_forge_refuses_more_than_twelve_leftovers(extra: int, status: str) -> None:
    state_dict = h.full_lora("sd1")
    for i in range(extra):
        for suffix in ("alpha", "lora_down.weight", "lora_up.weight"):
            state_dict[f"lora_unet_nowhere_{i}.{suffix}"] = torch.ones(2, 2) if suffix != "alpha" else torch.tensor(1.0)
    found = judge(state_dict, complete("sd1"))
    assert found["Forge"].status == status
    assert found["ComfyUI"].status == "differs"
    assert codes(found["A1111"]) == codes(found["diffusers"]) == codes(found["sd.cpp"]) == {"names"}


def test_flattened_text_encoder_names_load_nowhere() -> None:
    """P1: names taken from a live transformers >= 5.6 model."""
    found = judge(renamed(h.full_lora("sd1"), lambda k: k.replace("text_model_", "")), complete("sd1"))
    assert statuses(found) == ["differs", "fails", "differs", "fails", "differs"]
    assert codes(found["diffusers"]) == {"text-names"}


def test_missing_down_is_a_key_error() -> None:
    state_dict = h.full_lora("sd1")
    del state_dict["lora_unet_mid_block_attentions_0_proj_in.lora_down.weight"]
    found = judge(state_dict, complete("sd1"))
    assert statuses(found) == ["fails"] * 4 + ["differs"]


def test_oft_is_not_for_forge() -> None:
    state_dict = {f"{name}.oft_blocks": torch.ones(4, 2, 2) for name in names.expected_names("sd1", text=False)}
    found = judge(state_dict, complete("sd1"))
    assert statuses(found) == ["loads", "fails", "loads", "fails", "fails"]


def test_wrong_base_shapes() -> None:
    state_dict = h.full_lora("sd1")
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
    state_dict[f"{name}.lora_down.weight"] = torch.ones(1, 2048, dtype=torch.float16)
    found = judge(state_dict, complete("sd1"))
    assert statuses(found) == ["differs", "fails", "differs", "fails", "differs"]


# ---- stable-diffusion.cpp -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base", "key", "want"),
    [
        ("sd1", "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0.lora_up.weight",
         "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_out.0.weight.lora_up"),
        ("sd1", "lora_unet_up_blocks_0_upsamplers_0_conv.alpha",
         "model.diffusion_model.output_blocks.2.1.conv.weight.alpha"),
        ("sdxl", "lora_unet_up_blocks_0_upsamplers_0_conv.alpha",
         "model.diffusion_model.output_blocks.2.2.conv.weight.alpha"),
        ("sdxl", "lora_unet_output_blocks_2_2_conv.lora_down.weight",
         "model.diffusion_model.output_blocks.2.2.conv.weight.lora_down"),
        ("sd1", "lora_unet_down_blocks_1_resnets_0_time_emb_proj.lora_down.weight",
         "model.diffusion_model.input_blocks.4.0.emb_layers.1.weight.lora_down"),
        ("sdxl", "lora_te2_text_model_encoder_layers_7_self_attn_q_proj.lora_up.weight",
         "cond_stage_model.1.transformer.text_model.encoder.layers.7.self_attn.q_proj.weight.lora_up"),
        ("sd1", "lora_te_text_model_encoder_layers_7_mlp_fc1.alpha",
         "cond_stage_model.transformer.text_model.encoder.layers.7.mlp.fc1.weight.alpha"),
        ("sd1", "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k.lora_A.weight",
         "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight.lora_down"),
        ("sd1", "lora_unet_mid_block_attentions_0_proj_in.lokr_w2_a",
         "model.diffusion_model.middle_block.1.proj_in.weight.lokr_w2_a"),
    ],
)  # fmt: skip
def test_sdcpp_names(base: names.Base, key: str, want: str) -> None:
    assert sdcpp.convert(key, base) == want


@pytest.mark.parametrize("base", names.BASES)
@pytest.mark.parametrize("style", ["path", "sgm"])
def test_sdcpp_maps_both_styles(base: names.Base, style: str) -> None:
    for m in names.modules(base):
        if m.component == "unet" and m.group in ("attention", "conv"):
            key = f"lora_unet_{getattr(m, style).replace('.', '_')}.lora_up.weight"
            assert sdcpp.convert(key, base) == f"model.diffusion_model.{m.sgm}.weight.lora_up"


@pytest.mark.parametrize("dtype", [torch.int64, torch.float64])
def test_every_program_reads_an_alpha_of_any_number_type(dtype: torch.dtype) -> None:
    state_dict = h.full_lora("sd1")
    state_dict["lora_unet_mid_block_attentions_0_proj_in.alpha"] = torch.tensor(1, dtype=dtype)
    assert statuses(judge(state_dict, complete("sd1"))) == ["loads"] * 5


def test_sdcpp_does_not_know_time_embed() -> None:
    state_dict = h.full_lora("sdxl")
    for suffix, shape in (("lora_down.weight", (1, 320)), ("lora_up.weight", (1280, 1))):
        state_dict[f"lora_unet_time_embed_0.{suffix}"] = torch.ones(shape)
    found = judge(state_dict, complete("sdxl"))
    assert codes(found["sd.cpp"]) == {"names"}
    assert codes(found["diffusers"], "fail") == {"sgm-names"}
    assert [found[n].status for n in LOADERS[:3]] == ["loads"] * 3


# ---- everything -----------------------------------------------------------------------------------------------------


def test_common_failures() -> None:
    name = "lora_unet_mid_block_attentions_0_proj_in"
    state_dict = h.full_lora("sd1", keep=lambda n: n == name)
    state_dict[f"{name}.lora_up.weight"][0] = float("nan")
    assert {"non-finite"} <= codes(judge(state_dict)["ComfyUI"], "fail")
    state_dict = h.full_lora("sd1", alpha=0.0)
    assert all("alpha-zero" in codes(v, "fail") for v in judge(state_dict).values())
    state_dict = h.full_lora("sd1")
    state_dict = {k: torch.zeros_like(t) if "lora_up" in k else t for k, t in state_dict.items()}
    assert all(codes(v, "fail") == {"all-zero"} for v in judge(state_dict, complete("sd1")).values())
    assert all(v.status == "fails" for v in judge({}).values())


@pytest.mark.parametrize(
    ("key", "want"),
    [
        ("lora_unet_double_blocks_0_img_attn_proj.lora_down.weight", ["fails"] * 5),
        ("lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight", ["fails"] * 5),
        ("model.diffusion_model.input_blocks.0.0.bias", ["fails"] * 5),
    ],
)
def test_other_files(key: str, want: list[str]) -> None:
    assert statuses(judge({key: torch.ones(2, 2)})) == want


def test_base_from_shapes_beats_metadata() -> None:
    for base in names.BASES:
        for told in names.BASES:
            keep = {"keep": lambda n: "attn2_to_k" in n and ("mid_block" in n or "middle_block" in n)}
            contents = inspect.gather(h.full_lora(base, **keep).items(), complete(told))
            description = inspect.describe(contents)
            assert (description.base, description.evidence) == (base, "shapes")
