"""`spf train` of SD3 in diffusers' format: tiny random models with 3.5's norms and T5, and without either."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from spf_plugin.config import SPFConfig
from spf_plugin.core.prompt import Kind, Target, split
from spf_plugin.errors import SPFError
from spf_plugin.families.known import find
from spf_plugin.families.sd3 import CLIP
from spf_plugin.families.sd3_diffusers import DiffusersSD3
from spf_plugin.probe import capture
from spf_plugin.seam import Call
from spf_plugin.trainer import loop, models, vae
from spf_plugin.trainer.loop import train
from spf_plugin.trainer.mmdits import T5_TOKENS
from spf_plugin.trainer.processes import RectifiedFlow
from spf_plugin.trainer.settings import Settings
from tests import tiny
from tests.hosts.dits.kinds import Planted
from tests.hosts.dits.planted import spread

HAIR = (Target("blonde hair"),)
WEIGHTS = ("text_consistent_multiplier", "fine_grained_multiplier", "output_multiplier", "base_preservation_multiplier")
CAPTIONS = {
    "start": "blonde hair, a woman in a red coat, forest",
    "middle": "a woman, (blonde hair:1.2), forest",
    "end": "a man in a green shirt, street, blonde hair",
    "twice": "blonde hair, a girl with blonde hair, beach",
    "long": "a woman in a brown jacket, " * 10 + "blonde hair",
}


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With norms and T5."""
    return tiny.sd3(tmp_path_factory.mktemp("sd3"))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without norms and T5."""
    return tiny.sd3(tmp_path_factory.mktemp("sd3"), norms=False, t5=False)


@pytest.fixture(scope="module", params=["large", "small"])
def model(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.images(tmp_path_factory.mktemp("images"), size=(160, 128))


def settings(model: Path, images: Path, out: Path, spf: SPFConfig | None = None, **changes: Any) -> Settings:
    values: dict[str, Any] = {
        "steps": 4, "rank": 4, "alpha": 2.0, "learning_rate": 1e-2, "batch_size": 2, "seed": 3,
        "save_precision": "fp32", "device": "cpu",
    }  # fmt: skip
    return Settings(str(model), images, out, spf, **(values | changes))


def make_call(model: models.BaseModel, prompts: list[str], size: tuple[int, int] = (16, 16), seed: int = 0) -> Call:
    noisy = torch.randn(len(prompts), 4, *size, generator=torch.Generator().manual_seed(seed))
    return model.call(noisy, torch.full((len(prompts),), 400.0), model.encode(prompts), torch.zeros(len(prompts), 6))


# -- the model --------------------------------------------------------------------------------------------------------


def test_text_and_latents_are_those_of_the_pipeline(model: Path) -> None:
    """What is denoised in training is what the pipeline's own sampler denoises, and its VAE gives the picture back."""
    pipeline = models.load_pipeline(str(model), torch.float32)
    base = models.from_pipeline(pipeline)
    assert base.family == "sd3"
    assert isinstance(find(base.denoiser), DiffusersSD3)
    calls = []

    def keep(_module: object, _args: object, kwargs: dict[str, Any]) -> None:
        calls.append(kwargs)

    handle = base.denoiser.register_forward_pre_hook(keep, with_kwargs=True)
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    pipeline.set_progress_bar_config(disable=True)
    picture = pipeline(
        "a woman, blonde hair", num_inference_steps=2, guidance_scale=0, latents=latents, output_type="pt",
        height=128, width=128,
    ).images  # fmt: skip
    handle.remove()
    ours = base.call(latents, torch.tensor([1000.0]), base.encode(["a woman, blonde hair"]), torch.zeros(1, 6)).kwargs
    for name in ("encoder_hidden_states", "pooled_projections", "timestep"):
        torch.testing.assert_close(calls[0][name], ours[name])
    decoded = pipeline.vae.decode(vae.from_latents(base.vae, latents)).sample
    done = pipeline(
        "", num_inference_steps=1, sigmas=[1e-9], guidance_scale=0, latents=latents, output_type="pt", height=128,
        width=128,
    ).images  # fmt: skip
    torch.testing.assert_close((decoded / 2 + 0.5).clamp(0, 1), done, atol=1e-4, rtol=0)
    assert picture.shape == done.shape
    encoded = base.to_latents(torch.zeros(3, 128, 128), torch.Generator().manual_seed(0))
    posterior = base.vae.encode(torch.zeros(1, 3, 128, 128)).latent_dist
    noise = torch.randn(posterior.mean[0].shape, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(encoded, (posterior.mean[0] + posterior.std[0] * noise - 0.25) * 1.5)


def test_noise_and_target_are_those_of_diffusers_scheduler() -> None:
    """From the scheduler's own noisy latents one Euler step along the target leads back to the clean ones."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    process = RectifiedFlow(3.0)
    random = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, 6, 4, 8, 8, generator=random)
    timesteps = process.draw(6, random)
    noisy = process.noisy(latents, noise, timesteps)
    target = process.target(latents, noise, timesteps)
    torch.testing.assert_close(process.noise(latents, noisy, timesteps), noise, atol=1e-4, rtol=1e-4)
    for i, timestep in enumerate(timesteps.tolist()):
        scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
        scheduler.set_timesteps(sigmas=[timestep / 1000])
        at = scheduler.timesteps[0]
        assert float(at) == pytest.approx(timestep, rel=1e-5)
        torch.testing.assert_close(scheduler.scale_noise(latents[i], at[None], noise[i]), noisy[i])
        scheduler._step_index = None
        torch.testing.assert_close(
            scheduler.step(target[i], at, noisy[i]).prev_sample, latents[i], atol=1e-5, rtol=1e-4
        )


def test_times_are_logit_normal_and_shifted_as_the_sampler_shifts_them() -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    timesteps = RectifiedFlow(3.0).draw(40_000, torch.Generator().manual_seed(0)).double()
    sigma = timesteps / 1000
    unshifted = sigma / (3 - 2 * sigma)
    logits = torch.logit(unshifted)
    assert abs(float(logits.mean())) < 0.02
    assert float(logits.std()) == pytest.approx(1, abs=0.02)
    theirs = FlowMatchEulerDiscreteScheduler(shift=3.0).sigmas[500]  # of the unshifted sigma at the middle
    assert float(sigma.median()) == pytest.approx(float(theirs), abs=0.01)


# -- the family -------------------------------------------------------------------------------------------------------


@contextmanager
def recorded(denoiser: Any) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Queries and keys `[B, heads, N, d]` as the attention function of the joint blocks gets them."""
    import torch.nn.functional as F

    seen: list[tuple[Tensor, Tensor]] = []
    original = F.scaled_dot_product_attention

    def record(query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Tensor:
        seen.append((query, key))
        return original(query, key, value, *args, **options)

    F.scaled_dot_product_attention = record
    try:
        yield seen
    finally:
        F.scaled_dot_product_attention = original


@torch.no_grad()
def test_what_is_compared_is_what_the_blocks_attention_multiplies(model: Path) -> None:
    base = models.load(str(model))
    family = find(base.denoiser)
    layers = family.layers("all")
    assert [layer.name for layer in layers] == [f"transformer_blocks.{i}.attn" for i in range(4)]
    assert [layer.name for layer in family.layers("last")] == ["transformer_blocks.1.attn", "transformer_blocks.2.attn"]
    call = make_call(base, ["a woman, blonde hair", "a man"], (16, 24))
    image, length = 8 * 12, family.length(family.text(call))
    with capture(layers) as seen, recorded(base.denoiser) as attended:
        call.on(base.denoiser)
    joint = [pair for pair in attended if pair[0].shape[2] == image + length]  # not the image's own attention
    assert len(joint) == 4
    for layer, (query, key) in zip(layers, joint, strict=True):
        ours = family.tokens(layer, seen.queries[layer.name], seen.keys[layer.name], call)
        theirs = query[:, :, :image], key[:, :, image:]
        for mine, other in zip(ours, theirs, strict=True):
            assert torch.equal(mine, other.transpose(1, 2).flatten(2))
    assert family.grid(image, (16, 24)) == (8, 12)


@torch.no_grad()
def test_a_planted_key_is_where_it_was_planted(model: Path) -> None:
    """A word whose key answers to the left half of a wide image has its map there."""
    base = models.load(str(model))
    family = find(base.denoiser)
    call = make_call(base, ["a woman, blonde hair"], (16, 24))
    call.args[0][..., :12] += 6.0
    length = family.length(family.text(call))
    mask = family.text_mask(call)[0]

    def plant(output: Tensor, position: int, key: Tensor) -> Tensor:
        output = output.clone()
        if output.dim() == 4:
            output[:, :, position] = key
        else:
            output[:, position] = key.flatten()
        return output

    made = Planted(base.denoiser, call, ["all"], 3, [i for i in range(length) if not mask[i]], length, (16, 24), plant)
    found = spread(made, "all")
    assert found["grid"] == (8, 12)
    assert found["left"] > 0.4  # with T5 it is one key of 333
    assert found["right"] < 0.05
    assert found["top"] == pytest.approx(found["bottom"], abs=0.05)
    assert found["padding"] == 0


@pytest.mark.parametrize("full", [True, False], ids=["full", "base"])
@pytest.mark.parametrize("caption", CAPTIONS.values(), ids=CAPTIONS)
def test_spans_are_those_of_the_tokenizers(model: Path, caption: str, full: bool) -> None:
    """Against the offsets of both tokenizers, in the sequence that the pipeline makes of a caption."""
    base: Any = models.load(str(model))
    prompt = split(caption, [Target("blonde hair")])
    text = prompt.full if full else prompt.base
    pieces, end = [], 0
    for piece in prompt.pieces:
        if piece.in_full if full else piece.in_base:
            pieces.append((end, end + len(piece.text), piece))
            end += len(piece.text)
    from transformers import CLIPTokenizerFast

    expected: list[list[int]] = [[] for _ in prompt.phrases]
    target: list[int] = []
    tokenizers = [(CLIPTokenizerFast.from_pretrained(model / "tokenizer"), 1, CLIP - 2)]
    if base.pipeline.tokenizer_3 is not None:
        tokenizers.append((base.pipeline.tokenizer_3, CLIP, T5_TOKENS - 1))
    for tokenizer, start, room in tokenizers:
        offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True).offset_mapping[:room]
        for place, (_, stop) in enumerate(offsets):
            last = stop - 1  # a token may begin with the space before it
            piece = next(piece for begin, end, piece in pieces if begin <= last < end)
            if piece.kind is Kind.TARGET:
                target.append(start + place)
            elif piece.phrase >= 0:
                expected[piece.phrase].append(start + place)
    length = base.encode([text])["hidden"].shape[1]
    spans = find(base.denoiser).spans(prompt, base.tokenize, length, full=full)
    assert [list(phrase) for phrase in spans.phrases] == expected
    assert list(spans.target) == target
    assert bool(spans.target) == full or base.pipeline.tokenizer_3 is None


# -- a training -------------------------------------------------------------------------------------------------------


def test_without_weights_it_is_plain_bit_for_bit_and_with_them_it_is_not(
    model: Path, images: Path, tmp_path: Path
) -> None:
    files = {}
    for name, spf in {
        "plain": None,
        "off": SPFConfig(target=HAIR, **dict.fromkeys(WEIGHTS, 0)),
        "spf": SPFConfig(target=HAIR, log_every=1),
        "checkpointed": SPFConfig(target=HAIR, log_every=1),
    }.items():
        checkpointing = name == "checkpointed"
        run = settings(model, images, tmp_path / f"{name}.safetensors", spf, gradient_checkpointing=checkpointing)
        result = train(run)
        files[name] = load_file(result.path)
        if spf is not None and spf.active:
            assert result.run is not None
            assert result.run.problem is None
            assert result.run.batches == {"aligned": 2, "second": 2}
    assert files["plain"].keys() == files["off"].keys() == files["spf"].keys()
    assert all(torch.equal(files["plain"][key], files["off"][key]) for key in files["plain"])
    assert not all(torch.equal(files["plain"][key], files["spf"][key]) for key in files["plain"])
    for key, value in files["spf"].items():
        torch.testing.assert_close(files["checkpointed"][key], value, atol=1e-4, rtol=1e-4)


def test_the_reference_is_the_base_model_bit_for_bit_after_updates(
    model: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from spf_plugin.attachment import Attachment

    pristine = models.load(str(model)).denoiser
    compared = []
    original = Attachment._reference

    def beside(self: Any, call: Call, text: Any) -> Any:
        found = original(self, call, text)
        with torch.no_grad():
            compared.append(torch.equal(found.eps, call.on(pristine).sample))
        return found

    monkeypatch.setattr(Attachment, "_reference", beside)
    pristine.train()
    train(settings(model, images, tmp_path / "a.safetensors", SPFConfig(target=HAIR), steps=6))
    assert len(compared) == 3  # every second step shows the last one's noise again
    assert all(compared)


def test_diffusers_adds_what_was_trained(model: Path, images: Path, tmp_path: Path) -> None:
    """Every layer's weight, after diffusers fused the file into it, against the factors of the run."""
    kept: dict[str, Tensor] = {}

    def attach(network: Any, _trainer: object) -> Any:
        def end() -> None:
            for lora in network.unet_loras:
                up, down = lora.lora_up.weight.detach(), lora.lora_down.weight.detach()
                kept[lora.lora_name] = (up @ down) * (2.0 / 4)  # alpha / rank

        return end

    result = loop.train(settings(model, images, tmp_path / "a.safetensors", SPFConfig(target=HAIR)), attach=attach)
    pipeline = models.load_pipeline(str(model), torch.float32)
    before = {name: p.clone() for name, p in pipeline.transformer.named_parameters()}
    pipeline.load_lora_weights(str(tmp_path), weight_name="a.safetensors")
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    changed = {
        "lora_unet_" + name.removesuffix(".weight").replace(".", "_"): p - before[name]
        for name, p in pipeline.transformer.named_parameters()
        if not torch.equal(p, before[name])
    }
    unused = {"lora_unet_transformer_blocks_3_attn_add_q_proj"}  # the last block makes no text of its own
    assert changed.keys() == kept.keys() - unused
    assert sum("_attn_" in name for name in changed) == 4 * (4 + 3) + 3 - 1
    for name, value in changed.items():
        torch.testing.assert_close(value, kept[name], atol=1e-6, rtol=1e-4)
    with safe_open(result.path, "pt") as file:
        metadata = file.metadata()
    assert metadata["ss_base_model_version"].startswith("stable-diffusion-3")
    assert "modelspec.prediction_type" not in metadata
    assert json.loads(metadata["ss_network_args"])["spf_target"] == "blonde hair"


def test_bad_input(large: Path, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.safetensors"

    def message(spf: SPFConfig | None = None, **changes: Any) -> str:
        with pytest.raises(SPFError) as caught:
            train(settings(large, images, out, spf, **changes))
        assert not out.exists()
        return str(caught.value)

    assert "predicts a flow" in message(min_snr_gamma=5.0)
    assert "must be a multiple of 16" in message(resolution=136)
    assert "must be at most 192" in message(resolution=208)
    assert "plain LoRA only" in message(network_args={"algo": "lokr"})
    assert "SD1.x, SD2.x and SDXL only" in message(SPFConfig(target=HAIR, response="anchor", clip="x"))
