"""Runs the dual path inside somebody else's training loop: around calls of the denoiser, and in `accelerator.backward`.

An aligned step: the reference pass (the same call, adapter bypassed, base prompt, no grad), then the response pass (the
host's own call), then the losses; they wait until the host calls `backward`, and are added to the loss it passes. The
response term waits as a gradient with respect to the prediction. The step after it shows the same noisy latents with
the base prompts (adapter on) and is held to the same reference: `pairs`. Nothing else of a step outlives it.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from spf_plugin import patching, terminal
from spf_plugin.adapter.bypass import Adapter
from spf_plugin.config import SPFConfig
from spf_plugin.core import losses, sfcm
from spf_plugin.core.objective import Pass, dual_path
from spf_plugin.core.schedule import Schedule
from spf_plugin.enhancement import limits
from spf_plugin.enhancement.term import Enhancement
from spf_plugin.errors import SPFError
from spf_plugin.families.base import Family, put_blocks_back
from spf_plugin.hosts import resuming
from spf_plugin.hosts.base import Host
from spf_plugin.pairs import Partner, State, linked
from spf_plugin.probe import Capture, capture, pass_of
from spf_plugin.seam import Call, intercepted
from spf_plugin.shown.numbers import Numbers
from spf_plugin.shown.watch import Watch
from spf_plugin.step import Step
from spf_plugin.text import BatchText, TextSide

logger = terminal.logger(__name__)


class Attachment:
    """SPF, attached to a host and an adapter. `close()` puts everything back.

    Args:
        host: the training loop.
        config: the settings.
        family: of the denoiser.
        adapter: switches the trained modules off.
        multiplier: the adapter's present multiplier; at 0 SPF lets everything pass.
        enhancement: the response term, or None.
        watch: draws samples and warns, or None.

    Raises:
        SPFError: `spf_layers` matches nothing.
    """

    def __init__(
        self,
        host: Host,
        config: SPFConfig,
        family: Family,
        adapter: Adapter,
        multiplier: Callable[[], float] = lambda: 1.0,
        enhancement: Enhancement | None = None,
        watch: Watch | None = None,
    ):
        self.enhancement, self.watch = enhancement, watch
        self.host, self.config, self.adapter, self.multiplier = host, config, adapter, multiplier
        self.family, self.layers = family, family.layers(config.layers)
        self.text = TextSide(host, family, config.target, adapter.bypassed)
        self.step = 0  # finished optimiser steps
        self.numbers = Numbers(config.log_every, host.report)
        self._partner: Partner | None = None  # the second half of a pair, for the next prediction
        self._preserving = False  # between a prediction for base prompts and its backward
        self._shown_loss: Tensor | None = None  # the host's loss of the last step that was its own
        self._schedule: Schedule | None = None
        self._started = False
        self._aligned_before = False  # when the run was saved that this one resumes
        self._final: State | None = None  # of a run that has ended, whose host may save it only then
        self._pending: Tensor | None = None
        self._pending_response: tuple[Tensor, Tensor] | None = None  # prediction, gradient with respect to it
        self._checked = not config.active  # whether the probe collects a graph, which only losses need
        self._patches, self._hooks = ExitStack(), ExitStack()
        self._open = False

    # -- attaching ------------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Hook the denoiser, and wrap the host's `backward`, its step logs and its end on the instances."""
        trainer, accelerator = self.host.trainer, self.host.accelerator
        wrapped: list[tuple[Any, str, Callable[..., Any]]] = [
            (accelerator, "backward", self._backward),
            (accelerator, "end_training", self._end_training),
        ]
        if hasattr(trainer, "generate_step_logs"):
            wrapped.append((trainer, "generate_step_logs", self._step_logs))
        self._open = True
        try:
            for owner, name, ours in wrapped:
                self._patches.enter_context(patching.patched(owner, name, self._wrap(getattr(owner, name), ours)))
            self._patches.enter_context(self.host.stepping())
            self._hooks.enter_context(intercepted(self.family.denoiser, self._around))
            self.host.on_save_state(self._state, self._load_state)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Put back every patch. Safe to call twice."""
        self._let_go()
        self._hooks.close()

    def _let_go(self) -> None:
        """Everything but the hooks: none may go while torch walks through them, because a forward has failed."""
        self._open = False
        self._pending = self._pending_response = self._partner = self._shown_loss = None
        self._patches.close()

    def _wrap(self, original: Callable[..., Any], ours: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if not self._open:  # somebody wrapped us in turn and still calls us: be the original
                return original(*args, **kwargs)
            try:
                return ours(original, *args, **kwargs)
            except BaseException:
                self.close()
                raise

        return wrapper

    def _state(self) -> State:
        if self._final is not None:
            return self._final
        values: dict[str, Any] = {"step": self.step, "stage": self.stage, "run": self.numbers.state()}
        values |= resuming.kept(self.config, self.host.subset_targets)
        if self._partner is None:
            return State(values)
        shown = 0.0 if self._shown_loss is None else float(self._shown_loss)
        kept = self._partner.state()
        return State(values) if kept is None else State({**values, "pair": {**kept[0], "loss": shown}}, kept[1])

    def _load_state(self, state: State) -> None:
        if problems := resuming.problems(state.values, self.config, self.host.subset_targets):
            raise SPFError(problems)
        for change in resuming.changes(state.values, self.config):
            logger.warning(f"SPF: {change}")
        self.step, waiting = int(state.values["step"]), state.values.get("pair")
        if "run" in state.values:
            self.numbers.load_state(state.values["run"])
        if state.values.get("stage") == 2 and self.stage == 1:
            self._aligned_before = True
            logger.warning(
                f"SPF: the run was aligned when it was saved, at step {self.step}, and stays so, though its "
                f"spf_stage2_start is a later step of the {self.host.max_train_steps} that it has now"
            )
        if waiting and state.tensors and self.config.pairs:
            self._partner = Partner.of(waiting, state.tensors)
        self._shown_loss = torch.tensor(float(waiting["loss"])) if waiting else None
        logger.info(f"SPF: resumed at step {self.step}, stage {self.stage}")

    # -- schedule -------------------------------------------------------------------------------------------------

    @property
    def stage(self) -> int:
        """1: plain fine-tuning; 2: dual-path alignment. A resumed run does not fall back to 1."""
        return 2 if self._aligned_before or self.step >= self.config.stage2_step(self.host.max_train_steps) else 1

    def _aligns_now(self) -> bool:
        """Whether a prediction that is no second step runs both paths in order to train."""
        return self.config.active and self.stage == 2

    def _measures_now(self) -> bool:
        """Without any weight SPF changes nothing, and still reports the drift of plain training."""
        return not self.config.active and self.step % self.config.log_every == 0

    # -- a call of the denoiser -----------------------------------------------------------------------------------

    def _around(self, call: Call) -> Generator[Call, Any, Any] | None:
        """What happens around a call; None: nothing."""
        if not self._open:
            self._hooks.close()
            return None
        # Sampling, validation, the host's own preservation pass, and a network that is off are not training steps.
        if self.host.batch is None or not torch.is_grad_enabled() or self.multiplier() == 0:
            return None
        return self._guarded(call)

    def _guarded(self, call: Call) -> Generator[Call, Any, Any]:
        try:
            return (yield from self._step(call))
        except GeneratorExit:  # the denoiser raised
            self._let_go()
            raise
        except BaseException:
            self.close()
            raise

    def _step(self, call: Call) -> Generator[Call, Any, Any]:
        if self._pending is not None:
            raise SPFError(
                "the host predicted twice without accelerator.backward in between; SPF does not know this loop"
            )
        if not self._started:
            self._start()
        partner, self._partner = self._partner, None
        if partner is not None:
            return (yield from self._preserve(partner, call))
        if not (self._aligns_now() or self._measures_now()):
            return (yield from self._plain(call))
        batch = self.host.batch
        text = self.text.for_batch(self.host.captions(batch), self.family.text(call), self.host.targets(batch))
        # Where every caption was dropped out there is nothing to compare; but several processes alternate together.
        if text.all_empty and not (self.config.pairs and self.host.accelerator.num_processes > 1):
            return (yield from self._plain(call))
        return (yield from self._dual_path(call, text))

    def _start(self) -> None:
        """The first training prediction: only now the length of the run and its noise schedule are final."""
        self._started = True
        if self.host.first_step is not None:
            self.step = self.host.first_step
        if self.config.active and not self._aligned_before:
            steps = self.host.max_train_steps
            problems = self.config.never_aligned(steps)
            if problems:
                raise SPFError(problems)
            logger.info(f"SPF: alignment from step {self.config.stage2_step(steps)} of {steps}")

    @property
    def schedule(self) -> Schedule:
        """The noise schedule; asked for during steps only."""
        if self._schedule is None:
            self._schedule = self.family.schedule(self.host.noise_schedule)
        return self._schedule

    def _plain(self, call: Call) -> Generator[Call, Any, Any]:
        """The host's own prediction; the first of a run is looked at nevertheless."""
        self.numbers.count("dropped" if self._aligns_now() else "before" if self.config.active else "plain")
        if self._checked:
            return (yield call)
        with self.host.recomputable(), capture(self.layers) as seen:
            output = yield call
        self._check(seen, call)
        return output

    def _check(self, seen: Capture, call: Call) -> None:
        """Does what the probe collects carry a graph? Else SPF would train nothing."""
        missing = [layer.name for layer in self.layers if layer.name not in seen.queries]
        if missing:
            raise SPFError(f"cross-attention layer {missing[0]} was never called; SPF cannot compare the paths")
        # Not all of them: a layer may lie before the first trained module (spf_train).
        queries = [
            self.family.tokens(layer, seen.queries[layer.name], seen.keys[layer.name], call)[0] for layer in self.layers
        ]
        if self.config.compares_attention and not any(query.requires_grad for query in queries):
            raise SPFError(
                f"the queries of {self.layers[-1].name} and before carry no gradient, so the losses on attention and "
                "queries would train nothing. Are all trained modules behind it? Then compare later layers: spf_layers="
                f"{self.family.layers('all')[-1].name}. Else run without --gradient_checkpointing, or report the host."
            )
        self._checked = True

    def _preserve(self, partner: Partner, call: Call) -> Generator[Call, Any, Any]:
        """The second step of a pair. The host's own batch is not shown; its loss gets a constant of its shape."""
        self.numbers.count("second")
        family, present = self.family, self.family.noisy_latents(call)
        shown = partner.call.map(lambda tensor: tensor.to(present.device))
        if not partner.encoded:  # a trained text encoder must not leak the target into base prompts either
            shown = family.with_text(shown, self.host.encode(partner.base, beside=partner.full))
        timesteps = family.timesteps(shown)
        with self.host.recomputable():
            output = yield shown
        prediction = family.prediction(output, shown)
        error = losses.base_preservation(prediction, partner.eps_ref.to(prediction.device))
        which = partner.which.to(error.device)
        error = torch.where(which, error, torch.zeros_like(error))
        if self.numbers.taking:  # the mean over the samples that have it, as of every term
            self.numbers.base_preservation(float(error.detach().sum() / which.sum().clamp_min(1)))
        weight = losses.noise_weight(self.schedule.signal(timesteps)).to(error.device)
        self._pending = self.config.base_preservation_multiplier * (weight * partner.weighted(error)).mean()
        link = linked(family.text(call))
        if link is not None:
            self._pending = self._pending + link
        self._preserving = True
        return family.output(output, torch.zeros_like(present, dtype=prediction.dtype, requires_grad=False), call)

    def _dual_path(self, call: Call, text: BatchText) -> Generator[Call, Any, Any]:
        config, family, trained = self.config, self.family, self.host.text_encoder_trained
        noisy_latents, timesteps = family.noisy_latents(call), family.timesteps(call)
        base_call = family.with_text(call, self.text.base_text(text, family.text(call), text_encoder_trained=trained))
        weights = self.text.distances(text)  # before the passes: this moves tensors, which would wait for them
        sample_weights = self.host.sample_weights(self.host.batch)
        reference = self._reference(base_call, text)
        # A run that only measures keeps the host's own kind of checkpointing, and with it plain training's last bit.
        with self.host.recomputable() if config.active else nullcontext(), capture(self.layers) as seen:
            output = yield call
        if not self._checked:
            self._check(seen, call)
        response = pass_of(family, self.layers, call, output, seen, text.full_groups)
        prediction = response.eps
        aligned = ~text.empty
        result = dual_path(
            reference,
            response,
            present=text.present,
            weights=weights,
            target_map_kind=config.map,
            gain=config.map_gain,
            aligned=aligned,
            free=text.has_target,
            multipliers=config.multipliers,
            preserve_multiplier=config.base_preservation_multiplier,
            noise_weight=losses.noise_weight(self.schedule.signal(timesteps)).to(prediction.device),
            sample_weight=sample_weights,
        )
        step = Step(
            self.step, text, text.has_target & aligned, timesteps, noisy_latents, self.schedule, reference, response,
            result,
        )  # fmt: skip
        self.numbers.count("aligned" if config.active else "plain", len(text.prompts), text.with_target)
        if self.numbers.begin(self.step, not text.all_empty):
            self.numbers.take(result, step.shown)
            if self.watch is not None:
                self.watch.record(self.numbers.values, result.map, step.shown)
        if self.watch is not None:
            self.watch.show(step)
        if not config.active:
            return output
        self._pending = result.loss
        # One of several processes whose batch has no target shows it again.
        if config.pairs and (text.with_target or self.host.accelerator.num_processes > 1):
            self._partner = Partner(
                base_call.map(torch.Tensor.detach),
                reference.eps,
                step.shown,
                not trained,
                tuple(text.base),
                tuple(text.full),
                sample_weights,
            )
        if self.enhancement is not None:
            term = self.enhancement(step, self.host.batch)
            if term is not None:
                self._pending_response = prediction, term.gradient
                self.numbers.values["spf/response"] = float(term.loss)
            self.numbers.values["spf/response_skipped"] = float(self.enhancement.skipped)
        if config.diffusion_region == "all":
            return output
        # Outside the map the training image is what the LoRA must not learn. The host's loss keeps its value; its
        # gradient passes where the map is open, as that of a mean over the map.
        everywhere = torch.ones_like(result.map)
        gate = torch.where(aligned.view(-1, 1, 1, 1), sfcm.gate(result.map), everywhere).to(prediction.dtype)
        return family.output(output, torch.lerp(prediction.detach(), prediction, gate), call)

    def _reference(self, call: Call, text: BatchText) -> Pass:
        """The reference path: the base prompts in the base model, without a graph."""
        put_blocks_back(self.family.denoiser)
        with torch.no_grad(), self.adapter.bypassed(), capture(self.layers) as seen:
            output = call.on(self.family.denoiser)
            found = pass_of(self.family, self.layers, call, output, seen, text.base_groups)
        put_blocks_back(self.family.denoiser)
        return replace(found, eps=found.eps.detach())

    # -- the wrapped calls ----------------------------------------------------------------------------------------

    def _backward(self, original: Callable[..., None], loss: Tensor, **kwargs: Any) -> None:
        pending, self._pending = self._pending, None
        enhancing, self._pending_response = self._pending_response, None
        preserving, self._preserving = self._preserving, False
        if preserving:
            # The host compared a constant with a batch that was not shown: its reports repeat the last step's loss.
            if self._shown_loss is not None:
                with torch.no_grad():
                    loss.copy_(self._shown_loss)
        elif self._partner is not None:
            self._shown_loss = loss.detach().clone()
        added = loss
        if pending is not None:
            added = added + pending.to(loss.device, loss.dtype)
        if enhancing is not None:
            term, self.numbers.values["spf/response_ratio"] = limits.as_term(loss, *enhancing)
            added = added + term
        original(added, **kwargs)
        if self.host.accelerator.sync_gradients:
            self.step += 1

    def _step_logs(self, original: Callable[..., dict[str, Any]], *args: Any, **kwargs: Any) -> dict[str, Any]:
        return {**original(*args, **kwargs), **self.numbers.values, "spf/stage": float(self.stage)}

    def _end_training(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        self._final = self._state()
        if self.host.accelerator.is_main_process:
            run = self.numbers.run()
            problem = run.problem if self._started else "the run ended before its first step: no LoRA was trained in it"
            (logger.warning if problem else logger.info)(f"SPF: {problem or run}")
        self.close()
        return result
