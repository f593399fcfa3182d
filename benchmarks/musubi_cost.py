"""What a training step of musubi-tuner's transformers costs, plain and with SPF, in full size and without a GPU.

    python -m benchmarks.musubi_cost MUSUBI-TUNER                 # FLOPs and tracked memory of every model; takes long
    python -m benchmarks.musubi_cost MUSUBI-TUNER --only zimage   # of one, printed and not kept
    python -m benchmarks.musubi_cost MUSUBI-TUNER --only zimage --size 1536x1536   # the same elsewhere, in 16 bits

The host's own classes, networks, calls of the model, losses, 8-bit weights and swapped blocks, on tensors without data
(`tracking`), and SPF through `spf_plugin.attachment`, as in `dit_cost`. Writes the figures of `spf plan` into the
package, and docs/cost.md.
"""

from __future__ import annotations

import importlib
import json
import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import torch
import typer
from torch import Tensor, nn

from benchmarks.dit_cost import Host
from benchmarks.step_cost import write, write_page
from benchmarks.steps import NOT_LOGGED, TARGET, Accelerator, Setup
from benchmarks.tracking import MetaGpu, Tracker, total_bytes, track_steps
from spf_plugin.adapter.bypass import Adapter
from spf_plugin.attachment import Attachment
from spf_plugin.config import parse
from spf_plugin.families import known
from spf_plugin.families.base import Text
from spf_plugin.hosts.musubi import architectures
from spf_plugin.seam import Call
from spf_plugin.tools.plan_dit import CHECKPOINTING, FIRST, KEPT, PLAIN, SECOND
from spf_plugin.tools.plan_musubi import DENSE, FIGURES, MODELS, RANK, figures
from tests.hosts.musubi import full_size, krea2, launcher, wan

COMMAND = "python -m benchmarks.musubi_cost MUSUBI-TUNER"
WORDS = 256  # tokens of a text, the template's among them, where the host does not fill it up
ENDLESS = 2**31  # of a sequence that is cut where its padding begins, and has none
#: (width, height, frames as the model has them), of images and of clips.
IMAGES, CLIPS = ((512, 512, 1), (1024, 1024, 1)), ((832, 480, 1), (832, 480, 21))
STACKS = ("layers", "transformer_blocks", "double_blocks", "single_blocks", "blocks")
Steps = dict[str, dict[str, int]]


def sizes(name: str) -> tuple[tuple[int, int, int], ...]:
    """At which a model is tracked."""
    return CLIPS if MODELS[name].clips else IMAGES


@contextmanager
def without_values(size: tuple[int, int, int]) -> Iterator[None]:
    """Tensors that have none: a length is that of a text, where a sequence ends is far, and the last patch is in the
    last row and column."""
    width, height, _ = size
    answers = {
        "item": lambda tensor: ENDLESS,
        "__int__": lambda tensor: WORDS,
        "__index__": lambda tensor: WORDS,
        "tolist": lambda tensor: (
            [height // 16 - 1, width // 16 - 1] if tensor.numel() == 2 else [WORDS] * tensor.numel()
        ),
    }

    def asked(name: str) -> Any:
        own = getattr(Tensor, name)
        return lambda tensor: answers[name](tensor) if tensor.is_meta else own(tensor)

    with ExitStack() as stack:
        for name in answers:
            stack.enter_context(mock.patch.object(Tensor, name, asked(name)))
        yield


class Encoded(Host):
    """A loop whose texts may have a vector of their words beside their states, as `spf cache-prompts` records it."""

    def encode(self, prompts: Sequence[str], beside: Sequence[str] = ()) -> Text:
        found = super().encode(prompts, beside)
        if "hidden_mask" in found and found["hidden"].dim() == 3:
            return found
        return {**found, architectures.POOLED: found["hidden"].flatten(1)[:, : found["hidden"].shape[-1]]}


class Device(Accelerator):
    """accelerate's, as far as the host's call of a model asks for it."""

    def unwrap_model(self, model: nn.Module) -> nn.Module:
        return model


def prepare(host: Path) -> None:
    """Make the host importable."""
    launcher.prepare(host.resolve())
    wan.importable()
    import transformers

    transformers.Qwen2Model  # noqa: B018  the first model puts another module into the place of `transformers`
    if not hasattr(sys.modules["transformers"], "Qwen3VLForConditionalGeneration"):
        krea2.stand_in()


def made(name: str, weights: str) -> nn.Module:
    """A model with its weights as the host loads them: `bf16`, `fp8` (`--fp8_base`) or `fp8_scaled` (and
    `--fp8_scaled`)."""
    with torch.device("meta"):
        model = full_size.MODELS[name][2]()
    model.to(torch.float8_e4m3fn if weights == "fp8" else torch.bfloat16).requires_grad_(False)
    if weights == "fp8_scaled":
        fp8 = importlib.import_module("musubi_tuner.modules.fp8_optimization_utils")
        arch = MODELS[name].arch
        source = {
            "zimage": "zimage.zimage_model",
            "qwen_image": "qwen_image.qwen_image_model",
            "flux_2": "flux_2.flux2_models",
            "krea2": "krea2.krea2_utils",
            "wan": "wan.modules.model",
        }[arch]
        said = vars(importlib.import_module(f"musubi_tuner.{source}"))
        prefix = "KREA2_" if arch == "krea2" else ""
        which = [said[f"{prefix}FP8_OPTIMIZATION_{kind}_KEYS"] for kind in ("TARGET", "EXCLUDE")]
        state = fp8.optimize_state_dict_with_fp8(model.state_dict(), None, *which)
        fp8.apply_fp8_monkey_patch(model, state)
        model.load_state_dict(state, strict=True, assign=True)
        model.requires_grad_(False)
    return model


def on_card(model: nn.Module) -> list[int]:
    """Bytes of a model on the card by the number of swapped blocks, as many as the host takes: it keeps the weights of
    their linear layers elsewhere."""
    swapping = importlib.import_module("musubi_tuner.modules.custom_offloading_utils")
    config = swapping.BlockSwapConfig(torch.device("cpu"), supports_backward=False)
    found = [total_bytes([*model.parameters(), *model.buffers()])]
    while True:
        try:
            model.enable_block_swap(len(found), config)  # type: ignore[operator]
        except AssertionError:
            return found
        size = found[0]
        for stack in STACKS:
            blocks = getattr(model, stack, ())
            offloader = getattr(model, f"offloader_{stack.split('_')[0]}", getattr(model, "offloader", None))
            for block in blocks[len(blocks) - offloader.blocks_to_swap :] if len(blocks) else ():
                size -= sum(part.weight.nbytes for part in block.modules() if type(part).__name__.endswith("Linear"))
        found.append(size)


class Bench:
    """One of the models with a LoRA, and its trainer.

    Args:
        name: a key of `MODELS`. The host must be importable.
        weights: of the frozen model, one of the model's.
    """

    def __init__(self, name: str, weights: str):
        self.name, self.of = name, MODELS[name]
        self.model, self.adapter = made(name, weights), Adapter()
        architecture = architectures.named(self.of.arch)
        network = importlib.import_module(f"musubi_tuner.{architecture.network}")
        with torch.device("meta"):
            self.lora = network.create_arch_network(1.0, RANK, RANK / 2, None, None, self.model)
        self.family = known.find(self.model)
        with self.adapter.watching([self.model]):
            self.lora.apply_to(None, self.model, False, True)
        self.lora.prepare_grad_etc(self.model)
        self.host_of = importlib.import_module(f"musubi_tuner.{architecture.script.name}")
        self.trainer = getattr(self.host_of, architecture.script.trainer)()
        self.accelerator = Device(Setup())

    def args(self, *words: str) -> Any:
        """The host's arguments, and what its trainer makes of them."""
        parser = self.host_of.setup_parser_common()
        getattr(self.host_of, f"{self.of.arch.replace('flux_2', 'flux2')}_setup_parser")(parser)
        option, values = self.of.chosen_by
        chosen = [f"--{option}", values[0]] if option else []
        args = parser.parse_args([*chosen, "--dit", "model.safetensors", "--mixed_precision", "bf16", "--sdpa", *words])
        if self.of.arch == "qwen_image":
            self.host_of.qwen_image_utils.resolve_model_version_args(args)
        with mock.patch.object(self.host_of, "detect_wan_sd_dtype", return_value=torch.bfloat16, create=True):
            self.trainer.handle_model_specific_args(args)
        return args

    def batch(self, size: tuple[int, int, int]) -> dict[str, Any]:
        """One sample of cached latents and text, as it stands in a batch."""
        width, height, frames = size
        texts = {
            "zimage": ("llm_embed", 2560),
            "qwen_image": ("vl_embed", 3584),
            "krea2": ("krea2_vl_embed", 12, 2560),
            "wan": ("t5", 4096),
        }
        latent: tuple[int, ...] = (1, 16, frames, height // 8, width // 8)
        if self.of.arch == "flux_2":
            text: Any = torch.zeros(1, 512, self.model.txt_in.in_features, dtype=torch.bfloat16)  # type: ignore[union-attr]
            return {"latents": torch.zeros(1, 128, height // 16, width // 16), "ctx_vec": text}
        if self.of.arch == "zimage":
            latent = (1, 16, height // 8, width // 8)
        key, *shape = texts[self.of.arch]
        return {"latents": torch.zeros(latent), key: [torch.zeros(WORDS, *shape, dtype=torch.bfloat16)]}

    def tracked(self, size: tuple[int, int, int], *, checkpointing: bool) -> Steps:
        """Bytes at the peak, and operations, of a plain step and of both steps of a pair."""
        args = self.args(*["--gradient_checkpointing"] * checkpointing)
        if checkpointing:
            self.model.enable_gradient_checkpointing(False)  # type: ignore[operator]
        else:
            self.model.disable_gradient_checkpointing()  # type: ignore[operator]
        self.model.train(checkpointing)
        calls: list[Call] = []
        with ExitStack() as stack:
            stack.enter_context(MetaGpu())
            stack.enter_context(without_values(size))
            stack.enter_context(self._under_autocast())
            with torch.device("meta"):
                batch = self.batch(size)
                noise, time = torch.zeros_like(batch["latents"]), torch.zeros(1)
            steps = partial(self._steps, args, batch, noise, time)
            hook = self.model.register_forward_pre_hook(lambda _, a, k: calls.append(Call(a, k)), with_kwargs=True)
            plain = steps(self.accelerator, PLAIN)
            hook.remove()
            host = Encoded(self.model, self.family.text(calls.pop()))
            config = parse({"spf_target": TARGET, "spf_stage2_start": "0"})
            with closing(Attachment(host, config, self.family, self.adapter)) as spf:
                spf.open()
                spf.step, spf.numbers.window = NOT_LOGGED, 0
                pair = steps(host.accelerator, FIRST, SECOND)
                assert spf.step == NOT_LOGGED + 2
        return {**plain, **pair}

    @contextmanager
    def _under_autocast(self) -> Iterator[None]:
        """accelerate wraps a prepared model's forward so, and gives its output in float32."""
        from accelerate.utils.operations import convert_outputs_to_fp32

        own = self.model.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            with self.accelerator.autocast():
                return own(*args, **kwargs)

        with mock.patch.object(self.model, "forward", convert_outputs_to_fp32(forward)):
            yield

    def _steps(
        self, args: Any, batch: Mapping[str, Any], noise: Tensor, time: Tensor, accelerator: Accelerator, *names: str
    ) -> Steps:
        call = (batch["latents"], batch, noise)

        def forward() -> tuple[Tensor, ...]:
            noisy = noise + batch["latents"]
            output = self.trainer.call_dit(args, self.accelerator, self.model, *call, noisy, time, torch.float32)
            loss, _ = self.trainer.compute_loss(args, output, time, None, torch.bfloat16, torch.float32, 0)
            return loss, output, noisy

        # Of the device alone: encoded text is kept on the CPU.
        return track_steps(Tracker("meta"), names, self.lora, forward, accelerator.backward)


def track(name: str) -> dict[str, Any]:
    """A model's sizes, and its steps: in 16 bits of two samples, with checkpointing and without; in 8 of the smaller,
    with checkpointing."""
    found: dict[str, Any] = {"frozen": {}, "figures": {CHECKPOINTING: {}, KEPT: {}}}
    for weights in MODELS[name].weights:
        found["frozen"][weights] = on_card(made(name, weights))
        bench = Bench(name, weights)
        if weights == DENSE:
            found["lora"] = sum(p.numel() for p in bench.lora.parameters()) // RANK
        for how in (CHECKPOINTING, KEPT) if weights == DENSE else (CHECKPOINTING,):
            at = sizes(name)[: 2 if weights == DENSE else 1]
            found["figures"][how][weights] = [
                {"pixels": math.prod(size), **bench.tracked(size, checkpointing=how == CHECKPOINTING)} for size in at
            ]
    return found


def _size(text: str) -> tuple[int, int, int]:
    sides = [int(side) if side.isdigit() else 0 for side in text.split("x")]
    if len(sides) not in (2, 3) or 0 in sides:
        raise typer.BadParameter(f"--size {text}: write WIDTHxHEIGHT, or WIDTHxHEIGHTxFRAMES, such as 1024x1024")
    return sides[0], sides[1], sides[2] if len(sides) == 3 else 1


def main(
    host: Annotated[Path, typer.Argument(help="A checkout of musubi-tuner.")],
    only: Annotated[str, typer.Option(help="Only this model; prints the figures, and keeps none.")] = "",
    size: Annotated[str, typer.Option(help="With --only: at this size alone, in 16 bits; frames as the model's.")] = "",
    fresh: Annotated[bool, typer.Option("--fresh", help="Track everything again.")] = False,
) -> None:
    """Track what is missing, and write what the package and the page say of it."""
    if only not in ("", *MODELS):
        raise typer.BadParameter(f"--only is one of {', '.join(MODELS)}")
    at = _size(size) if size else None
    printed: dict[str, Any] = {}
    with redirect_stdout(sys.stderr):
        prepare(host)
        if only and at:
            bench = Bench(only, DENSE)
            printed = {how: bench.tracked(at, checkpointing=how == CHECKPOINTING) for how in (CHECKPOINTING, KEPT)}
        elif only:
            printed = track(only)
    if only:
        print(json.dumps({only: printed}))
        return
    models = {} if fresh or not FIGURES.is_file() else dict(figures()["models"])
    for name in MODELS:
        if name not in models:
            with redirect_stdout(sys.stderr):
                models[name] = track(name)
            _keep({each: models[each] for each in MODELS if each in models})
    write_page()


def _keep(models: Mapping[str, Any]) -> None:
    basis = "tracked on tensors without data, not measured on a GPU"
    values = {"command": COMMAND, "basis": basis, "torch": torch.__version__, "models": models}
    text = json.dumps(values, indent=1)
    # A row of numbers on a line.
    write(FIGURES, re.sub(r"\[[\d,\s]+\]", lambda row: " ".join(row[0].split()), text) + "\n")
    figures.cache_clear()


if __name__ == "__main__":
    typer.run(main)
