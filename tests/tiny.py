"""Tiny models with the real block structures, seeded, built in seconds: SD1.5 and SDXL in diffusers format.

Widths are as small as the structures allow (32 groups in every group norm).
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

SD15_WIDTHS = (32, 64, 128, 128)
SDXL_WIDTHS = (32, 64, 128)


def tokenizer_folder(folder: Path) -> Path:
    """CLIP's real BPE vocabulary, as a transformers tokenizer folder (the vocabulary ships with open_clip)."""
    from transformers import CLIPTokenizer

    spec = find_spec("open_clip")
    assert spec is not None
    assert spec.origin is not None
    bpe = Path(spec.origin).parent / "bpe_simple_vocab_16e6.txt.gz"
    merges = gzip.decompress(bpe.read_bytes()).decode("utf-8").split("\n")[1 : 49152 - 256 - 2 + 1]
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    characters = [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    vocabulary = [*characters, *(c + "</w>" for c in characters), *("".join(m.split()) for m in merges)]
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges), encoding="utf-8")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77)
    tokenizer.save_pretrained(folder)
    return folder


def _vae() -> torch.nn.Module:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32, 32, 32, 32),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=32,
        sample_size=128,
    )


def _text_model(width: int, layers: int, *, projection: int | None = None) -> torch.nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=width,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=77,
        projection_dim=projection or width,
        bos_token_id=49406,
        eos_token_id=49407,
        pad_token_id=1,
    )
    model = CLIPTextModelWithProjection(config) if projection else CLIPTextModel(config)
    with torch.no_grad():  # a random model's states have mean zero, by which v0.9.1 divides for weighted captions
        getattr(model, "text_model", model).final_layer_norm.bias.fill_(0.1)  # flat from transformers 5.6 on
    return model


def _spread(model: torch.nn.Module) -> torch.nn.Module:
    """Larger projections than the default init, so that text and position matter to a random model."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "attn2" in name and parameter.dim() == 2:
                parameter.mul_(3.0)
    return model


def sd15(folder: Path, seed: int = 0) -> Path:
    """A diffusers folder with SD1.5's block structure: 192 LoRA modules in the UNet."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTokenizer

    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=SD15_WIDTHS,
        cross_attention_dim=64,
        attention_head_dim=4,
        norm_num_groups=32,
    )
    pipeline = StableDiffusionPipeline(
        vae=_vae(),
        text_encoder=_text_model(64, 2),
        tokenizer=CLIPTokenizer.from_pretrained(tokenizer_folder(folder / "tokenizer")),
        unet=_spread(unet),
        scheduler=DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder, safe_serialization=True)
    return folder


def sd21(folder: Path, seed: int = 0) -> Path:
    """A diffusers folder with SD2.1's block structure: linear projections, a text of 1024, and v-prediction."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTokenizer

    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=SD15_WIDTHS,
        cross_attention_dim=1024,
        attention_head_dim=(1, 2, 4, 4),
        use_linear_projection=True,
        norm_num_groups=32,
    )
    pipeline = StableDiffusionPipeline(
        vae=_vae(),
        text_encoder=_text_model(1024, 2),
        tokenizer=CLIPTokenizer.from_pretrained(tokenizer_folder(folder / "tokenizer")),
        unet=_spread(unet),
        scheduler=DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
            set_alpha_to_one=False, prediction_type="v_prediction", steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    pipeline.save_pretrained(folder, safe_serialization=True)
    return folder


def sdxl(
    folder: Path,
    seed: int = 0,
    depths: tuple[int, int, int] = (1, 2, 2),
    widths: tuple[int, int] = (64, 96),
    layers: tuple[int, int] = (2, 2),
) -> Path:
    """A diffusers folder with SDXL's blocks, less deep than SDXL, and two text encoders of these widths and layers."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTokenizer

    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        sample_size=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=SDXL_WIDTHS,
        transformer_layers_per_block=depths,
        cross_attention_dim=sum(widths),
        attention_head_dim=(1, 1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=6 * 256 + widths[1],
        norm_num_groups=32,
    )
    tokenizer = CLIPTokenizer.from_pretrained(tokenizer_folder(folder / "tokenizer"))
    pipeline = StableDiffusionXLPipeline(
        vae=_vae(),
        text_encoder=_text_model(widths[0], layers[0]),
        text_encoder_2=_text_model(widths[1], layers[1], projection=widths[1]),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=_spread(unet),
        scheduler=EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
    )
    pipeline.save_pretrained(folder, safe_serialization=True)
    return folder


def sd3(folder: Path, *, norms: bool = True, t5: bool = True, seed: int = 0) -> Path:
    """A diffusers folder of SD3's parts: four joint blocks, 3.5's norms or none, 4 latent channels, with T5 or not."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
    from transformers import CLIPTokenizer, T5Config, T5EncoderModel

    from tests.hosts.dits.common import VOCABULARY, t5_tokenizer

    torch.manual_seed(seed)
    widths = (32, 48)
    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=4,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=96,  # T5's, wider than both CLIPs
        caption_projection_dim=32,
        pooled_projection_dim=sum(widths),
        pos_embed_max_size=12,
        dual_attention_layers=(0,) if norms else (),
        qk_norm="rms_norm" if norms else None,
    )
    third = T5EncoderModel(T5Config(d_model=96, d_ff=32, d_kv=8, num_heads=2, num_layers=1, vocab_size=VOCABULARY))
    tokenizer = CLIPTokenizer.from_pretrained(tokenizer_folder(folder / "tokenizer"))
    vae = _vae()
    vae.register_to_config(shift_factor=0.25, scaling_factor=1.5)
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=_text_model(widths[0], 2, projection=widths[0]),
        tokenizer=tokenizer,
        text_encoder_2=_text_model(widths[1], 2, projection=widths[1]),
        tokenizer_2=tokenizer,
        text_encoder_3=third if t5 else None,
        tokenizer_3=t5_tokenizer(CAPTIONS) if t5 else None,
    )
    pipeline.save_pretrained(folder, safe_serialization=True)
    return folder


def sdxl_of_hosts(folder: Path) -> Path:
    """SDXL's own structure, 722 LoRA modules. sd-scripts fixes it and the text widths, and reads layer 11 of a text."""
    return sdxl(folder, depths=(1, 2, 10), widths=(768, 1280), layers=(11, 2))


CAPTIONS = (
    "a woman in a brown jacket, curtain background, blonde hair",
    "blonde hair, a man, green shirt, street",
    "a woman with blonde hair in a red coat, forest",
    "a girl, white dress, (blonde hair:1.0), beach",
)


def images(
    folder: Path, captions: tuple[str, ...] = CAPTIONS, size: tuple[int, int] = (128, 128), seed: int = 0
) -> Path:
    """A kohya data folder: `FOLDER/1_set/NN.png` with a caption file beside each."""
    rng = np.random.default_rng(seed)
    target = folder / "1_set"
    target.mkdir(parents=True, exist_ok=True)
    for i, caption in enumerate(captions):
        pixels = rng.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(target / f"{i:02d}.png")
        (target / f"{i:02d}.txt").write_text(caption, encoding="utf-8")
    return folder


def clip(folder: Path) -> Path:
    """A random transformers CLIP of 32 px with a real, small tokenizer."""
    from transformers import CLIPConfig, CLIPModel

    from portraitlab.text import clip_merges, merges_for, save_tokenizer

    torch.manual_seed(0)
    size = len(save_tokenizer(folder, merges_for(["blonde", "hair", "woman"], clip_merges())))
    text = {"vocab_size": size, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
            "num_attention_heads": 2, "max_position_embeddings": 20, "eos_token_id": size - 1,
            "bos_token_id": size - 2, "pad_token_id": size - 1}  # fmt: skip
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 32, "patch_size": 8}  # fmt: skip
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)
    return folder


def can_segment() -> bool:
    """From 5 on transformers wants a torchvision for any image processor, and the test environment hides its own."""
    import transformers

    return int(transformers.__version__.split(".")[0]) < 5 or find_spec("torchvision") is not None


def segmenter(folder: Path, classes: Mapping[int, str]) -> Path:
    """A random SegFormer of 64 px that tells noise apart."""
    if not can_segment():
        pytest.skip("SEGMENTATION NOT TESTED: transformers 5 needs a torchvision for it")
    from transformers import SegformerConfig, SegformerForSemanticSegmentation, SegformerImageProcessor

    torch.manual_seed(0)
    config = SegformerConfig(
        num_encoder_blocks=2, depths=[1, 1], sr_ratios=[1, 1], hidden_sizes=[16, 16], patch_sizes=[3, 3],
        strides=[2, 2], num_attention_heads=[1, 1], mlp_ratios=[2, 2], decoder_hidden_size=16,
        id2label=dict(classes), label2id={name: i for i, name in classes.items()},
    )  # fmt: skip
    model = SegformerForSemanticSegmentation(config).eval()
    with torch.no_grad():  # without this the last layer's bias decides everywhere
        model.decode_head.classifier.weight.mul_(50)
    model.save_pretrained(folder)
    SegformerImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder)
    return folder


def dino(folder: Path, *, registers: int = 0) -> Path:
    """A random DINOv2 of 28 px, whose processor resizes to 32 and cuts, with layer scales that are not 1."""
    from transformers import (
        BitImageProcessor,
        Dinov2Config,
        Dinov2Model,
        Dinov2WithRegistersConfig,
        Dinov2WithRegistersModel,
    )

    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "mlp_ratio": 2, "image_size": 28,
             "patch_size": 7, "layerscale_value": 0.5}  # fmt: skip
    if registers:
        model = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**sizes, num_register_tokens=registers))
    else:
        model = Dinov2Model(Dinov2Config(**sizes))
    with torch.no_grad():
        for parameter in model.parameters():  # transformers' own start is near 0, and every image would be the same
            parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    BitImageProcessor(
        size={"shortest_edge": 32}, resample=3, crop_size={"height": 28, "width": 28},
        image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225],
    ).save_pretrained(folder)  # fmt: skip
    return folder
