"""HunyuanImage 2.1: two blocks of two streams and four of one, with heads of the real size, a Qwen2.5-VL of three
layers and a byT5 of one."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from spf_plugin.core.prompt import Prompt, Spans
from spf_plugin.families.hunyuan_image import HunyuanImage as Family
from spf_plugin.seam import Call
from tests.hosts.dits.common import (
    CAPTIONS,
    VOCABULARY,
    layer_norm_of_cards,
    overridden,
    quick_half_convolutions,
    qwen_vl_tokenizer,
    random_weights,
    reconfigured,
    shapes,
    shifted,
)
from tests.hosts.dits.joint import Joint
from tests.hosts.dits.kinds import Planted

SCRIPT, NETWORK = "hunyuan_image_train_network.py", "networks.lora_hunyuan_image"
TRAINER = "HunyuanImageNetworkTrainer"
CACHED = {"cache_text_encoder_outputs_to_disk": True}  # its VAE draws the latents, so all runs have the same
STEADY: dict[str, Any] = {}  # its T5 reads what is quoted, which is nothing here
PRECISION = "bf16"  # it cannot do without
TENSORS = (2 * 10 + 4 * 3) * 3  # blocks of two streams and of one, linear layers, tensors of each
WIDTH, GLYPHS = 256, 1472  # of the transformer and of byT5, whose width the host has written down
DROPPED = 34  # tokens of the template before the prompt
TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n"
)
END = "<|im_end|>"


def options(models: Path) -> dict[str, Any]:
    return {
        "pretrained_model_name_or_path": models / "dit.safetensors",
        "vae": models / "vae.safetensors",
        "text_encoder": models / "qwen.safetensors",
        "byt5": models / "byt5.safetensors",
        "tokenizer_cache_dir": models / "tokenizers",
        "bucket_reso_steps": 64,
        "resolution": 160,
        "cache_latents_to_disk": True,
    }


def places(models: Path, text: str, length: int) -> list[tuple[int, int] | None]:
    """ByT5's bytes of what is quoted, then Qwen's tokens behind the template, of which the first 34 are dropped."""
    from transformers import ByT5Tokenizer, Qwen2TokenizerFast

    found: list[tuple[int, int] | None] = []
    quoted = list(re.finditer('"(.*?)"', text))
    if quoted:
        where: list[int | None] = []  # of every byte that byT5 is given
        for match in quoted:
            inside = [i for i in range(*match.span(1)) for _ in text[i].encode()]
            where += [*[None] * len('Text "'), *inside, *[None] * len('". ')]
        written = "".join(f'Text "{match[1]}". ' for match in quoted)
        ids = ByT5Tokenizer()(written, truncation=True, max_length=128).input_ids
        found += [None if at is None else (at, at + 1) for at in where[: len(ids) - 1]] + [None]  # `</s>`
    qwen = Qwen2TokenizerFast.from_pretrained(models / "tokenizers" / "Qwen_Qwen2.5-VL-7B-Instruct")
    offsets = qwen(TEMPLATE + text + END, return_offsets_mapping=True).offset_mapping[DROPPED:]
    begin, end = len(TEMPLATE), len(TEMPLATE) + len(text)
    found += [(start - begin, stop - begin) if begin <= start < end else None for start, stop in offsets]
    return found


def spans(models: Path, prompt: Prompt, length: int, *, full: bool) -> Spans:
    from transformers import Qwen2TokenizerFast

    tokenizer = Qwen2TokenizerFast.from_pretrained(models / "tokenizers" / "Qwen_Qwen2.5-VL-7B-Instruct")
    return Family(nn.Module()).spans(
        prompt, lambda text: tokenizer(text, add_special_tokens=False).input_ids, length, full=full
    )


def shrink() -> None:
    from library import hunyuan_image_modules as modules
    from library import hunyuan_image_text_encoder as encoders
    from library import hunyuan_image_vae as vae
    from library.hunyuan_image_models import HYImageDiffusionTransformer
    from transformers import ByT5Tokenizer

    for block in (modules.MMDoubleStreamBlock, modules.MMSingleStreamBlock):
        overridden(block, hidden_size=WIDTH, heads_num=2)
    overridden(modules.SingleTokenRefiner, in_channels=WIDTH, hidden_size=WIDTH, heads_num=2, depth=1)
    overridden(modules.ByT5Mapper, out_dim=64, hidden_dim=64, out_dim1=WIDTH)
    overridden(modules.PatchEmbed2D, embed_dim=WIDTH)
    overridden(modules.TimestepEmbedder, hidden_size=WIDTH)
    overridden(modules.FinalLayer, hidden_size=WIDTH)
    original = HYImageDiffusionTransformer.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self.double_blocks, self.single_blocks = self.double_blocks[:2], self.single_blocks[:4]
        self.num_double_blocks, self.num_single_blocks = 2, 4

    HYImageDiffusionTransformer.__init__ = init
    widths = (32, 32, 32, 32, 64, 128)
    overridden(vae.Encoder, block_out_channels=widths, num_res_blocks=1)
    overridden(vae.Decoder, block_out_channels=widths[::-1], num_res_blocks=1)
    reconfigured(encoders, "T5Config", d_ff=32, d_kv=8, num_heads=2, num_layers=1, num_decoder_layers=1)
    language = {
        "hidden_size": WIDTH,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_window_layers": 3,
        "vocab_size": VOCABULARY,
    }
    vision = {"depth": 1, "fullatt_block_indexes": [0], "hidden_size": 32, "num_heads": 2, "intermediate_size": 32}
    theirs = encoders.Qwen2_5_VLConfig

    def config(text_config: Mapping[str, Any], vision_config: Mapping[str, Any], **rest: Any) -> Any:
        return theirs(
            text_config={**text_config, **language, "layer_types": ["full_attention"] * 3},
            vision_config={**vision_config, **vision, "out_hidden_size": WIDTH},
            **{**rest, **language},
        )

    encoders.Qwen2_5_VLConfig = config
    # It loads tokenizers beside its encoders, without a folder to say, and does nothing with them but count byT5's.
    encoders.AutoTokenizer = SimpleNamespace(from_pretrained=lambda _name: ByT5Tokenizer())
    for name in ("Qwen2Tokenizer", "Qwen2TokenizerFast"):  # v0.11 has the second
        if hasattr(encoders, name):
            setattr(encoders, name, SimpleNamespace(from_pretrained=lambda _name: None))
    layer_norm_of_cards()
    quick_half_convolutions()


def make(folder: Path) -> None:
    from library import hunyuan_image_models, hunyuan_image_text_encoder, hunyuan_image_vae
    from safetensors.torch import save_file
    from transformers import ByT5Tokenizer, Qwen2_5_VLForConditionalGeneration
    from transformers.models.t5.modeling_t5 import T5Stack

    nothing = {"shared.weight": torch.zeros(1)}
    with (
        mock.patch.object(hunyuan_image_models, "load_safetensors_with_lora_and_fp8", return_value={}),
        mock.patch.object(hunyuan_image_text_encoder, "load_safetensors", return_value=nothing),
        mock.patch.object(hunyuan_image_vae, "load_safetensors", return_value={}),
    ):
        dit = shapes(hunyuan_image_models.HYImageDiffusionTransformer, lambda: _load(""))
        qwen = shapes(
            Qwen2_5_VLForConditionalGeneration,
            lambda: hunyuan_image_text_encoder.load_qwen2_5_vl("", torch.bfloat16, "cpu"),
        )
        byt5 = shapes(T5Stack, lambda: hunyuan_image_text_encoder.load_byt5("", torch.float16, "cpu"))
        vae = shapes(hunyuan_image_vae.HunyuanVAE2D, lambda: hunyuan_image_vae.load_vae("", torch.device("cpu")))
    save_file(random_weights(dit, 1), folder / "dit.safetensors")
    language, visual = "model.language_model.", "model.visual."
    save_file(
        {
            name.replace(language, "model.").replace(visual, "visual."): weight.bfloat16()
            for name, weight in random_weights(qwen, 2).items()
        },
        folder / "qwen.safetensors",
    )
    save_file(
        {
            "shared.weight" if name == "embed_tokens.weight" else f"encoder.{name}": weight.half()
            for name, weight in random_weights(byt5, 3).items()
        },
        folder / "byt5.safetensors",
    )
    save_file({name: weight.half() for name, weight in random_weights(vae, 4).items()}, folder / "vae.safetensors")
    tokenizers = folder / "tokenizers"
    qwen_vl_tokenizer([*[TEMPLATE] * 8, *CAPTIONS * 3], tokenizers / "Qwen_Qwen2.5-VL-7B-Instruct")
    ByT5Tokenizer().save_pretrained(tokenizers / "google_byt5-small")


def planted(models: Path) -> Planted:
    """Of 20 tokens 9 are words, and behind 5 bytes; the rest of the sequence is none."""
    words, glyphs, size = 9, 5, (8, 12)

    def plant(output: Tensor, position: int, key: Tensor) -> Tensor:  # [B, (patches and) words, heads, d]
        output = output.clone()
        output[:, output.shape[1] - words - glyphs + position] = key
        return output

    length = Family(nn.Module()).length({})
    return Planted(
        _load(str(models / "dit.safetensors")).eval(),
        _call([words], [glyphs], size),
        ["double_blocks", "single_blocks"],
        8,
        range(words + glyphs, length),
        length,
        size,
        plant,
    )


def joint(models: Path) -> Joint:
    words, glyphs, size = [9, 17], [5, 0], (8, 12)
    counts = [w + g for w, g in zip(words, glyphs, strict=True)]
    patches = size[0] * size[1]
    return Joint(
        _load(str(models / "dit.safetensors")).eval(), _call(words, glyphs, size), [0, 0], [patches] * 2, counts
    )


def _load(path: str) -> nn.Module:
    from library import hunyuan_image_models

    return hunyuan_image_models.load_hunyuan_image_model("cpu", path, "torch", False, "cpu", torch.float32)


def _call(words: list[int], glyphs: list[int], size: tuple[int, int]) -> Call:
    batch = len(words)

    def mask(length: int, counts: list[int]) -> Tensor:
        return (torch.arange(length) < torch.tensor(counts)[:, None]).long()

    return Call(
        (
            shifted(batch, 64, *size),
            torch.full((batch,), 500),
            torch.randn(batch, 20, WIDTH),
            mask(20, words),
            torch.randn(batch, 128, GLYPHS),
            mask(128, glyphs),
        ),
        {},
    )
