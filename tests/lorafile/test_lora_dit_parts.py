"""diffusers' own names of the transformers whose modules it splits: tables against its classes, places against its own
converters, verdicts against the loaders, conversions delta by delta.

docs/lora-files.md says how to run the loaders themselves; without them their recorded results serve.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner

from spf_plugin.errors import SPFError
from spf_plugin.lorafile import convert, dit_names, dit_parts, dit_sdcpp, inspect
from spf_plugin.lorafile.findings import Verdict
from spf_plugin.lorafile.loaders import verdicts
from spf_plugin.lorafile.names import DitBase
from spf_plugin.lorafile.normalise import normalise
from spf_plugin.tools.cli.lora import app
from tests.lorafile import dit_kinds, dit_programs, real
from tests.lorafile.conftest import checkout
from tests.lorafile.test_lora_dits import written
from tests.lorafile.test_lora_real import RECORD, STATUS

StateDict = dict[str, torch.Tensor]
DIFFUSERS: tuple[DitBase, ...] = ("sd3", "flux", "chroma", "lumina", "hunyuan_image")
# diffusers' classes in the sizes that were released; what a table leaves out on purpose.
CLASSES: dict[str, tuple[DitBase, str, dict[str, Any]]] = {
    "SD 3": (
        "sd3", "SD3Transformer2DModel",
        {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536},
    ),
    "SD 3.5 medium": (
        "sd3", "SD3Transformer2DModel",
        {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "qk_norm": "rms_norm",
         "dual_attention_layers": tuple(range(13))},
    ),
    "SD 3.5 large": (
        "sd3", "SD3Transformer2DModel",
        {"num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432, "qk_norm": "rms_norm"},
    ),
    "FLUX.1": ("flux", "FluxTransformer2DModel", {"guidance_embeds": True}),
    "Chroma": ("chroma", "ChromaTransformer2DModel", {}),
    "Lumina 2": ("lumina", "Lumina2Transformer2DModel", {}),
    "HunyuanImage-2.1": ("hunyuan_image", "HunyuanImageTransformer2DModel", {}),
}  # fmt: skip
LEFT_OUT = {
    "chroma": ("distilled_guidance_layer",),
    "lumina": ("x_embedder", "time_caption_embed"),
    "hunyuan_image": ("context_embedder", "x_embedder", "time_guidance_embed", "norm_out", "proj_out"),
}
LIVE = ("peft, ranks differ", "down and up", "onetrainer")  # of diffusers, whose cost is a model for each


@pytest.mark.parametrize("kind", CLASSES)
def test_the_tables_are_diffusers_classes(kind: str) -> None:
    import diffusers

    base, name, options = CLASSES[kind]
    if not hasattr(diffusers, name):
        pytest.skip(f"NOT RUN: diffusers {diffusers.__version__} has no {name}")
    with torch.device("meta"):
        model = getattr(diffusers, name)(**options)
    theirs = {path: module for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    theirs = {path: m for path, m in theirs.items() if not path.startswith(LEFT_OUT.get(base, ("no such",)))}
    table = dit_parts.parts(base)
    assert theirs.keys() <= table.keys()
    assert base == "sd3" or table.keys() == theirs.keys()
    for path, module in theirs.items():
        assert dit_parts.fits(base, table[path].module, (module.in_features, module.out_features)), path


@pytest.mark.parametrize("base", DIFFUSERS)
def test_every_part_lies_in_a_module_of_the_checkpoint(base: DitBase) -> None:
    """Parts fill it without a gap; the modules inside the blocks are those that sd-scripts trains."""
    fans = {m.sgm: (m.fan_in, m.fan_out) for m in dit_names.modules(base) if m.component == "unet"}
    siblings = dit_parts.siblings(base)
    assert {whole for whole in fans if "final" not in whole} <= siblings.keys()
    for whole, parts in siblings.items():
        rows = 0
        for part in parts:
            assert part.start == rows
            rows += part.module.fan_out
        if whole in fans:
            assert (parts[0].module.fan_in, rows) == fans[whole]


def factors(base: DitBase, sizes: dict[str, tuple[int, int]], rank: int = 4, alpha: float = 1.0) -> StateDict:
    """A kohya file of random factors: the checkpoint's module -> features in and out."""
    torch.manual_seed(0)
    out = {}
    for path, (fan_in, fan_out) in sizes.items():
        name = f"lora_unet_{dit_names.host_path(base, path).replace('.', '_')}"
        out[f"{name}.lora_down.weight"] = torch.randn(rank, fan_in)
        out[f"{name}.lora_up.weight"] = torch.randn(fan_out, rank)
        out[f"{name}.alpha"] = torch.tensor(alpha)
    return out


def products(tensors: StateDict) -> StateDict:
    """Module -> weight delta of a file of PEFT's or kohya's spelling."""
    out = {}
    for key, down in tensors.items():
        name, dot, suffix = key.partition(".lora_down." if ".lora_down." in key else ".lora_A.")
        if suffix == "weight":
            up = tensors[f"{name}{'.lora_up.' if 'down' in dot else '.lora_B.'}weight"].double()
            scale = float(tensors[f"{name}.alpha"]) / down.shape[0] if f"{name}.alpha" in tensors else 1.0
            out[name] = scale * up @ down.double()
    return out


class Checkpoint(StateDict):
    """Deltas in the place of a checkpoint's weights; what is asked for beside them is there, as zeros."""

    def pop(self, key: str, *default: Any) -> Any:
        return super().pop(key, torch.zeros(12))


def test_sd3_is_split_as_diffusers_splits_its_checkpoint() -> None:
    from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers

    width = 8
    sizes = {}
    for module in dit_names.modules("sd3"):
        block = module.sgm.partition(".x_block")[0].partition(".context_block")[0]
        if module.component != "unet" or block not in ("joint_blocks.0", "joint_blocks.1"):
            continue
        last = block == "joint_blocks.1"
        if last and (
            ".attn2" in module.sgm or ("context" in module.sgm and module.sgm.endswith(("proj", "fc1", "fc2")))
        ):
            continue
        outs = 2 * 1536 if last and "context_block.adaLN" in module.sgm else module.fan_out
        sizes[module.sgm] = (module.fan_in * width // 1536, outs * width // 1536)
    file = factors("sd3", sizes)
    deltas = products(file)
    whole = {path: deltas[f"lora_unet_{path.replace('.', '_')}"] for path in sizes}
    theirs = convert_sd3_transformer_checkpoint_to_diffusers(
        Checkpoint(
            {f"{path}.weight": d for path, d in whole.items()} | {"context_embedder.weight": torch.zeros(width, 1)}
        )
    )
    ours = products(convert.to_diffusers(file, peft=True))
    assert len(ours) == 18 + 11
    for name, delta in ours.items():
        torch.testing.assert_close(delta, theirs[f"{name.removeprefix('transformer.')}.weight"], rtol=1e-5, atol=1e-5)


def test_flux_is_split_as_diffusers_splits_kohyas_files() -> None:
    from diffusers.loaders.lora_conversion_utils import _convert_kohya_flux_lora_to_diffusers

    file = {key: t for key, t in written("flux", every=1).items() if "_blocks_3_" in key or "_blocks_18_" in key}
    theirs = _convert_kohya_flux_lora_to_diffusers(dict(file))
    ours = convert.to_diffusers(file, peft=False)
    assert ours.keys() == theirs.keys()
    for key in [key for key in ours if key.endswith("lora_B.weight")]:
        down = key.replace("lora_B", "lora_A")
        torch.testing.assert_close(ours[key][:50] @ ours[down], theirs[key][:50] @ theirs[down])
        torch.testing.assert_close(ours[key][-50:] @ ours[down], theirs[key][-50:] @ theirs[down])


@pytest.mark.parametrize("kind", ["T5", "no alpha"])
def test_kohyas_files_of_flux_that_diffusers_stops_at(kind: str) -> None:
    from diffusers.loaders.lora_conversion_utils import _convert_kohya_flux_lora_to_diffusers

    file = factors("flux", {"double_blocks.0.img_attn.proj": (3072, 3072)})
    if kind == "T5":
        name = "lora_te3_encoder_block_0_layer_0_SelfAttention_q"
        file |= {f"{name}.lora_down.weight": torch.zeros(4, 4096), f"{name}.lora_up.weight": torch.zeros(4096, 4)}
        file[f"{name}.alpha"] = torch.tensor(4.0)
    else:
        file = {key: t for key, t in file.items() if not key.endswith("alpha")}
    verdict = judged(file, {})["diffusers"]
    assert verdict.status == "fails"
    if real.installed().startswith("0.32."):
        with pytest.raises((ValueError, KeyError)):
            _convert_kohya_flux_lora_to_diffusers(dict(file))
    if kind == "no alpha":
        fixed, strings, _ = normalise(file, {})
        assert judged(fixed, strings)["diffusers"].status == "loads"


@pytest.mark.parametrize("base", ["sd3", "flux", "chroma", "lumina"])
def test_there_and_back(base: DitBase) -> None:
    """Split and put together again, every delta is the same and so is every rank."""
    file = written(base, every=7)
    outside = [key for key in file if "final_layer" in key]
    file = {key: t for key, t in file.items() if key not in outside}
    metadata = {"ss_base_model_version": base}
    notes: list[str] = []
    parts = convert.to_diffusers(file, peft=True)
    back = convert.to_kohya(parts, metadata, notes)
    assert {key for key in back if key.endswith("up.weight")} == {key for key in file if key.endswith("up.weight")}
    for key in [key for key in file if key.endswith("lora_down.weight")]:
        up = key.replace("lora_down", "lora_up")
        assert torch.equal(back[key], file[key])
        assert torch.equal(back[up], 0.5 * file[up])  # alpha is in it
        assert float(back[key.replace("lora_down.weight", "alpha")]) == 2.0
    assert "put together" not in notes[0]
    assert "of kohya's" in notes[0]


@pytest.mark.parametrize("base", ["sd3", "flux", "hunyuan_image"])
@pytest.mark.parametrize("alphas", [(None, None, None), (1.0, 2.0, 4.0)])
def test_parts_of_their_own_ranks_are_put_together_exactly(base: DitBase, alphas: tuple[float | None, ...]) -> None:
    torch.manual_seed(1)
    whole = "joint_blocks.0.x_block.attn.qkv" if base == "sd3" else "single_blocks.0.linear1"
    siblings = dit_parts.siblings(base)[whole]
    file, meant = {}, torch.zeros(siblings[-1].start + siblings[-1].module.fan_out, 40, dtype=torch.float64)
    for rank, (part, alpha) in enumerate(zip(siblings[::-1][:3], alphas, strict=True), start=2):
        name, module = f"transformer.{part.module.path}", part.module
        down, up = torch.randn(rank, module.fan_in), torch.randn(module.fan_out, rank)
        file |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
        if alpha is not None:
            file[f"{name}.alpha"] = torch.tensor(alpha)
        scale = 1.0 if alpha is None else alpha / rank
        meant[part.start : part.start + module.fan_out] = scale * up.double() @ down[:, :40].double()
    notes: list[str] = []
    out = convert.to_kohya(file, {}, notes)
    name = f"lora_unet_{whole.replace('.', '_')}"
    assert set(out) == {f"{name}.{suffix}" for suffix in ("lora_down.weight", "lora_up.weight", "alpha")}
    assert out[f"{name}.lora_down.weight"].shape[0] == 2 + 3 + 4
    out[f"{name}.lora_down.weight"] = out[f"{name}.lora_down.weight"][:, :40]
    torch.testing.assert_close(products(out)[name], meant, rtol=1e-6, atol=1e-6)
    assert "ranks add up, to 9" in notes[0]


@pytest.mark.parametrize("base", DIFFUSERS)
@pytest.mark.parametrize("prefix", dit_parts.PREFIXES)
def test_the_model_is_told_by_shapes(base: DitBase, prefix: str) -> None:
    """Whatever stands before the path, and without metadata; of Chroma, whose names FLUX.1 has too, with."""
    file = {}
    for part in [p for path, p in dit_parts.parts(base).items() if ".1." in path]:
        path = part.module.path.replace(".", "_") if prefix.endswith("_") else part.module.path
        file[f"{prefix}{path}.lora_down.weight"] = torch.ones(1, 1).expand(2, part.module.fan_in)
        file[f"{prefix}{path}.lora_up.weight"] = torch.ones(1, 1).expand(part.module.fan_out, 2)
    metadata = {"ss_base_model_version": "chroma"} if base == "chroma" else {}
    description = inspect.describe(inspect.gather(file.items(), metadata))
    assert description.base == base
    assert description.components["other"] == 0
    assert not description.misshaped


def test_sd35_large_is_told_from_the_others_of_its_names() -> None:
    file = {}
    for path, fan_out in (("attn.to_q", 2432), ("ff.net.0.proj", 4 * 2432), ("norm1.linear", 6 * 2432)):
        file[f"transformer.transformer_blocks.3.{path}.lora_A.weight"] = torch.zeros(2, 2432)
        file[f"transformer.transformer_blocks.3.{path}.lora_B.weight"] = torch.zeros(fan_out, 2)
    description = inspect.describe(inspect.gather(file.items(), {}))
    assert (description.base, description.evidence) == ("sd3", "shapes")


# ---- the loaders ----------------------------------------------------------------------------------------------------

CASES = [(base, kind) for base in dit_kinds.BASES for kind in dit_kinds.of_base(base)]


@cache
def model(base: str) -> dit_kinds.Weights:
    return dit_kinds.model(base)


def judged(tensors: StateDict, metadata: dict[str, str]) -> dict[str, Verdict]:
    contents = inspect.gather(tensors.items(), metadata)
    return {v.loader: v for v in verdicts(contents, inspect.describe(contents))}


def recorded(loader: str, base: str, kind: str) -> str:
    """The worst of the releases that were run, and have the model; ``fails`` where none has."""
    found = [entry["results"].get(f"{kind}; {base}; fp32", "") for n, entry in RECORD.items() if n.split()[0] == loader]
    results = ["differs" if r.endswith("differ") else r for r in found if r]
    return max(results, key=STATUS.index) if results else "fails"


@pytest.mark.parametrize(("base", "kind"), CASES)
def test_verdicts_are_what_the_loaders_did(base: str, kind: str) -> None:
    file = dit_kinds.build(kind, base, model(base))
    found = judged(file.tensors, file.metadata)
    for loader in real.LABEL.values():
        assert found[loader].status == recorded(loader, base, kind), (loader, found[loader].findings)


@pytest.mark.parametrize(("base", "kind"), CASES)
def test_fix_keeps_the_file_and_no_verdict_gets_worse(base: str, kind: str) -> None:
    file = dit_kinds.build(kind, base, model(base))
    fixed, strings, _ = normalise(file.tensors, file.metadata)
    assert fixed.keys() == file.tensors.keys()
    assert all(fixed[key] is tensor for key, tensor in file.tensors.items())
    before, after = judged(file.tensors, file.metadata), judged(fixed, strings)
    assert [v.status for v in before.values()] == [v.status for v in after.values()]


@pytest.mark.parametrize(
    ("base", "kind"), [c for c in CASES if c[1].startswith(("peft, one", "peft, alphas", "down", "one"))]
)
def test_what_is_advised_mends(base: str, kind: str) -> None:
    """By the rules, which the tests above hold against the loaders."""
    file = dit_kinds.build(kind, base, model(base))
    names: StateDict = convert.to_diffusers(file.tensors, peft=True)
    assert judged(names, file.metadata)["diffusers"].status == "loads"
    kohya = convert.to_kohya(file.tensors, file.metadata, [])
    assert judged(kohya, file.metadata)["ComfyUI"].status == "loads"


@pytest.mark.parametrize("loader", [*real.CHECKOUTS, "diffusers"])
def test_the_loader_does_what_is_recorded(loader: str) -> None:
    """And takes what `convert` makes of such a file."""
    folder = Path(".") if loader == "diffusers" else checkout(real.CHECKOUTS[loader])
    name = real.LABEL[loader] if loader != "diffusers" else f"diffusers {real.installed()}"
    if name not in RECORD:
        pytest.skip(f"NOT RUN: nothing is recorded of {name}")
    few = loader == "diffusers" and not os.environ.get("SPF_DIFFUSERS_ALL")
    for base in dit_kinds.BASES[: 1 if few else None]:  # a quarter of a minute in place of two
        results = {kind: RECORD[name]["results"].get(f"{kind}; {base}; fp32") for kind in dit_kinds.of_base(base)}
        wanted = [kind for kind, result in results.items() if result and (not few or kind in LIVE)]
        if not wanted:
            continue
        files = [dit_kinds.build(kind, base, model(base)) for kind in wanted]
        other = dit_kinds.build("down and up, alpha", base, model(base))
        made = (
            convert.to_diffusers(other.tensors, peft=True)
            if loader == "diffusers"
            else convert.to_kohya(other.tensors, other.metadata, [])
        )
        files.append(dit_kinds.File(made, other.meant, other.metadata))
        done = real.run(loader, folder, base, files, model(base), dit_programs.__file__, dit_programs.CONFIG[base])
        for kind, file, got in zip(wanted, files, done, strict=False):
            assert real.outcome(file, *got) == results[kind], (base, kind)
        if loader != "a1111":  # which stops at an alpha
            assert real.outcome(files[-1], *done[-1]) == "loads", (base, done[-1][1])


def test_parts_in_order_in_sdcpp() -> None:
    """It files what diffusers splits under one tensor, by number, and stops at the first number that is missing."""
    place = dit_sdcpp.place
    block = "transformer.single_transformer_blocks.3"
    assert place(f"{block}.proj_mlp.lora_B.weight", "flux") == ("single_blocks.3.linear1.weight", 3, "lora_up")
    assert place("lycoris_transformer_blocks_0_attn_add_k_proj.alpha", "sd3") == (
        "joint_blocks.0.context_block.attn.qkv.weight", 1, "alpha",
    )  # fmt: skip
    flux = place("lora_unet_double_blocks_0_img_mod_lin.lora_down.weight", "flux")
    assert flux == ("double_blocks.0.img_mod.lin.weight", 0, "lora_down")
    for base, kind, status in (
        ("sd3", "peft", "loads"), ("sd3", "peft, keys only", "fails"),
        ("sd3", "peft, queries and values only", "differs"),
        ("sd3", "onetrainer", "fails"), ("flux", "simpletuner", "loads"), ("flux", "simpletuner, lokr", "differs"),
        ("flux", "peft, outside the blocks", "differs"), ("sd3", "peft, modulation", "differs"),
    ):  # fmt: skip
        file = dit_kinds.build(kind, base, model(base))
        assert judged(file.tensors, file.metadata)["sd.cpp"].status == status, (base, kind)
    gap = dit_kinds.build("peft, keys only", "flux", model("flux"))
    filled = convert.to_diffusers(convert.to_kohya(gap.tensors, gap.metadata, []), peft=True)
    assert judged(filled, gap.metadata)["sd.cpp"].status == "loads"


def test_what_spf_train_writes_of_sd3() -> None:
    """PEFT's spelling, no alpha, kohya's metadata."""
    file = dit_kinds.build("peft, attention only", "sd3", model("sd3"))
    found = judged(file.tensors, {"ss_base_model_version": "sd3_5_medium", "ss_network_dim": "4"})
    assert [v.status for v in found.values()] == ["differs", "fails", "loads", "loads", "loads"]


def test_an_alpha_in_diffusers_metadata() -> None:
    file = dit_kinds.build("peft", "sd3", model("sd3"))
    for config, status in (
        ('{"transformer.lora_alpha": 8, "transformer.r": 4}', "differs"),
        ("{}", "loads"),
        ("[", "loads"),
    ):
        metadata = file.metadata | {"lora_adapter_metadata": config}
        assert judged(file.tensors, metadata)["ComfyUI"].status == status
    with pytest.raises(SPFError, match="lora_adapter_metadata asks for alpha 8 at rank 4"):
        convert.to_kohya(
            file.tensors, {"lora_adapter_metadata": '{"transformer.lora_alpha": 8, "transformer.r": 4}'}, []
        )


def test_what_is_not_converted_is_refused_by_name() -> None:
    def file(kind: str) -> StateDict:
        return dit_kinds.build(kind, "flux", model("flux")).tensors

    with pytest.raises(SPFError, match="Only plain LoRA can be split or put together; lycoris_"):
        convert.to_kohya(file("simpletuner, lokr"), {}, [])
    with pytest.raises(SPFError, match="Only plain LoRA can be split or put together; transformer"):
        convert.to_diffusers(file("peft, dora"), peft=True)
    with pytest.raises(SPFError, match="is outside the blocks"):
        convert.to_kohya(file("peft, outside the blocks"), {}, [])
    text = {
        f"lora_te1_text_model_encoder_layers_0_mlp_fc1.{s}": torch.ones(1, 1)
        for s in ("lora_down.weight", "lora_up.weight")
    }
    with pytest.raises(SPFError, match="also trains text encoders"):
        convert.to_diffusers(written("flux") | text, peft=True)
    odd = factors("flux", {"double_blocks.0.img_attn.qkv": (3072, 100)})
    with pytest.raises(SPFError, match="has 100 outputs, not the 9216 of 3 parts"):
        convert.to_diffusers(odd, peft=True)
    with pytest.raises(SPFError, match="HunyuanImage"):
        convert.to_diffusers(written("hunyuan_image"), peft=True)
    kohya = written("flux")
    key = f"{next(iter(kohya)).partition('.')[0]}.diff_b"
    with pytest.raises(SPFError, match=f"{key} is not"):  # there is no place for a bias, and it must not be left out
        convert.to_diffusers(kohya | {key: torch.ones(1)}, peft=True)


def test_the_command(tmp_path: Path) -> None:
    """From diffusers' names to kohya's, ComfyUI's and back."""
    file = dit_kinds.build("onetrainer", "sd3", model("sd3"))
    save_file(file.tensors, tmp_path / "in.safetensors", file.metadata)
    run = CliRunner()
    checked = run.invoke(app, ["check", str(tmp_path / "in.safetensors")], env={"COLUMNS": "200"})
    assert "SD 3 (by" in checked.output
    for target, key in (
        ("kohya", "lora_unet_joint_blocks_0_x_block_attn_qkv.alpha"),
        ("comfyui", "diffusion_model.joint_blocks.0.x_block.attn.qkv.lora_up.weight"),
        ("peft", "transformer.transformer_blocks.0.attn.to_q.lora_B.weight"),
    ):
        out = tmp_path / f"{target}.safetensors"
        done = run.invoke(app, ["convert", str(tmp_path / "in.safetensors"), str(out), "--to", target])
        assert done.exit_code == 0, done.output
        assert key in load_file(out)
        assert target == "peft" or "ranks add up, to 12 at most" in done.output
