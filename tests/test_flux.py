"""What the family of FLUX.1 and Chroma says; `tests/hosts/test_dits.py` trains its models."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from spf_plugin.errors import SPFError
from spf_plugin.families import latents
from spf_plugin.families.flux import Flux
from spf_plugin.families.known import find
from spf_plugin.seam import Call


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query_norm, self.key_norm = nn.Identity(), nn.Identity()


def module(**parts: Any) -> Any:
    made = nn.Module()
    for name, part in parts.items():
        setattr(made, name, part)
    return made


def model(double: int = 19, single: int = 38, *, chroma: bool = False) -> Any:
    """The modules by which the family knows a model."""

    def block(**parts: Any) -> Any:
        return module(num_heads=24, **parts)

    return module(
        double_blocks=nn.ModuleList(
            block(img_attn=module(norm=Norm()), txt_attn=module(norm=Norm())) for _ in range(double)
        ),
        single_blocks=nn.ModuleList(block(norm=Norm()) for _ in range(single)),
        pe_embedder=nn.Identity(),
        **({"distilled_guidance_layer": nn.Identity()} if chroma else {}),
    )


def ids(h: int, w: int) -> torch.Tensor:
    return torch.tensor([[[0.0, row, column] for row in range(h) for column in range(w)]] * 2)


def test_the_layers() -> None:
    family = find(model())
    assert isinstance(family, Flux)
    assert len(family.layers("all")) == 57
    assert [layer.name for layer in family.layers("last")] == [f"double_blocks.{i}" for i in (10, 14, 18)]
    assert [layer.name for layer in find(model(8, 20)).layers("last")] == [f"double_blocks.{i}" for i in (4, 6, 7)]
    layer = family.layers(r"^single_blocks\.9$")[0]
    assert layer.query is family.denoiser.single_blocks[9].norm.query_norm
    assert layer.key is family.denoiser.single_blocks[9].norm.key_norm
    assert family.layers("last")[0].key is family.denoiser.double_blocks[10].txt_attn.norm.key_norm
    with pytest.raises(SPFError, match="spf_layers='triple' matches none of the 57 attention layers"):
        family.layers("triple")


def test_packed_latents() -> None:
    """Patches of 2 x 2, row by row; in each a channel's four values beside each other."""
    image = torch.randn(2, 3, 4, 6)
    patches = torch.zeros(2, 6, 12)
    for row in range(2):
        for column in range(3):
            for channel in range(3):
                for i in range(2):
                    for j in range(2):
                        value = image[:, channel, 2 * row + i, 2 * column + j]
                        patches[:, 3 * row + column, 4 * channel + 2 * i + j] = value
    family, call = Flux(model()), Call((), {"img": patches, "img_ids": ids(2, 3)})
    assert torch.equal(family.noisy_latents(call), image)
    assert torch.equal(family.output(None, image, call), patches)
    assert torch.equal(family.prediction(patches, call), image)
    assert family.grid(6, (4, 6)) == (2, 3)


def test_the_text_of_a_call() -> None:
    kwargs = {
        "txt": torch.randn(2, 5, 4),
        "y": torch.randn(2, 3),
        "txt_attention_mask": None,
        "guidance": torch.ones(2),
    }
    family, call = Flux(model()), Call((), kwargs)
    assert family.text(call).keys() == {"hidden", "pooled"}
    assert family.text_mask(call) is None
    swapped = family.with_text(call, {"pooled": torch.ones(2, 3)})  # CLIP alone is trained
    assert torch.equal(swapped.kwargs["y"], torch.ones(2, 3))
    assert all(swapped.kwargs[name] is kwargs[name] for name in ("txt", "txt_attention_mask", "guidance"))


@pytest.mark.parametrize("chroma", [False, True])
def test_the_mask_is_that_of_the_blocks(chroma: bool) -> None:
    """Cached masks are floats. Chroma keeps a padding token behind the text, where there is one."""
    mask = torch.tensor([[1.0, 1, 0, 0], [1, 1, 1, 1]])
    call = Call((), {"txt": torch.randn(2, 4, 3), "y": torch.randn(2, 77, 1), "txt_attention_mask": mask})
    family = Flux(model(chroma=chroma))
    assert family.text_mask(call).tolist() == [[True, True, chroma, False], [True] * 4]  # type: ignore[union-attr]
    assert family.text(call).keys() == {"hidden", "hidden_mask"} | ({"pooled"} if not chroma else set())


def test_whose_latents_they_are() -> None:
    """The host's VAE is Black Forest Labs' own, which is none of diffusers, and scales what it encodes itself."""

    def vae(*widths: int, scale: float = 0.3611) -> Any:
        stages = [SimpleNamespace(block=[SimpleNamespace(out_channels=width)]) for width in widths]
        return SimpleNamespace(encoder=SimpleNamespace(down=stages), scale_factor=scale)

    assert latents.FLUX.is_of(vae(128, 256, 512, 512))
    assert not latents.FLUX.is_of(vae(32, 64, 128, 128))
    assert not latents.FLUX.is_of(vae(128, 256, 512, 512, scale=1.5305))  # SD3's
    diffusers = SimpleNamespace(config=SimpleNamespace(block_out_channels=(128, 256, 512, 512)))
    assert not latents.FLUX.is_of(diffusers)
    assert latents.SD.is_of(diffusers)
    assert len(latents.FLUX.weight) == latents.FLUX.channels
