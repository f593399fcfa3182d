"""The transformer's base: its loss, its text encoders, and the folder that diffusers reads."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from portraitlab.autoencoder import build_autoencoder
from portraitlab.captions import DROP, caption, phrases
from portraitlab.export_base import export
from portraitlab.lab import app, measuring, peers, results
from portraitlab.model_card import card
from portraitlab.model_files import load_pipeline, sample
from portraitlab.portraits import BALANCED_RATES, BASE_RATES, sample_person
from portraitlab.train_dit import FlowMatching, load_encoders
from portraitlab.train_text import LAYERS, Readout, claims, counterpart, is_true, says, train
from portraitlab.training import Trainer


@pytest.fixture(scope="module")
def recipe(random_encoders):
    return FlowMatching(*load_encoders(random_encoders), seed=0, device="cpu")


def test_the_target_is_what_diffusers_sampler_follows(recipe, monkeypatch):
    """A model that leads the scheduler from the noisy latents back to the clean ones in one step has no loss."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    clean = torch.randn(4, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    calls = []

    def perfect(noisy, states, pooled, timesteps, **_):
        calls.append((noisy, timesteps))
        out = []
        for row, timestep, goal in zip(noisy, timesteps, clean, strict=True):
            scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=1.0)
            scheduler.set_timesteps(sigmas=[float(timestep) / 1000])
            assert float(scheduler.timesteps[0]) == pytest.approx(float(timestep), rel=1e-5)
            still = scheduler.step(torch.zeros_like(row), scheduler.timesteps[0], row).prev_sample
            scheduler._step_index = None
            moved = scheduler.step(torch.ones_like(row), scheduler.timesteps[0], row).prev_sample
            out.append((goal - still) / (moved - still))
        return (torch.stack(out),)

    monkeypatch.setattr(recipe, "transformer", perfect)
    loss = recipe.loss(clean, ["a man"] * 4, torch.Generator().manual_seed(2))
    assert float(loss) < 1e-6
    noisy, timesteps = calls[0]
    assert not torch.allclose(noisy, clean, atol=0.1)
    assert len(set(timesteps.tolist())) == 4


def test_times_are_even_before_the_shift(recipe, monkeypatch):
    seen = []

    def record(noisy, states, pooled, timesteps, **_):
        seen.append(timesteps)
        return (noisy,)

    monkeypatch.setattr(recipe, "transformer", record)
    recipe.loss(torch.zeros(20_000, 4, 1, 1), [""], torch.Generator().manual_seed(0))
    sigmas = (seen[0].double() / 1000).sort().values
    quantiles = {0.25: 0.4, 0.5: 2 / 3, 0.75: 6 / 7}  # with a shift of 2
    for share, sigma in quantiles.items():
        assert abs(float(sigmas[int(share * len(sigmas))]) - sigma) < 0.01
    assert 0 <= float(sigmas.min()) <= float(sigmas.max()) <= 1


def test_the_exported_folder_is_a_stable_diffusion_3_pipeline(tmp_path, random_encoders):
    from diffusers import StableDiffusion3Pipeline

    work = tmp_path / "work"
    for folder in random_encoders:
        shutil.copytree(folder, work / folder.name)
    recipe = FlowMatching(*load_encoders(random_encoders), seed=0, device="cpu")
    trainer = Trainer(recipe, images=4, batch=2, lr=1e-3, seed=0, device="cpu")
    rng = np.random.default_rng(0)
    persons = [sample_person(rng, BASE_RATES) for _ in range(4)]
    for _ in range(2):
        trainer.train_step(torch.randn(4, 4, 16, 16).half(), persons)
    trainer.save(work / "base.pt")
    build_autoencoder().save_pretrained(work / "vae")
    texts = ["a man, blonde hair, hat", ""]
    states, pooled = recipe.encode(texts)

    folder, facts = export(work, tmp_path / "model")
    assert facts["images_seen"] == 4
    assert sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) <= 30 * 2**20
    pipe = load_pipeline(folder)
    assert isinstance(pipe, StableDiffusion3Pipeline)
    for a, b in zip(pipe.transformer.parameters(), trainer.ema, strict=True):
        assert torch.equal(a, b.half().float())
    read, _, read_pooled, _ = pipe.encode_prompt(texts, texts, texts, do_classifier_free_guidance=False)
    torch.testing.assert_close(read, states, atol=5e-3, rtol=5e-3)
    torch.testing.assert_close(read_pooled, pooled, atol=5e-3, rtol=5e-3)
    assert sample(pipe, texts[:1], [0], steps=2).shape == (1, 128, 128, 3)
    page = card(folder)
    assert "| hat |" in page
    assert "(hat, scarf, earrings) were never shown" in page
    assert page.count("\\\n") == 1  # of the command in two lines


def test_the_lab_trains_and_measures_on_it_and_keeps_it_apart(tmp_path, random_encoders, monkeypatch):
    """A plain LoRA, SPF and a peer that makes noise of its own, on an untrained transformer."""
    work = tmp_path / "work"
    for folder in random_encoders:
        shutil.copytree(folder, work / folder.name)
    recipe = FlowMatching(*load_encoders(random_encoders), seed=0, device="cpu")
    trainer = Trainer(recipe, images=4, batch=2, lr=1e-3, seed=0, device="cpu")
    persons = [sample_person(np.random.default_rng(0), BASE_RATES) for _ in range(4)]
    trainer.train_step(torch.randn(4, 4, 16, 16).half(), persons)
    trainer.save(work / "base.pt")
    build_autoencoder().save_pretrained(work / "vae")
    folder, _ = export(work, tmp_path / "model")
    monkeypatch.setattr(results, "PUBLISHED", tmp_path / "lab.jsonl")
    monkeypatch.setattr(peers, "CLASS_IMAGES", 2)
    monkeypatch.setattr(measuring, "SAMPLER_STEPS", 2)
    words = ["--rows", "plain,spf,prior-preservation-1", "--seeds", "0", "--steps", "4", "--prompts", "2"]
    done = CliRunner().invoke(app.app, ["run", *words, "--out", str(tmp_path / "lab"), "--model", str(folder)])
    assert done.exit_code == 0, done.output
    found = results.read(tmp_path / "lab" / "results", tmp_path / "none")
    assert sorted(result.row for result in found.values()) == ["base", "plain", "prior-preservation-1", "spf"]
    assert {result.base for result in found.values()} == {"dit"}
    assert all(np.isfinite(list(result.scores.values())).all() for result in found.values())
    results.publish(found.values())
    assert results.stored(tmp_path / "lab.jsonl") == found
    for base, shown in (("dit", True), ("unet", False)):
        table = CliRunner().invoke(app.app, ["table", "--base", base, "--out", str(tmp_path / "lab")])
        assert ("prior-preservation-1" in table.output) == shown
    assert "choose one of unet, dit" in CliRunner().invoke(app.app, ["table", "--base", "x"]).output


def test_what_a_phrase_claims_is_true_of_whom_captions_describe_with_it():
    rng = np.random.default_rng(3)
    said, used = claims(), set()
    for _ in range(1500):
        person = sample_person(rng, BALANCED_RATES)
        for phrase in (p.text.removeprefix("wearing a ") for p in phrases(person, rng)):
            used.add(phrase)
            for name, value in said.get(phrase, {}).items():
                assert getattr(person, name) == value, phrase
    # Styles and textures are said before "hair" and "background" only.
    assert set(said) - used <= {"long", "bob cut", "hair bun", "curly", "short", "swept"} | {
        f"{texture} {word}"
        for texture in ("plain", "striped", "gradient", "dotted", "polka dot")
        for word in ("background", "backdrop")
    }


def test_a_text_says_what_its_phrases_are_about():
    """Captions, taken apart again: what they say is true, of nobody else, and all of it if no part is left out."""
    topics = {"hair": "hair_colour", "eyes": "eye_colour", "clothes": "clothes_colour"}
    rng = np.random.default_rng(6)
    persons = [sample_person(rng, BALANCED_RATES) for _ in range(60)]
    for person in persons:
        text = caption(person, rng, dict.fromkeys(DROP, 0.0))
        said = says(text)
        assert is_true(said, person)
        assert not any(is_true(said, other) for other in persons if other is not person)
        for topic in DROP:
            name = topics.get(topic, topic)
            assert name in said or getattr(person, name) is False, text
    assert says("a person with long blond hair, polka dot red backdrop, wearing a blue tee") == {
        "hair_style": "long", "hair_colour": "blonde", "texture": "dotted", "background": "red",
        "clothes_colour": "blue", "clothes": "t-shirt",
    }  # fmt: skip
    assert says("a person") == {}


def test_a_counterpart_differs_in_one_attribute_or_has_two_colours_exchanged():
    rng = np.random.default_rng(4)
    exchanged = 0
    for _ in range(200):
        person = sample_person(rng, BALANCED_RATES)
        other = counterpart(person, rng)
        changed = {name for name, value in person.labels().items() if other.labels()[name] != value}
        if changed == {"clothes_colour", "background"}:
            assert (other.clothes_colour, other.background) == (person.background, person.clothes_colour)
            exchanged += 1
        else:
            assert len(changed) == 1 or changed == {"glasses", "sunglasses"}
        assert other.geometry == person.geometry
    assert 10 < exchanged < 40


def test_what_a_phrase_says_is_read_off_its_last_word(random_encoders):
    _, (tokenizer, _) = load_encoders(random_encoders)
    readout = Readout(tokenizer, 4)
    names = {column: pair for pair, column in readout.columns.items()}
    rng = np.random.default_rng(6)
    for _ in range(50):
        text = caption(sample_person(rng, BALANCED_RATES), rng)
        ids = tokenizer(text, max_length=40, truncation=True).input_ids
        read = {}
        for place, columns in readout.places(text):
            word = tokenizer.decode(ids[place]).strip()
            said = dict(names[column] for column in columns)
            assert any(claim.endswith(word) and what.items() <= said.items() for claim, what in claims().items())
            read |= said
        assert read == says(text), text

    with torch.no_grad():
        readout.linear.weight.copy_(torch.zeros(len(names), 4))
        readout.linear.bias.zero_()
    torch.testing.assert_close(
        readout(torch.randn(2, 40, 4), ["a man, hat", "blonde hair"]), torch.tensor(2.0).log() * len(names)
    )


def test_a_trained_text_encoder_is_read_back_with_its_figures(tmp_path):
    torch.manual_seed(0)
    summary = train(tmp_path, seed=5, portraits=12, images=16, batch=8)
    assert summary == json.loads((tmp_path / "scores.json").read_text())
    assert set(summary["separation"]) == set(claims())
    assert all(0 <= value <= 1 for value in summary["separation"].values())
    encoders, tokenizers = load_encoders([tmp_path])
    ids = tokenizers[0](["a man, hat"], return_tensors="pt").input_ids
    out = encoders[0](ids, output_hidden_states=True)
    assert out.text_embeds.shape == (1, 64)
    assert len(out.hidden_states) == LAYERS + 1
    assert not any(p.requires_grad for p in encoders[0].parameters())
