"""The response term: its maths against float64, decoders and encoders against the libraries, its place in a step."""

from __future__ import annotations

import gc
import json
import math
import os
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from portraitlab.model_files import CLIP_FOLDERS, DECODERS, MODEL_FOLDER
from spf_plugin.config import parse
from spf_plugin.core.schedule import one_step_prediction
from spf_plugin.enhancement import clip, decoders, limits
from spf_plugin.enhancement.term import Enhancement, _computes_in_bf16
from spf_plugin.errors import SPFError
from spf_plugin.families.latents import SD, SDXL, LatentSpace
from spf_plugin.step import Step
from tests import tiny
from tests.test_attachment import Run

ROOT = Path(__file__).parents[1]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def unit(*shape: int, seed: int = 0) -> Tensor:
    return F.normalize(random(*shape, seed=seed), dim=-1)


# -- maths --------------------------------------------------------------------------------------------------------


def slow_cosine(a: list[float], b: list[float]) -> float:
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(sum(x * x for x in a)) / math.sqrt(sum(y * y for y in b))


def test_anchor_and_directional() -> None:
    res, data, text, base = (unit(3, 7, seed=i) for i in range(4))
    for i in range(3):
        r, d, t, b = (x[i].double().tolist() for x in (res, data, text, base))
        minus = lambda u, v: [x - y for x, y in zip(u, v, strict=True)]  # noqa: E731
        anchor = 1 - slow_cosine(minus(r, t), minus(d, t))
        directional = 1 - slow_cosine(minus(r, d), minus(t, b))
        assert float(limits.anchor(res, data, text)[i]) == pytest.approx(anchor, abs=1e-6)
        assert float(limits.directional(res, data, text, base)[i]) == pytest.approx(directional, abs=1e-6)


def test_only_the_response_path_gets_a_gradient() -> None:
    res, data, text, base = (unit(2, 5, seed=i).requires_grad_() for i in range(4))
    (limits.anchor(res, data, text).sum() + limits.directional(res, data, text, base).sum()).backward()
    assert res.grad is not None
    assert data.grad is None or not data.grad.any()
    assert base.grad is None


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_one_step_prediction_gives_back_the_clean_latents(kind: str) -> None:
    clean, noise, abar = random(3, 4, 5, 6, seed=1), random(3, 4, 5, 6, seed=2), torch.tensor([0.9, 0.3, 0.01])
    a, s = abar.sqrt().view(-1, 1, 1, 1), (1 - abar).sqrt().view(-1, 1, 1, 1)
    target = noise if kind == "epsilon" else a * noise - s * clean
    found = one_step_prediction(a * clean + s * noise, target, abar, kind)
    torch.testing.assert_close(found, clean, rtol=1e-4, atol=1e-4)


def test_zero_terminal_signal_stays_finite() -> None:
    z, p = random(1, 4, 3, 3), random(1, 4, 3, 3, seed=1)
    for kind in ("epsilon", "v_prediction"):
        assert torch.isfinite(one_step_prediction(z, p, torch.zeros(1), kind)).all()
    with pytest.raises(ValueError, match="unknown prediction type"):
        one_step_prediction(z, p, torch.ones(1), "sample")


def test_limited() -> None:
    gradient, beside = random(2, 4, 3, 3), 2 * random(2, 4, 3, 3, seed=5)
    ratio = float(gradient.double().norm() / beside.double().norm())
    scaled, found = limits.limited(gradient, beside, ratio / 4)
    assert found == pytest.approx(ratio, rel=1e-5)
    torch.testing.assert_close(scaled, gradient / 4)
    assert torch.equal(limits.limited(gradient, beside, 2 * ratio)[0], gradient)
    assert limits.limited(torch.zeros(3), torch.zeros(3), 0.5)[0].tolist() == [0, 0, 0]


# -- preprocessing and encoders -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(90, 60), (64, 100), (32, 32), (48, 48)])
def test_preprocessing_agrees_with_the_library(height: int, width: int) -> None:
    from transformers import CLIPImageProcessor

    # Not black and white: Pillow clips the overshoot at edges after each of its two passes, a tensor only at the end.
    image = np.random.default_rng(0).integers(60, 196, (height // 4, width // 4, 3), dtype=np.uint8)
    image = np.kron(image, np.ones((4, 4, 1), dtype=np.uint8))
    processor = CLIPImageProcessor(size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48})
    theirs = processor(images=image, return_tensors="pt").pixel_values
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 127.5 - 1
    ours = clip.preprocess(pixels, 48, clip.OPENAI_MEAN, clip.OPENAI_STD)
    # Pillow also rounds to 8 bit after each pass; the rest agrees.
    torch.testing.assert_close(ours, theirs, atol=2 / 255 / min(clip.OPENAI_STD), rtol=0)


def test_transformers_folder_agrees_with_the_library(tmp_path: Path) -> None:
    from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

    folder = tiny.clip(tmp_path / "clip")
    encoder = clip.load(str(folder))
    model, tokenizer = CLIPModel.from_pretrained(folder), CLIPTokenizer.from_pretrained(folder)
    image = np.random.default_rng(1).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    with torch.no_grad():
        ids = tokenizer(["blonde hair", "a woman"], padding="max_length", max_length=20, return_tensors="pt")
        wanted = model(**ids, **processor(images=image, return_tensors="pt"))
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 127.5 - 1
    torch.testing.assert_close(encoder.image(pixels), wanted.image_embeds, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(encoder.text(["blonde hair", "a woman"]), wanted.text_embeds, rtol=1e-4, atol=1e-5)
    assert not any(p.requires_grad for p in encoder.parameters())


def test_open_clip_local_checkpoint(tmp_path: Path) -> None:
    """In its own process: open_clip wants torchvision, which the core and these tests do without."""
    site = ROOT / ".venv" / "host-site"
    script = f"""
import json, sys, warnings
warnings.simplefilter("ignore")
import torch, torch.nn.functional as F
library = torch.library.Library("torchvision", "DEF")
for name in ("nms", "qnms"):  # a torchvision for another build of torch: only its Python part is needed here
    try:
        library.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    except RuntimeError:
        pass
import open_clip
from safetensors.torch import save_file
config = {{"embed_dim": 8, "vision_cfg": {{"image_size": 32, "layers": 1, "width": 64, "patch_size": 8}},
          "text_cfg": {{"context_length": 20, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1}}}}
from pathlib import Path
Path({str(tmp_path)!r}, "spf-test.json").write_text(json.dumps(config))
open_clip.add_model_config(Path({str(tmp_path)!r}, "spf-test.json"))
torch.manual_seed(0)
model = open_clip.create_model("spf-test")
weights = Path({str(tmp_path)!r}, "w.safetensors")
save_file(model.state_dict(), weights)
from spf_plugin.enhancement import clip
encoder = clip.load(f"spf-test:{{weights}}")
from PIL import Image
import numpy as np
image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
transform = open_clip.image_transform(32, is_train=False)
pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 127.5 - 1
with torch.no_grad():
    wanted = F.normalize(model.eval().encode_image(transform(image)[None]), dim=-1)
    words = F.normalize(model.encode_text(open_clip.get_tokenizer("spf-test")(["blonde hair"])), dim=-1)
print(float((encoder.image(pixels) - wanted).abs().max()), float((encoder.text(["blonde hair"]) - words).abs().max()))
for bad in ("spf-tset:laion2b", "spf-test:laion2b", "spf-test:missing.safetensors"):
    try:
        clip.load(bad)
    except ValueError as error:
        print(error)
"""
    path = os.pathsep.join([str(ROOT), str(site), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    if "No module named 'torchvision'" in done.stderr or "No module named 'open_clip'" in done.stderr:
        pytest.skip("OPEN_CLIP IS NOT IMPORTABLE HERE: " + done.stderr.strip().splitlines()[-1])
    assert done.returncode == 0, done.stderr
    errors, unknown, tag, missing = done.stdout.strip().splitlines()[-4:]
    assert max(map(float, errors.split())) < 1e-5
    assert "open_clip knows no model 'spf-tset'; did you mean spf-test" in unknown
    assert "'laion2b' is neither a .safetensors checkpoint nor one of open_clip's weights" in tag
    assert "there is no file missing.safetensors" in missing


def test_a_missing_or_broken_clip_is_one_clear_message(tmp_path: Path) -> None:
    with pytest.raises(SPFError, match="there is no such folder"):
        clip.load(str(tmp_path / "nothing"))
    with pytest.raises(SPFError, match="there is no such folder"):
        clip.load(r"C:\models\clip")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SPFError, match=r"no readable config.json"):
        clip.load(str(tmp_path / "empty"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(SPFError, match="holds a 'bert' model"):
        clip.load(str(tmp_path / "other"))
    for content in ("[1]", "[" * 5000):
        (tmp_path / "other" / "config.json").write_text(content)
        with pytest.raises(SPFError, match=r"no readable config.json"):
            clip.load(str(tmp_path / "other"))
    folder = tiny.clip(tmp_path / "clip")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(SPFError, match="cannot be loaded"):
        clip.load(str(folder))


@pytest.mark.parametrize(
    "content",
    [
        "{", "[1]", "\0", '{"image_mean": 3}', '{"image_mean": [1, 2]}', '{"image_std": [1, 0, 1]}',
        '{"image_std": ["a", "b", "c"]}', '{"image_mean": [NaN, 0, 0]}', '{"image_std": null}',
    ],
)  # fmt: skip
def test_a_damaged_preprocessor_is_found_when_the_model_is_loaded(tmp_path: Path, content: str) -> None:
    folder = tiny.clip(tmp_path / "clip")
    (folder / "preprocessor_config.json").write_text(content)
    with pytest.raises(SPFError, match=r"preprocessor_config.json"):
        clip.load(str(folder))


def test_without_open_clip_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(SPFError, match=r"spf-plugin\[clip\]"):
        clip.load("ViT-B-32:laion2b_s34b_b79k")


# -- decoders -----------------------------------------------------------------------------------------------------


def test_fit_linear_finds_the_matrix_that_made_the_colours(tmp_path: Path) -> None:
    latents, weight, bias = random(3, 4, 6, 8), random(4, 3, seed=1), random(3, seed=2)
    colours = torch.einsum("nchw,cd->ndhw", latents, weight) + bias.view(1, 3, 1, 1)
    pixels = colours.repeat_interleave(8, 2).repeat_interleave(8, 3)
    found, error = decoders.fit_linear(latents, pixels)
    torch.testing.assert_close(found.weight, weight, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.bias, bias, rtol=1e-4, atol=1e-5)
    assert error < 1e-5
    decoders.save_linear(found, tmp_path / "m.safetensors")
    again = decoders.load(str(tmp_path / "m.safetensors"), SD, None, lambda: pytest.fail("not asked for"))
    torch.testing.assert_close(again(latents), found(latents))


def test_choice_of_decoder(tmp_path: Path) -> None:
    class Vae:
        def __init__(self, *blocks: int) -> None:
            self.config = SimpleNamespace(block_out_channels=list(blocks))

    own: Any = Vae()

    def load(name: str, known: bool = True, space: LatentSpace | None = SD) -> Any:
        return decoders.load(name, space, Vae(128, 256, 512, 512) if known else Vae(32, 64), lambda: own)

    assert isinstance(load("auto"), decoders.LinearDecoder)
    assert load("auto", known=False) is own
    assert load("vae") is load("auto", space=None) is own
    assert not torch.equal(load("linear").weight, load("linear", space=SDXL).weight)
    for name in ("linear", "tiny"):
        with pytest.raises(SPFError, match=r"[Uu]se spf_decoder=vae"):
            load(name, space=None)
    with pytest.raises(SPFError, match="spf decoder --model"):
        load("linear", known=False)
    with pytest.raises(SPFError, match="no AutoencoderTiny can be loaded"):
        load(str(tmp_path))
    (tmp_path / "x.safetensors").write_bytes(b"junk")
    with pytest.raises(SPFError, match="damaged"):
        load(str(tmp_path / "x.safetensors"))


@pytest.mark.skipif(not (DECODERS / "scores.json").exists(), reason="NO DECODERS in portraitlab/decoders")
def test_the_three_decoders_agree_on_the_embedded_model() -> None:
    """Root mean square against the model's own decoder, pixels in [-1, 1], within what scores.json states."""
    from portraitlab.autoencoder import to_tensor
    from portraitlab.portraits import render_batch, sample_person
    from spf_plugin.trainer.models import load

    stated = json.loads((DECODERS / "scores.json").read_text())["rms"]
    model = load(str(MODEL_FOLDER))
    own = decoders.VaeDecoder(model.vae, model.vae.config.scaling_factor)
    images = to_tensor(render_batch(sample_person(np.random.default_rng([5, 5])) for _ in range(12))[0])
    random = torch.Generator().manual_seed(0)
    z = torch.stack([model.to_latents(image, random) for image in images])
    with torch.no_grad():
        reference = own(z)
        linear = decoders.load_linear(DECODERS / "linear.safetensors")(z)
        tiny = decoders.load_tiny(str(DECODERS / "tiny"))(z)
    assert reference.shape == tiny.shape == (12, 3, 128, 128)
    assert linear.shape == (12, 3, 16, 16)
    assert float((linear - F.interpolate(reference, size=(16, 16), mode="area")).square().mean().sqrt()) < (
        1.3 * stated["linear"]
    )
    assert float((tiny - reference).square().mean().sqrt()) < 1.3 * stated["tiny"]


# -- in a step ----------------------------------------------------------------------------------------------------


class FlatClip(nn.Module):
    """Image and text as eight numbers, by fixed random projections: no library."""

    size, name = 12, "flat"

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Linear(27, 8, bias=False)
        with torch.no_grad():
            self.model.weight.copy_(random(8, 27, seed=3))
        self.calls = {"image": 0, "text": 0}
        self.spoil = False

    @property
    def device(self) -> torch.device:
        return self.model.weight.device

    def image(self, pixels: Tensor) -> Tensor:
        self.calls["image"] += 1
        x = F.adaptive_avg_pool2d(pixels, (3, 3)).flatten(1)
        return F.normalize(self.model(x) * (float("nan") if self.spoil else 1.0), dim=-1)

    def text(self, texts: Any) -> Tensor:
        self.calls["text"] += 1
        return torch.cat([unit(1, 8, seed=sum(map(ord, t))) for t in texts])


CAPTIONS = ["a woman, red coat, blonde hair", "a man, blue shirt, blonde hair"]
NO_ALIGNMENT = {
    f"spf_{name}_multiplier": "0" for name in ("text_consistent", "fine_grained", "output", "base_preservation")
}
NO_PAIRS = {"spf_base_preservation_multiplier": "0"}


def enhanced(captions: list[str] = CAPTIONS, **settings: str) -> Run:
    """A toy run with the response term; see tests/test_attachment.py. Its timestep is 500."""
    run = Run(captions, **{"spf_response": "anchor", **settings})
    host: Any = run.host
    clean = random(len(captions), 4, 12, 16, seed=9)
    host.clean_images = lambda batch: (clean, None)
    run.clip = FlatClip()  # type: ignore[attr-defined]
    run.spf.enhancement = Enhancement(run.spf.config, host, run.clip, decoders.LinearDecoder.of(SD))  # type: ignore
    return run


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), False), ((8, 6), True)])
def test_bf16_where_the_card_has_units_for_it(
    capability: tuple[int, int], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert _computes_in_bf16(torch.device("cuda")) is expected
    assert not _computes_in_bf16(torch.device("cpu"))


@pytest.mark.parametrize(("mode", "region"), [("anchor", "all"), ("anchor", "map"), ("directional", "all")])
def test_gradient_equals_the_plain_sum_of_losses(mode: str, region: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a slow version: the whole term in one graph, through the UNet, beside the diffusion loss, which acts
    everywhere or inside the map; the term acts inside the map."""
    monkeypatch.setattr(limits, "MAX_RATIO", 1e6)
    run = enhanced(**NO_ALIGNMENT, spf_response=mode, spf_diffusion_region=region)
    maps: list[Tensor] = []
    call = run.spf.enhancement

    def spy(step: Step, batch: Any) -> Any:
        maps.append(step.result.map)
        return call(step, batch)  # type: ignore[misc]

    spy.skipped = 0  # type: ignore[attr-defined]
    run.spf.enhancement = spy  # type: ignore[assignment]
    run.step()
    found = run.weight.grad
    assert found is not None

    host, z = run.host, run.z
    abar = torch.full((2,), float(host.noise_schedule.alphas_cumprod[500]))
    run.spf.close()
    prediction = run.base(CAPTIONS)
    with run.spf.adapter.bypassed():
        reference = run.base(["a woman, red coat", "a man, blue shirt"])
    rgb = torch.tensor(SD.weight)

    def embed(latents: Tensor) -> Tensor:
        return run.clip.image(torch.einsum("nchw,cd->ndhw", latents, rgb))  # type: ignore[attr-defined]

    def x0(eps: Tensor) -> Tensor:
        return (z - (1 - abar).sqrt().view(-1, 1, 1, 1) * eps) / abar.sqrt().view(-1, 1, 1, 1)

    texts = run.clip.text  # type: ignore[attr-defined]
    if mode == "anchor":
        target, data = texts(["blonde hair"] * 2), embed(host.clean_images(None)[0])  # type: ignore[attr-defined]
        term = 1 - F.cosine_similarity(embed(x0(prediction)) - target, data - target)
    else:
        words = texts(CAPTIONS) - texts(["a woman, red coat", "a man, blue shirt"])
        term = 1 - F.cosine_similarity(embed(x0(prediction)) - embed(x0(reference)), words)
    m = maps[0]
    gate = m / m.mean(dim=(1, 2, 3), keepdim=True).clamp_min(0.1) if region == "map" else torch.ones_like(m)
    assert (region == "all") == bool((gate == 1).all())
    inside = prediction.detach() + gate * (prediction - prediction.detach())
    (pulled,) = torch.autograd.grad((abar * term).mean(), prediction, retain_graph=True)
    loss = inside.square().mean() + (m * pulled * prediction).sum()
    (wanted,) = torch.autograd.grad(loss, run.weight)
    (without,) = torch.autograd.grad(run.base(CAPTIONS).square().mean(), run.weight)
    assert not torch.allclose(wanted, without, rtol=1e-2)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
    assert all(p.grad is None for p in [*run.unet.parameters(), *run.clip.parameters()])  # type: ignore[attr-defined]


def test_loss_value_is_not_touched_and_ratio_is_logged_and_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    grads = []
    for limit in (0.01, 1e6, 1e-9):
        monkeypatch.setattr(limits, "MAX_RATIO", limit)
        run = enhanced(**NO_ALIGNMENT)
        prediction = run.step()
        assert run.host.accelerator.losses[-1] == pytest.approx(float(prediction.detach().square().mean()))
        assert run.spf.numbers.values["spf/response_ratio"] > 0.01
        assert 0 < run.spf.numbers.values["spf/response"] <= 2
        assert run.weight.grad is not None
        grads.append(run.weight.grad)
    small, large = (grad - grads[2] for grad in grads[:2])
    assert float(small.norm()) < 0.1 * float(large.norm())


def test_it_cannot_act_outside_the_map() -> None:
    run = enhanced(**NO_ALIGNMENT, spf_map="paper")
    seen: list[tuple[Tensor, Tensor]] = []
    call = run.spf.enhancement

    def spy(step: Step, batch: Any) -> Any:
        term = call(step, batch)  # type: ignore[misc]
        seen.append((step.result.map, term.gradient))  # type: ignore[union-attr]
        return term

    spy.skipped = 0  # type: ignore[attr-defined]
    run.spf.enhancement = spy  # type: ignore[assignment]
    run.step()
    control_map, gradient = seen[0]
    closed = (control_map == 0).expand_as(gradient)
    assert closed.any()
    assert float(gradient[closed].abs().max()) == 0
    assert float(gradient.abs().max()) > 0


def test_not_finite_is_left_out_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    run = enhanced(**NO_ALIGNMENT)
    run.clip.spoil = True  # type: ignore[attr-defined]
    for _ in range(3):
        run.step()
    assert run.weight.grad is not None
    assert torch.isfinite(run.weight.grad).all()
    assert run.spf.numbers.values["spf/response_skipped"] == 3
    assert caplog.text.count("not finite") == 1


@pytest.mark.parametrize(
    ("settings", "last", "steps"), [({}, 0.51, 4), ({}, 0.5, 0), ({"spf_response": "off"}, 0.51, 0)]
)
def test_gates(settings: dict[str, str], last: float, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_LEVEL", last)  # the toy's timestep is 500
    run = enhanced(**NO_PAIRS, **settings)
    if not run.spf.config.enhances:
        run.spf.enhancement = None
    for _ in range(4):
        run.step()
    data = 2 if steps else 0  # the two training images, once
    assert run.clip.calls["image"] == steps + data  # type: ignore[attr-defined]


def test_images_and_texts_are_embedded_once_and_the_second_step_of_a_pair_has_none() -> None:
    run = enhanced()
    for _ in range(5):
        run.step()
    assert run.clip.calls == {"image": 3 + 2, "text": 1}  # type: ignore[attr-defined]


def test_samples_without_target_have_no_term() -> None:
    run = enhanced(["a woman, red coat", "a man"])
    run.step()
    assert run.clip.calls["image"] == 0  # type: ignore[attr-defined]


def test_pixels_serve_where_there_are_no_latents() -> None:
    run = enhanced()
    pixels = random(2, 3, 96, 128, seed=4).clamp(-1, 1)
    run.host.clean_images = lambda batch: (None, pixels)  # type: ignore[attr-defined]
    run.step()
    assert "spf/response" in run.spf.numbers.values


def test_nothing_of_a_step_survives_it() -> None:
    run = enhanced(**NO_PAIRS)
    run.step()
    kept: list[weakref.ref[Tensor]] = []
    call = run.spf.enhancement.__call__  # type: ignore[union-attr]

    def spy(step: Step, batch: Any) -> Any:
        term = call(step, batch)
        kept.extend(weakref.ref(t) for t in (step.response.eps, term.gradient, step.result.map))
        return term

    spy.skipped = 0  # type: ignore[attr-defined]
    run.spf.enhancement = spy  # type: ignore[assignment]
    for _ in range(3):
        run.step()
    gc.collect()
    assert len(kept) == 9
    assert not any(ref() is not None for ref in kept)


def test_settings() -> None:
    config = parse({"spf_target": "hat", "spf_response": "directional"})
    assert config.enhances
    assert not parse({"spf_target": "hat"}).enhances
    assert parse(config.to_metadata()) == config
    with pytest.raises(SPFError) as caught:
        parse({"spf_response": "ankor", "spf_response_max_timestep": "600", "spf_clip_offload": "true"})
    assert len(caught.value.problems) == 3
    assert "did you mean anchor" in str(caught.value)


@pytest.mark.skipif(not (CLIP_FOLDERS[0] / "config.json").exists(), reason="NO CLIP in portraitlab/clip")
def test_the_portrait_clip_tells_the_targets_apart() -> None:
    scores = json.loads((CLIP_FOLDERS[0] / "scores.json").read_text())["zero_shot"]
    assert scores["blonde (AUC)"] > 0.9
    encoder = clip.load(str(CLIP_FOLDERS[0]))
    from portraitlab.autoencoder import to_tensor
    from portraitlab.portraits import counterfactual, sample_person

    rng = np.random.default_rng(11)
    people = [sample_person(rng) for _ in range(24)]
    pairs = [counterfactual(person, 128, hair_colour="blonde") for person in people]
    before, after = (to_tensor(np.stack([getattr(p, name) for p in pairs])) for name in ("without", "with_"))
    text = encoder.text(["blonde hair"])[0]
    with torch.no_grad():
        rise = encoder.image(after) @ text - encoder.image(before) @ text
    assert float((rise > 0).float().mean()) > 0.9
