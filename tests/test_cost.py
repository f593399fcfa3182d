"""What a step costs: the counters against torch's own and against hand counts, and the bounds that SPF promises."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from benchmarks.cases import DOP, PLAIN, PRESERVATION, PURE_CC, SPF, TIMED, Record, timed, tracked
from benchmarks.report import NOT_MEASURED, markdown, rows
from benchmarks.steps import Setup, Workbench
from benchmarks.tracking import MetaGpu, Tracker, track
from spf_plugin.core import attention
from tests.test_attachment import CAPTIONS, Run

KIB4 = 1024 * 4
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ---- the counters ----------------------------------------------------------------------------------------------------


def test_live_memory_by_hand() -> None:
    weight = torch.ones(1024)
    with Tracker() as tracker:
        a = weight + 1
        b = a * 2
        del a
        tracker.mark("first")
        c = b.view(32, 32).t()  # no memory of its own, and keeps b's
        del b
        d = c + 1
        assert tracker.current == 2 * KIB4
        del c, d
        weight.view(32, 32)  # was there before
    assert tracker.phases == {"first": (2 * KIB4, KIB4)}
    assert tracker.highest == 2 * KIB4
    assert tracker.current == 0


def test_cuda_autocast_rules_also_where_checkpointing_recomputes() -> None:
    seen: list[tuple[torch.dtype, torch.dtype]] = []
    weight = torch.randn(8, 8, requires_grad=True)

    def block(x: Tensor) -> Tensor:
        y = F.linear(x, weight)
        z = F.layer_norm(y, (8,))
        seen.append((y.dtype, z.dtype))
        return z * z

    with MetaGpu():
        x = torch.randn(4, 8, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16):
            out = checkpoint(block, x, use_reentrant=False)
        out.sum().backward()
    assert seen == [(torch.bfloat16, torch.float32)] * 2  # and not bfloat16 twice, as on the CPU
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32


def test_products_in_float32_where_a_model_asks_for_them() -> None:
    """CUDA has that, and the CPU has not."""
    weight, x = (torch.ones(8, 8, dtype=dtype, device="meta") for dtype in (torch.bfloat16, torch.float32))
    with MetaGpu(), torch.autocast("cpu", torch.bfloat16):
        with torch.amp.autocast(device_type="meta", dtype=torch.float32):
            assert F.linear(x, weight).dtype == torch.float32
        assert F.linear(x, weight).dtype == torch.bfloat16


def test_only_one_kind_of_device_counts() -> None:
    with Tracker("meta") as tracker:
        kept = torch.ones(1024)
        on_card = kept.to("meta")
        assert tracker.current == on_card.numel() * 4
    assert tracker.highest == KIB4


def test_outputs_that_are_known_are_those_of_the_operators() -> None:
    layer = torch.nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True, device="meta")
    found = []
    for device in (None, "meta"):  # the second asks each operator once
        x = torch.ones(2, 16, 32, device="meta", requires_grad=True)
        with MetaGpu(), Tracker(device) as tracker:
            loss = layer(layer(x).float()).square().mean()
            tracker.mark("forward")
            loss.backward()
            tracker.mark("backward")
        found.append((dict(tracker.flops), tracker.highest, tracker.phases))
        layer.zero_grad()
    assert found[0] == found[1]
    assert found[0][0]


def test_counts_without_data_are_those_of_a_real_step() -> None:
    """A real step on the CPU under torch's FlopCounterMode, against the count on tensors without data."""
    torch.manual_seed(0)
    setup = Setup("tiny", 64, 2, True, rank=4, weights="fp32", device="cpu")
    real = Workbench(setup)
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # which torch's counter does not know
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    known = {
        attention: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
        backward: lambda g, q, k, v, *_, **__: sdpa_backward_flop_count(g, q, k, v),
    }
    with FlopCounterMode(display=False, custom_mapping=known) as counter:
        real.spf(lambda _: None)
    real.clear()
    on_cpu = track(real.spf)
    with MetaGpu():
        counted = track(Workbench(Setup(**{**setup.__dict__, "device": "meta"})).spf)
    assert counted.flops == counter.get_total_flops()
    # The CPU's convolutions and attention hold a few buffers of their own.
    assert counted.peak == pytest.approx(on_cpu.peak, rel=0.1)


# ---- what is promised ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sd15() -> dict[tuple[Setup, str], Record]:
    """The real SD1.5 UNet: on tensors without data a narrow one takes as long."""
    return {record.key: record for record in tracked(Setup("sd1", 512, 1, True), (PLAIN, SPF, PRESERVATION))}


def test_flops_of_a_pair_and_of_the_default_run(sd15: dict[tuple[Setup, str], Record]) -> None:
    _plain, first, run, second = rows(sd15, Setup("sd1", 512, 1, True))
    assert 1.2 < first.flops <= 1.35  # not plain by mistake
    assert second.flops == 1
    assert run.flops == pytest.approx((first.flops + second.flops) / 2)
    assert run.flops <= 1.20


def test_memory_of_a_pair(sd15: dict[tuple[Setup, str], Record]) -> None:
    _, first, _, second = rows(sd15, Setup("sd1", 512, 1, True))
    for step in (first, second):
        assert step.memory <= 1.03
        assert step.more <= 40 * 2**20  # 24 MB; 114 MB when every layer's maps were kept for backward


def test_the_maps_of_single_tokens_are_not_kept() -> None:
    query = torch.randn(2, 64, 32, requires_grad=True)
    key, groups = torch.randn(2, 77, 32, requires_grad=True), torch.ones(2, 77, 3)
    with Tracker() as tracker:
        out = attention.group_attention(query, key, 4, groups)
        assert tracker.current == out.numel() * 4
        kept = attention._group_attention(query, key, 4, groups)
        assert tracker.current > 4 * 2 * 64 * 77 * 4  # so the tracker would have seen them
        del kept


def test_gradient_of_group_attention() -> None:
    """Against float64 autograd of the formula itself."""
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, n, 12, generator=generator, requires_grad=True) for n in (10, 7))
    groups = (torch.rand(2, 7, 2, generator=generator) > 0.5).float()
    upstream = torch.randn(2, 10, 2, generator=generator)
    attention.group_attention(query, key, 3, groups).backward(upstream)

    q, k = (t.detach().double().requires_grad_() for t in (query, key))
    heads = [(q[..., i : i + 4] @ k[..., i : i + 4].mT / 2).softmax(-1) for i in (0, 4, 8)]
    ((sum(heads) / 3) @ groups.double()).backward(upstream.double())
    torch.testing.assert_close(query.grad, q.grad, check_dtype=False, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(key.grad, k.grad, check_dtype=False, rtol=1e-4, atol=1e-6)


# ---- nothing stays ---------------------------------------------------------------------------------------------------


def test_memory_is_flat_over_200_steps() -> None:
    run = Run(CAPTIONS)
    alive = []
    with Tracker() as tracker:
        for step in range(1, 201):
            run.step()
            run.weight.grad = None
            if step % 20 == 0:
                gc.collect()
                alive.append(tracker.current)
    assert run.spf.step == 200
    assert len(set(alive)) == 1  # what the caches of prompts and phrases hold, from the first twenty steps on


def test_no_captured_tensor_survives_its_step(monkeypatch: pytest.MonkeyPatch) -> None:
    captured: list[weakref.ref[Tensor]] = []
    original = attention.group_attention

    def noting(query: Tensor, key: Tensor, heads: int, groups: Tensor, mask: None) -> Tensor:
        out = original(query, key, heads, groups, mask)
        captured.extend(weakref.ref(t) for t in (query, key, out))
        return out

    monkeypatch.setattr("spf_plugin.probe.group_attention", noting)
    run = Run(CAPTIONS)
    for _ in range(5):
        run.step()
    gc.collect()
    assert len(captured) == 3 * 2 * 3  # the first steps of three pairs, two paths, three tensors
    assert not any(ref() is not None for ref in captured)


# ---- timing ----------------------------------------------------------------------------------------------------------

TINY = Setup("tiny", 64, 2, True, rank=4, weights="fp32", device="cpu")


def test_a_timed_step_is_one_in_the_middle_of_a_run() -> None:
    """Prompts are encoded and SPF attached before the clock starts, and the model is afterwards what it was."""
    bench = Workbench(TINY)
    forwards = [id(getattr(module.forward, "__func__", module.forward)) for module in bench.unet.modules()]
    with mock.patch.object(bench.host, "encode", wraps=bench.host.encode) as encode:
        with bench.running(SPF) as step:
            warmed_up = encode.call_count
            bench.clear()
            step(lambda _: None)
            assert all(parameter.grad is not None for parameter in bench.parameters)
        assert encode.call_count == warmed_up > 0
    assert [id(getattr(module.forward, "__func__", module.forward)) for module in bench.unet.modules()] == forwards

    alone = track(bench.step(SPF)).flops
    with bench.running(SPF) as step:
        assert track(step).flops == alone


@pytest.mark.parametrize(("step", "passes"), [(DOP, "-++"), (PURE_CC, "---+"), (SPF, "-+"), (PRESERVATION, "+")])
def test_the_passes_of_a_step(step: str, passes: str) -> None:
    """`+` has a gradient. Nothing stays at the model."""
    bench, seen = Workbench(TINY), []
    bench.unet.register_forward_pre_hook(lambda *_: seen.append("+" if torch.is_grad_enabled() else "-"))
    bench.step(step)(lambda _: None)
    assert sorted(seen) == sorted(passes)
    assert len(bench.unet._forward_pre_hooks) == 1
    assert not bench.unet._forward_hooks
    assert all(parameter.grad is not None for parameter in bench.parameters)


def test_every_step_is_timed_in_every_round() -> None:
    rounds: list[None] = []
    timing = timed(TINY, (PLAIN, SPF, PRESERVATION), 3, lambda: rounds.append(None))
    assert len(rounds) == (3 + 1) * 3  # and one round of warming up
    assert {name: len(seconds) for name, seconds in timing.seconds.items()} == {PLAIN: 3, SPF: 3, PRESERVATION: 3}
    assert timing.ratio(PLAIN) == 1
    assert timing.peaks == {}  # the allocator's, of a GPU
    timing.seconds = {PLAIN: [1.0, 2.0, 4.0], SPF: [3.0, 2.0, 8.0]}
    assert (timing.median(SPF), timing.ratio(SPF)) == (3.0, 2.0)


def test_the_page_says_where_it_was_timed() -> None:
    stored = json.loads((ROOT / "docs" / "cost.json").read_text(encoding="utf-8"))
    records = {record.key: record for record in map(Record.from_json, stored["records"])}
    page = markdown(records, stored["environment"], stored["timed_on"], stored["command"])
    assert page == (ROOT / "docs" / "cost.md").read_text(encoding="utf-8")

    for record in records.values():
        record.seconds = record.ratio = record.gpu_peak = None
    page = markdown(records, stored["environment"], None, stored["command"])
    assert "## What a GPU said\n\nNot measured yet.\n" in page
    for setup, steps in TIMED:
        for name in steps:
            record = records[setup, name]
            record.seconds, record.ratio, record.gpu_peak = 0.25 * setup.batch, 1.5, (1 + (name == SPF)) * 2**30
    page = markdown(records, stored["environment"], {"gpu": "a card"}, stored["command"])
    assert "took 4.00 times (SD1.5) and 4.00 times (SDXL) as long as one with batch 1" in page
    assert "| SD1.5, 512 px, batch 4, checkpointing | SPF, first step of a pair | +97 MB | +1024 MB |" in page
    assert "| SD1.5, 512 px, batch 4, checkpointing | plain LoRA | +0 MB" not in page
    assert "measured on a GPU (gpu a card)" in page
    assert "1.50 (250 ms) | 2048 MB" in page
    assert NOT_MEASURED not in "".join(line for line in page.splitlines() if line.startswith("| SPF"))
