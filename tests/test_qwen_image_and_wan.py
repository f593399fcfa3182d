"""What the families of Qwen-Image and Wan make of a call; `tests/hosts/musubi` has the host's own models."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from spf_plugin.enhancement.decoders import LinearDecoder, load
from spf_plugin.errors import SPFError
from spf_plugin.families import known, latents
from spf_plugin.families.qwen_image import QwenImage
from spf_plugin.families.wan import Wan
from spf_plugin.seam import Call


def words(*lengths: int) -> list[Tensor]:
    return [torch.randn(length, 5) for length in lengths]


def test_packed_latents_of_qwen_image() -> None:
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
    family, call = QwenImage(nn.Module()), Call((), {"hidden_states": patches, "img_shapes": [[(1, 2, 3)]]})
    assert torch.equal(family.noisy_latents(call), image)
    assert torch.equal(family.output(None, image, call), patches)
    assert torch.equal(family.prediction(patches, call), image)
    assert family.grid(6, (4, 6)) == (2, 3)


@pytest.mark.parametrize("masked", [torch.bool, torch.int64, None], ids=str)
def test_words_of_qwen_image_are_padded_to_the_longest(masked: torch.dtype | None) -> None:
    like = torch.zeros(2, 9, 5, dtype=torch.bfloat16)
    mask = torch.ones(2, 9, dtype=masked) if masked else None
    call = Call(
        (), {"encoder_hidden_states": like, "encoder_hidden_states_mask": mask, "txt_seq_lens": [9, 7], "guidance": 1}
    )
    new = {"hidden": torch.randn(2, 8, 5), "hidden_mask": torch.arange(8) < torch.tensor([[3], [6]])}
    found = QwenImage(nn.Module()).with_text(call, new).kwargs
    assert found["txt_seq_lens"] == [3, 6]
    assert torch.equal(found["encoder_hidden_states"], new["hidden"][:, :6].bfloat16())
    if masked:
        assert found["encoder_hidden_states_mask"].tolist() == [[1, 1, 1, 0, 0, 0], [1] * 6]
        assert found["encoder_hidden_states_mask"].dtype == masked
    else:
        assert found["encoder_hidden_states_mask"] is None
    assert found["guidance"] == 1
    nothing = QwenImage(nn.Module()).with_text(call, {**new, "hidden_mask": torch.zeros(2, 8, dtype=torch.bool)})
    assert nothing.kwargs["txt_seq_lens"] == [1, 1]  # the model has no positions for none
    assert nothing.kwargs["encoder_hidden_states"].shape == (2, 1, 5)


def test_words_of_wan_are_a_list() -> None:
    family, call = Wan(nn.Module()), Call((torch.zeros(2, 3, 1, 4, 6),), {"context": words(4, 2), "t": None})
    text = family.text(call)
    assert text["hidden"].shape == (2, 4, 5)
    assert text["hidden_mask"].tolist() == [[True] * 4, [True, True, False, False]]
    assert torch.equal(text["hidden"][1, 2:], torch.zeros(2, 5))
    back = family.with_text(call, text).kwargs["context"]
    assert all(map(torch.equal, back, call.kwargs["context"]))
    assert family.text_mask(call).sum(dim=1).tolist() == [4, 2]


def test_frames_of_wan_lie_one_above_the_other() -> None:
    noisy = torch.randn(2, 3, 5, 4, 6)
    family, call = Wan(nn.Module()), Call((noisy,), {})
    image = family.noisy_latents(call)
    assert image.shape == (2, 3, 20, 6)
    for frame in range(5):
        assert torch.equal(image[:, :, 4 * frame : 4 * frame + 4], noisy[:, :, frame])
    assert family.frames(call) == 5
    output = list(noisy)
    assert torch.equal(family.prediction(output, call), image)
    assert all(map(torch.equal, family.output(output, image, call), output))
    # The second step of a pair shows another call: a clip where the batch is of pictures, or the other way round.
    for frames in (1, 3):
        other = torch.randn(2, 3, frames, 8, 4)
        call = Call((other,), {})
        assert all(map(torch.equal, family.output(output, family.noisy_latents(call), call), other))


def test_models_with_the_names_and_other_blocks_are_of_no_family() -> None:
    """Each is known by something of its own, and by attention that SPF can read."""
    made = nn.Module()
    for name in ("context_refiner", "double_stream_modulation_img", "pos_embed", "text_len", "txtfusion"):
        setattr(made, name, nn.Identity())
    for stack in ("blocks", "double_blocks", "layers", "single_blocks", "transformer_blocks"):
        setattr(made, stack, nn.ModuleList([nn.Identity()]))
    with pytest.raises(SPFError, match=r"found no cross-attention layers .* in this Module; SPF needs SD1\.x"):
        known.find(made)


def test_whose_latents_they_are() -> None:
    """The trainer has no VAE at hand, and every model of the two has the same latents."""
    assert latents.WAN.is_of(None)
    assert not latents.FLUX.is_of(None)
    assert LinearDecoder.of(latents.WAN)(torch.randn(1, 16, 12, 6)).shape == (1, 3, 12, 6)
    assert isinstance(load("auto", latents.WAN, None, lambda: nn.Identity()), LinearDecoder)
    with pytest.raises(SPFError, match="spf_decoder=tiny knows none"):
        load("tiny", latents.WAN, None, lambda: nn.Identity())
