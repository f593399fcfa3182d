"""The attachment in a toy loop: what it adds to the loss, what it leaves behind, what it lets pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from spf_plugin import attachment, objective
from spf_plugin.adapter import Adapter
from spf_plugin.attachment import Attachment
from spf_plugin.config import SPFConfig, parse
from spf_plugin.errors import SPFError
from spf_plugin.prompt import Target

WIDTH, TOKENS = 8, 12


class CrossAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads = 2
        self.to_q, self.to_k, self.to_v = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        b, n, c = x.shape

        def heads(t: Tensor) -> Tensor:
            return t.reshape(b, -1, self.heads, c // self.heads).transpose(1, 2)

        q, k, v = heads(self.to_q(x)), heads(self.to_k(context)), heads(self.to_v(context))
        out = torch.softmax(q @ k.transpose(-1, -2) * (c // self.heads) ** -0.5, -1) @ v
        return x + out.transpose(1, 2).reshape(b, n, c)


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Conv2d(4, WIDTH, 1), nn.Conv2d(WIDTH, 4, 1)
        self.attn2 = CrossAttention()

    def forward(self, z: Tensor, context: Tensor) -> Tensor:
        x = self.into(z)
        b, c, h, w = x.shape
        x = self.attn2(x.flatten(2).transpose(1, 2), context).transpose(1, 2).reshape(b, c, h, w)
        return self.out(x)


class Accelerator:
    sync_gradients = True
    process_index = 0

    def __init__(self) -> None:
        self.losses: list[float] = []

    def backward(self, loss: Tensor) -> None:
        self.losses.append(float(loss.detach()))
        loss.backward()

    def end_training(self) -> None:
        pass


class Trainer:
    def call_unet(
        self,
        args: Any,
        accelerator: Any,
        unet: UNet,
        z: Tensor,
        t: Tensor,
        conds: Tensor,
        batch: Any,
        dtype: Any,
        **kw: Any,
    ) -> Tensor:
        return unet(z, conds)

    def generate_step_logs(self) -> dict[str, float]:
        return {"loss/current": 1.0}


class ToyHost:
    """The host protocol with words as tokens and a fixed random embedding for each word."""

    text_encoder_trained = False
    max_train_steps = 10
    first_step: int | None = None
    seed = 3

    def __init__(self) -> None:
        self.trainer, self.accelerator = Trainer(), Accelerator()
        self.reported: dict[str, float] = {}
        self.saved: Callable[[], dict[str, Any]] | None = None

    def tokenize(self, text: str) -> Sequence[int]:
        return [sum(map(ord, word)) % 97 for word in text.replace(",", " , ").split()]

    def encode(self, prompts: Sequence[str], beside: Sequence[str] = ()) -> Tensor:
        table = torch.randn(100, WIDTH, generator=torch.Generator().manual_seed(0))
        rows = []
        for prompt in prompts:
            ids = [98, *self.tokenize(prompt)][: TOKENS - 1]
            rows.append(table[torch.tensor([*ids, *[99] * (TOKENS - len(ids))])])
        return torch.stack(rows)

    def captions(self, batch: Any) -> list[str]:
        return batch["captions"]

    def targets(self, batch: Any) -> Sequence[Sequence[Target] | None]:
        return batch.get("targets", [])

    def recomputable(self) -> AbstractContextManager[None]:
        return nullcontext()

    def report(self, values: dict[str, float]) -> None:
        self.reported = values

    def on_save_state(self, state: Callable[[], dict[str, Any]], load: Callable[[dict[str, Any]], None]) -> None:
        self.saved = state


class Run:
    """A host, a UNet with an adapter on to_q, and SPF attached; `step` is one training step."""

    def __init__(self, captions: list[str], **settings: str):
        torch.manual_seed(0)
        self.host, self.unet, self.captions = ToyHost(), UNet().requires_grad_(False), captions
        self.weight = nn.Parameter(0.3 * torch.randn(WIDTH, WIDTH))
        adapter = Adapter()
        to_q = self.unet.attn2.to_q
        with adapter.watching([self.unet]):
            original = to_q.forward
            to_q.forward = lambda x: original(x) + x @ self.weight  # type: ignore[method-assign]
        # The toy adapter is noise all over the image, which a bright map would leave free altogether.
        usual = {"spf_target": "blonde hair", "spf_stage2_start": "0", "spf_log_every": "1", "spf_map_gain": "0.5"}
        usual["spf_every"] = "1"
        config = parse({**usual, **settings})
        self.spf = Attachment(self.host, config, self.unet, adapter)
        self.spf.open()
        self.z = torch.randn(len(captions), 4, 12, 16)

    def predict(self, **kwargs: Any) -> Tensor:
        trainer, t = self.host.trainer, torch.full((len(self.captions),), 500)
        conds, batch = self.host.encode(self.captions), {"captions": self.captions}
        return trainer.call_unet(
            None, self.host.accelerator, self.unet, self.z, t, conds, batch, torch.float32, **kwargs
        )

    def step(self) -> Tensor:
        prediction = self.predict()
        self.host.accelerator.backward(prediction.square().mean())
        return prediction


CAPTIONS = ["a woman, red coat, blonde hair", "a man, blue shirt, blonde hair"]


def test_the_first_step_checks_and_the_second_aligns() -> None:
    run = Run(CAPTIONS)
    first = run.step()
    assert run.host.accelerator.losses[0] == pytest.approx(float(first.detach().square().mean()))
    second = run.step()
    assert run.host.accelerator.losses[1] > float(second.detach().square().mean())
    assert set(run.host.reported) == {"drift", "map"}
    logs = run.host.trainer.generate_step_logs()
    assert logs["loss/current"] == 1.0
    assert {"spf/output", "spf/drift_outside", "spf/map_mean", "spf/stage"} <= set(logs)


def test_reference_is_the_base_and_gradient_reaches_only_the_adapter() -> None:
    run = Run(CAPTIONS, spf_base_preservation="0")
    run.step()
    run.weight.grad = None
    run.step()
    assert run.weight.grad is not None
    assert float(run.weight.grad.abs().max()) > 0
    assert all(p.grad is None for p in run.unet.parameters())


def test_loss_is_the_sum_of_its_terms() -> None:
    run = Run(CAPTIONS, spf_base_preservation="0", spf_text_consistent_multiplier="0.5", spf_output_multiplier="2")
    run.step()
    prediction = run.step()
    logs, config = run.spf.logs, run.spf.config
    expected = sum(weight * logs[f"spf/{name}"] for name, weight in config.multipliers.items())
    added = run.host.accelerator.losses[1] - float(prediction.detach().square().mean())
    assert added == pytest.approx(expected, rel=1e-4)


def test_preserved_samples_have_no_diffusion_loss() -> None:
    run = Run(CAPTIONS, spf_base_preservation="0.9", spf_output_multiplier="0", spf_fine_grained_multiplier="0")
    run.step()
    for _ in range(6):
        prediction = run.predict()
        preserved = run.spf._choose_preserved(torch.tensor([True, True]), 0)
        gradient = torch.autograd.grad(prediction.square().sum(), run.weight, retain_graph=True, allow_unused=True)[0]
        if preserved is not None and preserved.all():
            assert gradient is None or float(gradient.abs().max()) == 0
        run.host.accelerator.backward(prediction.square().mean())
    assert run.spf.logs["spf/output"] >= 0


@pytest.mark.parametrize("weight", ["0", "3", "8"])
def test_base_preservation_has_its_own_weight(weight: str) -> None:
    """A caption without the target must agree with the base model everywhere, whatever the other losses weigh."""
    off = {f"spf_{name}_multiplier": "0" for name in ("text_consistent", "fine_grained", "output")}
    run = Run(["a woman, red coat"], spf_base_preservation_multiplier=weight, **off)
    run.step()
    prediction = run.step().detach()
    with torch.no_grad(), run.spf.adapter.bypassed():
        base = run.unet(run.z, run.host.encode(run.captions))
    difference = float((prediction - base).square().mean() / base.square().mean())
    added = run.host.accelerator.losses[1] - float(prediction.square().mean())
    assert added == pytest.approx(float(weight) * difference, rel=1e-4, abs=1e-6)
    assert difference > 0.001


def test_the_diffusion_loss_acts_inside_the_map_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its value stays; its gradient at the prediction is multiplied by the map."""
    maps: list[Tensor] = []

    def spy(*args: Any, **kwargs: Any) -> Any:
        result = objective.dual_path(*args, **kwargs)
        maps.append(result.map)
        return result

    monkeypatch.setattr(attachment, "dual_path", spy)
    captions = [*CAPTIONS, "a woman, red coat"]  # the last has no target: nothing is open
    gated = Run(captions, spf_base_preservation="0")
    everywhere = Run(captions, spf_base_preservation="0", spf_diffusion_region="all")
    for run in (gated, everywhere):
        run.predict()  # the first prediction of a run only checks
    mine, theirs = gated.predict(), everywhere.predict()
    assert torch.equal(mine, theirs)
    m = maps[0]
    assert 0 < float(m.mean()) < 1
    assert not m[2].any()
    upstream = torch.randn(mine.shape, generator=torch.Generator().manual_seed(1))
    (found,) = torch.autograd.grad(mine, gated.weight, upstream)
    (expected,) = torch.autograd.grad(theirs, everywhere.weight, m * upstream)
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-7)


def test_paired_preservation_compares_both_prompts_in_one_step() -> None:
    """Beside the untouched response: the base prompt with the adapter against without it, for samples with a target."""
    off = {f"spf_{name}_multiplier": "0" for name in ("text_consistent", "fine_grained", "output", "base_preservation")}
    captions = [*CAPTIONS, "a woman, red coat"]
    run = Run(captions, spf_paired_preservation_multiplier="4", spf_base_preservation="0.9", **off)
    run.step()
    assert run.host.accelerator.losses[0] == pytest.approx(float(run.predict().detach().square().mean()), rel=1e-6)
    run.spf._pending = None
    prompts: list[Tensor] = []
    run.unet.register_forward_pre_hook(lambda _, args: prompts.append(args[1]))
    prediction = run.step().detach()
    full, base = run.host.encode(captions), run.host.encode(["a woman, red coat", "a man, blue shirt", captions[2]])
    assert [torch.equal(seen, wanted) for seen, wanted in zip(prompts, [base, full, base], strict=True)] == [True] * 3
    with torch.no_grad():
        tuned = run.unet(run.z, base)
        with run.spf.adapter.bypassed():
            untuned = run.unet(run.z, base)
    differences = (tuned - untuned).square().flatten(1).mean(1)
    assert float(differences.min()) > 1e-4
    added = run.host.accelerator.losses[1] - float(prediction.square().mean())
    assert added == pytest.approx(4 * float(differences[:2].sum() / 3), rel=1e-4)
    assert run.spf.logs["spf/paired_preservation"] == pytest.approx(float(differences.mean()), rel=1e-4)


def test_paired_preservation_stands_for_the_steps_that_every_leaves_out() -> None:
    off = {f"spf_{name}_multiplier": "0" for name in ("text_consistent", "fine_grained", "output")}
    added = []
    for every in ("1", "3"):
        run = Run(CAPTIONS, spf_paired_preservation_multiplier="4", spf_every=every, **off)
        run.spf._checked = True
        calls: list[int] = []
        run.unet.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        prediction = run.step()
        added.append(run.host.accelerator.losses[0] - float(prediction.detach().square().mean()))
        run.step()
        assert len(calls) == {"1": 6, "3": 4}[every]
    assert added[1] == pytest.approx(3 * added[0], rel=1e-4)


def test_choice_of_preserved_samples_is_a_function_of_the_step() -> None:
    a, b = Run(CAPTIONS, spf_base_preservation="0.5"), Run(CAPTIONS, spf_base_preservation="0.5")
    candidates = torch.ones(64, dtype=torch.bool)
    a.spf.step = b.spf.step = 7
    state = torch.get_rng_state()
    first, again, other = (run.spf._choose_preserved(candidates, i) for run, i in ((a, 0), (b, 0), (a, 1)))
    assert first is not None
    assert again is not None
    assert other is not None
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_dropped_caption_is_left_alone() -> None:
    run = Run(["", ""])
    run.step()
    prediction = run.step()
    assert run.host.accelerator.losses[1] == pytest.approx(float(prediction.detach().square().mean()))


def test_a_caption_without_target_must_agree_everywhere() -> None:
    run = Run(["a woman, red coat", CAPTIONS[1]], spf_base_preservation="0")
    run.step()
    run.step()
    assert 0 < run.spf.logs["spf/map_mean"] < 1
    only = Run(["a woman, red coat", "a man"], spf_base_preservation="0")
    only.step()
    only.step()
    assert only.spf.logs["spf/map_mean"] == 0
    assert "spf/drift_inside" not in only.spf.logs


def test_targets_of_single_samples() -> None:
    run = Run(CAPTIONS)
    text = run.spf.text.for_batch(CAPTIONS, run.host.encode(CAPTIONS), [None, [Target("blue shirt")]])
    assert text.base == ["a woman, red coat", "a man, blonde hair"]


@pytest.mark.parametrize("how", ["no_grad", "indices", "multiplier"])
def test_what_is_no_training_step_passes_through(how: str) -> None:
    run = Run(CAPTIONS)
    run.step()
    seen: list[int] = []
    run.spf._dual_path = lambda *a, **k: seen.append(1)  # type: ignore[assignment,method-assign]
    if how == "multiplier":
        run.spf.multiplier = lambda: 0.0
        run.predict()
    elif how == "no_grad":
        with torch.no_grad():
            run.predict()
    else:
        original = Trainer.call_unet
        assert original
        run.predict(indices=[0])
    assert not seen


def test_stages_and_every() -> None:
    run = Run(CAPTIONS, spf_stage2_start="4", spf_every="2")
    aligned = []
    for _ in range(8):
        before = len(run.host.accelerator.losses)
        prediction = run.step()
        aligned.append(run.host.accelerator.losses[before] > float(prediction.detach().square().mean()) + 1e-9)
    assert aligned == [False] * 4 + [True, False, True, False]


def test_a_loop_that_begins_late_is_as_far_as_it_says(caplog: pytest.LogCaptureFixture) -> None:
    run = Run(CAPTIONS, spf_stage2_start="4")
    run.host.first_step = 3
    with caplog.at_level("INFO"):
        stages = [run.spf.stage for _ in range(3) if run.step() is not None]
    assert stages == [2, 2, 2]
    assert run.spf.step == 6
    assert "alignment from step 4 of 10" in caplog.text


def test_numbers_come_once_in_every_window_whatever_is_aligned() -> None:
    run = Run(CAPTIONS, spf_every="3", spf_log_every="10")
    logged = []
    for step in range(40):
        run.host.reported = {}
        run.step()
        if run.host.reported:
            logged.append(step)
    assert logged == [12, 21, 30]  # the first aligned step is the one that only checks


def test_an_aligned_step_stands_for_those_left_out() -> None:
    added = []
    for every in ("1", "2", "3"):
        run = Run(CAPTIONS, spf_base_preservation="0", spf_every=every)
        run.step()
        run.spf.step = 6
        prediction = run.step()
        added.append(run.host.accelerator.losses[-1] - float(prediction.detach().square().mean()))
    assert added == pytest.approx([added[0], 2 * added[0], 3 * added[0]], rel=1e-4)


def test_two_predictions_without_backward_are_refused() -> None:
    run = Run(CAPTIONS)
    run.step()
    run.predict()
    with pytest.raises(SPFError, match="predicted twice"):
        run.predict()


def test_a_model_whose_hooks_see_no_graph_is_refused() -> None:
    run = Run(CAPTIONS)
    run.unet.attn2.to_q.forward = lambda x: x.detach()  # type: ignore[method-assign]
    with pytest.raises(SPFError, match="carry no gradient"):
        run.step()


@pytest.mark.parametrize("end", ["close", "end_training", "exception"])
def test_everything_is_put_back(end: str) -> None:
    run = Run(CAPTIONS)
    run.step()
    run.step()
    if end == "close":
        run.spf.close()
    elif end == "end_training":
        run.host.accelerator.end_training()
    else:
        run.z = torch.zeros(2, 3, 12, 16)
        with pytest.raises(RuntimeError):
            run.step()
    assert "call_unet" not in vars(run.host.trainer)
    assert "generate_step_logs" not in vars(run.host.trainer)
    assert set(vars(run.host.accelerator)) == {"losses"}
    assert not any(module._forward_hooks for module in run.unet.modules())
    assert run.spf._pending is None


def test_stacked_with_another_wrapper() -> None:
    """Somebody wraps call_unet after us; when we leave, theirs stays and reaches the original."""
    run = Run(CAPTIONS)
    ours, calls = run.host.trainer.call_unet, []

    def theirs(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(1)
        return ours(*args, **kwargs)

    run.host.trainer.call_unet = theirs  # type: ignore[method-assign]
    run.step()
    run.spf.close()
    run.step()
    assert len(calls) == 2
    assert vars(run.host.trainer)["call_unet"] is theirs


def test_no_tensor_of_a_step_survives_it() -> None:
    import gc

    def tensors() -> int:
        gc.collect()
        return sum(isinstance(o, Tensor) for o in gc.get_objects())

    run = Run(CAPTIONS)
    for _ in range(5):
        run.step()
    before = tensors()
    for _ in range(200):
        run.step()
    assert tensors() == before


def test_no_step_waits_for_the_gpu() -> None:
    """Nothing of an aligned step that logs nothing asks a tensor for its values (on a GPU, the host would wait)."""
    asked: list[str] = []

    class Asking(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = func._overloadpacket.__name__
            masks = [i for i in args[1] if i is not None and i.dtype == torch.bool] if name == "index" else []
            if masks or name in ("_local_scalar_dense", "nonzero", "masked_select"):
                asked.append(name)
            return func(*args, **(kwargs or {}))

    run = Run(CAPTIONS, spf_log_every="100", spf_base_preservation="0")
    run.step()
    with Asking():
        prediction = run.predict()
    assert run.spf._pending is not None  # it was aligned
    assert not asked
    run.host.accelerator.backward(prediction.square().mean())
    limited = Run(CAPTIONS, spf_log_every="100", spf_base_preservation="0", spf_max_timestep="900")
    limited.step()
    with Asking():
        limited.predict()
    assert asked  # so the mode would have seen it


def test_state() -> None:
    run = Run(CAPTIONS)
    for _ in range(3):
        run.step()
    assert run.host.saved is not None
    assert run.host.saved() == {"step": 3}
    run.spf._load_state({"step": 8})
    assert run.spf.step == 8


def test_config_without_weights_only_measures() -> None:
    off = {f"spf_{n}_multiplier": "0" for n in SPFConfig().multipliers}
    run = Run(CAPTIONS, spf_base_preservation="0", **off)
    run.step()
    prediction = run.step()
    assert run.host.accelerator.losses[1] == pytest.approx(float(prediction.detach().square().mean()))
    assert run.spf.logs["spf/drift_outside"] > 0
