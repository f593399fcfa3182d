"""Every SPF setting: its name, default, range and help text. The table of docs/settings.md is generated from here.

Settings arrive as `--network_args spf_NAME=VALUE` (always strings) or from a TOML file named by `spf_config`.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spf_plugin.core.prompt import Target, parse_targets
from spf_plugin.errors import SPFError, closest, nearest
from spf_plugin.files import SLASHES, read_toml, shown

PREFIX = "spf_"
MAPS = ("soft", "paper", "difference")
TRAIN = ("all", "cross_attention")
BASES = ("off", "int8", "nf4")
LAYERS = ("last", "all")
RESPONSES = ("off", "anchor", "directional")
REGIONS = ("map", "all")
#: What replaced a setting that old configurations may have.
_IN_PAIRS = (
    "every second step now shows the last one's noisy latents with the base prompt, whose weight is "
    "spf_base_preservation_multiplier. Remove it."
)
_EVERY_STEP = "alignment now takes every step, at the cost that every second one had. Remove it."
_CONSTANT = "the response term has no settings of its own but spf_response, spf_clip and spf_decoder. Remove it."
REMOVED: Mapping[str, str] = {
    "base_preservation": _IN_PAIRS,
    "paired_preservation_multiplier": _IN_PAIRS,
    "every": _EVERY_STEP,
    "min_timestep": "all timesteps are aligned. Remove it; the host has --min_timestep for what is trained at all.",
    "max_timestep": "all timesteps are aligned. Remove it; the host has --max_timestep for what is trained at all.",
    **dict.fromkeys(
        ("response_multiplier", "response_max_ratio", "response_max_timestep", "response_every", "response_region"),
        _CONSTANT,
    ),
    "clip_offload": "the CLIP model stays where the UNet is. Remove it.",
}
SURELY = 0.7  # so like a name is a misspelling of it
LONGEST_SHOWN = 200  # characters of a path in a message


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("must be a text in quotes")
    return value.strip()


def _number(low: float, high: float = math.inf) -> Callable[[Any], float]:
    def convert(value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise ValueError("must be a number")
        try:
            number = float(value)
        except OverflowError:  # a whole number with hundreds of digits
            number = math.inf
        if not math.isfinite(number):
            raise ValueError("must be a finite number")
        if not low <= number <= high:
            raise ValueError(f"must be {low:g} or more" if high == math.inf else f"must be from {low:g} to {high:g}")
        return number

    return convert


def _integer(low: int, high: float = math.inf) -> Callable[[Any], int]:
    def convert(value: Any) -> int:
        number = _number(low, high)(value)
        if number != int(number):
            raise ValueError("must be a whole number")
        return int(number)

    return convert


def _choice(choices: Sequence[str]) -> Callable[[Any], str]:
    def convert(value: Any) -> str:
        if str(value) not in choices:
            raise ValueError(f"must be one of {', '.join(choices)}{nearest(str(value), choices)}")
        return str(value)

    return convert


def _choice_or_regex(choices: Sequence[str]) -> Callable[[Any], str]:
    def convert(value: Any) -> str:
        text = _text(value)
        try:
            re.compile(text)
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(
                f"must be {', '.join(choices)} or a regular expression, and is not valid: {error}"
            ) from None
        return text

    return convert


def read_targets(value: Any) -> tuple[Target, ...]:
    """Targets as a file or a command line gives them.

    Raises:
        ValueError: it is no text and no list of texts, or no target can be read from it.
    """
    if not isinstance(value, str) and not (
        isinstance(value, list | tuple) and value and all(isinstance(item, str) for item in value)
    ):
        raise ValueError("must be a text in quotes, or a list of texts")
    return parse_targets(value)


def _setting(default: Any, convert: Callable[[Any], Any], help: str) -> Any:
    return field(default=default, metadata={"convert": convert, "help": help})


@dataclass(frozen=True)
class SPFConfig:
    """All settings of a run. Build it with `parse`; every field is documented by its own help text."""

    target: tuple[Target, ...] = _setting(
        (),
        read_targets,
        "What the LoRA shall learn, as it stands in the captions: `blonde hair`. Several with `|`; a replacement as "
        "`dress->T-shirt` (learn the dress; without it the base shows a T-shirt). `_` stands for a space.",
    )
    network: str = _setting(
        "",
        _text,
        "The inner network module that makes the adapter: `networks.lora` (default inside sd-scripts; for a "
        "transformer the host's own for it, as `networks.lora_sd3`), `lycoris.kohya` (default elsewhere), or any "
        "other module with kohya's `create_network`.",
    )
    train: str = _setting(
        "all",
        _choice_or_regex(TRAIN),
        "Which of its modules are trained: `all`, `cross_attention` (as the paper does), or a regular expression over "
        "LoRA names.",
    )
    base: str = _setting(
        "off",
        _choice(BASES),
        "Keep the linear weights of the frozen UNet's transformers in fewer bits: `int8`, or `nf4` (4.5 bits; needs "
        "bitsandbytes). Saves memory; reference and LoRA share the same weights. Not together with `--fp8_base`.",
    )
    text_consistent_multiplier: float = _setting(
        0.3, _number(0.0), "Weight of the text-consistent loss: attention of the base phrases, outside the map."
    )
    fine_grained_multiplier: float = _setting(
        0.3, _number(0.0), "Weight of the fine-grained loss: cross-attention queries, outside the map."
    )
    output_multiplier: float = _setting(
        3.0, _number(0.0), "Weight of the output loss: the predicted noise, outside the map."
    )
    base_preservation_multiplier: float = _setting(
        3.0,
        _number(0.0),
        "Weight of base preservation: every second step shows the last step's noisy latents again with the base "
        "prompt, which must give what the base model gives; so must captions without the target. Stops the target "
        "from leaking into prompts without it. 0 leaves these steps out.",
    )
    diffusion_region: str = _setting(
        "map",
        _choice(REGIONS),
        "Where the diffusion loss acts in an aligned step: `map`, inside the control map and averaged over it, or "
        "`all`, over the whole picture, as published.",
    )
    response: str = _setting(
        "off",
        _choice(RESPONSES),
        "Response enhancement by a CLIP model: `off`, `anchor` (the prediction stands to the target's text as the "
        "training image does), or `directional` (the image changes as the text does).",
    )
    clip: str = _setting(
        "ViT-B-32:laion2b_s34b_b79k",
        _text,
        "The CLIP model: open_clip's `MODEL:PRETRAINED` (a tag, or a local .safetensors checkpoint), or a transformers "
        "CLIP folder.",
    )
    decoder: str = _setting(
        "auto",
        _text,
        "Latents to pixels for it: `linear` (cheapest), `tiny` (an AutoencoderTiny, also as a folder or hub name), "
        "`vae` (the run's own), a matrix fitted by `spf decoder`, or `auto` (`linear` for the known VAEs, else `vae`).",
    )
    stage2_start: float = _setting(
        0.0,
        _number(0.0),
        "When alignment starts: below 1 a fraction of the run, from 1 on a step. Before it, training is plain LoRA at "
        "plain cost. 0 aligns from the first step.",
    )
    map: str = _setting(
        "soft",
        _choice(MAPS),
        "How the control map is made: `soft`, `paper` (as published), or `difference` (no phrases subtracted).",
    )
    map_gain: float = _setting(3.0, _number(0.1, 100.0), "Brightness of the map; larger leaves more of the image free.")
    layers: str = _setting(
        "last",
        _choice_or_regex(LAYERS),
        "Which cross-attention layers are compared: `last` (the last block of every UNet transformer; of the other "
        "models three from the middle on), `all`, or a regular expression over module names.",
    )
    log_every: int = _setting(
        10, _integer(1), "Report drift and losses to the progress bar and trackers every N steps."
    )
    preview_every: int = _setting(
        200,
        _integer(0),
        "Draw the control map and the phrases' maps of four training samples every N steps, into the folder "
        "`OUTPUT_NAME-spf` beside the LoRA and to TensorBoard or wandb; 0 draws none.",
    )

    @property
    def multipliers(self) -> dict[str, float]:
        """Loss name -> weight, for the terms of the objective."""
        return {
            "text_consistent": self.text_consistent_multiplier,
            "fine_grained": self.fine_grained_multiplier,
            "output": self.output_multiplier,
        }

    @property
    def compares_attention(self) -> bool:
        """Whether a term is made of queries and keys."""
        return bool(self.text_consistent_multiplier or self.fine_grained_multiplier)

    @property
    def enhances(self) -> bool:
        """Whether the response term is on."""
        return self.response != "off"

    @property
    def pairs(self) -> bool:
        """Whether a step with the full prompts is followed by one with the base prompts."""
        return self.base_preservation_multiplier > 0

    @property
    def active(self) -> bool:
        """Whether SPF changes training at all. If not, it only measures drift."""
        return any(self.multipliers.values()) or self.pairs or self.enhances

    def stage2_step(self, max_train_steps: int) -> int:
        """The first optimiser step (0-based) of stage 2."""
        if self.stage2_start < 1:
            return math.ceil(self.stage2_start * max_train_steps)
        return int(self.stage2_start)

    def never_aligned(self, max_train_steps: int) -> list[str]:
        """Why a run of this length would be a plain LoRA."""
        start, found = self.stage2_step(max_train_steps), []
        if self.active and start >= max_train_steps:
            found.append(
                f"alignment would start at step {start}, and the run ends at step {max_train_steps}: a plain LoRA. "
                "Lower spf_stage2_start: below 1 it is a share of the run, from 1 on a step."
            )
        return found

    def to_metadata(self) -> dict[str, str]:
        """Every setting as the `spf_` strings that would reproduce this run."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        values["target"] = "|".join(str(t) for t in self.target)
        return {PREFIX + name: f"{v:g}" if isinstance(v, float) else str(v) for name, v in values.items() if v != ""}


def _strip_quotes(value: Any) -> Any:
    """GUIs wrap some values in one pair of literal quotes (kohya_ss uses shlex.quote without a shell)."""
    if isinstance(value, str) and len(value) >= 2 and value[0] == value[-1] and value[0] in "'\"":
        return value[1:-1]
    return value


def _read_file(name: str, folders: Sequence[Path]) -> tuple[dict[str, Any], list[str]]:
    candidates = [folder / name for folder in folders]
    path = next((p for p in candidates if os.path.isfile(p)), None)  # Path's own fails where a name is too long
    if path is None:
        looked = ", ".join(str(p) if len(str(p)) <= LONGEST_SHOWN else f"{str(p)[:40]}..." for p in candidates)
        return {}, [f"{PREFIX}config: no such file (looked at {looked})"]
    try:
        settings = read_toml(path, "utf-8-sig")
    except SPFError as error:
        return {}, [f"{PREFIX}config: {problem}" for problem in error.problems]
    # "C:\new" is valid TOML, and means a line break.
    odd = [key for key, value in settings.items() if isinstance(value, str) and not value.isprintable()]
    kept = {key: value for key, value in settings.items() if key not in odd}
    return kept, [f"{PREFIX}config: {path}: {key} has a control character. {SLASHES}" for key in odd]


@dataclass(frozen=True)
class Read:
    """Settings as far as they can be read.

    Attributes:
        config: the settings, with the default in place of each that is wrong.
        problems: every mistake.
        wrong: names of the fields whose value is not known, which nothing more can be said about.
    """

    config: SPFConfig
    problems: tuple[str, ...] = ()
    wrong: frozenset[str] = frozenset()


#: Names of all fields.
NAMES = frozenset(f.name for f in dataclasses.fields(SPFConfig))


def read(network_args: Mapping[str, Any], folders: Sequence[Path] = (Path(),)) -> Read:
    """Read the settings of `--network_args`, and of the file that `spf_config` names.

    Args:
        network_args: `spf_` keys only (`split_network_args`); values are strings, or TOML values.
        folders: where a relative `spf_config` is looked for, in this order.

    Returns:
        Them, with every mistake at once: unknown keys with the nearest valid name, malformed values.
    """
    settings = {k: _strip_quotes(v) for k, v in network_args.items()}
    problems: list[str] = []
    wrong: set[str] = set()
    name = settings.pop(PREFIX + "config", None)
    if name is not None:
        from_file, problems = _read_file(str(name), folders)
        if problems:  # what it says is not known; what stands beside it is
            wrong |= NAMES - {key.removeprefix(PREFIX) for key in settings}
        settings = {**from_file, **settings}  # the command line wins, as it does for sd-scripts' own --config_file

    fields = {PREFIX + f.name: f for f in dataclasses.fields(SPFConfig)}
    values: dict[str, Any] = {}
    for key, value in settings.items():
        if key.removeprefix(PREFIX) in REMOVED and key.startswith(PREFIX):
            problems.append(f"{key} is no longer a setting: {REMOVED[key.removeprefix(PREFIX)]}")
            continue
        if key not in fields:
            problems.append(
                f"unknown setting {key!r}{nearest(key, [*fields, PREFIX + 'config']) or ' (see docs/settings.md)'}"
            )
            meant = closest(key.removeprefix(PREFIX), [*sorted(NAMES), "config"], cutoff=SURELY)
            wrong |= NAMES if "config" in meant else set(meant)
            continue
        try:
            values[fields[key].name] = fields[key].metadata["convert"](value)
        except (ValueError, TypeError) as error:
            reason = str(error)
            if reason.startswith("could not convert"):
                reason = "must be a number"
            problems.append(f"{key}={shown(value)}: {reason}")
            wrong.add(fields[key].name)
    return Read(SPFConfig(**values), tuple(problems), frozenset(wrong - values.keys()))


def parse(network_args: Mapping[str, Any], folders: Sequence[Path] = (Path(),)) -> SPFConfig:
    """What `read` reads.

    Raises:
        SPFError: with every mistake at once.
    """
    found = read(network_args, folders)
    if found.problems:
        raise SPFError(found.problems)
    return found.config


def settings_table() -> str:
    """The table of docs/settings.md, as Markdown."""
    rows = ["| setting | default | meaning |", "|---|---|---|"]
    for f in dataclasses.fields(SPFConfig):
        default = "" if f.default in ((), "") else f"`{f.default}`"
        meaning = f.metadata["help"].replace("|", "\\|")  # in code, too, a bare one would end the cell
        rows.append(f"| `{PREFIX}{f.name}` | {default} | {meaning} |")
    rows.append(
        f"| `{PREFIX}config` |  | A TOML file with any of these settings, relative to the working folder or the "
        "training data folder. |"
    )
    return "\n".join(rows)
