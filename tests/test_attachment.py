"""The attachment in a toy loop: what it adds to the loss, what it leaves behind, what it lets pass."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from spf_plugin import attachment, pairs
from spf_plugin.adapter.bypass import Adapter
from spf_plugin.attachment import Attachment
from spf_plugin.config import parse
from spf_plugin.core import losses, objective, sfcm
from spf_plugin.core.prompt import Target, parse_targets
from spf_plugin.core.schedule import Discrete
from spf_plugin.errors import SPFError
from spf_plugin.families import known
from spf_plugin.families.base import Text
from spf_plugin.pairs import Partner, State
from spf_plugin.seam import Call

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

    def forward(self, z: Tensor, t: Tensor, context: Tensor, sizes: Tensor | None = None) -> Tensor:
        x = self.into(z)
        b, c, h, w = x.shape
        x = self.attn2(x.flatten(2).transpose(1, 2), context).transpose(1, 2).reshape(b, c, h, w)
        return self.out(x)


class Accelerator:
    sync_gradients = True
    num_processes = 1
    is_main_process = True

    def __init__(self) -> None:
        self.losses: list[float] = []

    def backward(self, loss: Tensor) -> None:
        self.losses.append(float(loss.detach()))
        loss.backward()

    def end_training(self) -> None:
        pass


class Trainer:
    def generate_step_logs(self) -> dict[str, float]:
        return {"loss/current": 1.0}


class ToyHost:
    """The host protocol with words as tokens and a fixed random embedding for each word."""

    text_encoder_trained = False
    max_train_steps = 10
    first_step: int | None = None
    noise_schedule = Discrete(torch.linspace(0.999, 0.005, 1000), "epsilon")
    captions_before_training = None
    prefix = ""
    subset_targets: Sequence[Target] = ()

    def __init__(self, denoiser: nn.Module) -> None:
        self.trainer, self.accelerator, self.denoiser = Trainer(), Accelerator(), denoiser
        self.batch: Any = None
        self.reported: dict[str, float] = {}
        self.losses: list[float] = []
        self.saved: Callable[[], State] | None = None

    def tokenize(self, text: str) -> Sequence[int]:
        return [sum(map(ord, word)) % 97 for word in text.replace(",", " , ").split()]

    def encode(self, prompts: Sequence[str], beside: Sequence[str] = ()) -> Text:
        table = torch.randn(100, WIDTH, generator=torch.Generator().manual_seed(0))
        rows = []
        for prompt in prompts:
            ids = [98, *self.tokenize(prompt)][: TOKENS - 1]
            rows.append(table[torch.tensor([*ids, *[99] * (TOKENS - len(ids))])])
        return {"hidden": torch.stack(rows)}

    def captions(self, batch: Any) -> list[str]:
        return batch["captions"]

    def targets(self, batch: Any) -> Sequence[Sequence[Target] | None]:
        return batch.get("targets", [])

    def sample_weights(self, batch: Any) -> Tensor | None:
        return batch.get("weights")

    def stepping(self) -> AbstractContextManager[None]:
        return nullcontext()

    def recomputable(self) -> AbstractContextManager[None]:
        return nullcontext()

    def report(self, values: dict[str, float]) -> None:
        self.reported = values

    def on_save_state(self, state: Callable[[], State], load: Callable[[State], None]) -> None:
        self.saved = state


class Run:
    """A host, a UNet with an adapter on to_q, and SPF attached; `step` is one training step."""

    def __init__(self, captions: list[str], **settings: str):
        torch.manual_seed(0)
        self.unet, self.captions = UNet().requires_grad_(False), captions
        self.host = ToyHost(self.unet)
        self.weight = nn.Parameter(0.3 * torch.randn(WIDTH, WIDTH))
        adapter = Adapter()
        to_q = self.unet.attn2.to_q
        with adapter.watching([self.unet]):
            original = to_q.forward
            to_q.forward = lambda x: original(x) + x @ self.weight  # type: ignore[method-assign]
        # The toy adapter is noise all over the image, which a bright map would leave free altogether.
        usual = {"spf_target": "blonde hair", "spf_log_every": "1", "spf_map_gain": "0.5"}
        config = parse({**usual, **settings})
        self.spf = Attachment(self.host, config, known.find(self.unet), adapter)
        self.spf.open()
        self.weights: Tensor | None = None  # of the host's own loss
        self.t = 500  # half signal, half noise: `losses.noise_weight` is 1
        self.z, self.more = torch.randn(len(captions), 4, 12, 16), dict[str, Tensor]()

    def predict(self) -> Tensor:
        self.host.batch = {"captions": self.captions, "weights": self.weights}
        t, hidden = torch.full((len(self.captions),), self.t), self.host.encode(self.captions)["hidden"]
        return self.unet(self.z, t, hidden, **self.more)

    def base(self, captions: list[str]) -> Tensor:
        """The UNet's own prediction for these captions, whatever is hooked."""
        return self.unet.forward(self.z, torch.full((len(captions),), self.t), self.host.encode(captions)["hidden"])

    def step(self) -> Tensor:
        prediction = self.predict()
        loss = prediction.square().mean()
        self.host.accelerator.backward(loss)
        self.host.losses.append(float(loss.detach()))  # as hosts do, after backward
        return prediction


CAPTIONS = ["a woman, red coat, blonde hair", "a man, blue shirt, blonde hair"]


UNPAIRED = {"spf_base_preservation_multiplier": "0"}
OFF = {f"spf_{name}_multiplier": "0" for name in ("text_consistent", "fine_grained", "output", "base_preservation")}


def without_target(run: Run) -> list[str]:
    return [caption.replace(", blonde hair", "") for caption in run.captions]


def mean_square(prediction: Tensor) -> float:
    return float(prediction.detach().square().mean())


def test_the_first_step_is_aligned() -> None:
    """Nothing of a run or of a resumed one is trained plainly when alignment starts at 0."""
    run = Run(CAPTIONS)
    first = run.step()
    assert run.host.accelerator.losses[0] > mean_square(first) + 1e-4
    assert set(run.host.reported) == {"drift", "map"}
    logs = run.host.trainer.generate_step_logs()
    assert logs["loss/current"] == 1.0
    assert {"spf/output", "spf/drift_outside", "spf/map_mean", "spf/stage"} <= set(logs)


def test_reference_is_the_base_and_gradient_reaches_only_the_adapter() -> None:
    run = Run(CAPTIONS, **UNPAIRED)
    for _ in range(2):
        run.weight.grad = None
        run.step()
        assert run.weight.grad is not None
        assert float(run.weight.grad.abs().max()) > 0
        assert all(p.grad is None for p in run.unet.parameters())


def test_loss_is_the_sum_of_its_terms() -> None:
    run = Run(CAPTIONS, **UNPAIRED, spf_text_consistent_multiplier="0.5", spf_output_multiplier="2")
    prediction = run.step()
    logs, config = run.spf.numbers.values, run.spf.config
    expected = sum(weight * logs[f"spf/{name}"] for name, weight in config.multipliers.items())
    assert run.host.accelerator.losses[0] - mean_square(prediction) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("weight", ["0", "3", "8"])
def test_a_caption_without_target_only_preserves(weight: str) -> None:
    """It must agree with the base model everywhere, with base preservation's weight, and nothing pulls it elsewhere."""
    settings = {**OFF, "spf_fine_grained_multiplier": "1e-9", "spf_base_preservation_multiplier": weight}
    run = Run(["a woman, red coat"], **settings)
    prediction = run.predict()
    (gradient,) = torch.autograd.grad(prediction.square().sum(), run.weight, retain_graph=True)
    assert not gradient.any()
    run.host.accelerator.backward(prediction.square().mean())
    with torch.no_grad(), run.spf.adapter.bypassed():
        base = run.base(run.captions)
    difference = float((prediction.detach() - base).square().mean() / base.square().mean())
    added = run.host.accelerator.losses[0] - mean_square(prediction)
    assert added == pytest.approx(float(weight) * difference, rel=1e-4, abs=1e-6)
    assert difference > 0.001
    assert run.spf._partner is None  # it has shown its base prompt


def test_the_diffusion_loss_acts_inside_the_map_and_is_averaged_over_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its value stays; its gradient at the prediction is that of a mean over the map."""
    maps: list[Tensor] = []

    def spy(*args: Any, **kwargs: Any) -> Any:
        result = objective.dual_path(*args, **kwargs)
        maps.append(result.map)
        return result

    monkeypatch.setattr(attachment, "dual_path", spy)
    captions = [
        *CAPTIONS,
        "a woman, red coat",
        "",
    ]  # the third has no target: nothing is open; the last was dropped out
    gated, everywhere = Run(captions), Run(captions, spf_diffusion_region="all")
    mine, theirs = gated.predict(), everywhere.predict()
    assert torch.equal(mine, theirs)
    m = maps[0]
    assert 0 < float(m[:2].mean()) < 1
    assert not m[2].any()
    upstream = torch.randn(mine.shape, generator=torch.Generator().manual_seed(1))
    (found,) = torch.autograd.grad(mine, gated.weight, upstream)
    factor = m.double() / m.double().mean(dim=(1, 2, 3), keepdim=True).clamp_min(0.1)
    factor[3] = 1
    (expected,) = torch.autograd.grad(theirs, everywhere.weight, (factor * upstream).float())
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-7)


# ---- pairs in time ---------------------------------------------------------------------------------------------------


def test_the_second_step_shows_the_same_noise_with_the_base_prompts() -> None:
    """Against two explicit passes; whatever the host's own batch of that step is."""
    run = Run([*CAPTIONS, "a woman, red coat"], **{**OFF, "spf_base_preservation_multiplier": "4"})
    run.more, run.t = {"sizes": torch.arange(3.0)}, 750
    seen: list[tuple[tuple[Tensor, ...], dict[str, Tensor]]] = []
    run.unet.register_forward_hook(lambda _, args, kwargs, __: seen.append((args, kwargs)), with_kwargs=True)
    run.step()
    shown, base = run.z, run.host.encode(without_target(run))["hidden"]
    # Another bucket, another number of images, other captions: none of them is shown.
    run.captions, run.z, run.more = ["a hat, blonde hair"], torch.randn(1, 4, 8, 24), {"sizes": torch.zeros(1)}
    run.t = 100
    run.weight.grad = None
    returned = run.step()
    assert [torch.equal(args[2], base) for args, _ in seen] == [True, False, True]
    (z, t, _), kwargs = seen[2]
    assert torch.equal(z, shown)
    assert t.tolist() == [750] * 3
    assert torch.equal(kwargs["sizes"], torch.arange(3.0))
    assert returned.shape == run.z.shape
    assert not returned.requires_grad

    weight = run.weight.detach().double().requires_grad_()
    unet = UNet().double()
    unet.load_state_dict(run.unet.state_dict())
    with torch.no_grad():
        untuned = unet(shown.double(), t, base.double())
    plain = unet.attn2.to_q.forward
    unet.attn2.to_q.forward = lambda x: plain(x) + x @ weight  # type: ignore[method-assign]
    tuned = unet(shown.double(), t, base.double())
    error = (tuned - untuned).square().flatten(1).mean(1) / untuned.square().flatten(1).mean(1)
    abar = float(run.host.noise_schedule.alphas_cumprod[750])
    noisy = (1 - abar) / abar  # of the first step's timestep: 2.9
    expected = 4 * noisy * error[:2].sum() / 3  # the third has no target, and has been shown already
    expected.backward()
    host_loss, total = run.host.losses[1], run.host.accelerator.losses[1]
    assert total - host_loss == pytest.approx(float(expected.detach()), rel=1e-4)
    torch.testing.assert_close(run.weight.grad, weight.grad, check_dtype=False, rtol=1e-4, atol=1e-7)
    assert run.spf.numbers.values["spf/base_preservation"] == pytest.approx(float(error.detach()[:2].mean()), rel=1e-4)


def test_steps_alternate_and_the_host_reports_the_loss_of_its_own() -> None:
    run = Run(CAPTIONS)
    calls: list[int] = []
    run.unet.register_forward_pre_hook(lambda *_: calls.append(1))
    counts = []
    for _ in range(4):
        before = len(calls)
        run.z = torch.randn_like(run.z)
        run.step()
        counts.append(len(calls) - before)
    assert counts == [2, 1, 2, 1]  # half a reference pass a step
    losses_ = run.host.losses
    assert losses_[1] == losses_[0] != losses_[2] == losses_[3]


def test_both_steps_of_a_pair_fall_into_one_optimiser_step() -> None:
    """Gradient accumulation counts predictions, so batch size 1 has the contrast in one update."""
    run = Run(CAPTIONS)
    waiting = []
    for micro in range(4):
        run.host.accelerator.sync_gradients = micro % 2 == 1
        run.step()
        waiting.append(run.spf._partner is not None)
    assert waiting == [True, False, True, False]
    assert run.spf.step == 2


def test_a_batch_without_target_has_no_second_step_unless_other_processes_have() -> None:
    alone, together = Run(["a woman, red coat", "a man"]), Run(["a woman, red coat", "a man"])
    together.host.accelerator.num_processes = 2
    for run in (alone, together):
        run.step()
    assert alone.spf._partner is None
    assert together.spf._partner is not None
    together.step()
    host_loss, total = together.host.losses[1], together.host.accelerator.losses[1]
    assert total == pytest.approx(host_loss)  # nothing is preserved twice


def test_a_batch_that_was_dropped_out_is_left_alone_and_alternates_with_other_processes() -> None:
    run = Run(["", ""])
    run.host.accelerator.num_processes = 2
    calls: list[int] = []
    run.unet.register_forward_pre_hook(lambda *_: calls.append(1))
    counts, gradients = [], []
    for _ in range(4):
        before, run.weight.grad = len(calls), None
        run.step()
        counts.append(len(calls) - before)
        assert run.weight.grad is not None
        gradients.append(run.weight.grad)
    assert counts == [2, 1, 2, 1]
    assert run.host.accelerator.losses == pytest.approx(run.host.losses)
    (expected,) = torch.autograd.grad(run.base(run.captions).square().mean(), run.weight)
    torch.testing.assert_close(gradients[0], expected)
    assert not gradients[1].any()
    assert not run.host.reported  # no numbers of nothing
    assert not run.spf.numbers.values


def test_a_trained_text_encoder_encodes_the_base_prompts_anew() -> None:
    """By its present weights, with a graph; and the host's own conditioning gets a gradient, of 0."""
    run = Run(CAPTIONS, **{**OFF, "spf_base_preservation_multiplier": "1"})
    run.host.text_encoder_trained = True
    scale = nn.Parameter(torch.ones(()))
    encode = run.host.encode
    run.host.encode = lambda prompts, beside=(): {"hidden": encode(prompts)["hidden"] * scale}  # type: ignore
    run.step()
    assert run.spf._partner is not None
    assert not run.spf._partner.encoded
    with torch.no_grad():
        scale.fill_(1.5)
    scale.grad = None
    run.step()
    assert scale.grad is not None
    hidden, t = run.host.encode(without_target(run))["hidden"].detach(), torch.full((2,), run.t)
    with torch.no_grad():
        tuned = run.unet(run.z, t, hidden)
    with torch.no_grad(), run.spf.adapter.bypassed():
        untuned = run.unet(run.z, t, hidden / 1.5)  # the reference is that of the untrained encoder
    error = losses.base_preservation(tuned, untuned).mean()
    assert run.host.accelerator.losses[1] - run.host.losses[1] == pytest.approx(float(error), rel=1e-4)

    hidden = torch.ones(2, 3, requires_grad=True)
    zero = pairs.linked({"hidden": hidden, "pooled": torch.ones(1)})
    assert zero is not None
    zero.backward()
    assert float(zero.detach()) == 0
    assert hidden.grad is not None
    assert pairs.linked({"hidden": torch.ones(2)}) is None


def test_a_partner_survives_being_saved() -> None:
    call = Call(
        (torch.randn(2, 4, 3, 3), torch.tensor([1, 9])),
        {"context": torch.randn(2, 3, 4), "added": {"sizes": [torch.ones(2, 2)], "y": None}, "return_dict": True},
    )
    eps = torch.randn(2, 4, 3, 3).to(torch.bfloat16)
    given = Partner(call, eps, torch.tensor([True, False]), True, ("a", "b"), ("a c", "b"), torch.tensor([1.0, 0.5]))
    kept = given.state()
    assert kept is not None
    read = Partner.of(json.loads(json.dumps(kept[0])), kept[1])
    assert torch.equal(read.eps_ref, given.eps_ref)
    assert torch.equal(read.which, given.which)
    assert read.weights is not None
    assert torch.equal(read.weights, torch.tensor([1.0, 0.5]))
    assert Partner.of(kept[0], {name: t for name, t in kept[1].items() if name != "sample_weights"}).weights is None
    assert (read.encoded, read.base, read.full) == (True, ("a", "b"), ("a c", "b"))
    assert all(torch.equal(a, b) for a, b in zip(read.call.args, call.args, strict=True))
    assert torch.equal(read.call.kwargs["context"], call.kwargs["context"])
    assert torch.equal(read.call.kwargs["added"]["sizes"][0], torch.ones(2, 2))
    assert (read.call.kwargs["added"]["y"], read.call.kwargs["return_dict"]) == (None, True)
    odd = replace(given, call=Call(call.args, {"parameters": object()}))
    assert odd.state() is None  # the resumed run begins with an aligned step


def test_a_run_resumed_within_a_pair_goes_on_as_an_uninterrupted_one() -> None:
    def optimiser_step(run: Run) -> None:
        run.step()
        with torch.no_grad():
            run.weight -= 0.1 * run.weight.grad
        run.weight.grad = None

    whole, first = Run(CAPTIONS), Run(CAPTIONS)
    for _ in range(4):
        optimiser_step(whole)
    optimiser_step(first)
    assert first.host.saved is not None
    state = first.host.saved()
    first.host.accelerator.end_training()  # a host may save only after its last step
    assert first.spf._partner is None
    assert first.host.saved().values == state.values
    assert first.host.saved().tensors.keys() == state.tensors.keys()
    assert set(state.values) == {"step", "stage", "pair", "run", "settings", "subset_targets"}
    second = Run(CAPTIONS)
    with torch.no_grad():
        second.weight.copy_(first.weight)
    second.spf._load_state(state)
    for _ in range(3):
        optimiser_step(second)
    assert torch.equal(second.weight, whole.weight)
    assert second.host.losses == whole.host.losses[1:]


def test_the_gate_is_a_mean_over_the_map() -> None:
    m = torch.rand(3, 1, 5, 7, generator=torch.Generator().manual_seed(0))
    m[1] *= 0.02  # nearly empty: limited
    m[2] = 0
    wide = m.double()
    expected = wide * (1 / wide.mean(dim=(1, 2, 3), keepdim=True)).clamp(max=sfcm.MAX_REGION_GAIN)
    expected[2] = 0
    torch.testing.assert_close(sfcm.gate(m).double(), expected, rtol=1e-6, atol=0)
    assert float(sfcm.gate(m)[0].mean()) == pytest.approx(1)


def test_a_dropped_caption_is_left_alone() -> None:
    run = Run(["", ""])
    for step in range(2):
        prediction = run.step()
        assert run.host.accelerator.losses[step] == pytest.approx(mean_square(prediction))


def test_an_empty_map_has_no_drift_inside_and_a_full_one_none_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(["a woman, red coat", CAPTIONS[1]], **UNPAIRED)
    run.step()
    assert 0 < run.spf.numbers.values["spf/map_mean"] < 1
    only = Run(["a woman, red coat", "a man"])
    only.step()
    assert only.spf.numbers.values["spf/map_mean"] == 0
    assert "spf/drift_inside" not in only.spf.numbers.values
    monkeypatch.setattr(sfcm, "control_map", lambda *_, eps_res, **__: torch.ones_like(eps_res[:, :1]))
    full = Run(CAPTIONS)
    full.step()
    assert set(full.host.reported) == {"map"}
    assert "spf/drift_outside" not in full.spf.numbers.values


def test_targets_of_single_samples() -> None:
    run = Run(CAPTIONS)
    text = run.spf.text.for_batch(CAPTIONS, run.host.encode(CAPTIONS), [None, [Target("blue shirt")]])
    assert text.base == ["a woman, red coat", "a man, blonde hair"]


@pytest.mark.parametrize("how", ["no_grad", "no_batch", "multiplier"])
def test_what_is_no_training_step_passes_through(how: str) -> None:
    run = Run(CAPTIONS, **UNPAIRED)
    run.step()
    seen: list[int] = []
    run.unet.register_forward_hook(lambda *_: seen.append(1))
    if how == "multiplier":
        run.spf.multiplier = lambda: 0.0
        run.predict()
    elif how == "no_grad":
        with torch.no_grad():
            run.predict()
    else:
        hidden = run.host.encode(CAPTIONS)["hidden"]
        run.host.batch = None
        run.unet(run.z, torch.full((2,), run.t), hidden)
    assert seen == [1]  # no reference pass
    assert run.spf._pending is None


def test_stages() -> None:
    run = Run(CAPTIONS, spf_stage2_start="4", **UNPAIRED)
    aligned = []
    for step in range(8):
        prediction = run.step()
        aligned.append(run.host.accelerator.losses[step] > mean_square(prediction) + 1e-9)
    assert aligned == [False] * 4 + [True] * 4


def test_a_run_that_would_never_be_aligned_stops_before_its_first_step() -> None:
    """Whatever its length comes from: epochs, too, are steps by then."""
    run = Run(CAPTIONS, spf_stage2_start="10")
    with pytest.raises(SPFError, match="start at step 10, and the run ends at step 10: a plain LoRA"):
        run.step()
    assert not run.host.accelerator.losses
    assert not vars(run.host.trainer)


def test_a_loop_that_begins_late_is_as_far_as_it_says(caplog: pytest.LogCaptureFixture) -> None:
    run = Run(CAPTIONS, spf_stage2_start="4")
    run.host.first_step = 3
    with caplog.at_level("INFO"):
        stages = [run.spf.stage for _ in range(3) if run.step() is not None]
    assert stages == [2, 2, 2]
    assert run.spf.step == 6
    assert "alignment from step 4 of 10" in caplog.text


def test_numbers_come_once_in_every_window_whatever_is_aligned() -> None:
    run = Run(CAPTIONS, spf_log_every="5")
    logged = []
    for step in range(22):
        run.host.reported = {}
        run.step()
        if run.host.reported:
            logged.append(step)
    assert logged == [0, 6, 10, 16, 20]  # the first step of a pair in each


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


@pytest.mark.parametrize("end", ["close", "end_training", "exception", "exception_in_the_response"])
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
        if end == "exception_in_the_response":
            run.z = torch.randn(2, 4, 12, 16)
            original = run.unet.out.forward

            def fails(x: Tensor) -> Tensor:
                if torch.is_grad_enabled():
                    raise RuntimeError("out of memory")
                return original(x)

            run.unet.out.forward = fails  # type: ignore[method-assign]
        with pytest.raises(RuntimeError):
            run.step()
        if end == "exception_in_the_response":  # hooks may not go while torch walks through them
            assert not run.spf._open
            run.unet.out.forward = original  # type: ignore[method-assign]
            run.predict()
    assert "generate_step_logs" not in vars(run.host.trainer)
    assert set(vars(run.host.accelerator)) == {"losses"}
    assert not any(module._forward_hooks for module in run.unet.modules())
    assert run.spf._pending is None


def test_stacked_with_another_wrapper() -> None:
    """Somebody wraps backward after us; when we leave, theirs stays and reaches the original."""
    run = Run(CAPTIONS)
    ours, calls = run.host.accelerator.backward, []

    def theirs(loss: Tensor) -> None:
        calls.append(1)
        ours(loss)

    run.host.accelerator.backward = theirs  # type: ignore[method-assign]
    run.step()
    run.spf.close()
    run.step()
    assert len(calls) == 2
    assert vars(run.host.accelerator)["backward"] is theirs


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

    run = Run(CAPTIONS, spf_log_every="100")
    for _ in range(2):
        run.step()
    for _ in range(2):  # both steps of a pair
        with Asking():
            prediction = run.predict()
        assert run.spf._pending is not None  # it was aligned
        assert not asked
        run.host.accelerator.backward(prediction.square().mean())
    with Asking():
        float(run.weight.detach().sum())
    assert asked  # so the mode would have seen it


def test_state() -> None:
    run = Run(CAPTIONS, **UNPAIRED)
    for _ in range(3):
        run.step()
    assert run.host.saved is not None
    saved = run.host.saved()
    assert (saved.values["step"], saved.values["stage"], saved.tensors) == (3, 2, {})
    run.spf._load_state(State({"step": 8}))
    assert run.spf.step == 8


def test_a_state_of_another_target_stops_and_other_settings_are_said(caplog: pytest.LogCaptureFixture) -> None:
    first = Run(CAPTIONS)
    first.host.subset_targets = parse_targets("hat")
    first.step()
    assert first.host.saved is not None
    state = first.host.saved()
    same = Run(CAPTIONS, spf_log_every="5")
    same.host.subset_targets = parse_targets("Hat")
    same.spf._load_state(state)
    assert "other settings" not in caplog.text
    same.host.subset_targets = ()
    with pytest.raises(SPFError, match=r"with the target blonde hair\|hat, and this run's is blonde hair:"):
        same.spf._load_state(state)
    other = Run(CAPTIONS, spf_map="paper")
    other.host.subset_targets = parse_targets("hat")
    other.spf._load_state(state)
    assert "spf_map=paper (was soft)" in caplog.text
    assert other.spf.step == 1


def test_more_steps_do_not_take_a_resumed_run_back_to_plain_training(caplog: pytest.LogCaptureFixture) -> None:
    first = Run(CAPTIONS, **UNPAIRED, spf_stage2_start="0.5")
    for _ in range(6):
        first.step()
    assert first.host.saved is not None
    state = first.host.saved()
    assert (state.values["step"], state.values["stage"]) == (6, 2)
    for reached, stage in ((state, 2), (State({"step": 6, "stage": 1}), 1), (State({"step": 6}), 1)):
        caplog.clear()
        second = Run(CAPTIONS, **UNPAIRED, spf_stage2_start="0.5")
        second.host.max_train_steps = 40
        second.spf._load_state(reached)
        second.step()
        assert second.spf.stage == stage
        assert ("stays so" in caplog.text) == (stage == 2)
        assert ("spf/output" in second.spf.numbers.values) == (stage == 2)
    same = Run(CAPTIONS, **UNPAIRED, spf_stage2_start="0.5")
    caplog.clear()
    same.spf._load_state(state)
    assert (same.spf.stage, caplog.text) == (2, "")


def test_a_sample_that_weighs_nothing_to_the_host_weighs_nothing_to_spf() -> None:
    """A regularisation image with --prior_loss_weight 0: one that only preserves, or one that says the target."""
    for other in ("a man, blue shirt", CAPTIONS[1]):
        added = []
        for weights in (None, torch.tensor([1.0, 1.0]), torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])):
            run = Run([CAPTIONS[0], other])
            run.weights = weights
            both = []
            for _ in range(2):
                shown = mean_square(run.step())
                both.append(run.host.accelerator.losses[-1] - (shown if not both else run.host.losses[-1]))
            added.append(torch.tensor(both))
        assert torch.equal(added[0], added[1])
        torch.testing.assert_close(added[2] + added[3], added[0])
        assert (added[2] > 0).all()
        assert bool(added[3][0] > 0)


def test_config_without_weights_only_measures() -> None:
    run = Run(CAPTIONS, **OFF)
    for step in range(2):
        prediction = run.step()
        assert run.host.accelerator.losses[step] == pytest.approx(mean_square(prediction))
        (gradient,) = torch.autograd.grad(run.predict().square().sum(), run.weight)
        (expected,) = torch.autograd.grad(run.base(CAPTIONS).square().sum(), run.weight)
        assert torch.equal(gradient, expected)
    assert run.spf.numbers.values["spf/drift_outside"] > 0
    assert run.spf._partner is None


def test_an_attachment_that_fails_to_open_leaves_nothing_behind() -> None:
    run = Run(CAPTIONS)
    run.spf.close()

    def refuse(*_: Any) -> None:
        raise RuntimeError("no hooks here")

    run.host.on_save_state = refuse  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="no hooks"):
        run.spf.open()
    assert not vars(run.host.trainer)
    assert set(vars(run.host.accelerator)) == {"losses"}
