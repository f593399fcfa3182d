"""The maths against slow, obvious float64 implementations with explicit loops."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from spf_plugin.core import losses, schedule, sfcm
from spf_plugin.core.attention import group_attention
from spf_plugin.families.unet import UNet

B, C, H, W, P = 2, 4, 6, 10, 3  # not square


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_group_attention() -> None:
    b, n, t, heads, d, g = 2, 5, 7, 3, 4, 2
    query, key = random(b, n, heads * d, seed=1), random(b, t, heads * d, seed=2)
    groups = (random(b, t, g, seed=3) > 0).float()
    expected = torch.zeros(b, n, g, dtype=torch.float64)
    for i in range(b):
        for position in range(n):
            for head in range(heads):
                part = slice(head * d, (head + 1) * d)
                scores = [
                    float(query[i, position, part].double() @ key[i, j, part].double()) / math.sqrt(d) for j in range(t)
                ]
                total = sum(math.exp(s) for s in scores)
                for j in range(t):
                    for group in range(g):
                        expected[i, position, group] += math.exp(scores[j]) / total / heads * float(groups[i, j, group])
    torch.testing.assert_close(group_attention(query, key, heads, groups).double(), expected, rtol=1e-5, atol=1e-6)


def test_masked_keys_are_as_if_they_were_not_there() -> None:
    query, key = random(2, 5, 12, seed=1), random(2, 7, 12, seed=2)
    groups = (random(2, 7, 2, seed=3) > 0).float()
    mask = torch.tensor([[True] * 7, [True] * 3 + [False] * 4])
    with_mask = group_attention(query, key, 3, groups, mask)
    assert torch.equal(with_mask[0], group_attention(query, key, 3, groups)[0])
    torch.testing.assert_close(with_mask[1:], group_attention(query[1:], key[1:, :3], 3, groups[1:, :3]))
    nothing = group_attention(query, key, 3, groups, torch.zeros(2, 7, dtype=torch.bool))
    assert nothing.isfinite().all()


GRID = UNet(torch.nn.Module()).grid


def grids_of(layers: Sequence[torch.Tensor]) -> list[tuple[int, int]]:
    return [GRID(layer.shape[1], (H, W)) for layer in layers]


def slow_weight(weight: torch.Tensor, positions: int) -> torch.Tensor:
    """W on a layer's grid by averaging blocks, `[B, N]`."""
    h, w = GRID(positions, (H, W))
    out = torch.zeros(B, h, w, dtype=torch.float64)
    fh, fw = H // h, W // w
    for i in range(B):
        for y in range(h):
            for x in range(w):
                out[i, y, x] = weight[i, 0, y * fh : (y + 1) * fh, x * fw : (x + 1) * fw].double().mean()
    return out.reshape(B, -1)


def test_text_consistent() -> None:
    grids = [H * W, (H // 2) * (W // 2)]
    a_ref = [random(B, n, P, seed=n).abs() for n in grids]
    a_res = [random(B, n, P, seed=n + 1).abs() for n in grids]
    weight = torch.rand(B, 1, H, W, generator=torch.Generator().manual_seed(5))
    present = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 1.0]])
    expected = torch.zeros(B, dtype=torch.float64)
    for i in range(B):
        for ref, res in zip(a_ref, a_res, strict=True):
            w = slow_weight(weight, ref.shape[1])
            error, scale, count = 0.0, 0.0, 0
            for n in range(ref.shape[1]):
                for g in range(P):
                    if present[i, g]:
                        error += float(w[i, n]) * float(res[i, n, g].double() - ref[i, n, g].double()) ** 2
                        scale += float(ref[i, n, g].double()) ** 2
                        count += 1
            expected[i] += (error / count) / (scale / count) / len(grids)
    torch.testing.assert_close(
        losses.text_consistent(a_res, a_ref, weight, present, grids_of(a_ref)).double(), expected, rtol=1e-5, atol=0
    )


def test_fine_grained() -> None:
    grids = [H * W, (H // 2) * (W // 2)]
    q_ref = [random(B, n, 8, seed=n) for n in grids]
    q_res = [random(B, n, 8, seed=n + 1) for n in grids]
    weight = torch.rand(B, 1, H, W, generator=torch.Generator().manual_seed(5))
    expected = torch.zeros(B, dtype=torch.float64)
    for ref, res in zip(q_ref, q_res, strict=True):
        w = slow_weight(weight, ref.shape[1])
        error = (w[..., None] * (res.double() - ref.double()) ** 2).sum(dim=(1, 2)) / ref[0].numel()
        expected += error / ((ref.double() ** 2).sum(dim=(1, 2)) / ref[0].numel()) / len(grids)
    torch.testing.assert_close(
        losses.fine_grained(q_res, q_ref, weight, grids_of(q_ref)).double(), expected, rtol=1e-5, atol=0
    )


def test_output_and_drift() -> None:
    res, ref = random(B, C, H, W, seed=1), random(B, C, H, W, seed=2)
    weight = torch.rand(B, 1, H, W, generator=torch.Generator().manual_seed(5))
    output, drift = torch.zeros(B, dtype=torch.float64), torch.zeros(B, dtype=torch.float64)
    for i in range(B):
        error = energy = inside = 0.0
        for c in range(C):
            for y in range(H):
                for x in range(W):
                    square = float(res[i, c, y, x].double() - ref[i, c, y, x].double()) ** 2
                    error += float(weight[i, 0, y, x]) * square
                    energy += float(ref[i, c, y, x].double()) ** 2
                    inside += float(weight[i, 0, y, x]) * float(ref[i, c, y, x].double()) ** 2
        output[i], drift[i] = error / energy, error / inside
    torch.testing.assert_close(losses.output(res, ref, weight).double(), output, rtol=1e-5, atol=0)
    torch.testing.assert_close(losses.relative_drift(res, ref, weight).double(), drift, rtol=1e-5, atol=0)


def test_base_preservation() -> None:
    generator = torch.Generator().manual_seed(7)
    base, ref = (torch.randn(2, 4, 6, 5, generator=generator) for _ in range(2))
    error, energy = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    for b in range(2):
        for place in itertools.product(range(4), range(6), range(5)):
            error[b] += (float(base[b][place]) - float(ref[b][place])) ** 2
            energy[b] += float(ref[b][place]) ** 2
    torch.testing.assert_close(losses.base_preservation(base, ref).double(), error / energy, rtol=1e-5, atol=0)
    base.requires_grad_()
    ref.requires_grad_()
    losses.base_preservation(base, ref).sum().backward()
    assert base.grad is not None
    assert ref.grad is None


def test_noise_weight() -> None:
    """The error of the clean image that wrongly predicted noise stands for, between 1 and 10 times its own."""
    abar = torch.tensor([0.999, 0.5, 0.25, 0.05, 0.0])
    error = torch.tensor(0.1, dtype=torch.float64)
    expected = []
    for a in abar.double():
        z, eps = torch.tensor(0.7, dtype=torch.float64), torch.tensor(0.4, dtype=torch.float64)
        x0, wrong = ((z - (1 - a).sqrt() * e) / a.clamp_min(1e-3).sqrt() for e in (eps, eps + error))
        expected.append(min(max(float((x0 - wrong) ** 2 / error**2), 1), 10))
    found = losses.noise_weight(abar)
    torch.testing.assert_close(found.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-4, atol=0)


def test_noise_weight_of_a_flow() -> None:
    """`sigma^2 / (1 - sigma)^2`, the noise's share of the variance by the signal's, between 1 and 10."""
    signal = schedule.Flow(scale=1000).signal(torch.tensor([10.0, 500.0, 750.0, 800.0, 1000.0]))
    assert losses.noise_weight(signal).tolist() == pytest.approx([1, 1, 9, 10, 10], rel=1e-4)


def test_losses_send_gradient_to_the_response_only() -> None:
    weight, present = torch.ones(B, 1, H, W), torch.ones(B, P)
    res, ref = random(B, H * W, P, seed=1).requires_grad_(), random(B, H * W, P, seed=2).requires_grad_()
    eps_res, eps_ref = random(B, C, H, W, seed=3).requires_grad_(), random(B, C, H, W, seed=4).requires_grad_()
    total = losses.text_consistent([res], [ref], weight, present, grids_of([ref]))
    total = total + losses.fine_grained([res], [ref], weight, grids_of([ref]))
    (total + losses.output(eps_res, eps_ref, weight)).sum().backward()
    assert res.grad is not None
    assert eps_res.grad is not None
    assert ref.grad is None
    assert eps_ref.grad is None


def test_losses_vanish_where_nothing_is_aligned() -> None:
    """W = 0 outside the aligned half: a difference there costs nothing."""
    weight = torch.ones(1, 1, H, W)
    weight[..., W // 2 :] = 0
    ref = random(1, C, H, W)
    res = ref.clone()
    res[..., W // 2 :] += 1
    assert float(losses.output(res, ref, weight)) == 0
    q_ref = random(1, H * W, 8)
    q_res = (q_ref.reshape(1, H, W, 8) + (1 - weight[0, 0])[None, ..., None]).reshape(1, H * W, 8)
    assert float(losses.fine_grained([q_res], [q_ref], weight, [(H, W)])) == 0


@pytest.mark.parametrize(
    ("positions", "size", "grid"),
    [(60, (6, 10), (6, 10)), (15, (6, 10), (3, 5)), (6, (6, 10), (2, 3)), (64, (8, 8), (8, 8)), (28, (13, 28), (4, 7))],
)
def test_layer_grid(positions: int, size: tuple[int, int], grid: tuple[int, int]) -> None:
    assert GRID(positions, size) == grid


def test_layer_grid_refuses_what_no_unet_gives() -> None:
    with pytest.raises(ValueError, match="59 positions"):
        GRID(59, (6, 10))


def test_noise_difference() -> None:
    res, ref = random(B, C, H, W, seed=1), random(B, C, H, W, seed=2)
    for i in range(B):
        d = [
            sum(abs(float(res[i, c, y, x]) - float(ref[i, c, y, x])) for c in range(C)) / C
            for y in range(H)
            for x in range(W)
        ]
        ordered = sorted(d)

        def quantile(q: float, ordered: list[float] = ordered) -> float:
            position = q * (len(ordered) - 1)
            low = math.floor(position)
            return ordered[low] + (position - low) * (ordered[min(low + 1, len(ordered) - 1)] - ordered[low])

        low, high = quantile(sfcm.LOW_QUANTILE), quantile(sfcm.HIGH_QUANTILE)
        expected = [min(max((v - low) / (high - low), 0), 1) for v in d]
        torch.testing.assert_close(
            sfcm.noise_difference(res, ref)[i].flatten().double(), torch.tensor(expected).double(), rtol=1e-4, atol=1e-5
        )
    assert float(sfcm.noise_difference(ref, ref).abs().max()) == 0


def test_paper_map_is_the_published_recursion() -> None:
    res, ref = random(1, C, H, W, seed=1), random(1, C, H, W, seed=2)
    maps, weights = random(1, P, H, W, seed=3).abs(), torch.tensor([[1.0, 0.25, 0.5]])
    m = sfcm.control_map(
        "paper", eps_res=res, eps_ref=ref, phrase_maps=maps, target_map=maps[:, :1], weights=weights, gain=3.0
    )
    difference = sfcm.noise_difference(res, ref)
    for y in range(H):
        for x in range(W):
            value = float(difference[0, 0, y, x])
            for p in range(P):
                low, high = float(maps[0, p].min()), float(maps[0, p].max())
                a = (float(maps[0, p, y, x]) - low) / (high - low)
                value = min(max(value - float(weights[0, p]) * a, 0), 1)
            assert float(m[0, 0, y, x]) == pytest.approx(value, abs=1e-5)


def test_soft_map_takes_the_phrases_shares_and_at_most_half_of_each() -> None:
    """Place by place: shares of the attention, `min(w_p, 1/2)` of each taken, brightened, and grown by a cell."""
    res, ref = random(1, C, H, W, seed=1), random(1, C, H, W, seed=2)
    maps, target = random(1, P, H, W, seed=3).abs(), random(1, 1, H, W, seed=4).abs()
    weights, gain = torch.tensor([[1.0, 0.25, 0.7]]), 2.0
    m = sfcm.control_map(
        "soft", eps_res=res, eps_ref=ref, phrase_maps=maps, target_map=target, weights=weights, gain=gain
    )
    difference = sfcm.noise_difference(res, ref)[0, 0].tolist()
    left = [[0.0] * W for _ in range(H)]
    for y in range(H):
        for x in range(W):
            attention = [float(maps[0, p, y, x]) for p in range(P)] + [float(target[0, 0, y, x])]
            value = difference[y][x]
            for w, a in zip((0.5, 0.25, 0.5), attention, strict=False):
                value = max(value - w * a / sum(attention), 0)
            left[y][x] = value
    bright = np.quantile(left, sfcm.HIGH_QUANTILE)
    for y in range(H):
        for x in range(W):
            around = [left[j][i] for j in range(y - 1, y + 2) for i in range(x - 1, x + 2) if 0 <= j < H and 0 <= i < W]
            assert float(m[0, 0, y, x]) == pytest.approx(min(max(around) / bright * gain, 1), abs=1e-4)


def test_a_target_stays_open_however_many_phrases_a_caption_has() -> None:
    """With attention alike everywhere, what differs at least six tenths as much as anywhere is open: for two phrases as
    for forty."""
    ref = torch.zeros(1, 1, 8, 8)
    res = torch.linspace(0, 1, 64).reshape(1, 1, 8, 8)
    for phrases in (2, 40):
        m = sfcm.control_map(
            "soft",
            eps_res=res,
            eps_ref=ref,
            phrase_maps=torch.ones(1, phrases, 8, 8),
            target_map=torch.ones(1, 1, 8, 8),
            weights=torch.ones(1, phrases),
            gain=3.0,
        )
        assert float(m[sfcm.noise_difference(res, ref) > 0.6].min()) > 0.3


@pytest.mark.parametrize("kind", ["soft", "paper", "difference"])
def test_every_map_is_a_constant_in_range(kind: str) -> None:
    res, ref = random(B, C, H, W, seed=1).requires_grad_(), random(B, C, H, W, seed=2)
    maps = random(B, P, H, W, seed=3).abs().requires_grad_()
    m = sfcm.control_map(
        kind, eps_res=res, eps_ref=ref, phrase_maps=maps, target_map=maps[:, :1], weights=torch.ones(B, P), gain=3.0
    )
    assert m.shape == (B, 1, H, W)
    assert m.dtype == torch.float32
    assert not m.requires_grad
    assert float(m.min()) >= 0
    assert float(m.max()) <= 1


def test_a_frame_of_a_clip_does_not_reach_into_the_next() -> None:
    """A change in the first rows of the middle one of three frames, which lie one above the other: its neighbours above
    are those of another time. And attention is resized in each frame as it is in a picture."""
    ref = random(1, C, 24, 8)
    res = ref + 0.01 * random(1, C, 24, 8, seed=9)
    res[..., 8:11, 2:5] += 1
    nothing = {"phrase_maps": torch.zeros(1, 0, 24, 8), "target_map": torch.zeros(1, 1, 24, 8)}
    for kind in ("soft", "difference"):
        m = sfcm.control_map(kind, eps_res=res, eps_ref=ref, **nothing, weights=torch.zeros(1, 0), gain=3.0, frames=3)
        assert float(m[..., 8:12, 1:6].min()) == 1
        assert float(m[..., :8, :].max()) < 0.1
        assert float(m[..., 16:, :].max()) < 0.1
    attention = random(B, 3 * 4 * 5, P, seed=3)
    clip = sfcm.mean_maps([attention], [(12, 5)], (24, 10), 3)
    for frame, each in enumerate(attention.split(20, dim=1)):
        assert torch.equal(clip[:, :, 8 * frame : 8 * frame + 8], sfcm.mean_maps([each], [(4, 5)], (8, 10)))


def test_bright_map_finds_a_local_change() -> None:
    """A change in one corner: the map is full there, grown by one cell, and empty far away."""
    ref = random(1, C, 16, 16)
    res = ref + 0.01 * random(1, C, 16, 16, seed=9)
    res[..., 4:8, 4:8] += 1
    m = sfcm.control_map(
        "difference",
        eps_res=res,
        eps_ref=ref,
        phrase_maps=torch.zeros(1, 0, 16, 16),
        target_map=torch.zeros(1, 1, 16, 16),
        weights=torch.zeros(1, 0),
        gain=3.0,
    )
    assert float(m[..., 3:9, 3:9].min()) == 1
    assert float(m[..., 10:, 10:].max()) < 0.1


def test_semantic_distance_is_calibrated() -> None:
    target, unrelated = torch.tensor([1.0, 0, 0]), torch.tensor([[0.0, 1, 0], [0, 0, 1], [0, 1, 1]])
    phrases = torch.stack([target, torch.tensor([1.0, 1, 0]), torch.tensor([0.0, 1, 0])])
    w = sfcm.semantic_distance(phrases, target, unrelated)
    torch.testing.assert_close(w, torch.tensor([0.0, 1 - 1 / math.sqrt(2), 1.0]))
