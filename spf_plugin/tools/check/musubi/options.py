"""Names that musubi-tuner knows: it ignores other keys of a --config_file silently, and refuses them in a data set.

Of v0.3.4 (30c658c); a test compares it with the checkouts that it finds.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from spf_plugin.config import PREFIX
from spf_plugin.errors import SPFError, nearest
from spf_plugin.files import SLASHES, read_toml, shown
from spf_plugin.hosts.looking import repeated
from spf_plugin.hosts.musubi.rules import HOST
from spf_plugin.hosts.musubi.scripts import Script
from spf_plugin.tools.check.findings import Finding
from spf_plugin.tools.check.host_options import whole_or_number
from spf_plugin.tools.check.kinds import NUMBER, NUMBER_LIST, SWITCH, TEXT, TEXTS, WHOLE, Kind
from spf_plugin.tools.check.source import OWN_OPTIONS, HostArgs, unfolded

_SWITCHES = """
    async_upload block_swap_h2d_only compile compile_fullgraph cuda_allow_tf32 cuda_cudnn_benchmark
    ddp_gradient_as_bucket_view ddp_static_graph dim_from_weights disable_numpy_memmap dynamo_dynamic
    dynamo_fullgraph flash3 flash_attn fp8_base gradient_checkpointing gradient_checkpointing_cpu_offload
    img_in_txt_in_offloading log_config no_metadata persistent_data_loader_workers preserve_distribution_shape
    resume_from_huggingface sage_attn sample_at_first save_state save_state_on_train_end save_state_to_huggingface
    sdpa split_attn use_pinned_memory_for_block_swap xformers
"""
_TEXTS = """
    compile_backend compile_dynamic compile_mode config_file dataset_config dit dynamo_backend dynamo_mode
    huggingface_path_in_repo huggingface_repo_id huggingface_repo_type huggingface_repo_visibility huggingface_token
    log_prefix log_tracker_config log_tracker_name log_with logging_dir lr_scheduler lr_scheduler_type metadata_arch
    metadata_author metadata_description metadata_license metadata_reso metadata_tags metadata_title mixed_precision
    network_module network_weights optimizer_type output_dir output_name resume sample_prompts save_precision
    show_timesteps timestep_sampling training_comment vae vae_dtype wandb_api_key wandb_run_name weighting_scheme
"""
_WHOLE = """
    block_swap_ring_size blocks_to_swap compile_cache_size_limit ddp_timeout gradient_accumulation_steps
    lr_scheduler_num_cycles lr_scheduler_timescale max_data_loader_n_workers max_timestep max_train_epochs
    max_train_steps min_timestep network_dim num_timestep_buckets sample_every_n_epochs sample_every_n_steps
    save_every_n_epochs save_every_n_steps save_last_n_epochs save_last_n_epochs_state save_last_n_steps
    save_last_n_steps_state seed
"""
_DECIMALS = """
    discrete_flow_shift guidance_scale learning_rate logit_mean logit_std lr_scheduler_min_lr_ratio lr_scheduler_power
    max_grad_norm mode_scale network_alpha network_dropout scale_weight_norms sigmoid_scale
"""
_SHARES = "lr_decay_steps lr_warmup_steps"
_TEXT_LISTS = "base_weights lr_scheduler_args network_args optimizer_args"
_NUMBER_LISTS = "base_weights_multiplier"
#: Of one trainer alone: switches, texts, whole numbers.
_OWN = {
    "zimage": ("fp8_llm fp8_scaled use_32bit_attention", "text_encoder", ""),
    "qwen_image": (
        "edit edit_plus fp8_scaled fp8_vl remove_first_image_from_target",
        "model_version text_encoder",
        "num_layers",
    ),
    "flux_2": ("fp8_scaled fp8_text_encoder", "model_version text_encoder", ""),
    "krea2": ("fp8_scaled turbo_dit_cache", "text_encoder turbo_dit", ""),
    "wan": (
        "force_v2_1_time_embedding fp8_scaled fp8_t5 offload_inactive_dit one_frame vae_cache_cpu",
        "clip dit_high_noise t5 task",
        "timestep_boundary",
    ),
}


def _kinds(switches: str, texts: str, whole: str) -> dict[str, Kind]:
    return {
        **dict.fromkeys(switches.split(), SWITCH),
        **dict.fromkeys(texts.split(), TEXT),
        **dict.fromkeys(whole.split(), WHOLE),
    }


COMMON: dict[str, Kind] = {
    **_kinds(_SWITCHES, _TEXTS, _WHOLE),
    **dict.fromkeys([*_DECIMALS.split(), *_SHARES.split()], NUMBER),
    **dict.fromkeys(_TEXT_LISTS.split(), TEXTS),
    **dict.fromkeys(_NUMBER_LISTS.split(), NUMBER_LIST),
}
#: By SPF's name of the architecture, what its trainer takes.
OF_ARCH: dict[str, dict[str, Kind]] = {arch: {**COMMON, **_kinds(*own)} for arch, own in _OWN.items()}
#: Of any trainer.
ANY: dict[str, Kind] = {name: kind for kinds in OF_ARCH.values() for name, kind in kinds.items()}
CHOICES: dict[str, tuple[str, ...]] = {
    "compile_dynamic": ("true", "false", "auto"),
    "compile_mode": ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"),
    "dynamo_mode": ("default", "reduce-overhead", "max-autotune"),
    "log_with": ("tensorboard", "wandb", "all"),
    "mixed_precision": ("no", "fp16", "bf16"),
    "save_precision": ("float", "fp32", "fp16", "bf16"),
    "show_timesteps": ("image", "console"),
    "timestep_sampling": (
        "sigma", "uniform", "sigmoid", "shift", "flux_shift", "flux2_shift", "ideogram4_shift", "qwen_shift",
        "krea2_shift", "logsnr", "qinglong_flux", "qinglong_qwen",
    ),
    "weighting_scheme": ("logit_normal", "mode", "cosmap", "sigma_sqrt", "none"),
}  # fmt: skip
#: The host's own defaults of what is read here.
DEFAULTS: dict[str, Any] = {"max_train_steps": 1600, "dynamo_backend": "NO", "dim_from_weights": False}


#: Of one trainer alone.
OWN_DEFAULTS: dict[str, dict[str, Any]] = {"flux_2": {"model_version": "dev"}, "wan": {"task": "t2v-14B"}}


def known(script: Script | None) -> Mapping[str, Kind]:
    """The options of a trainer; of any where none is named, or SPF does not know it."""
    return OF_ARCH.get(script.arch, ANY) if script else ANY


class _Parser(argparse.ArgumentParser):
    """The host's parser of the command line, made from what is known of it."""

    def __init__(self, problems: list[str], options: Mapping[str, Kind]):
        super().__init__(add_help=False, argument_default=argparse.SUPPRESS)
        self.problems = problems
        for name, kind in sorted(options.items()):
            if kind is SWITCH:
                self.add_argument(f"--{name}", action="store_true")
            else:
                many = "*" if kind in (TEXTS, NUMBER_LIST) else None
                self.add_argument(f"--{name}", type=_reader(name, kind, problems), nargs=many)

    def error(self, message: str) -> NoReturn:
        raise SPFError([*self.problems, f"{HOST} would not take these options: {message}."])


def _reader(name: str, kind: Kind, problems: list[str]) -> Callable[[str], Any]:
    """What makes a value of a word; it never fails, so that all mistakes are found."""
    number: Callable[[str], Any] = whole_or_number if name in _SHARES.split() else float

    def value_of(text: str) -> Any:
        try:
            value = int(text) if kind is WHOLE else number(text) if kind in (NUMBER, NUMBER_LIST) else text
        except ValueError:
            problems.append(f"--{name} takes {'a whole number' if kind is WHOLE else 'a number'}, not {text!r}")
            return text
        if name in CHOICES and value not in CHOICES[name]:
            problems.append(f"--{name} takes one of {', '.join(CHOICES[name])}, not {text!r}")
        return value

    return value_of


def parse_words(words: Sequence[str], script: Script | None) -> dict[str, Any]:
    """The options on a command line of the host, by the rules of its parser (argparse, as the host's is).

    Raises:
        SPFError: a word that belongs to no option, an option that the trainer does not have, or a value that it
            refuses.
    """
    options = known(script)
    problems: list[str] = []
    values, others = _Parser(problems, options).parse_known_args(words)
    problems += repeated(words, HOST)
    unknown = False
    for word in others:
        if word.startswith("-"):
            unknown = True  # what follows are its values
            close = nearest(word.lstrip("-").partition("=")[0].replace("-", "_"), [*options, *OWN_OPTIONS])
            of = script.file if script else HOST
            problems.append(f"{word.partition('=')[0]} is no option of {of} or of spf check{close}")
        elif not unknown:
            problems.append(f"stray word {word!r}: no option takes it. Quote a text that has spaces")
    if problems:
        raise SPFError(problems)
    return vars(values)


def read(config: Path | None, words: Mapping[str, Any], script: Script | None) -> tuple[HostArgs, list[Finding]]:
    """The host's arguments, and what is wrong with how they are written.

    Args:
        config: the `--config_file`, or None.
        words: options of the command line (`parse_words`); they win.
        script: the trainer.

    Raises:
        SPFError: the file cannot be read.
    """
    from_file = unfolded(read_toml(config)) if config else {}
    findings = _written_wrongly(config, from_file, known(script)) if config else []
    values = {**{key: value for key, value in from_file.items() if not key.startswith(PREFIX)}, **words}
    # What the host cannot work with is said above, and left out of what is looked at.
    kept = {
        key: value
        for key, value in values.items()
        if key not in ANY or ANY[key].fits(value) or (key == "network_args" and isinstance(value, str))
    }
    own = OWN_DEFAULTS.get(script.arch, {}) if script else {}
    return HostArgs(kept, {**DEFAULTS, **own}), findings


def _written_wrongly(path: Path, values: Mapping[str, Any], options: Mapping[str, Kind]) -> list[Finding]:
    return [finding for key, value in values.items() if (finding := _wrong(path.name, key, value, options))]


def _wrong(file: str, key: str, value: Any, options: Mapping[str, Kind]) -> Finding | None:
    """What is wrong with one line of a configuration file, if anything."""
    if key.startswith(PREFIX):
        fix = f'Write network_args = ["{key}=..."], or put it into a file that spf_config names.'
        message = f"{file}: {key} stands by itself, where {HOST} ignores it"
        return Finding("error", "spf-outside-network-args", message, fix)
    if key not in options:
        message = f"{file}: {HOST} has no option {key!r} here and ignores it silently{nearest(key, options)}"
        return Finding("warning", "unknown-option", message)
    kind = options[key]
    if kind in (WHOLE, NUMBER) and isinstance(value, str):
        message = f'{file}: {key} = "{value}" is a text, and {HOST} does not make a number of it'
        return Finding("error", "quoted-number", message, "Write the number without quotes.")
    if kind in (TEXTS, NUMBER_LIST) and not isinstance(value, list) and value not in ("", 0):
        message = f"{file}: {key} = {shown(value)} is no list, and {HOST} goes through it piece by piece"
        fix = f"Write {key} = [{json.dumps(value)}]" if isinstance(value, str | int | float) else "Write a list."
        return Finding("error", "no-list", message, fix)
    if kind is SWITCH and isinstance(value, str) and key != "dim_from_weights":
        message = f'{file}: {key} = "{value}" is a text, and every text counts as true'
        return Finding("warning", "quoted-boolean", message, "Write true or false, without quotes.")
    if not kind.fits(value):
        message = f"{file}: {key} = {shown(value)} is not what {HOST} can work with"
        return Finding("error", "wrong-type", message, f"Write {kind.name}.")
    if isinstance(value, str) and key in CHOICES and value not in CHOICES[key]:
        message = f"{file}: {key} = {value!r} is none of {', '.join(CHOICES[key])}"
        return Finding("error", "wrong-choice", message)
    if isinstance(value, str) and re.search(r"[\x00-\x08\x0a-\x1f]", value):
        return Finding("error", "backslash", f"{file}: {key} holds a control character: {value!r}", SLASHES)
    return None
