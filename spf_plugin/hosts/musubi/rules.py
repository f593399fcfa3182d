"""What musubi-tuner can and cannot do with SPF: rules that a run and `spf check` share.

They are functions of plain data, so that both ask the very same: no trainer, no model, no torch. What the host itself
stops at before it makes the network a run never gets here with; the check does.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from spf_plugin.config import SPFConfig
from spf_plugin.core import coverage
from spf_plugin.hosts import resuming
from spf_plugin.hosts.looking import Found, folder_problems, name_problems
from spf_plugin.hosts.musubi.dataset import Dataset, clashes, in_one_cache
from spf_plugin.hosts.musubi.scripts import SUPPORTED, Script, script_of

HOST = "musubi-tuner"
NETWORK_MODULE = "spf_plugin.lora"
#: What reads attention; the host takes the first of them that is on.
ATTENTION = ("sdpa", "flash_attn", "sage_attn", "xformers", "flash3")
#: Tasks of Wan from text alone: without an image or a control video.
WAN_TASKS = ("t2v-14B", "t2v-1.3B", "t2i-14B", "t2v-A14B")
QWEN_VERSION = "original"
_NO_DYNAMO = ("", "no", "none")
_EVERY = ("save_every_n_epochs", "save_every_n_steps", "sample_every_n_epochs", "sample_every_n_steps")


def trainer_problem(trainer: Any) -> str | None:
    """Why this trainer cannot be used, or None. Every reason names the trainer."""
    name, script = type(trainer).__name__, script_of(trainer)
    if script is None:
        return f"{name} is none of the trainers of {HOST} that SPF knows. {SUPPORTED}"
    if not script.supported:
        return f"{name} trains {script.said}, whose model SPF does not know. {SUPPORTED}"
    own = next(cls for cls in type(trainer).__mro__ if cls.__name__ == script.trainer)
    changed = [step for step in ("process_batch", "compute_loss") if getattr(type(trainer), step) != getattr(own, step)]
    if changed:
        return f"{name} has a {changed[0]} of its own, and SPF knows that of {script.trainer} only. {SUPPORTED}"
    return None


def folders(args: Any) -> list[Path]:
    """Where a relative `spf_config` is looked for."""
    config = getattr(args, "dataset_config", None)
    return [Path(), *([Path(config).parent] if config else [])]


def too_early(args: Any) -> list[str]:
    """What the host fails at without a reason between importing the network's module and making the network."""
    found: list[str] = []
    words = args.network_args if isinstance(args.network_args, list) else []
    for word in words:
        if str(word).count("=") > 1 and not str(word).startswith("spf_"):  # of ours `check_words` says it
            found.append(
                f"--network_args item {word!r} has more than one '=', and {HOST} fails at it. It has no way to write "
                "such a value: leave the item out."
            )
    if args.dim_from_weights is True:
        found.append(
            f"--dim_from_weights: {HOST} reads its value as the file, and a command line gives it none, so it fails. "
            'Write dim_from_weights = "FILE.safetensors" into the file of --config_file, or use --network_weights '
            "FILE.safetensors with its --network_dim."
        )
    return found


def look(
    args: Any,
    datasets: Sequence[Dataset],
    config: SPFConfig,
    wrong: Collection[str] = (),
    *,
    script: Script,
    trying: bool,
    tokenize: Callable[[str], Sequence[int]] | None = None,
    limit: int | None = None,
    compiled: bool = False,
) -> Found:
    """What would make a run wrong.

    Args:
        args: the host's arguments.
        datasets: the data set, as the host reads it now.
        config: SPF's settings.
        wrong: those of them whose value is not known, because it is wrong (`config.Read`): what depends on them is
            left out.
        script: the trainer's.
        trying: the output folder may be touched (`looking.unwritable`).
        tokenize: text -> token ids without begin, end and padding; None where no tokenizer is at hand.
        limit: tokens of text that are read; None: as many as its text encoder reads.
        compiled: accelerate compiles the model, whatever the arguments say.
    """
    errors = [
        *model_problems(args, script),
        *_compiling(args, compiled),
        *option_problems(args, script),
        *batch_problems(args, datasets, script),
        *_saving_problems(args, trying),
        *setting_problems(config),
        *resuming.problems(resuming.of_run(args), config, (), wrong),
    ]
    steps = getattr(args, "max_train_steps", None)
    # Of epochs the host makes steps later, and what is resumed may be aligned already.
    later = getattr(args, "max_train_epochs", None) or getattr(args, "resume", None)
    if steps and not later and "stage2_start" not in wrong:
        errors += config.never_aligned(steps)
    of_data = look_at_data(datasets, config, wrong, script=script, tokenize=tokenize, limit=limit)
    return Found(errors + of_data.errors, of_data.warnings, of_data.of_captions)


def look_at_data(
    datasets: Sequence[Dataset],
    config: SPFConfig,
    wrong: Collection[str] = (),
    *,
    script: Script | None,
    tokenize: Callable[[str], Sequence[int]] | None = None,
    limit: int | None = None,
) -> Found:
    """What of it is about the data set; the arguments are those of `look`, `script` None where it is not known."""
    errors = dataset_problems(datasets, script)
    of_captions: list[str] = []
    if "target" not in wrong:
        limit = limit or (script or Script).text
        captions = [((caption,), None) for dataset in datasets for caption in dataset.captions]
        said = coverage.coverage(captions, config.target, tokenize, limit)
        errors += _target_problems(config) or coverage.problems(said, config.target, limit)
        of_captions += coverage.warnings(said, limit)
    return Found(errors, [], of_captions)


def model_problems(args: Any, script: Script) -> list[str]:
    """Models of a known trainer that SPF does not know."""
    found: list[str] = []
    if not script.supported:
        found.append(f"{script.file} trains {script.said}, whose model SPF does not know. {SUPPORTED}")
    elif script.arch == "qwen_image":
        version = getattr(args, "model_version", None) or next(
            (name for name in ("edit_plus", "edit") if getattr(args, name, False)), QWEN_VERSION
        )
        if version.lower() != QWEN_VERSION:
            found.append(
                f"Qwen-Image {version}: SPF knows the model from text to image only. Leave --model_version, --edit and "
                "--edit_plus out, and name that model in --dit."
            )
    elif script.arch == "wan":
        task = getattr(args, "task", None) or WAN_TASKS[0]
        if task not in WAN_TASKS:
            found.append(
                f"--task {task} begins with an image or follows a control video, and SPF knows Wan from text only: "
                f"{', '.join(WAN_TASKS)}."
            )
        if getattr(args, "dit_high_noise", None):
            found.append(
                "--dit_high_noise: the host changes between two models by the noise of each step, and SPF's second "
                "step of a pair has the first one's noise. Train them one by one: each as --dit, with --min_timestep "
                "and --max_timestep for its share of the noise."
            )
        if getattr(args, "one_frame", False):
            found.append("--one_frame begins with an image, and SPF knows Wan from text only. Remove the option.")
    return found


def _compiling(args: Any, compiled: bool) -> list[str]:
    """Compiled code, which no longer calls hooks."""
    found: list[str] = []
    if getattr(args, "compile", False):
        found.append(
            "--compile: compiled blocks no longer call the hooks with which SPF reads the attention layers. Remove the "
            "option."
        )
    backend = str(getattr(args, "dynamo_backend", None) or "")
    if backend.lower() not in _NO_DYNAMO:
        found.append(
            f"--dynamo_backend {backend}: compiled code no longer calls the hooks with which SPF reads the attention "
            "layers. Remove the option."
        )
    elif compiled:
        found.append(
            "the model would be compiled (torch dynamo, by accelerate), and compiled code no longer calls the hooks "
            "with which SPF reads the attention layers. Answer no to it in accelerate config, or launch with "
            "--dynamo_backend no."
        )
    return found


def option_problems(args: Any, script: Script) -> list[str]:
    """Options that the host stops at, or would fail at later."""
    found: list[str] = [*too_early(args)]
    given = [name for name in ATTENTION if getattr(args, name, False)]
    if not given:
        found.append(f"no attention is chosen, and {HOST} stops without. Add --sdpa.")
    elif given[0] == "sage_attn":
        found.append(f"--sage_attn cannot train, and {HOST} stops at it. Use --sdpa.")
    if getattr(args, "fp8_scaled", False) and not getattr(args, "fp8_base", False):
        found.append(f"--fp8_scaled needs --fp8_base beside it: {HOST} stops without.")
    if getattr(args, "fp8_base", False) and not getattr(args, "fp8_scaled", False):
        if script.arch == "krea2":
            found.append(f"--fp8_base needs --fp8_scaled beside it with Krea 2: {HOST} stops without.")
        elif script.arch == "flux_2":  # its norms multiply by their weights, which torch does not do in 8 bits
            found.append(f"--fp8_base needs --fp8_scaled beside it with FLUX.2: {HOST} fails in its first step.")
    if getattr(args, "block_swap_h2d_only", False):
        found.append(
            "--block_swap_h2d_only is not supported: SPF has not been tried with it. Remove the option; "
            "--blocks_to_swap works."
        )
    for name in _EVERY:
        if getattr(args, name, None) == 0:
            found.append(f"--{name} 0: {HOST} divides by it, and fails in training. Leave the option out.")
    return found


def batch_problems(args: Any, datasets: Sequence[Dataset], script: Script) -> list[str]:
    """Options that the host would fail at where a batch has more than one sample."""
    found: list[str] = []
    cast = getattr(args, "fp8_base", False) and not getattr(args, "fp8_scaled", False)
    # It fills texts up to one length with a weight, which is in 8 bits then.
    filled = not getattr(args, "split_attn", False) and any(dataset.batch_size > 1 for dataset in datasets)
    if script.arch == "zimage" and cast and filled:
        found.append(
            f"--fp8_base needs --fp8_scaled beside it with Z-Image and a batch_size above 1: {HOST} fails in its first "
            "step."
        )
    return found


def _saving_problems(args: Any, trying: bool) -> list[str]:
    """Why nothing could be saved in the end."""
    found: list[str] = []
    for name, example in (("output_dir", "output"), ("output_name", "blonde_hair")):
        if getattr(args, name, None) is None:
            found.append(f"no --{name}: {HOST} would train, and fail when it saves. For example --{name} {example}.")
    found += folder_problems(getattr(args, "output_dir", None), trying=trying)
    return found + name_problems(args, HOST)


def setting_problems(config: SPFConfig) -> list[str]:
    """Settings of SPF that are for other hosts."""
    found: list[str] = []
    if config.enhances:
        found.append(
            f"spf_response={config.response} needs pixels of latents, and SPF has decoders for those of SD and SDXL "
            "only. Leave it out."
        )
    if config.base != "off":
        found.append(
            f"spf_base={config.base} has not been tried with {HOST}, which shrinks its models itself. Leave it out, "
            "and use --fp8_base --fp8_scaled."
        )
    return found


def dataset_problems(datasets: Sequence[Dataset], script: Script | None) -> list[str]:
    """Data that is more than an image or a clip with a caption."""
    found: list[str] = []
    for dataset in datasets:
        if dataset.video and script is not None and script.supported and not script.clips:
            found.append(f"{dataset.label} is of videos, and {script.file} takes images only.")
        if dataset.control:
            found.append(
                f"{dataset.label} has control images or videos, and SPF knows models that are given text only. Take "
                "control_directory, or every control_path of the JSON lines, out, and cache the latents again."
            )
        if dataset.multiple_target:
            found.append(f"{dataset.label}: multiple_target is for layers of one picture. Take it out.")
        if dataset.one_frame:
            found.append(
                f"{dataset.label}: {dataset.one_frame[0]} is for training that begins with an image. Take it out."
            )
    for one, other in in_one_cache(datasets):
        found.append(
            f"{one.label} and {other.label} have one cache folder, {other.cache}, and {HOST} trains all that it finds "
            "there with each. It compares the names only. Give each a cache_directory of its own."
        )
    together = clashes(datasets)
    if together:
        first, second = together[0]
        found.append(
            f"{len(together)} of the data set's items have the name of another, and {HOST} keeps one caption for both: "
            f"{first} and {second}. Rename one."
        )
    return found


def shown_problems(latents: Sequence[str]) -> list[str]:
    """What is wrong with cached latents that have control images with them."""
    found: list[str] = []
    if latents:
        found.append(
            f"{len(latents)} of the cached latents have control images with them, e.g. {latents[0]}, and {HOST} shows "
            "them to the model, whatever the data set says now. SPF knows models that are given text only. Cache the "
            "latents again, without control images."
        )
    return found


def _target_problems(config: SPFConfig) -> list[str]:
    """Why there is nothing to learn."""
    found: list[str] = []
    if not config.target:
        found.append(
            'no target. Say what the LoRA shall learn, as the captions say it: --network_args "spf_target=blonde hair"'
        )
    return found
