"""Training steps, the autoencoder's scale, and the exported model folder."""

from __future__ import annotations

import os
import signal

import numpy as np
import pytest
import torch

from portraitlab.autoencoder import SCALING_FACTOR, build_autoencoder, decode, encode, normalise, psnr, to_tensor
from portraitlab.export_base import export
from portraitlab.model_files import DIT_FOLDER, JUDGE_FILE, MODEL_FOLDER, load_pipeline, sample, sheet
from portraitlab.portraits import BASE_RATES, render_batch, sample_person
from portraitlab.text import save_tokenizer
from portraitlab.train_base import NoisePrediction, build_unet, snr_weights
from portraitlab.train_dit import FlowMatching, load_encoders
from portraitlab.training import Trainer

exported = pytest.mark.skipif(not (MODEL_FOLDER / "model_index.json").exists(), reason="no model exported yet")

SD15_BLOCKS = {
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "in_channels": 4,
    "out_channels": 4,
}


def portraits(count: int, seed: int):
    rng = np.random.default_rng(seed)
    persons = [sample_person(rng, BASE_RATES) for _ in range(count)]
    return persons, render_batch(persons)[0]


def test_loss_weights_match_the_definition():
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    alphas = np.cumprod(1 - betas)
    found = snr_weights(torch.tensor(alphas), torch.tensor([0, 100, 500, 999]))
    for t, weight in zip((0, 100, 500, 999), found.tolist(), strict=True):
        snr = alphas[t] / (1 - alphas[t])
        assert weight == pytest.approx(min(snr, 5.0) / snr * max(1.0, snr**-0.5), rel=1e-6)


def test_noise_schedule_is_diffusers_ddpm():
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(1000, 0.00085, 0.012, "scaled_linear")
    recipe = NoisePrediction(None, seed=0, device="cpu")
    torch.testing.assert_close(recipe.alphas_cumprod, scheduler.alphas_cumprod)


def test_unet_has_sd15s_block_structure():
    config = build_unet().config
    for key, value in SD15_BLOCKS.items():
        assert (list(config[key]) if isinstance(value, list) else config[key]) == value, key


def test_normalise_gives_unit_latents_and_the_same_pictures():
    torch.manual_seed(0)
    vae = build_autoencoder().eval()
    _, pictures = portraits(4, 1)
    before = encode(vae, pictures)
    decoded = decode(vae, before)
    log_variance = vae.encode(to_tensor(pictures)).latent_dist.logvar
    std = before.std((0, 2, 3))
    normalise(vae, before.mean((0, 2, 3)), std)
    after = encode(vae, pictures) * SCALING_FACTOR
    torch.testing.assert_close(after.mean((0, 2, 3)), torch.zeros(4), atol=1e-3, rtol=0)
    torch.testing.assert_close(after.std((0, 2, 3)), torch.ones(4), atol=1e-3, rtol=0)
    torch.testing.assert_close(decode(vae, after / SCALING_FACTOR), decoded, atol=1e-4, rtol=1e-4)
    shift = vae.encode(to_tensor(pictures)).latent_dist.logvar - log_variance
    expected = -2 * (std * SCALING_FACTOR).log()[None, :, None, None]
    torch.testing.assert_close(shift, expected.expand_as(shift), atol=1e-3, rtol=0)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def make_recipe(request, tokenizer, random_encoders):
    """Makes the recipe of the kind that the test is run for, with the same weights every time."""
    if request.param == "unet":
        return lambda: NoisePrediction(tokenizer, seed=3, device="cpu")
    return lambda: FlowMatching(*load_encoders(random_encoders), seed=3, device="cpu")


@pytest.mark.parametrize("make_recipe", ["unet", "dit"], indirect=True)
def test_a_resumed_run_is_the_same_run(tmp_path, make_recipe):
    persons, _ = portraits(8, 2)
    latents = torch.randn(8, 4, 16, 16, generator=torch.Generator().manual_seed(0)).half()
    options = {"images": 6, "batch": 2, "lr": 1e-3, "seed": 3, "device": "cpu"}
    straight = Trainer(make_recipe(), **options)
    losses = [straight.train_step(latents, persons) for _ in range(3)]
    first = Trainer(make_recipe(), **options)
    first.train_step(latents, persons)
    first.save(tmp_path / "base.pt")
    second = Trainer(make_recipe(), **options)
    second.load(tmp_path / "base.pt")
    assert [second.train_step(latents, persons) for _ in range(2)] == losses[1:]
    for a, b in zip(straight.parameters + straight.ema, second.parameters + second.ema, strict=True):
        assert torch.equal(a, b)
    longer = Trainer(make_recipe(), **{**options, "images": 128})
    longer.load(tmp_path / "base.pt")
    assert longer.extended == [[2, 6]]
    with pytest.raises(ValueError, match="same options"):
        Trainer(make_recipe(), **{**options, "lr": 2e-3}).load(tmp_path / "base.pt")


@pytest.mark.parametrize("make_recipe", ["dit"], indirect=True)
def test_a_terminated_run_goes_on_to_the_same_weights(tmp_path, make_recipe, monkeypatch):
    persons, _ = portraits(8, 2)
    latents = torch.randn(8, 4, 16, 16, generator=torch.Generator().manual_seed(0)).half()
    options = {"images": 6, "batch": 2, "lr": 1e-3, "seed": 3, "device": "cpu"}
    straight, stopped, resumed = (Trainer(make_recipe(), **options) for _ in range(3))
    assert straight.run("straight", latents, persons, tmp_path / "straight.pt", 5)
    loss = stopped.recipe.loss

    def terminated(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return loss(*args)

    monkeypatch.setattr(stopped.recipe, "loss", terminated)
    before = signal.getsignal(signal.SIGTERM)
    assert not stopped.run("stopped", latents, persons, tmp_path / "base.pt", 5)
    assert stopped.done == 2
    assert resumed.run("resumed", latents, persons, tmp_path / "base.pt", 5)
    assert signal.getsignal(signal.SIGTERM) == before
    for a, b in zip(straight.parameters + straight.ema, resumed.parameters + resumed.ema, strict=True):
        assert torch.equal(a, b)


def test_export_without_a_checkpoint_says_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match="train_base"):
        export(tmp_path, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_loading_an_empty_folder_says_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match="train_base"):
        load_pipeline(tmp_path)


def test_sheet_keeps_every_pixel_in_reading_order():
    images = np.arange(5 * 2 * 3 * 3, dtype=np.uint8).reshape(5, 2, 3, 3)
    picture = sheet(images, 3)
    assert picture.shape == (4, 9, 3)
    assert np.array_equal(picture[2:4, 3:6], images[4])
    assert (picture[2:4, 6:9] == 255).all()


@exported
def test_shipped_model_loads_has_sd15s_blocks_and_is_small():
    pipe = load_pipeline()
    for key, value in SD15_BLOCKS.items():
        found = pipe.unet.config[key]
        assert (list(found) if isinstance(value, list) else found) == value, key
    assert list(pipe.unet.config["block_out_channels"]) == [64, 64, 128, 128]
    assert pipe.unet.config["cross_attention_dim"] == pipe.text_encoder.config.hidden_size == 64
    assert pipe.vae.config["scaling_factor"] == SCALING_FACTOR
    assert pipe.safety_checker is None
    for folder in (MODEL_FOLDER, DIT_FOLDER):
        assert sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) <= 30 * 2**20
    if JUDGE_FILE.exists():
        assert JUDGE_FILE.stat().st_size < 1e6


@exported
def test_shipped_autoencoder_has_unit_latents_and_recognisable_portraits():
    pipe = load_pipeline()
    _, pictures = portraits(24, 99)
    latents = encode(pipe.vae, pictures) * SCALING_FACTOR
    assert abs(float(latents.std()) - 1) < 0.1
    assert abs(float(latents.mean())) < 0.1
    assert psnr(decode(pipe.vae, latents / SCALING_FACTOR), to_tensor(pictures)) > 25


@exported
def test_shipped_model_draws_the_same_image_for_a_seed_in_any_batch():
    pipe = load_pipeline()
    texts = ["a woman, black hair, red background", "a man, grey hair, blue background"]
    both = sample(pipe, texts, [1, 2], steps=3)
    alone = sample(pipe, texts[1:], [2], steps=3)
    assert both.shape == (2, 128, 128, 3)
    assert np.abs(both[1].astype(int) - alone[0].astype(int)).max() <= 2
