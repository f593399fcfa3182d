"""Runs the dual path inside somebody else's training loop, through two calls: `call_unet` and `accelerator.backward`.

An aligned step: the reference pass (adapter bypassed, base prompt, no grad), then the response pass (adapter on, the
host's own call), then the losses; they wait until the host calls `backward`, and are added to the loss it passes. The
response term waits as a gradient with respect to the prediction. The step after it shows the same noisy latents with
the base prompts (adapter on) and is held to the same reference: `pairs`. Nothing else of a step outlives it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from spf_plugin import patching
from spf_plugin.adapter.bypass import Adapter
from spf_plugin.config import SPFConfig
from spf_plugin.core import losses, sfcm
from spf_plugin.core.objective import Objective, Path, dual_path
from spf_plugin.enhancement import limits as response
from spf_plugin.enhancement.term import Enhancement
from spf_plugin.errors import SPFError
from spf_plugin.families.unet import Capture, capture, find_layers
from spf_plugin.hosts.base import Host
from spf_plugin.pairs import Partner, State, linked
from spf_plugin.shown.watch import Watch
from spf_plugin.text import BatchText, Conds, TextSide, as_type, map_conds

logger = logging.getLogger(__name__)

PROBE_SCALE = 2.0**12  # the diffusion loss's gradient at a float16 prediction would vanish unscaled


class Attachment:
    """SPF, attached to a host and an adapter. `close()` puts everything back.

    Args:
        host: the training loop.
        config: the settings.
        unet: the model whose cross-attention is compared.
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
        unet: nn.Module,
        adapter: Adapter,
        multiplier: Callable[[], float] = lambda: 1.0,
        enhancement: Enhancement | None = None,
        watch: Watch | None = None,
    ):
        self.enhancement, self.watch = enhancement, watch
        self.host, self.config, self.adapter, self.multiplier = host, config, adapter, multiplier
        self.layers = find_layers(unet, config.layers)
        self.text = TextSide(host, config.target, adapter.bypassed)
        self.step = 0  # finished optimiser steps
        self.logs: dict[str, float] = {}
        self._partner: Partner | None = None  # the second half of a pair, for the next prediction
        self._preserving = False  # between a prediction for base prompts and its backward
        self._shown_loss: Tensor | None = None  # the host's loss of the last step that was its own
        self._logged = -1  # the last window of `log_every` steps that has numbers
        self._logging = False  # whether the present pair gives them
        self._abar: Tensor | None = None  # the noise schedule, on the device
        self._started = False
        self._final: State | None = None  # of a run that has ended, whose host may save it only then
        self._pending: Tensor | None = None
        self._pending_response: tuple[Tensor, Tensor] | None = None  # prediction, gradient with respect to it
        self._checked = not config.active  # whether the probe collects a graph, which only losses need
        self._patches = ExitStack()
        self._open = False

    # -- attaching ------------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Wrap the host's two calls, its step logs and its end, on the instances."""
        trainer, accelerator = self.host.trainer, self.host.accelerator
        wrapped: list[tuple[Any, str, Callable[..., Any]]] = [
            (trainer, "call_unet", self._call_unet),
            (accelerator, "backward", self._backward),
            (accelerator, "end_training", self._end_training),
        ]
        if hasattr(trainer, "generate_step_logs"):
            wrapped.append((trainer, "generate_step_logs", self._step_logs))
        self._open = True
        try:
            for owner, name, ours in wrapped:
                self._patches.enter_context(patching.patched(owner, name, self._wrap(getattr(owner, name), ours)))
            self.host.on_save_state(self._state, self._load_state)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Put back every patch. Safe to call twice."""
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
        values: dict[str, Any] = {"step": self.step}
        if self._partner is None:
            return State(values)
        shown = 0.0 if self._shown_loss is None else float(self._shown_loss)
        return State({**values, "pair": {**self._partner.prompts(), "loss": shown}}, self._partner.tensors())

    def _load_state(self, state: State) -> None:
        self.step, waiting = int(state.values["step"]), state.values.get("pair")
        if waiting and state.tensors and self.config.pairs:
            self._partner = Partner.of(state.tensors, waiting)
        self._shown_loss = torch.tensor(float(waiting["loss"])) if waiting else None
        logger.info(f"SPF: resumed at step {self.step}, stage {self.stage}")

    # -- schedule -------------------------------------------------------------------------------------------------

    @property
    def stage(self) -> int:
        """1: plain fine-tuning; 2: dual-path alignment."""
        return 1 if self.step < self.config.stage2_step(self.host.max_train_steps) else 2

    def _aligns_now(self) -> bool:
        """Whether a prediction that is no second step runs both paths in order to train."""
        return self.config.active and self.stage == 2

    def _measures_now(self) -> bool:
        """Without any weight SPF changes nothing, and still reports the drift of plain training."""
        return not self.config.active and self.step % self.config.log_every == 0

    # -- the wrapped calls ----------------------------------------------------------------------------------------

    def _call_unet(
        self,
        original: Callable[..., Tensor],
        args: Any,
        accelerator: Any,
        unet: Any,
        noisy_latents: Tensor,
        timesteps: Tensor,
        text_conds: Conds,
        batch: Any,
        weight_dtype: torch.dtype,
        **kwargs: Any,
    ) -> Tensor:
        def predict(conds: Conds, z: Tensor = noisy_latents, t: Tensor = timesteps, batch: Any = batch) -> Tensor:
            return original(args, accelerator, unet, z, t, conds, batch, weight_dtype, **kwargs)

        # Validation, the host's own preservation pass, and a network that is turned off are not training steps.
        if not torch.is_grad_enabled() or kwargs.get("indices") is not None or self.multiplier() == 0:
            return predict(text_conds)
        if self._pending is not None:
            raise SPFError(
                "the host predicted twice without accelerator.backward in between; SPF does not know this loop"
            )
        if not self._started:
            self._start()
        partner, self._partner = self._partner, None
        if partner is not None:
            return self._preserve(partner, predict, text_conds, noisy_latents, timesteps, batch)
        if not (self._aligns_now() or self._measures_now()):
            return self._plain(predict, text_conds)
        text = self.text.for_batch(self.host.captions(batch), text_conds, self.host.targets(batch))
        # Where every caption was dropped out there is nothing to compare; but several processes alternate together.
        if text.all_empty and not (self.config.pairs and self.host.accelerator.num_processes > 1):
            return self._plain(predict, text_conds)
        return self._dual_path(predict, text_conds, text, noisy_latents, timesteps, batch)

    def _start(self) -> None:
        """The first training prediction: only now the length of the run is final."""
        self._started = True
        if self.host.first_step is not None:
            self.step = self.host.first_step
        if self.config.active:
            steps = self.host.max_train_steps
            start = self.config.stage2_step(steps)
            if start >= steps:
                raise SPFError(
                    f"alignment would start at step {start}, and the run ends at step {steps}: a plain LoRA. Lower "
                    "spf_stage2_start: below 1 it is a share of the run, from 1 on a step."
                )
            logger.info(f"SPF: alignment from step {start} of {steps}")

    def _plain(self, predict: Callable[..., Tensor], conds: Conds) -> Tensor:
        """The host's own prediction; the first of a run is looked at nevertheless."""
        if self._checked:
            return predict(conds)
        with self.host.recomputable(), capture(self.layers) as seen:
            prediction = predict(conds)
        self._check(seen)
        return prediction

    def _check(self, seen: Capture) -> None:
        """Does what the probe collects carry a graph? Else SPF would train nothing."""
        missing = [layer.name for layer in self.layers if layer.name not in seen.queries]
        if missing:
            raise SPFError(f"cross-attention layer {missing[0]} was never called; SPF cannot compare the paths")
        # Not all of them: a layer may lie before the first trained module (spf_train).
        if not any(query.requires_grad for query in seen.queries.values()):
            raise SPFError(
                "the cross-attention queries carry no gradient (reentrant gradient checkpointing?), so the alignment "
                "losses would train nothing. Run without --gradient_checkpointing, or report this host."
            )
        self._checked = True

    def _preserve(
        self, partner: Partner, predict: Callable[..., Tensor], text_conds: Conds, noisy_latents: Tensor,
        timesteps: Tensor, batch: Any,
    ) -> Tensor:  # fmt: skip
        """The second step of a pair. The host's own batch is not shown; its loss gets a constant of its shape."""
        # The trained text encoder must not leak the target into base prompts either.
        conds = self.host.encode(partner.base, beside=partner.full) if partner.conds is None else partner.conds
        conds = map_conds(lambda c, to: c.to(to.device, to.dtype), as_type(conds, text_conds), text_conds)
        z = partner.noisy_latents.to(noisy_latents.device).requires_grad_(noisy_latents.requires_grad)
        with self.host.recomputable():
            prediction = predict(conds, z, partner.timesteps.to(timesteps.device), {**batch, **partner.sizes})
        error = losses.base_preservation(prediction, partner.eps_ref.to(prediction.device))
        which = partner.which.to(error.device)
        error = torch.where(which, error, torch.zeros_like(error))
        if self._logging:  # the mean over the samples that have it, as of every term
            self.logs["spf/base_preservation"] = float(error.detach().sum() / which.sum().clamp_min(1))
        weight = self._noise_weight(partner.timesteps, error.device)
        self._pending = self.config.base_preservation_multiplier * (weight * error).mean()
        link = linked(text_conds)
        if link is not None:
            self._pending = self._pending + link
        self._preserving = True
        return torch.zeros_like(noisy_latents, dtype=prediction.dtype, requires_grad=False)

    def _noise_weight(self, timesteps: Tensor, device: torch.device) -> Tensor:
        if self._abar is None:
            self._abar = self.host.alphas_cumprod.to(device)
        return losses.noise_weight(self._abar[timesteps.to(device)], self.host.prediction_type)

    def _dual_path(
        self, predict: Callable[..., Tensor], conds: Conds, text: BatchText, noisy_latents: Tensor, timesteps: Tensor,
        batch: Any,
    ) -> Tensor:  # fmt: skip
        config, trained = self.config, self.host.text_encoder_trained
        base_conds = self.text.reference_conds(text, conds, text_encoder_trained=trained)
        weights = self.text.distances(text)  # before the passes: this moves tensors, which would wait for them
        with torch.no_grad(), self.adapter.bypassed(), capture(self.layers) as seen:
            reference = Path.of(predict(base_conds), seen, self.layers, text.base_groups)
        reference = Path(reference.eps.detach(), reference.queries, reference.attention)
        # A run that only measures keeps the host's own kind of checkpointing, and with it plain training's last bit.
        with self.host.recomputable() if config.active else nullcontext(), capture(self.layers) as seen:
            prediction = predict(conds)
        if not self._checked:
            self._check(seen)
        response = Path.of(prediction, seen, self.layers, text.full_groups)
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
            noise_weight=self._noise_weight(timesteps, prediction.device),
        )
        shown = text.has_target & aligned
        # The first aligned step of each window.
        self._logging = self.step // config.log_every > self._logged and not text.all_empty
        if self._logging:
            self._logged = self.step // config.log_every
            self._log(result)
            if self.watch is not None:
                self.watch.record(self.logs, result.map, shown)
        if self.watch is not None:
            self.watch.show(self.step, text, shown, timesteps, noisy_latents, reference, response, result)
        if not config.active:
            return prediction
        self._pending = result.loss
        # One of several processes whose batch has no target shows it again.
        if config.pairs and (text.any_target or self.host.accelerator.num_processes > 1):
            self._partner = Partner(
                noisy_latents.detach(),
                timesteps,
                reference.eps,
                shown,
                self.host.sizes(batch),
                None if trained else base_conds,
                tuple(text.base),
                tuple(text.full),
            )
        if self.enhancement is not None:
            term = self.enhancement(
                noisy_latents=noisy_latents,
                timesteps=timesteps,
                prediction=prediction,
                reference=reference.eps,
                text=text,
                which=shown & self.enhancement.candidates(timesteps).to(aligned.device),
                control_map=result.map,
                batch=batch,
            )
            if term is not None:
                self._pending_response = prediction, term.gradient
                self.logs["spf/response"] = float(term.loss)
            self.logs["spf/response_skipped"] = float(self.enhancement.skipped)
        if config.diffusion_region == "all":
            return prediction
        # Outside the map the training image is what the LoRA must not learn. The host's loss keeps its value; its
        # gradient passes where the map is open, as that of a mean over the map.
        everywhere = torch.ones_like(result.map)
        gate = torch.where(aligned.view(-1, 1, 1, 1), sfcm.gate(result.map), everywhere).to(prediction.dtype)
        return torch.lerp(prediction.detach(), prediction, gate)

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
            added = added + self._response_term(loss, *enhancing)
        original(added, **kwargs)
        if self.host.accelerator.sync_gradients:
            self.step += 1

    def _response_term(self, loss: Tensor, prediction: Tensor, gradient: Tensor) -> Tensor:
        """A term of value 0 whose gradient at `prediction` is `gradient`, limited beside the host's own loss."""
        (beside,) = torch.autograd.grad(loss * PROBE_SCALE, prediction, retain_graph=True, allow_unused=True)
        if beside is None:
            raise SPFError("the host's loss does not depend on what call_unet returned; SPF does not know this loop")
        gradient, ratio = response.limited(gradient, beside.float() / PROBE_SCALE, response.MAX_RATIO)
        self.logs["spf/response_ratio"] = ratio
        term = (gradient * prediction.float()).sum()
        return (term - term.detach()).to(loss.dtype)

    def _log(self, result: Objective) -> None:
        values = {f"spf/{name}": float(value) for name, value in result.terms.items()}
        values["spf/drift_inside"] = float(result.drift_inside)
        values["spf/drift_outside"] = float(result.drift_outside)
        values["spf/map_mean"] = float(result.map_mean)
        kept = {name: value for name, value in self.logs.items() if name.startswith(("spf/response", "spf/base_"))}
        # An empty map has no drift inside, a full one none outside.
        self.logs = kept | {name: value for name, value in values.items() if value == value}
        bar = {"drift": values["spf/drift_outside"], "map": values["spf/map_mean"]}
        self.host.report({name: value for name, value in bar.items() if value == value})

    def _step_logs(self, original: Callable[..., dict[str, Any]], *args: Any, **kwargs: Any) -> dict[str, Any]:
        return {**original(*args, **kwargs), **self.logs, "spf/stage": float(self.stage)}

    def _end_training(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        self._final = self._state()
        self.close()
        return result
