"""What a training step of sd-scripts' transformers costs, plain and with SPF, in full size and without a GPU.

    python -m benchmarks.dit_cost SD-SCRIPTS              # FLOPs and tracked memory of every model; takes minutes
    python -m benchmarks.dit_cost SD-SCRIPTS --only flux  # of one, printed and not kept

The host's own classes and networks, on tensors without data (`tracking`), and SPF through `spf_plugin.attachment`, as
in training: reference pass, comparison, map, losses, and the second step of the pair. Writes the figures of `spf plan`
into the package, and docs/cost.md.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any
from unittest import mock

import torch
import typer
from torch import Tensor, nn

from benchmarks.step_cost import write, write_page
from benchmarks.steps import CAPTION, NOT_LOGGED, STEPS, TARGET, Accelerator, Setup
from benchmarks.tracking import MetaGpu, Tracker, track_steps
from spf_plugin.adapter.bypass import Adapter
from spf_plugin.attachment import Attachment
from spf_plugin.config import parse
from spf_plugin.families import known
from spf_plugin.families.base import Text
from spf_plugin.hosts.reference import ReferenceHost
from spf_plugin.seam import Call
from spf_plugin.text import map_text
from spf_plugin.tools.plan_dit import (
    CHECKPOINTING,
    FIGURES,
    FIRST,
    KEPT,
    PLAIN,
    RANK,
    SECOND,
    SIDE,
    TRANSFORMERS,
    figures,
)
from tests.hosts import full_size, launcher

COMMAND = "python -m benchmarks.dit_cost SD-SCRIPTS"
PATCH = 16  # pixels of FLUX.1's
# Tokens that a text is said to have, where a model asks for the length; the others attend to all positions.
WORDS, USUAL = {"hunyuan_image": 128}, 256


class Host(ReferenceHost):
    """A training loop around one call of the model; its texts are as long as those of the call."""

    def __init__(self, model: nn.Module, text: Text):
        super().__init__(
            SimpleNamespace(
                accelerator=Accelerator(Setup()),
                model=SimpleNamespace(denoiser=model),
                batch={"captions": [CAPTION]},
                settings=SimpleNamespace(steps=STEPS),
            )  # type: ignore[arg-type]
        )
        self._text = text

    @property
    def noise_schedule(self) -> None:  # type: ignore[override]
        return None

    def tokenize(self, text: str, which: int = 0) -> Sequence[int]:
        return list(range(len(text.replace(",", " , ").split())))

    def encode(self, prompts: Sequence[str], beside: Sequence[str] = ()) -> Text:
        """On the CPU, where SPF keeps what is encoded."""

        def rows(part: Tensor) -> Tensor:
            return torch.ones(len(prompts), *part.shape[1:], dtype=part.dtype, device="cpu")

        return map_text(rows, self._text)


@contextmanager
def without_values(length: int, side: int) -> Iterator[None]:
    """Tensors that have none: whoever asks for the length of a text gets `length`, and for a place among FLUX.1's
    patches, which is a floating-point number, the last row or column."""

    def values(tensor: Tensor) -> list[Any]:
        return [side / PATCH - 1 if tensor.is_floating_point() else length] * tensor.numel()

    with ExitStack() as stack:
        for name in ("item", "__int__", "__index__"):
            stack.enter_context(mock.patch.object(Tensor, name, return_value=length))
        stack.enter_context(mock.patch.object(Tensor, "tolist", values))
        stack.enter_context(torch.device("meta"))
        yield


class Bench:
    """One of the models with a LoRA.

    Args:
        name: a key of `full_size.MODELS`. The host must be importable.
    """

    def __init__(self, name: str):
        network, make = full_size.MODELS[name]
        made = importlib.import_module(f"networks.{network}")
        with torch.device("meta"):
            self.model = make().to(torch.bfloat16).requires_grad_(False).train()
            self.lora = made.create_network(1.0, RANK, RANK / 2, None, [nn.Module()], self.model)
        self.name, self.adapter, self.family = name, Adapter(), known.find(self.model)
        with self.adapter.watching([self.model]):
            self.lora.apply_to([nn.Module()], self.model, False, True)
        self.family.dropped = lambda text: ()  # type: ignore[method-assign]  # no text has values to tell it by

    def tracked(self, side: int, *, checkpointing: bool) -> dict[str, dict[str, int]]:
        """Bytes at the peak, and operations, of a plain step and of both steps of a pair, `side` x `side` pixels."""
        for module in self.model.modules():
            if hasattr(module, "gradient_checkpointing"):
                module.gradient_checkpointing = checkpointing
        with MetaGpu(), without_values(WORDS.get(self.name, USUAL), side):
            call = full_size.call(self.name, side, checkpointing=checkpointing)
            host = Host(self.model, self.family.text(call))
            plain = self._steps(host, call, PLAIN)
            config = parse({"spf_target": TARGET, "spf_stage2_start": "0"})
            with closing(Attachment(host, config, self.family, self.adapter)) as spf:
                spf.open()
                spf.step, spf.numbers.window = NOT_LOGGED, 0
                pair = self._steps(host, call, FIRST, SECOND)
                assert spf.step == NOT_LOGGED + 2
        return {**plain, **pair}

    def _steps(self, host: Host, call: Call, *names: str) -> dict[str, dict[str, int]]:
        def forward() -> tuple[Tensor, ...]:
            with host.accelerator.autocast():
                output = call.on(self.model)
            return output.float().square().mean(), output

        return track_steps(Tracker(), names, self.lora, forward, host.accelerator.backward)


def track(names: Sequence[str], side: int) -> dict[str, Any]:
    """By model, and with checkpointing and without."""
    found: dict[str, Any] = {}
    for name in names:
        bench = Bench(name)
        found[name] = {how: bench.tracked(side, checkpointing=how == CHECKPOINTING) for how in (CHECKPOINTING, KEPT)}
    return found


def main(
    host: Annotated[Path, typer.Argument(help="A checkout of sd-scripts.")],
    only: Annotated[str, typer.Option(help="Only this model; prints the figures, and keeps none.")] = "",
    side: Annotated[int, typer.Option(help="With --only: another size in pixels.")] = SIDE,
) -> None:
    """Track, and write what the package and the page say of it."""
    if only not in ("", *TRANSFORMERS):
        raise typer.BadParameter(f"--only is one of {', '.join(TRANSFORMERS)}")
    with redirect_stdout(sys.stderr):
        launcher.prepare(host.resolve())
        models = track([only] if only else list(TRANSFORMERS), side if only else SIDE)
    if only:
        print(json.dumps(models))
        return
    basis = "tracked on tensors without data, not measured on a GPU"
    values = {"command": COMMAND, "basis": basis, "torch": torch.__version__, "models": models}
    write(FIGURES, json.dumps(values, indent=1) + "\n")
    figures.cache_clear()
    write_page()


if __name__ == "__main__":
    typer.run(main)
