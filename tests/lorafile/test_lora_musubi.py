"""LoRA files of the models that musubi-tuner trains: tables against its own networks in full size and against
diffusers' classes, verdicts against the loaders, conversions delta by delta, and its own `convert_lora.py`.

docs/lora-files.md says how to run the loaders themselves; without them their recorded results serve.
"""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner

from spf_plugin.errors import SPFError
from spf_plugin.lorafile import convert, dit_names, dit_parts, dit_sdcpp, inspect, musubi_names
from spf_plugin.lorafile.findings import Verdict
from spf_plugin.lorafile.loaders import verdicts
from spf_plugin.lorafile.musubi_names import MUSUBI_BASES
from spf_plugin.lorafile.names import DitBase
from spf_plugin.lorafile.normalise import normalise
from spf_plugin.tools.cli.lora import app
from tests.hosts.musubi.classes import NO_CHECKOUT
from tests.hosts.musubi.sizes import MUSUBI_HOSTS, full_size
from tests.lorafile import musubi_kinds, musubi_real, real
from tests.lorafile.conftest import checkout
from tests.lorafile.test_lora_dit_parts import products
from tests.lorafile.test_lora_dits import written
from tests.lorafile.test_lora_real import STATUS

StateDict = dict[str, torch.Tensor]
RECORD: dict[str, Any] = json.loads(musubi_real.RECORD.read_text("utf-8"))
CASES = [(base, kind) for base in musubi_kinds.BASES for kind in musubi_kinds.of_base(base)]
LIVE = ("musubi", "musubi, second block", "diffusion_model, down and up, alpha", "diffusers", "diffusers, alpha")
CLASSES: dict[DitBase, tuple[str, dict[str, Any]]] = {  # diffusers', as released
    "zimage": ("ZImageTransformer2DModel", {}),
    "qwen_image": ("QwenImageTransformer2DModel", {}),
    "flux2": ("Flux2Transformer2DModel", {}),
    "krea2": ("Krea2Transformer2DModel", {}),
    "wan": ("WanTransformer3DModel", {"image_dim": 1280, "added_kv_proj_dim": 5120}),
}


@cache
def model(base: str) -> musubi_kinds.Weights:
    return musubi_kinds.model(base)


def judged(tensors: StateDict, metadata: dict[str, str]) -> dict[str, Verdict]:
    contents = inspect.gather(tensors.items(), metadata)
    return {v.loader: v for v in verdicts(contents, inspect.describe(contents))}


# ---- tables ---------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not MUSUBI_HOSTS, reason=NO_CHECKOUT)
def test_the_tables_are_the_hosts_networks() -> None:
    """Names, and features in and out, of every size; what the network takes with every pattern of its own lifted."""
    seen: dict[str, set[str]] = {}
    for kind, theirs in full_size(MUSUBI_HOSTS[0]).items():
        base: DitBase = theirs["base"]
        for name, fans in theirs["all modules"].items():
            found = dit_names.resolve(base, name)
            assert found is not None, (kind, name)
            assert found.style == "host"
            assert dit_names.kohya_name(base, found.module) == name
            assert dit_parts.fits(base, found.module, tuple(fans)), (kind, name)
        assert theirs["modules"].keys() <= theirs["all modules"].keys()
        told = dit_names.detect({name: tuple(fans) for name, fans in theirs["modules"].items()}, base)
        assert told is not None
        assert told[0] == base, kind
        seen.setdefault(base, set()).update(theirs["all modules"])
    for base in MUSUBI_BASES:
        table = {dit_names.kohya_name(base, m) for m in dit_names.modules(base) if not m.path.endswith("_img")}
        assert seen[base] == table


@pytest.mark.parametrize("base", MUSUBI_BASES)
def test_diffusers_paths_are_its_classes(base: DitBase) -> None:
    import diffusers

    name, options = CLASSES[base]
    if not hasattr(diffusers, name):
        pytest.skip(f"NOT RUN: diffusers {diffusers.__version__} has no {name}")
    with torch.device("meta"):
        theirs = {p: m for p, m in getattr(diffusers, name)(**options).named_modules() if isinstance(m, nn.Linear)}
    if base == "flux2":
        ours = {path: part.module for path, part in dit_parts.parts(base).items()}
    else:
        ours = {musubi_names.diffusers_path(base, m.path): m for m in dit_names.modules(base)}
    assert ours.keys() <= theirs.keys()
    for path, module in ours.items():
        assert (module.fan_in, module.fan_out) == (theirs[path].in_features, theirs[path].out_features), path
    inside = {path for path in theirs if "block" in path or "layers" in path or "refiner" in path}
    assert inside - {p for p in inside if "modulation" in p} <= ours.keys()


def test_flux2_parts_lie_in_the_modules_of_the_checkpoint() -> None:
    fans = {m.path: (m.fan_in, m.fan_out) for m in dit_names.modules("flux2")}
    siblings = dit_parts.siblings("flux2")
    assert siblings.keys() == fans.keys()
    for whole, parts in siblings.items():
        rows = 0
        for part in parts:
            assert part.start == rows
            rows += part.module.fan_out
        assert (parts[0].module.fan_in, rows) == fans[whole]


@pytest.mark.parametrize(
    ("architecture", "version", "base"),
    [
        ("Z-Image/lora", "z_image", "zimage"), ("Qwen-Image-Edit-2511/lora", "qwen_image_edit", "qwen_image"),
        ("Flux.2-klein-4b/lora", "flux_2_klein_4b", "flux2"), ("Krea-2/lora", "krea2", "krea2"),
        ("wan2.1/lora", "wan", "wan"), ("flux-1-dev/lora", "flux1", "flux"),
        ("Flux.1-dev/lora", "flux_kontext", "flux"),
    ],
)  # fmt: skip
def test_what_the_metadata_names(architecture: str, version: str, base: str) -> None:
    assert inspect.metadata_base({"ss_base_model_version": version}) == base
    if architecture != "Flux.1-dev/lora":
        assert inspect.metadata_base({"modelspec.architecture": architecture}) == base


# ---- the loaders ----------------------------------------------------------------------------------------------------


def recorded(loader: str, base: str, kind: str) -> str | None:
    """The worst of the releases that were run, and have the model; None where none has."""
    found = [entry["results"].get(f"{kind}; {base}", "") for n, entry in RECORD.items() if n.split()[0] == loader]
    results = ["differs" if r.endswith("differ") else r for r in found if r]
    return max(results, key=STATUS.index) if results else None


@pytest.mark.parametrize(("base", "kind"), CASES)
def test_verdicts_are_what_the_loaders_did(base: str, kind: str) -> None:
    file = musubi_kinds.build(kind, base, model(base))
    found = judged(file.tensors, file.metadata)
    assert inspect.describe(inspect.gather(file.tensors.items(), file.metadata)).base == base
    for loader in ("ComfyUI", "diffusers"):
        wanted = recorded(loader, base, kind)
        assert wanted in (None, found[loader].status), (loader, found[loader].findings)
    assert found["A1111"].status == found["Forge"].status == "fails"


def test_everything_was_run_but_krea2_in_comfyui() -> None:
    missing = {(loader, b) for b, k in CASES for loader in ("ComfyUI", "diffusers") if recorded(loader, b, k) is None}
    assert missing == {("ComfyUI", "krea2")}


@pytest.mark.parametrize(
    ("kind", "status"),
    [("musubi", "loads"), ("musubi, lokr", "loads"), ("diffusion_model, alpha", "loads"), ("diffusers", "loads"),
     ("diffusers, bare", "loads"), ("simpletuner", "loads"), ("onetrainer", "fails"), ("base_model", "fails")],
)  # fmt: skip
def test_krea2_in_comfyui_as_it_was_read(kind: str, status: str) -> None:
    file = musubi_kinds.build(kind, "krea2", model("krea2"))
    assert judged(file.tensors, file.metadata)["ComfyUI"].status == status


@pytest.mark.parametrize(("base", "kind"), CASES)
def test_fix_makes_no_verdict_worse(base: str, kind: str) -> None:
    file = musubi_kinds.build(kind, base, model(base))
    fixed, strings, _ = normalise(file.tensors, file.metadata)
    before, after = judged(file.tensors, file.metadata), judged(fixed, strings)
    assert not [name for name in before if after[name].worse_than(before[name])]
    if "no alpha" not in kind and "lokr" not in kind:
        assert fixed.keys() == file.tensors.keys()


def test_fix_adds_the_alphas_without_which_wan_stops() -> None:
    file = musubi_kinds.build("musubi, no alpha", "wan", model("wan"))
    assert judged(file.tensors, file.metadata)["diffusers"].status == "fails"
    fixed, strings, _ = normalise(file.tensors, file.metadata)
    assert judged(fixed, strings)["diffusers"].status == "loads"


def converted(base: str, kind: str, to: str) -> tuple[musubi_kinds.File, StateDict]:
    file = musubi_kinds.build(kind, base, model(base))
    if to == "diffusers":
        return file, convert.to_diffusers(file.tensors, file.metadata, peft=True)
    names = convert.to_kohya(file.tensors, file.metadata, [])
    return file, names if to == "kohya" else convert.to_comfyui(names, file.metadata)


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and float((a.double() - b.double()).abs().max()) < 1e-4


PLAIN = [(base, kind) for base, kind in CASES if "lokr" not in kind]


@pytest.mark.parametrize(("base", "kind"), PLAIN)
def test_conversions_keep_every_delta(base: str, kind: str) -> None:
    """Of every kind to every naming, against what the file's author meant."""
    for to, start in (("kohya", "lora_unet_"), ("comfyui", "diffusion_model."), ("diffusers", "transformer.")):
        file, names = converted(base, kind, to)
        found, left = products(names), dict(file.meant)
        if to == "kohya":
            assert sum(key.endswith(".alpha") for key in names) == len(found)
        for path in list(left):
            if to == "diffusers":
                parts = [found.pop(f"{start}{theirs}") for theirs in musubi_kinds.diffusers_paths(base, path)]
                assert close(torch.cat(parts), left.pop(path)), path
            else:
                own = path.replace(".", "_") if to == "kohya" else path
                assert close(found.pop(f"{start}{own}"), left.pop(path)), path
        assert not found
        status = judged(names, file.metadata)
        program = "diffusers" if to == "diffusers" else "ComfyUI" if to == "comfyui" else ""
        assert not program or status[program].status == "loads", (to, status[program].findings)


def test_what_is_to_mend_a_file_for_sdcpp_does() -> None:
    """Every conversion that it names; where it names none, none does."""
    asked = 0
    for base, kind in CASES:
        file = musubi_kinds.build(kind, base, model(base))
        verdict = judged(file.tensors, file.metadata)["sd.cpp"]
        (fix,) = {finding.fix for finding in verdict.findings if finding.code == "names"} or {""}
        assert bool(fix) == (verdict.status != "loads")
        for to in ("comfyui", "diffusers"):
            if f"--to {to}" in fix:
                asked += 1
                _, names = converted(base, kind, to)
                assert judged(names, file.metadata)["sd.cpp"].status == "loads", (base, kind, to)
        if fix == "use ComfyUI":
            _, names = converted(base, kind, "comfyui")
            assert judged(names, file.metadata)["sd.cpp"].status != "loads", (base, kind)
    assert asked > 40


def test_three_in_one_are_taken_apart_to_the_ranks_that_they_had() -> None:
    """What its own script puts together comes back bit for bit, alphas too."""
    one, three = (musubi_kinds.build(kind, "zimage", model("zimage")) for kind in ("musubi", "fused"))
    notes: list[str] = []
    back = convert.to_kohya(three.tensors, three.metadata, notes)
    assert back.keys() == one.tensors.keys()
    assert all(torch.equal(back[key], tensor) for key, tensor in one.tensors.items())
    assert any("4 modules of ComfyUI's checkpoint taken apart" in note for note in notes)


def of_zimage(*, alpha: bool, rows: float = 1.0) -> StateDict:
    """q, k and v in one and what comes out, of ranks 12 and 4."""
    draw = torch.Generator().manual_seed(0)
    found = {}
    for name, rank, out in (("qkv", 12, 192), ("out", 4, 64)):
        module = f"lora_unet_layers_0_attention_{name}"
        found[f"{module}.lora_down.weight"] = torch.randn(rank, 64, generator=draw)
        found[f"{module}.lora_up.weight"] = torch.randn(out, rank, generator=draw) * rows
        if alpha:
            found[f"{module}.alpha"] = torch.tensor(rank / 2)
    return found


def test_three_in_one_without_an_alpha_or_without_a_delta() -> None:
    told = {"ss_base_model_version": "z_image"}
    for alpha, rows in ((False, 1.0), (True, 0.0)):
        file = of_zimage(alpha=alpha, rows=rows)
        (whole,) = (delta for name, delta in products(file).items() if name.endswith("qkv"))
        found = products(convert.to_kohya(file, told, []))
        assert len(found) == 4
        parts = torch.cat([found[f"lora_unet_layers_0_attention_to_{part}"] for part in "qkv"])
        assert close(parts, whole), (alpha, rows)


def test_what_a_conversion_changed_is_said() -> None:
    """Padding, alphas with what they are rounded to, and those that were added."""
    told, notes = {"ss_base_model_version": "z_image"}, []
    convert.to_diffusers(of_zimage(alpha=True), told, peft=True, notes=notes)
    assert notes == [
        "1 modules padded with zeros to rank 12, as diffusers 0.35 takes every rank for one",
        "alpha / rank multiplied into 4 modules",
    ]
    halves = {key: tensor.half() for key, tensor in of_zimage(alpha=True).items()}
    halves["lora_unet_layers_0_attention_out.alpha"] = torch.tensor(1.1)
    notes.clear()
    convert.to_diffusers(halves, told, peft=True, notes=notes)
    assert notes[-1] == "alpha / rank multiplied into 4 modules, in 1 of them rounded to the file's dtype"
    plain = {key: tensor for key, tensor in written("zimage", every=3).items() if not key.endswith("alpha")}
    notes.clear()
    convert.to_kohya(plain, told, notes)
    assert notes == [f"the rank as alpha added to {len(plain) // 2} modules that had none"]
    notes.clear()
    convert.to_diffusers(plain, told, peft=True, notes=notes)
    assert notes == []


@pytest.mark.parametrize(
    ("base", "kind", "said"),
    [
        ("zimage", "fused, diffusion_model", "2 modules hold q, k and v in one, which it leaves out: "),
        ("zimage", "diffusers, default", "it takes the names for another program's"),
        ("zimage", "fused, diffusion_model", "diffusers 0.36 give"),
        ("qwen_image", "musubi, ranks differ", "diffusers 0.35 and 0.36 give"),
        ("wan", "musubi, ranks differ", "diffusers 0.35 and 0.36 give"),
    ],
)
def test_what_is_said_of_diffusers(base: str, kind: str, said: str) -> None:
    file = musubi_kinds.build(kind, base, model(base))
    said_of = [finding.message for finding in judged(file.tensors, file.metadata)["diffusers"].findings]
    assert any(said in text for text in said_of), said_of


def test_names_of_two_kinds_and_of_nobody_in_diffusers() -> None:
    host, theirs = (musubi_kinds.build(kind, "zimage", model("zimage")) for kind in ("musubi", "diffusion_model"))
    verdict = judged(host.tensors | theirs.tensors, host.metadata)["diffusers"]
    assert any(finding.code == "mixed-names" for finding in verdict.findings), verdict
    stranger = {f"lora_unet_blocks_99_x.{key}.weight": torch.ones(2, 2) for key in ("lora_up", "lora_down")}
    file = musubi_kinds.build("musubi", "wan", model("wan"))
    verdict = judged(file.tensors | stranger | {"lora_unet_blocks_99_x.alpha": torch.ones(())}, file.metadata)[
        "diffusers"
    ]
    (found,) = (finding for finding in verdict.findings if finding.code == "names")
    assert found.message == "1 modules are left out: lora_unet_blocks_99_x."


def test_what_is_not_converted_is_refused_by_name() -> None:
    def file(kind: str, base: str = "zimage") -> StateDict:
        return dict(musubi_kinds.build(kind, base, model(base)).tensors)

    with pytest.raises(
        SPFError, match=r"diffusers loads plain LoRA of Z-Image only; lora_unet_layers_0_attention_to_q"
    ):
        convert.to_diffusers(file("musubi, lokr"), peft=True)
    stranger = {f"lora_unet_layers_99_x.{key}": torch.ones(2, 2) for key in ("lora_up.weight", "lora_down.weight")}
    with pytest.raises(SPFError, match="lora_unet_layers_99_x is no module of Z-Image"):
        convert.to_kohya(file("musubi") | stranger, {}, [])
    with pytest.raises(SPFError, match=r"Both .* are layers\.0\.attention\.to_q"):
        convert.to_kohya(file("musubi") | file("diffusers"), {}, [])
    odd = file("fused")
    name = "lora_unet_layers_0_attention_qkv"
    told = {"ss_base_model_version": "z_image"}
    with pytest.raises(SPFError, match="Only plain LoRA of q, k and v in one"):
        convert.to_kohya(odd | {f"{name}.dora_scale": torch.ones(1)}, told, [])
    with pytest.raises(SPFError, match="has 100 outputs, not three times"):
        convert.to_kohya(odd | {f"{name}.lora_up.weight": torch.ones(100, 12)}, told, [])
    alpha = '{"transformer.lora_alpha": 8, "transformer.r": 4}'
    with pytest.raises(SPFError, match="lora_adapter_metadata asks for alpha 8 at rank 4"):
        convert.to_kohya(file("diffusers"), {"lora_adapter_metadata": alpha}, [])


def test_in_sdcpp_as_it_was_read() -> None:
    """Underscores that it takes for dots lose a module; of FLUX.2 it knows diffusers' names of FLUX.1."""
    place = dit_sdcpp.place
    assert place("lora_unet_layers_3_attention_to_k.lora_up.weight", "zimage") == (
        "layers.3.attention.qkv.weight", 1, "lora_up",
    )  # fmt: skip
    assert place("lora_unet_blocks_0_self_attn_q.alpha", "wan") == ("blocks.0.self_attn.q.weight", 0, "alpha")
    status = {
        ("zimage", "musubi"): "differs", ("zimage", "diffusion_model"): "loads", ("zimage", "fused"): "differs",
        ("qwen_image", "musubi"): "loads", ("flux2", "musubi"): "loads", ("flux2", "diffusers"): "differs",
        ("krea2", "musubi"): "differs", ("krea2", "diffusers"): "loads", ("wan", "musubi"): "loads",
        ("wan", "diffusers"): "fails", ("zimage", "diffusers"): "loads",
    }  # fmt: skip
    for (base, kind), wanted in status.items():
        file = musubi_kinds.build(kind, base, model(base))
        assert judged(file.tensors, file.metadata)["sd.cpp"].status == wanted, (base, kind)


# ---- live -----------------------------------------------------------------------------------------------------------


def host() -> Path:
    if not MUSUBI_HOSTS:
        pytest.skip(NO_CHECKOUT)
    return MUSUBI_HOSTS[0]


def test_the_trainer_takes_what_is_converted_for_it() -> None:
    """`--base_weights` and `--dim_from_weights` in its own network: of every kind, after `--to kohya`."""
    for base in musubi_kinds.BASES:
        kinds = [kind for kind in musubi_kinds.of_base(base) if "lokr" not in kind]
        files = []
        for kind in kinds:
            file, names = converted(base, kind, "kohya")
            files.append(musubi_kinds.File(names, file.meant, file.metadata))
        done = musubi_real.run("musubi", host(), base, files, model(base))
        assert {real.outcome(f, *d) for f, d in zip(files, done, strict=True)} == {"loads"}, base


@pytest.mark.parametrize("loader", ["comfyui", "diffusers"])
def test_the_loader_does_what_is_recorded(loader: str) -> None:
    """And takes what `convert` makes for it."""
    folder = Path(".") if loader == "diffusers" else checkout(musubi_real.CHECKOUTS[loader])
    name = musubi_real.LABEL[loader] if loader != "diffusers" else f"diffusers {real.installed()}"
    if name not in RECORD:
        pytest.skip(f"NOT RUN: nothing is recorded of {name}")
    for base in musubi_real.bases(loader):
        if f"musubi; {base}" not in RECORD[name]["results"]:
            continue
        found = musubi_real.outcomes(loader, folder, [base], LIVE)
        assert found == {key: RECORD[name]["results"][key] for key in found}
        kinds = [kind for b, kind in PLAIN if b == base]
        files = []
        for kind in kinds:
            file, names = converted(base, kind, loader)
            files.append(musubi_kinds.File(names, file.meant, file.metadata))
        done = musubi_real.run(loader, folder, base, files, model(base))
        assert {real.outcome(f, *d) for f, d in zip(files, done, strict=True)} == {"loads"}, base


def test_its_own_conversion(tmp_path: Path) -> None:
    """What musubi-tuner's `convert_lora.py --target other` writes is `diffusion_model.` of the same modules, of which
    ComfyUI and `--to kohya` make the same deltas. Of Krea 2 and FLUX.2 it spells names that are nobody's."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from musubi_tuner import convert_lora as c\n"
        "for i in sys.argv[2:]: c.convert(i, i.replace('in-', 'out-'), 'other', None)"
    )
    wrong = {"flux2": "_attn_", "krea2": ".layerwise.blocks."}
    bases = ("zimage", "qwen_image", "wan", *wrong)
    for base in bases:
        save_file(musubi_kinds.build("musubi", base, model(base)).tensors, tmp_path / f"in-{base}.safetensors")
    files = [str(tmp_path / f"in-{base}.safetensors") for base in bases]
    run = [sys.executable, "-c", code, str(host() / "src"), *files]
    done = subprocess.run(run, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    for base in bases:
        file = musubi_kinds.build("musubi", base, model(base))
        theirs = load_file(tmp_path / f"out-{base}.safetensors")
        names = {key.rpartition(".lora_")[0] for key in theirs}
        if base in wrong:
            assert any(wrong[base] in name for name in names - {f"diffusion_model.{path}" for path in file.meant})
            continue
        assert names == {f"diffusion_model.{path}" for path in file.meant}
        assert judged(theirs, file.metadata)["ComfyUI"].status == "loads"
        back = products(convert.to_kohya(theirs, file.metadata, []))
        for path, meant in file.meant.items():
            assert close(back[f"lora_unet_{path.replace('.', '_')}"], meant), path


def test_the_command(tmp_path: Path) -> None:
    tensors = written("zimage", every=3)
    save_file(tensors, tmp_path / "in.safetensors", {"ss_base_model_version": "z_image"})
    run = CliRunner()
    checked = run.invoke(app, ["check", str(tmp_path / "in.safetensors")], env={"COLUMNS": "200"})
    assert "Z-Image (by" in checked.output
    assert "spf lora convert --to comfyui" in checked.output
    for target, key in (
        ("comfyui", "diffusion_model.layers.0.attention.to_q.lora_up.weight"),
        ("peft", "transformer.layers.0.attention.to_q.lora_B.weight"),
        ("kohya", "lora_unet_layers_0_attention_to_q.alpha"),
    ):
        out = tmp_path / f"{target}.safetensors"
        done = run.invoke(app, ["convert", str(tmp_path / "in.safetensors"), str(out), "--to", target])
        assert done.exit_code == 0, done.output
        assert key in load_file(out)
    back = run.invoke(
        app, ["convert", str(tmp_path / "comfyui.safetensors"), str(tmp_path / "back.safetensors"), "--to", "kohya"]
    )
    assert back.exit_code == 0, back.output
    again = load_file(tmp_path / "back.safetensors")
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[key], tensors[key]) for key in tensors)
