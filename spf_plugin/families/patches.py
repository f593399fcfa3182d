"""Latents as a row of patches, as diffusion transformers take them, and as the image that they are. Pure tensors."""

from __future__ import annotations

from torch import Tensor


def unpacked(patches: Tensor, ids: Tensor, patch: int) -> Tensor:
    """The image of a row of patches.

    Args:
        patches: `[B, N, C p p]`, row by row; of each a channel's values beside each other.
        ids: `[B, N, 3 or more]`, of each patch: image, row, column.
        patch: p, the side of a patch.

    Returns:
        `[B, C, h, w]`.
    """
    h, w = (int(last) + 1 for last in ids[0, -1, 1:3].tolist())
    image = patches.unflatten(2, (-1, patch, patch)).unflatten(1, (h, w))  # [B, h, w, C, p, p]
    return image.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def packed(image: Tensor, patch: int) -> Tensor:
    """What `unpacked` took, `[B, C, h, w]` -> `[B, N, C p p]`."""
    patches = image.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))  # [B, C, h, p, w, p]
    return patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
