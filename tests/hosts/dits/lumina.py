"""Lumina Image 2.0: three joint blocks of four heads over two of keys, a Gemma of two layers, FLUX's VAE."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from spf_plugin.core.prompt import Prompt, Spans
from spf_plugin.families.lumina import Lumina as Family
from spf_plugin.seam import Call
from tests.hosts.dits.common import (
    CAPTIONS,
    VOCABULARY,
    gemma_tokenizer,
    hub_folder,
    random_weights,
    reconfigured,
    shapes,
    shifted,
)
from tests.hosts.dits.joint import Joint
from tests.hosts.dits.kinds import Planted

SCRIPT, NETWORK, TRAINER = "lumina_train_network.py", "networks.lora_lumina", "LuminaNetworkTrainer"
CACHED = {"cache_text_encoder_outputs": True}  # its VAE draws the latents, so all runs cache these
STEADY: dict[str, Any] = {}
PRECISION = "no"
TENSORS = (
    3 * 6 + 2 * 6 + 2 * 5 + 2
) * 3  # joint blocks, refiners of patches and words, the last layer; tensors of each
GEMMA = "google/gemma-2-2b"
SHARED = 2  # heads of queries that have the same key
SYSTEM = "Draw what is said."
PREFIX = f"{SYSTEM} <Prompt Start> "  # what the host makes of it


def options(models: Path) -> dict[str, Any]:
    return {
        "pretrained_model_name_or_path": models / "dit.safetensors",
        "ae": models / "ae.safetensors",
        "gemma2": models / "gemma2.safetensors",
        "tokenizer_cache_dir": models / "tokenizers",
        "gemma2_max_token_length": 48,
        "system_prompt": SYSTEM,
        "bucket_reso_steps": 64,
        "resolution": 160,
        "cache_latents": True,
    }


def places(models: Path, text: str, length: int) -> list[tuple[int, int] | None]:
    """Gemma's tokens of the system prompt and the text, of which those of the text are asked for."""
    encoded = _tokenizer(models)(
        PREFIX + text, truncation=True, padding="max_length", max_length=length, return_offsets_mapping=True
    )
    return [
        (max(start - len(PREFIX), 0), stop - len(PREFIX)) if stop > len(PREFIX) else None
        for start, stop in encoded.offset_mapping
    ]


def spans(models: Path, prompt: Prompt, length: int, *, full: bool) -> Spans:
    tokenizer = _tokenizer(models)
    return Family(nn.Module()).spans(
        prompt.behind(PREFIX), lambda text: tokenizer(text, add_special_tokens=False).input_ids, length, full=full
    )


def _tokenizer(models: Path) -> Any:
    from transformers import PreTrainedTokenizerFast

    (file,) = (models / "tokenizers").rglob("tokenizer.json")
    return PreTrainedTokenizerFast.from_pretrained(file.parent)


def shrink() -> None:
    from library import flux_models, lumina_models, lumina_util

    small = dataclasses.replace(
        lumina_models.LuminaParams.get_2b_config(),
        dim=96, n_layers=3, n_heads=4, n_kv_heads=2, axes_dims=[12, 6, 6], cap_feat_dim=64,
    )  # fmt: skip
    lumina_models.LuminaParams.get_2b_config = classmethod(lambda _cls: small)
    for name, spec in flux_models.configs.items():
        autoencoder = dataclasses.replace(spec.ae_params, ch=32, num_res_blocks=1)
        flux_models.configs[name] = dataclasses.replace(spec, ae_params=autoencoder)
    reconfigured(
        lumina_util,
        "Gemma2Config",
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
    )


def make(folder: Path) -> None:
    from library import flux_models, lumina_models, lumina_util
    from safetensors.torch import save_file
    from transformers import Gemma2Model

    cpu = torch.device("cpu")
    with mock.patch.object(lumina_util, "load_safetensors", return_value={"": torch.zeros(1)}):
        dit = shapes(lumina_models.NextDiT, lambda: lumina_util.load_lumina_model("", torch.float32, cpu))
        gemma = shapes(Gemma2Model, lambda: lumina_util.load_gemma2("", torch.float32, "cpu"))
        autoencoder = shapes(flux_models.AutoEncoder, lambda: lumina_util.load_ae("", torch.float32, "cpu"))
    save_file(random_weights(dit, 1), folder / "dit.safetensors")
    save_file(random_weights(gemma, 2), folder / "gemma2.safetensors")
    save_file(random_weights(autoencoder, 3), folder / "ae.safetensors")
    texts = [*CAPTIONS, PREFIX, *(chr(i) for i in range(33, 127))] * 3
    gemma_tokenizer(texts).save_pretrained(hub_folder(folder / "tokenizers", GEMMA))


def planted(models: Path) -> Planted:
    """Of 24 tokens 9 are words."""
    from library import lumina_models

    words, length, size = 9, 24, (16, 24)
    model, call = _model(models), _call([words], length, size)

    def plant(output: Tensor, position: int, key: Tensor) -> Tensor:  # [B, S, 2, d], to be rotated
        turns = model.rope_embedder(torch.tensor([[[position, 0, 0]]]))
        output = output.clone()
        output[:, position] = lumina_models.apply_rope(key[None, None, ::SHARED], turns.conj())[0, 0]
        return output

    return Planted(model, call, ["attention"], 5, range(words, length), length, size, plant, shared=SHARED)


def joint(models: Path) -> Joint:
    """The patches stand behind the words, which are more in the second sample."""
    counts = [9, 17]
    return Joint(_model(models), _call(counts, 24, (16, 24)), counts, [0, 0], counts)


def _model(models: Path) -> nn.Module:
    from library import lumina_util

    return lumina_util.load_lumina_model(str(models / "dit.safetensors"), torch.float32, torch.device("cpu")).eval()


def _call(words: list[int], length: int, size: tuple[int, int]) -> Call:
    batch = len(words)
    return Call(
        (),
        {
            "x": shifted(batch, 16, *size),
            "t": torch.full((batch,), 0.5),
            "cap_feats": torch.randn(batch, length, 64),
            "cap_mask": (torch.arange(length) < torch.tensor(words)[:, None]).int(),
        },
    )
