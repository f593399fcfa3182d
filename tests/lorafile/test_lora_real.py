"""The rules against the loaders themselves: against what they did when they were run, and live where a checkout is.

docs/lora-files.md says how to get the checkouts, and how the record is made anew.
"""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from spf_plugin.errors import SPFError
from spf_plugin.lorafile import inspect, loaders
from spf_plugin.lorafile.findings import Verdict
from spf_plugin.lorafile.normalise import normalise
from tests.lorafile import helpers as h
from tests.lorafile import kinds, real
from tests.lorafile.conftest import checkout

RECORD: dict[str, Any] = json.loads(real.RECORD.read_text("utf-8"))
STATUS = ("loads", "differs", "fails")
# Its shapes are wrong for real widths only, which these tiny models do not have: test_too_few_inputs.
WIDTHS = "too few inputs"
CASES = [(base, kind) for base in kinds.BASES for kind in kinds.of_base(base) if kind != WIDTHS]


@cache
def model(base: str) -> kinds.Weights:
    return kinds.model(base)


def verdicts(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> dict[str, Verdict]:
    contents = inspect.gather(tensors.items(), metadata)
    return {v.loader: v for v in loaders.verdicts(contents, inspect.describe(contents))}


def recorded(loader: str, case: str) -> list[str]:
    """``loads``, ``differs`` or ``fails`` in every release that was run."""
    results = [entry["results"][case] for name, entry in RECORD.items() if name.split()[0] == loader]
    assert results
    return ["differs" if r.endswith("differ") else r for r in results]


@pytest.mark.parametrize(("base", "kind"), CASES)
def test_verdicts_are_what_the_loaders_did(base: str, kind: str) -> None:
    """The worst of the releases, where several were run."""
    file = real.build(kind, base, model(base), "fp32")
    found = verdicts(file.tensors, file.metadata)
    for loader in real.LABEL.values():
        worst = max(recorded(loader, f"{kind}; {base}; fp32"), key=STATUS.index)
        assert found[loader].status == worst, (loader, found[loader].findings)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("kind", real.ALGORITHMS)
def test_verdicts_hold_in_every_precision(kind: str, precision: str) -> None:
    for base in kinds.BASES:
        file = real.build(kind, base, model(base), precision)
        found = verdicts(file.tensors, file.metadata)
        for loader in ("A1111", "Forge", "ComfyUI"):
            assert [found[loader].status] == recorded(loader, f"{kind}; {base}; {precision}"), loader


@pytest.mark.parametrize(("base", "kind"), CASES)
def test_fix_writes_nothing_that_loads_worse(base: str, kind: str) -> None:
    """By the rules, which the tests above hold against the loaders; live below."""
    file = real.build(kind, base, model(base), "fp32")
    before = verdicts(file.tensors, file.metadata)
    try:
        fixed, strings, _ = normalise(file.tensors, file.metadata)
    except SPFError:
        return  # nothing is written
    after = verdicts(fixed, strings)
    assert not [name for name, verdict in after.items() if verdict.worse_than(before[name])]


@pytest.mark.parametrize("loader", [*real.CHECKOUTS, "diffusers"])
def test_the_loader_does_what_is_recorded(loader: str) -> None:
    """And takes no file worse after `spf lora fix`."""
    folder = Path(".") if loader == "diffusers" else checkout(real.CHECKOUTS[loader])
    name = real.LABEL[loader] if loader != "diffusers" else f"diffusers {real.installed()}"
    if name not in RECORD:
        pytest.skip(f"NOT RUN: nothing is recorded of {name}")
    few = loader == "diffusers" and not os.environ.get("SPF_DIFFUSERS_ALL")  # a minute in place of ten
    for base in kinds.BASES[: 1 if few else None]:
        wanted = [k for k in kinds.of_base(base) if not few or k.startswith(("ranks", "alphas", "text", "outside"))]
        files = [real.build(kind, base, model(base), "fp32") for kind in wanted]
        mended: dict[str, kinds.File] = {}
        for kind, file in zip(wanted, files, strict=True):
            try:
                fixed, strings, _ = normalise(file.tensors, file.metadata)
                mended[kind] = kinds.File(fixed, file.meant, strings)
            except SPFError:
                continue
        done = real.run(loader, folder, base, [*files, *mended.values()], model(base))
        before = dict(zip(wanted, done, strict=False))
        for kind, file in zip(wanted, files, strict=True):
            assert real.outcome(file, *before[kind]) == RECORD[name]["results"][f"{kind}; {base}; fp32"], kind
        for (kind, file), got in zip(mended.items(), done[len(files) :], strict=True):
            assert real.wrong(file, *got) <= real.wrong(file, *before[kind]), (kind, got[1])


def test_too_few_inputs() -> None:
    """Real widths: Forge fills a linear layer's missing inputs with zeros, the others leave the module out or stop."""
    state_dict = h.full_lora("sd1")
    key = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k.lora_down.weight"
    state_dict[key] = state_dict[key][:, :-8].clone()
    found = verdicts(state_dict, h.metadata_for("sd1"))
    for loader in ("A1111", "Forge", "ComfyUI", "diffusers"):
        assert [found[loader].status] * 1 == recorded(loader, f"{WIDTHS}; sd1; fp32")[:1], loader


def test_tucker_and_whole_factors_in_sdcpp() -> None:
    """Recorded of stable-diffusion.cpp 97d29908: convolutions are permuted, wrong, or stop the program."""
    weights = model("sd1")
    want = {
        "locon, tucker": "differs", "loha, tucker": "differs", "lokr, tucker": "fails", "lokr, whole": "differs",
        "lokr": "loads", "loha": "loads", "int64 alpha": "loads", "float64 alpha": "loads",
    }  # fmt: skip
    for kind, status in want.items():
        file = real.build(kind, "sd1", weights, "fp32")
        assert verdicts(file.tensors, file.metadata)["sd.cpp"].status == status, kind
        fixed, strings, _ = normalise(file.tensors, file.metadata)
        after = verdicts(fixed, strings)["sd.cpp"].status
        assert after == ("differs" if kind == "lokr, whole" else "loads"), kind


@pytest.mark.parametrize("kind", ["locon, tucker", "loha, tucker", "lokr, tucker", "scalar"])
def test_plainer_factors_have_the_same_delta(kind: str) -> None:
    """By the slow sums: of the plain form of each algorithm."""
    file = real.build(kind, "sd1", model("sd1"), "fp32")
    fixed, _, _ = normalise(file.tensors, file.metadata)
    assert not [key for key in fixed if key.endswith(("lora_mid.weight", "_t1", "_t2", "scalar"))]
    for name, meant in file.meant.items():
        stem = kinds.kohya("sd1", name)
        parts = {k.removeprefix(f"{stem}."): t.double() for k, t in fixed.items() if k.startswith(f"{stem}.")}
        if "lora_up.weight" in parts:
            rank = parts["lora_down.weight"].shape[0]
            delta = parts["lora_up.weight"].flatten(1) @ parts["lora_down.weight"].flatten(1)
        elif "hada_w1_a" in parts:
            rank = parts["hada_w1_b"].shape[0]
            delta = (parts["hada_w1_a"] @ parts["hada_w1_b"]) * (parts["hada_w2_a"] @ parts["hada_w2_b"])
        else:
            rank = parts["lokr_w2_b"].shape[0]
            delta = torch.kron(parts["lokr_w1"], parts["lokr_w2_a"] @ parts["lokr_w2_b"])
        delta = float(parts["alpha"]) / rank * delta
        assert (delta - meant.flatten(1)).abs().max() <= 1e-5 * meant.abs().max(), name


@pytest.mark.parametrize(
    ("algorithm", "precision", "least", "most"),
    [("lora", "bf16", 0.0, 0.03), ("loha", "fp16", 0.0, 0.03), ("loha", "bf16", 0.1, 0.5), ("lokr", "fp32", 0.0, 0.03)],
)
def test_precision_of_sums_in_a1111_at_real_widths(algorithm: str, precision: str, least: float, most: float) -> None:
    """Of LoHa and LoKr it adds weight and delta in the file's precision: bf16 rounds the model. The delta is right."""
    folder = checkout("SPF_A1111")
    name = "unet/mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(1280, 768, generator=generator) / 768**0.5).half().float()  # A1111's model is fp16
    make = {"lora": kinds.lora, "loha": kinds.loha, "lokr": kinds.lokr}[algorithm]
    factors = {"lora": 2, "loha": 4, "lokr": 3}[algorithm]
    _, delta = make(kinds.Draw(torch.float32, scale=1.0), weight)
    scale = (0.01 * float(weight.std()) / float(delta.std())) ** (1 / factors)
    file = kinds.of("sd1", {name: weight}, kinds.Draw(kinds.DTYPES[precision], scale=scale), make)
    ((got, error),) = real.run("a1111", folder, "sd1", [file], {name: weight})
    assert error is None
    meant = file.meant[name]
    off = float((got[name].double() - meant).pow(2).mean().sqrt() / meant.pow(2).mean().sqrt())
    assert least <= off <= most
