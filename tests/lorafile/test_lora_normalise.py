"""Normalising: never another delta, always the safe subset, and a clear refusal where neither is possible."""

from __future__ import annotations

import json

import pytest
import torch

from spf_plugin.errors import SPFError
from spf_plugin.lorafile import names
from spf_plugin.lorafile.normalise import fitted, normalise
from tests.lorafile import helpers as h
from tests.lorafile.test_lora_loaders import LOADERS, complete, judge, statuses

StateDict = dict[str, torch.Tensor]
MID = "lora_unet_mid_block_attentions_0_"


def random_lora(
    base: names.Base, *, keep, ranks=lambda n: 4, alphas=lambda n: 2.0, dtype=torch.float16, seed: int = 0
) -> StateDict:
    """Real names and shapes, random factors."""
    generator = torch.Generator().manual_seed(seed)
    out: StateDict = {}
    for m in names.modules(base):
        name = names.kohya_name(base, m)
        if m.group == "extra" or not keep(name):
            continue
        tail = {"linear": (), "conv1": (1, 1), "conv3": (3, 3)}[m.kind]
        rank = ranks(name)
        down = torch.randn(rank, m.fan_in, *tail, generator=generator)
        up = torch.randn(m.fan_out, rank, *(1 for _ in tail), generator=generator)
        if alphas(name) is not None:
            out[f"{name}.alpha"] = torch.tensor(alphas(name)).to(dtype)
        out[f"{name}.lora_down.weight"], out[f"{name}.lora_up.weight"] = (0.1 * down).to(dtype), (0.1 * up).to(dtype)
    return out


def test_a_file_is_fitted_to_a_network_of_other_alphas_and_shapes() -> None:
    """Normalising makes one alpha of several and SD2's projections flat; the network has its own, as it was made."""
    conv = "lora_unet_mid_block_attentions_0_proj_in"

    def alphas(name: str) -> float:
        return 16.0 if "attn1" in name else 1.0

    own = random_lora("sd2", keep=middle, alphas=alphas, dtype=torch.float32)
    for suffix in ("lora_down.weight", "lora_up.weight"):
        own[f"{conv}.{suffix}"] = own[f"{conv}.{suffix}"].flatten(1)[:, :, None, None]
    saved, _, _ = normalise(own, None)
    assert saved[f"{conv}.lora_up.weight"].dim() == 2
    assert len({float(tensor) for name, tensor in saved.items() if name.endswith("alpha")}) == 1
    back = fitted(saved, own)
    assert back.keys() == own.keys()
    for name, tensor in own.items():
        assert torch.equal(back[name], tensor), name
    assert all(fitted(own, own)[name] is tensor for name, tensor in own.items())
    assert fitted(saved, {}) == saved


def middle(name: str) -> bool:
    """A handful of modules: some of the mid block, one small convolution, one text-encoder layer."""
    if "mid_block_attentions_0" in name or "middle_block_1_transformer_blocks_0" in name:
        return "ff_net" not in name
    small = ("down_blocks_0_resnets_0_conv1", "input_blocks_1_0_in_layers_2", "layers_3_mlp_fc1")
    return name.endswith(small) or "layers_3_self_attn" in name


def assert_deltas(before: StateDict, after: StateDict, eps: float) -> None:
    old, new = h.deltas(before), h.deltas(after)
    assert old.keys() <= new.keys()
    for name, delta in old.items():
        assert (new[name] - delta).abs().max() <= eps * delta.abs().max(), name


@pytest.mark.parametrize("base", names.BASES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_plain_is_untouched(base: names.Base, dtype: torch.dtype) -> None:
    state_dict = random_lora(base, keep=middle, dtype=dtype)
    fixed, _, notes = normalise(state_dict, complete(base))
    assert list(fixed) == list(state_dict)
    assert all(fixed[key] is tensor for key, tensor in state_dict.items())
    assert [n for n in notes if "SD2 text encoder" not in n] == []


@pytest.mark.parametrize("base", ["sd1", "sdxl"])
def test_alphas_are_baked_exactly(base: names.Base) -> None:
    """Powers of two move between alpha and up without rounding, even in fp16."""
    state_dict = random_lora(base, keep=middle, alphas=lambda n: 8.0 if "attn2" in n else 0.5 if "mlp" in n else 2.0)
    fixed, strings, notes = normalise(state_dict, complete(base))
    assert_deltas(state_dict, fixed, 0.0)
    for half in ("lora_unet", "lora_te"):
        assert len({float(t) for k, t in fixed.items() if k.endswith(".alpha") and k.startswith(half)}) == 1
    assert any(note.startswith("UNet: one alpha, 2;") and note.endswith("exactly") for note in notes)
    assert any(note.startswith("text encoders: one alpha, 0.5;") and note.endswith("exactly") for note in notes)
    assert statuses(judge(fixed, strings)) == ["loads"] * 5
    before = judge(state_dict, complete(base))
    assert before["diffusers"].status == "differs"


def test_odd_alphas_round_to_the_dtype_only() -> None:
    state_dict = random_lora("sd1", keep=middle, alphas=lambda n: 3.0 if "attn2_to_q" in n else 2.0)
    fixed, _, notes = normalise(state_dict, complete("sd1"))
    assert_deltas(state_dict, fixed, 2**-10)
    assert any("rounded to the file's dtype" in note for note in notes)


def test_the_smallest_values_survive() -> None:
    """fp16 cannot divide its smallest subnormal, so the alpha is chosen for scaling up only."""
    state_dict = random_lora("sd1", keep=middle, alphas=lambda n: 0.125 if "attn2_to_q" in n else 2.0)
    key = f"{MID}transformer_blocks_0_attn1_to_q.lora_up.weight"
    state_dict[key] = torch.full_like(state_dict[key], 6e-8)
    fixed, _, notes = normalise(state_dict, complete("sd1"))
    assert_deltas(state_dict, fixed, 0.0)
    assert {float(t) for k, t in fixed.items() if k.endswith(".alpha") and "unet" in k} == {0.125}
    assert any(note.endswith("exactly") for note in notes)


def test_mixed_ranks() -> None:
    """One alpha with several ranks is safe already; --one-rank pads with zeros."""
    state_dict = random_lora("sd1", keep=middle, ranks=lambda n: 8 if "attn1" in n else 4)
    fixed, _, _ = normalise(state_dict, complete("sd1"))
    assert all(fixed[key] is tensor for key, tensor in state_dict.items())
    padded, _, notes = normalise(state_dict, complete("sd1"), one_rank=True)
    assert_deltas(state_dict, padded, 0.0)
    assert {t.shape[0] for k, t in padded.items() if k.endswith("lora_down.weight") and "unet" in k} == {8}
    assert any("padded with zeros to rank 8" in note for note in notes)


@pytest.mark.parametrize("some", [False, True])
def test_missing_alphas_mean_the_rank(some: bool) -> None:
    state_dict = random_lora("sd1", keep=middle, alphas=lambda n: 2.0 if some and "attn1" in n else None)
    fixed, strings, notes = normalise(state_dict, complete("sd1"))
    assert_deltas(state_dict, fixed, 0.0)
    assert all(f"{name}.alpha" in fixed for name in h.deltas(fixed))
    assert statuses(judge(fixed, strings)) == ["loads"] * 5
    assert any("added to" in note for note in notes)


def test_alpha_dtypes() -> None:
    state_dict = random_lora("sd1", keep=middle, dtype=torch.bfloat16)
    state_dict[f"{MID}proj_in.alpha"] = torch.tensor(2)
    state_dict[f"{MID}proj_out.alpha"] = torch.tensor([2.0], dtype=torch.float64)
    fixed, _, _ = normalise(state_dict, complete("sd1"))
    assert fixed[f"{MID}proj_in.alpha"].dtype == torch.bfloat16
    assert fixed[f"{MID}proj_out.alpha"].dtype == torch.float32
    assert fixed[f"{MID}proj_out.alpha"].shape == ()
    odd = {k: torch.tensor(257) if k.endswith("alpha") else t for k, t in state_dict.items()}
    fixed, _, _ = normalise(odd, complete("sd1"))
    assert {(float(t), t.dtype) for k, t in fixed.items() if k.endswith("alpha")} == {(257.0, torch.float32)}
    saved, _, _ = normalise(random_lora("sd1", keep=middle, alphas=lambda n: 0.3), None, dtype=torch.float16)
    assert {t.dtype for k, t in saved.items() if not k.endswith("alpha")} == {torch.float16}


@pytest.mark.parametrize(("base", "prefix"), [("sdxl", "lora_te2"), ("sd2", "lora_te")])
@pytest.mark.parametrize("present", [("q",), ("k", "v"), ("v",), ("q", "k", "out")])
def test_attention_groups_are_completed(base: names.Base, prefix: str, present: tuple[str, ...]) -> None:
    layer = f"{prefix}_text_model_encoder_layers_3_self_attn_"
    state_dict = random_lora(base, keep=lambda n: n in {f"{layer}{p}_proj" for p in present})
    fixed, strings, _ = normalise(state_dict, complete(base))
    got = h.deltas(fixed)
    assert set(got) == {f"{layer}{p}_proj" for p in ("q", "k", "v", "out")}
    assert_deltas(state_dict, fixed, 0.0)
    for part in {"q", "k", "v", "out"} - set(present):
        assert not got[f"{layer}{part}_proj"].any()
    assert len({float(t) for k, t in fixed.items() if k.endswith("alpha")}) == 1
    found = judge(fixed, strings)
    assert all("half-attention" not in {f.code for f in v.findings} for v in found.values())


def test_clip_l_groups_stay_open() -> None:
    """But for an output: diffusers knows kohya's text encoders by it."""
    layer = "lora_te1_text_model_encoder_layers_3_self_attn_"
    state_dict = random_lora("sdxl", keep=lambda n: n in (f"{layer}k_proj", f"{layer}out_proj"))
    assert list(normalise(state_dict, complete("sdxl"))[0]) == list(state_dict)
    state_dict = random_lora("sdxl", keep=lambda n: n == f"{layer}k_proj")
    fixed = normalise(state_dict, complete("sdxl"))[0]
    assert {key.split(".")[0] for key in fixed} == {f"{layer}k_proj", f"{layer}out_proj"}
    assert not fixed[f"{layer}out_proj.lora_up.weight"].any()


def test_names_are_mended() -> None:
    """Mixed styles, te/te1, flattened text encoder, generic prefixes: all to kohya's names, same deltas."""
    healthy = random_lora("sdxl", keep=lambda n: middle(n) or "input_blocks_4_1_transformer_blocks_0" in n)
    damaged = {}
    for key, tensor in healthy.items():
        key = key.replace("lora_unet_input_blocks_4_1_", "lora_unet_down_blocks_1_attentions_0_")
        key = key.replace("lora_unet_middle_block_1_", "diffusion_model_middle_block_1_")
        key = key.replace("lora_te1_text_model_", "lora_te_").replace("lora_te2_text_model_", "lora_te2_")
        damaged[key] = tensor
    assert statuses(judge(damaged, complete("sdxl"))) != ["loads"] * 5
    fixed, strings, notes = normalise(damaged, complete("sdxl"))
    assert {k: t for k, t in fixed.items() if k in healthy}.keys() == healthy.keys()
    assert all(fixed[key] is tensor for key, tensor in healthy.items())
    assert "renamed" in notes[0]
    assert statuses(judge(fixed, strings)) == ["loads"] * 5


def test_two_entries_for_one_module() -> None:
    state_dict = random_lora("sdxl", keep=lambda n: "middle_block_1_proj_in" in n)
    state_dict |= {k.replace("middle_block_1", "mid_block_attentions_0"): t for k, t in state_dict.items()}
    with pytest.raises(SPFError, match="Two entries"):
        normalise(state_dict, complete("sdxl"))


def test_adapter_metadata() -> None:
    """diffusers' own metadata carries alpha for its own names, and is refused beside kohya's."""
    kohya = random_lora("sd1", keep=lambda n: "mid_block_attentions_0_proj" in n, alphas=lambda n: None)
    own = {}
    for key, tensor in kohya.items():
        key = key.replace("lora_unet_mid_block_attentions_0_proj_", "unet.mid_block.attentions.0.proj_")
        own[key.replace("lora_down", "lora_A").replace("lora_up", "lora_B")] = tensor
    metadata = {"lora_adapter_metadata": json.dumps({"unet.r": 4, "unet.lora_alpha": 1})}
    fixed, strings, _ = normalise(own, metadata)
    assert "lora_adapter_metadata" not in strings
    assert {float(t) for k, t in fixed.items() if k.endswith("alpha")} == {1.0}
    assert {k for k in fixed if not k.endswith("alpha")} == set(kohya)
    with pytest.raises(SPFError, match="one by one"):
        normalise(own, {"lora_adapter_metadata": json.dumps({"unet.use_rslora": True})})
    with pytest.raises(SPFError, match="not JSON"):
        normalise(own, {"lora_adapter_metadata": "["})
    found = judge(random_lora("sd1", keep=middle), complete("sd1") | metadata)
    assert found["diffusers"].status == "fails"


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_is_refused(bad: float) -> None:
    state_dict = random_lora("sd1", keep=middle)
    state_dict[f"{MID}proj_in.lora_up.weight"][3] = bad
    with pytest.raises(SPFError, match="NaN or infinity"):
        normalise(state_dict, complete("sd1"))


@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_large_values_are_balanced(dtype: torch.dtype | None) -> None:
    """Beyond fp16 in one factor only: a power of two moves, exactly."""
    state_dict = random_lora("sd1", keep=middle, dtype=torch.float32)
    key = f"{MID}proj_in.lora_up.weight"
    state_dict[key] = state_dict[key] * 2.0**20
    fixed, strings, notes = normalise(state_dict, complete("sd1"), dtype=dtype)
    assert all(float(t.abs().max()) <= 65504 for t in fixed.values())
    assert_deltas(state_dict, fixed, 0.0 if dtype is None else 2**-9)
    assert any("beyond fp16" in note for note in notes)
    assert statuses(judge(fixed, strings)) == ["loads"] * 5


def test_unbalanceable_is_refused() -> None:
    state_dict = random_lora("sd1", keep=middle, dtype=torch.float32)
    for suffix in ("lora_up.weight", "lora_down.weight"):
        state_dict[f"{MID}proj_in.{suffix}"] *= 1e9
    with pytest.raises(SPFError, match="in no balance"):
        normalise(state_dict, complete("sd1"))


def test_metadata() -> None:
    """M1: strings only, consistent, complete for the cards; nothing right is replaced."""
    given = {"ss_output_name": "{odd}", "ss_steps": 12, "ss_seed": None, "ss_network_dim": "4", "mine": "kept"}
    _, strings, notes = normalise(random_lora("sdxl", keep=middle), given)
    assert all(isinstance(k, str) and isinstance(v, str) for k, v in strings.items())
    assert strings["ss_steps"] == "12"
    assert strings["ss_seed"] == "None"
    assert strings["mine"] == "kept"
    assert strings["ss_output_name"] == "odd"
    assert strings["ss_base_model_version"] == "sdxl_base_v1-0"
    assert strings["ss_v2"] == "False"
    assert strings["ss_network_alpha"] == "2.0"
    assert strings["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert strings["modelspec.title"] == "odd"
    assert len(notes) == 1
    host = complete("sd2") | {
        "ss_base_model_version": "sd_v2_v",
        "modelspec.architecture": "stable-diffusion-v2-768-v/lora",
    }
    _, strings, _ = normalise(random_lora("sd2", keep=lambda n: "mid_block" in n), host)
    assert {k: strings[k] for k in host} == host
    assert strings["modelspec.resolution"] == "768x768"


def test_wrong_base_in_metadata_is_corrected() -> None:
    fixed, strings, notes = normalise(random_lora("sdxl", keep=middle), complete("sd1"))
    assert strings["ss_base_model_version"] == "sdxl_base_v1-0"
    assert any("another base model" in note for note in notes)
    assert statuses(judge(fixed, strings)) == ["loads"] * 5


@pytest.mark.parametrize("denoiser", ["double_blocks_0_img_attn_qkv", "joint_blocks_0_x_block_attn_qkv"])
def test_a_text_encoder_of_sd_makes_no_lora_of_sd(denoiser: str) -> None:
    """FLUX's and SD3's CLIP has the names of SD's, behind a prefix of its own that their loaders ask for."""
    layer = "lora_te1_text_model_encoder_layers_0_self_attn_q_proj"
    state_dict = {
        f"{name}.{suffix}": tensor
        for name in (f"lora_unet_{denoiser}", layer)
        for suffix, tensor in {
            "alpha": torch.tensor(2.0),
            "lora_down.weight": torch.ones(4, 768),
            "lora_up.weight": torch.ones(768, 4),
        }.items()
    }
    out, _, _ = normalise(state_dict, {}, judged=False)
    assert out.keys() == state_dict.keys()
    assert all(torch.equal(out[name], tensor) for name, tensor in state_dict.items())


def test_unknown_tensors_are_kept_and_named() -> None:
    state_dict = random_lora("sd1", keep=middle) | {"bundle_emb.me.string_to_param.*": torch.ones(2, 768)}
    fixed, _, notes = normalise(state_dict, complete("sd1"))
    assert list(fixed) == list(state_dict)
    assert any(note.startswith("diffusers: ") for note in notes)
    assert set(LOADERS) >= {note.split(":")[0] for note in notes}


def test_input_is_not_modified() -> None:
    state_dict = random_lora("sd2", keep=middle, alphas=lambda n: 8.0 if "attn2" in n else 2.0, dtype=torch.float32)
    state_dict[f"{MID}proj_in.lora_up.weight"] *= 2.0**20
    copies = {key: tensor.clone() for key, tensor in state_dict.items()}
    metadata = complete("sd2")
    normalise(state_dict, metadata, one_rank=True, dtype=torch.float16)
    assert all(torch.equal(state_dict[key], tensor) for key, tensor in copies.items())
    assert metadata == complete("sd2")


def test_twice_is_once() -> None:
    state_dict = random_lora("sd2", keep=middle, alphas=lambda n: 8.0 if "attn2" in n else 2.0)
    once, strings, _ = normalise(state_dict, None)
    twice, again, _ = normalise(once, strings)
    assert again == strings
    assert all(twice[key] is tensor for key, tensor in once.items())
