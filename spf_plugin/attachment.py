"""Runs the dual path inside somebody else's training loop, through two calls: `call_unet` and `accelerator.backward`.

Per step: the reference pass (adapter bypassed, base prompt, no grad), then the response pass (adapter on, the host's
own call), with paired preservation a third (adapter on, base prompt), then the losses; they wait until the host calls
`backward`, and are added to the loss it passes. The response term waits as a gradient with respect to the prediction.
Nothing of a step outlives it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from spf_plugin import patching, response
from spf_plugin.adapter import Adapter
from spf_plugin.config import SPFConfig
from spf_plugin.enhancement import Enhancement, ImageHost
from spf_plugin.errors import SPFError
from spf_plugin.objective import Objective, Path, dual_path
from spf_plugin.probe import capture, find_layers
from spf_plugin.prompt import Target
from spf_plugin.text import BatchText, Conds, TextHost, TextSide, as_type, map_conds
from spf_plugin.watch import Watch, WatchedHost

logger = logging.getLogger(__name__)

PROBE_SCALE = 2.0**12  # the diffusion loss's gradient at a float16 prediction would vanish unscaled


class Host(TextHost, ImageHost, WatchedHost, Protocol):
    """What SPF needs of a training loop. A new host is one new class with these members."""

    trainer: (
        Any  # has call_unet(args, accelerator, unet, noisy_latents, timesteps, text_conds, batch, weight_dtype, **kw)
    )
    accelerator: Any  # has backward(loss), sync_gradients, process_index, end_training()

    @property
    def text_encoder_trained(self) -> bool: ...

    @property
    def max_train_steps(self) -> int: ...

    @property
    def first_step(self) -> int | None:
        """The step at which the user lets the loop begin, whatever was resumed; None: 0, or the resumed one."""
        ...

    @property
    def seed(self) -> int: ...

    def captions(self, batch: Any) -> list[str]:
        """The captions of a batch as they were encoded, `[B]`."""
        ...

    def targets(self, batch: Any) -> Sequence[Sequence[Target] | None]:
        """Per-sample targets that replace the run's, or None; may be empty."""
        ...

    def recomputable(self) -> AbstractContextManager[None]:
        """While the response pass runs: make gradient checkpointing keep the graph of what hooks collect."""
        ...

    def report(self, values: dict[str, float]) -> None:
        """Put numbers on the host's progress bar."""
        ...

    def on_save_state(self, state: Callable[[], dict[str, Any]], load: Callable[[dict[str, Any]], None]) -> None:
        """Keep `state()` with the host's training state, and call `load` when it resumes."""
        ...


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
        self._micro_step = 0  # call_unet calls since the last optimiser step (gradient accumulation)
        self._pending: Tensor | None = None
        self._pending_response: tuple[Tensor, Tensor] | None = None  # prediction, gradient with respect to it
        self._checked = False
        self._patches = ExitStack()
        self._open = False

    # -- attaching ------------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Wrap the host's two calls, its step logs and its end, on the instances."""
        trainer, accelerator = self.host.trainer, self.host.accelerator
        self._open = True
        self._patches.enter_context(
            patching.patched(trainer, "call_unet", self._wrap(trainer.call_unet, self._call_unet))
        )
        self._patches.enter_context(
            patching.patched(accelerator, "backward", self._wrap(accelerator.backward, self._backward))
        )
        if hasattr(trainer, "generate_step_logs"):
            wrapped = self._wrap(trainer.generate_step_logs, self._step_logs)
            self._patches.enter_context(patching.patched(trainer, "generate_step_logs", wrapped))
        wrapped = self._wrap(accelerator.end_training, self._end_training)
        self._patches.enter_context(patching.patched(accelerator, "end_training", wrapped))
        self.host.on_save_state(lambda: {"step": self.step}, self._load_state)

    def close(self) -> None:
        """Put back every patch. Safe to call twice."""
        self._open = False
        self._pending = self._pending_response = None
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

    def _load_state(self, state: dict[str, Any]) -> None:
        self.step = int(state["step"])
        logger.info(f"SPF: resumed at step {self.step}, stage {self.stage}")

    # -- schedule -------------------------------------------------------------------------------------------------

    @property
    def stage(self) -> int:
        """1: plain fine-tuning; 2: dual-path alignment."""
        return 1 if self.step < self.config.stage2_step(self.host.max_train_steps) else 2

    @property
    def aligns_now(self) -> bool:
        """Whether this step runs both paths in order to train."""
        return self.config.active and self.stage == 2 and self.step % self.config.every == 0

    def _measures_now(self) -> bool:
        """Without any weight SPF changes nothing, and still reports the drift of plain training."""
        return not self.config.active and self.step % self.config.log_every == 0

    def _responds_now(self) -> bool:
        """Every N-th of the aligned steps."""
        return self.aligns_now and self.step // self.config.every % self.config.response_every == 0

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
        def predict(conds: Conds) -> Tensor:
            return original(args, accelerator, unet, noisy_latents, timesteps, conds, batch, weight_dtype, **kwargs)

        # Validation, the host's own preservation pass, and a network that is turned off are not training steps.
        if not torch.is_grad_enabled() or kwargs.get("indices") is not None or self.multiplier() == 0:
            return predict(text_conds)
        if self._pending is not None:
            raise SPFError(
                "the host predicted twice without accelerator.backward in between; SPF does not know this loop"
            )
        micro_step, self._micro_step = self._micro_step, self._micro_step + 1
        if not self._checked:
            if self.host.first_step is not None:
                self.step = self.host.first_step
            return self._check(predict, text_conds)
        if not (self.aligns_now or self._measures_now()):
            return predict(text_conds)

        text = self.text.for_batch(self.host.captions(batch), text_conds, self.host.targets(batch))
        in_range = (timesteps >= self.config.min_timestep) & (timesteps < self.config.max_timestep)
        aligned = in_range.to(text.empty.device) & ~text.empty
        # Asking the tensor makes the host wait for the GPU; over the full range the captions alone decide.
        full_range = self.config.min_timestep == 0 and self.config.max_timestep == 1000
        if not any(prompt.full.strip() for prompt in text.prompts) if full_range else not aligned.any():
            return predict(text_conds)
        return self._dual_path(predict, text_conds, text, aligned, micro_step, noisy_latents, timesteps, batch)

    def _check(self, predict: Callable[[Conds], Tensor], text_conds: Conds) -> Tensor:
        """The first prediction of a run: does what the probe collects carry a graph? Else SPF would train nothing."""
        with self.host.recomputable(), capture(self.layers) as captured:
            prediction = predict(text_conds)
        missing = [layer.name for layer in self.layers if layer.name not in captured.queries]
        if missing:
            raise SPFError(f"cross-attention layer {missing[0]} was never called; SPF cannot compare the paths")
        if not all(query.requires_grad for query in captured.queries.values()):
            raise SPFError(
                "the cross-attention queries carry no gradient (reentrant gradient checkpointing?), so the alignment "
                "losses would train nothing. Run without --gradient_checkpointing, or report this host."
            )
        self._checked = True
        if self.config.active:  # only now the length of the run is final
            steps = self.host.max_train_steps
            logger.info(f"SPF: alignment from step {self.config.stage2_step(steps)} of {steps}")
        return prediction

    def _dual_path(
        self, predict: Callable[[Conds], Tensor], conds: Conds, text: BatchText, aligned: Tensor, micro_step: int,
        noisy_latents: Tensor, timesteps: Tensor, batch: Any,
    ) -> Tensor:  # fmt: skip
        config, trained = self.config, self.host.text_encoder_trained
        base_conds = self.text.reference_conds(text, conds, text_encoder_trained=trained)
        # Before the passes: these move tensors, which would wait for them.
        weights = self.text.distances(text)
        preserved = self._choose_preserved(text.has_target & aligned, micro_step)
        with torch.no_grad(), self.adapter.bypassed(), capture(self.layers) as seen:
            reference = Path.of(predict(base_conds), seen, self.layers, text.base_groups)
        reference = Path(reference.eps.detach(), reference.queries, reference.attention)

        paired = config.pairs and self.aligns_now
        own_base = base_conds
        if trained and (preserved is not None or paired):
            # The trained text encoder must not leak the target into base prompts either.
            encoded = as_type(self.host.encode(text.base, beside=text.full), conds)
            own_base = map_conds(lambda c, to: c.to(to.device, to.dtype), encoded, conds)
        if preserved is not None:
            text = text.with_base_prompt(preserved)
            conds = map_conds(
                lambda full, base: torch.where(preserved.view(-1, *[1] * (full.dim() - 1)), base, full), conds, own_base
            )
        with self.host.recomputable(), capture(self.layers) as seen:
            prediction = predict(conds)
        response = Path.of(prediction, seen, self.layers, text.full_groups)
        base_response = None
        if paired:
            with self.host.recomputable():
                base_response = predict(own_base)

        weigh = config.every if config.active else 0  # an aligned step also stands for those that `every` leaves out
        result = dual_path(
            reference,
            response,
            present=text.present,
            weights=weights,
            target_map_kind=config.map,
            gain=config.map_gain,
            aligned=aligned,
            free=text.has_target,
            multipliers={name: weight * weigh for name, weight in config.multipliers.items()},
            preserve_multiplier=config.base_preservation_multiplier * weigh,
            base_response=base_response,
            paired_multiplier=config.paired_preservation_multiplier * weigh,
        )
        if result.loss is not None and config.active:
            self._pending = result.loss
        shown = text.has_target & aligned
        if self.step % config.log_every < config.every:  # one of the aligned steps in each window
            self._log(result)
            if self.watch is not None:
                self.watch.record(self.logs, result.map, shown)
        if self.watch is not None:
            self.watch.show(self.step, text, shown, timesteps, noisy_latents, reference, response, result)
        returned = prediction
        if config.diffusion_region == "map" and self.aligns_now:
            # Outside the map the training image is what the LoRA must not learn. The host's loss keeps its value; its
            # gradient passes where the map is open.
            gate = torch.where(aligned.view(-1, 1, 1, 1), result.map, torch.ones_like(result.map))
            returned = torch.lerp(returned.detach(), returned, gate.to(returned.dtype))
        if preserved is not None:
            # These samples reproduce the base model instead of denoising the training image.
            returned = torch.where(preserved.view(-1, 1, 1, 1), returned.detach(), returned)
        if self.enhancement is not None and self._responds_now():
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
                self._pending_response = prediction, term.gradient * config.response_multiplier
                self.logs["spf/response"] = float(term.loss)
            self.logs["spf/response_skipped"] = float(self.enhancement.skipped)
        return returned

    def _choose_preserved(self, candidates: Tensor, micro_step: int) -> Tensor | None:
        """A share of the samples, `[B]` bool, or None for nobody. Its own generator, seeded by the step: no global
        random state is touched, and a resumed run chooses as an uninterrupted one."""
        if not self.config.base_preservation or self.config.pairs or not self.aligns_now:
            return None  # with pairs all of them are preserved, in a pass of their own
        seed = hash((self.host.seed, self.step, micro_step, self.host.accelerator.process_index)) & 0x7FFFFFFF
        draw = torch.rand(len(candidates), generator=torch.Generator().manual_seed(seed))
        drawn = draw < self.config.base_preservation
        return drawn.to(candidates.device) & candidates if drawn.any() else None  # known without asking the GPU

    def _backward(self, original: Callable[..., None], loss: Tensor, **kwargs: Any) -> None:
        pending, self._pending = self._pending, None
        enhancing, self._pending_response = self._pending_response, None
        added = loss
        if pending is not None:
            added = added + pending.to(loss.device, loss.dtype)
        if enhancing is not None:
            added = added + self._response_term(loss, *enhancing)
        loss = added
        original(loss, **kwargs)
        if self.host.accelerator.sync_gradients:
            self.step += 1
            self._micro_step = 0

    def _response_term(self, loss: Tensor, prediction: Tensor, gradient: Tensor) -> Tensor:
        """A term of value 0 whose gradient at `prediction` is `gradient`, limited beside the host's own loss."""
        (beside,) = torch.autograd.grad(loss * PROBE_SCALE, prediction, retain_graph=True, allow_unused=True)
        if beside is None:
            raise SPFError("the host's loss does not depend on what call_unet returned; SPF does not know this loop")
        gradient, ratio = response.limited(gradient, beside.float() / PROBE_SCALE, self.config.response_max_ratio)
        self.logs["spf/response_ratio"] = ratio
        self.logs["spf/response_limited"] = float(ratio > self.config.response_max_ratio)
        term = (gradient * prediction.float()).sum()
        return (term - term.detach()).to(loss.dtype)

    def _log(self, result: Objective) -> None:
        values = {f"spf/{name}": float(value) for name, value in result.terms.items()}
        values["spf/drift_inside"] = float(result.drift_inside)
        values["spf/drift_outside"] = float(result.drift_outside)
        values["spf/map_mean"] = float(result.map_mean)
        kept = {name: value for name, value in self.logs.items() if name.startswith("spf/response")}
        # An empty map has no drift inside.
        self.logs = kept | {name: value for name, value in values.items() if value == value}
        self.host.report({"drift": values["spf/drift_outside"], "map": values["spf/map_mean"]})

    def _step_logs(self, original: Callable[..., dict[str, Any]], *args: Any, **kwargs: Any) -> dict[str, Any]:
        return {**original(*args, **kwargs), **self.logs, "spf/stage": float(self.stage)}

    def _end_training(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        self.close()
        return result
