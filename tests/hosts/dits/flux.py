"""FLUX.1 dev: three double and four single blocks of four heads, CLIP-L, T5 and the VAE in small."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from spf_plugin.core.prompt import Prompt, Spans
from spf_plugin.families.flux import Flux as Family
from spf_plugin.seam import Call
from tests import tiny
from tests.hosts.dits.common import CAPTIONS, VOCABULARY, random_weights, shapes, shifted, t5_tokenizer
from tests.hosts.dits.joint import Joint
from tests.hosts.dits.kinds import Planted

SCRIPT, NETWORK, TRAINER = "flux_train_network.py", "networks.lora_flux", "FluxNetworkTrainer"
CACHED = {"cache_text_encoder_outputs": True}
STEADY = CACHED  # T5
DROPPED: dict[str, Any] = {}  # it drops no cached text
PRECISION = "no"
DOUBLE, SINGLE = 3, 4
TENSORS = (DOUBLE * 10 + SINGLE * 3) * 3  # blocks, linear layers, tensors of each
WORDS, LENGTH, SIZE = 9, 20, (16, 24)  # of the planted call


def options(models: Path) -> dict[str, Any]:
    return {
        "pretrained_model_name_or_path": models / "dit.safetensors",
        "clip_l": models / "clip_l.safetensors",
        "t5xxl": models / "t5xxl.safetensors",
        "ae": models / "ae.safetensors",
        "tokenizer_cache_dir": models,
        "t5xxl_max_token_length": 40,
        "model_prediction_type": "raw",
        "cache_latents": True,  # its VAE draws from a distribution; so the same of all runs
        "resolution": 160,  # buckets are in steps of 64: 128 x 192, and 192 x 128
    }


def places(models: Path, text: str, length: int) -> list[tuple[int, int] | None]:
    """T5's tokens from the first position on."""
    encoded = _t5(models)(text, truncation=True, padding="max_length", max_length=length, return_offsets_mapping=True)
    return [
        (start, stop) if stop > start else None  # `</s>` and padding have no characters
        for start, stop in encoded.offset_mapping
    ]


def spans(models: Path, prompt: Prompt, length: int, *, full: bool) -> Spans:
    tokenizer = _t5(models)
    return Family(nn.Module()).spans(
        prompt, lambda text: tokenizer(text, add_special_tokens=False).input_ids, length, full=full
    )


def _t5(models: Path) -> Any:
    from transformers import T5TokenizerFast

    return T5TokenizerFast.from_pretrained(models / "google_t5-v1_1-xxl")


def configured(module: Any, name: str, **values: Any) -> None:
    """Let a configuration class of a module be called with these values, whatever the caller says of them."""
    original: Callable[..., Any] = getattr(module, name)
    setattr(module, name, lambda **theirs: original(**{**theirs, **values}))


def shrink() -> None:
    from library import flux_models, flux_utils

    for name, spec in flux_models.configs.items():
        params = dataclasses.replace(
            spec.params, vec_in_dim=32, context_in_dim=64, hidden_size=128, num_heads=4, axes_dim=[8, 12, 12]
        )
        vae = dataclasses.replace(spec.ae_params, ch=32, num_res_blocks=1)
        flux_models.configs[name] = dataclasses.replace(spec, params=params, ae_params=vae)
    configured(
        flux_utils,
        "CLIPConfig",
        hidden_size=32,
        projection_dim=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    configured(flux_utils, "T5Config", d_model=64, d_ff=32, d_kv=8, num_heads=2, num_layers=1, vocab_size=VOCABULARY)


def make(folder: Path) -> None:
    from library import flux_models, flux_utils
    from safetensors.torch import save_file

    with mock.patch.object(flux_utils, "analyze_checkpoint_state", return_value=(False, False, (DOUBLE, SINGLE), [])):
        dit = shapes(flux_models.Flux, lambda: flux_utils.load_flow_model("", torch.float32, "cpu"))
    save_file(random_weights(dit, 1), folder / "dit.safetensors")
    surroundings(folder)


def surroundings(folder: Path) -> None:
    """Text encoders, tokenizers and the VAE."""
    from library import flux_models, flux_utils
    from safetensors.torch import save_file
    from transformers import CLIPTextModel, T5EncoderModel

    loaders: dict[str, tuple[type[nn.Module], Callable[..., Any]]] = {
        "clip_l": (CLIPTextModel, flux_utils.load_clip_l),
        "t5xxl": (T5EncoderModel, flux_utils.load_t5xxl),
        "ae": (flux_models.AutoEncoder, flux_utils.load_ae),
    }
    with mock.patch.object(flux_utils, "load_safetensors", return_value={}):
        for seed, (name, (cls, load)) in enumerate(loaders.items(), start=2):
            wanted = shapes(cls, lambda load=load: load("", torch.float32, "cpu"))  # type: ignore[misc]
            save_file(random_weights(wanted, seed), folder / f"{name}.safetensors")
    texts = [*CAPTIONS, *(chr(i) for i in range(33, 127))] * 3
    t5_tokenizer(texts).save_pretrained(folder / "google_t5-v1_1-xxl")
    tiny.tokenizer_folder(folder / "openai_clip-vit-large-patch14")


def call(*words: int, **more: Any) -> Call:
    """Of samples with so many words among their 20 T5 tokens; padding is masked."""
    from library import flux_utils

    b = len(words)
    return Call(
        (),
        {
            "img": flux_utils.pack_latents(shifted(b, 16, *SIZE)),
            "img_ids": flux_utils.prepare_img_ids(b, SIZE[0] // 2, SIZE[1] // 2),
            "txt": torch.randn(b, LENGTH, 64),
            "txt_ids": torch.zeros(b, LENGTH, 3),
            "y": torch.randn(b, 32),
            "timesteps": torch.full((b,), 0.5),
            "guidance": torch.full((b,), 3.5),
            "txt_attention_mask": (torch.arange(LENGTH) < torch.tensor(words)[:, None]).long(),
            **more,
        },
    )


def load(models: Path, model_type: str = "flux") -> nn.Module:
    from library import flux_utils

    dit = str(models / "dit.safetensors")
    return flux_utils.load_flow_model(dit, torch.float32, "cpu", model_type=model_type)[1].eval()


def planted(models: Path) -> Planted:
    padding = range(WORDS, LENGTH)
    return Planted(load(models), call(WORDS), ["double_blocks", "single_blocks"], 5, padding, LENGTH, SIZE, plant)


def joint(models: Path) -> Joint:
    """The words come first, and there are more in the second sample."""
    return Joint(load(models), call(WORDS, LENGTH), [LENGTH] * 2, [0, 0], [WORDS, LENGTH])


def plant(output: Tensor, position: int, key: Tensor) -> Tensor:  # [B, heads, T (and image), d], the text first
    output = output.clone()
    output[:, :, position] = key
    return output
