"""What the response term adds to a training step: `python -m benchmarks.response_cost`.

Counts floating-point operations (exact, no timing) on the real sizes of SD1.5 at 512 px, CLIP ViT-B/32 and the three
decoders, with random weights and without computing anything (fake tensors).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from spf_plugin.core.schedule import one_step_prediction
from spf_plugin.enhancement import decoders, limits
from spf_plugin.enhancement.clip import ClipEncoder
from spf_plugin.families.latents import SD

LATENTS, CLIP_SIZE = 64, 224
SCALING = 0.18215


def flops(work: Callable[[], Any]) -> float:
    """Floating-point operations of `work`, in units of 1e12."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops() / 1e12


def encoder() -> ClipEncoder:
    """A random ViT-B/32; its text half costs nothing during training (texts are embedded once)."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    config = CLIPVisionConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, patch_size=32,
        image_size=CLIP_SIZE, projection_dim=512,
    )  # fmt: skip
    model: Any = CLIPVisionModelWithProjection(config)
    return ClipEncoder("ViT-B/32", model, lambda x: model(x).image_embeds, lambda _: torch.empty(0), CLIP_SIZE)


def all_decoders() -> dict[str, decoders.Decoder]:
    """The three decoders at SD1.5's sizes."""
    from diffusers import AutoencoderKL, AutoencoderTiny

    vae = AutoencoderKL(
        3, 3, ("DownEncoderBlock2D",) * 4, ("UpDecoderBlock2D",) * 4, (128, 256, 512, 512), 2, latent_channels=4
    ).requires_grad_(False)
    return {
        "linear": decoders.LinearDecoder(torch.tensor(SD.weight), torch.tensor(SD.bias)),
        "tiny": decoders.TinyDecoder(AutoencoderTiny().requires_grad_(False)),
        "vae": decoders.VaeDecoder(vae, SCALING),
    }


def measure() -> dict[str, float]:
    """Operations for one sample: of a UNet pass, and of the term with each decoder and mode."""
    from diffusers import UNet2DConditionModel
    from torch._subclasses.fake_tensor import FakeTensorMode

    found: dict[str, float] = {}
    with FakeTensorMode():
        unet: Any = UNet2DConditionModel(sample_size=LATENTS, cross_attention_dim=768).requires_grad_(False)
        z, t, states = torch.randn(1, 4, LATENTS, LATENTS), torch.tensor([1]), torch.randn(1, 77, 768)
        found["forward"] = flops(lambda: unet(z, t, states))
        z.requires_grad_()
        found["forward and backward"] = flops(lambda: unet(z, t, states).sample.sum().backward())
        clip = encoder()
        for name, decoder in all_decoders().items():
            small = LATENTS if decoder.scale == 1 else CLIP_SIZE // decoder.scale

            def embed(latents: Tensor, decoder: Any = decoder, small: int = small) -> Tensor:
                shrunk = torch.nn.functional.interpolate(latents, size=(small, small), mode="bilinear", antialias=True)
                return clip.image(decoder(shrunk))

            def anchor(embed: Any = embed) -> None:
                eps = torch.randn(1, 4, LATENTS, LATENTS, requires_grad=True)
                x0 = one_step_prediction(torch.randn_like(eps), eps, torch.ones(1) / 2, "epsilon")
                embed(x0).sum().backward()

            def directional(embed: Any = embed, anchor: Any = anchor) -> None:
                with torch.no_grad():
                    embed(torch.randn(1, 4, LATENTS, LATENTS))
                anchor()

            found[f"{name}, anchor"], found[f"{name}, directional"] = flops(anchor), flops(directional)
    return found


def main() -> None:
    """Print the table."""
    found = measure()
    forward, both = found.pop("forward"), found.pop("forward and backward")
    share = limits.MAX_LEVEL
    steps = {
        "SPF step": both + forward,
        "SPF step, checkpointing": both + 2 * forward,
        "plain step": both,
    }
    table = Table(title=f"The response term at SD1.5 512 px, share of a step; {share:.0%} of the samples have it")
    table.add_column("decoder, mode")
    table.add_column("TFLOP a sample", justify="right")
    for name in steps:
        table.add_column(f"of a {name}", justify="right")
    for name, cost in found.items():
        table.add_row(name, f"{cost:.3f}", *(f"{share * cost / whole:.1%}" for whole in steps.values()))
    console = Console(width=110)
    console.print(table)
    console.print(f"one UNet pass: {forward:.3f} TFLOP; with backward: {both:.3f}; torch {torch.__version__}")


if __name__ == "__main__":
    main()
