"""How a trained LoRA reaches the disk: checked, loadable by every WebUI, and never half a file in place of a good one.

The inner network writes its file as always, under a temporary name; what lands under the final name is that file with
normalised names, shapes, alphas and metadata, and the same weight deltas. The run's last file gets its WebUI card.
A file that comes back (`--network_weights`) gets the shapes and alphas of the network again.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path, PurePath
from typing import Any

import torch
from safetensors import SafetensorError  # type: ignore[attr-defined]
from safetensors.torch import save_file
from torch import nn

from spf_plugin import terminal
from spf_plugin.config import SPFConfig
from spf_plugin.errors import SPFError
from spf_plugin.files import replace
from spf_plugin.lorafile import inspect, reader, record, sidecars, writer
from spf_plugin.lorafile.findings import taken
from spf_plugin.lorafile.loaders import verdicts
from spf_plugin.lorafile.normalise import fitted, normalise
from spf_plugin.lorafile.record import Run

logger = terminal.logger(__name__)


def save_normalised(
    network: nn.Module, config: SPFConfig, *, judged: bool = True, ran: Callable[[], Run | None] = lambda: None
) -> None:
    """Make `network.save_weights` write every SPF setting into `ss_network_args`, and a file that loads everywhere.

    What is on the disk stays there, whatever happens: hours of training are in it. A LoRA that cannot be normalised
    (not a number somewhere) is kept beside the wanted name, as `NAME.rejected.safetensors`, and logged as an error, or
    raised at the end of the run; a good earlier file is not replaced by it. Where there is no room for a second,
    normalised file, the network's own is kept, under the wanted name if that is free, else beside it, which is an error
    as well.

    Args:
        network: the inner network.
        config: the settings.
        judged: say which loaders cannot read the file; what is known of them is of SD and SDXL.
        ran: what the run was until now; it stands beside the settings.
    """
    original: Callable[..., None] = network.save_weights  # type: ignore[assignment]

    def save_weights(file: str, dtype: torch.dtype | None, metadata: dict[str, str] | None) -> None:
        if metadata is not None and "ss_network_args" in metadata:
            arguments = {**(json.loads(metadata["ss_network_args"]) or {}), **config.to_metadata()}
            run = ran()
            if run is not None:
                arguments[record.KEY] = run.as_json()
            metadata = {**metadata, "ss_network_args": json.dumps(arguments)}
        final = Path(file)
        partial = writer.aside(final, f".partial{final.suffix}")
        try:
            original(str(partial), dtype, metadata)
        except BaseException as error:  # it is not complete
            partial.unlink(missing_ok=True)
            if isinstance(error, OSError | SafetensorError):
                raise SPFError(f"{final} was not written: {error}. Nothing was changed.") from error
            raise
        try:
            _land(partial, final, dtype, metadata or {}, judged=judged)
        except BaseException:  # Ctrl-C too
            if partial.exists():
                _keep(partial, final)
            raise
        partial.unlink(missing_ok=True)

    network.save_weights = save_weights  # type: ignore[assignment]  # the network is ours: nothing to put back


def own_tensors(network: nn.Module) -> dict[str, torch.Tensor]:
    """What the network's modules hold, by the names of a LoRA file; also before the network is applied."""
    lists = ("unet_loras", "text_encoder_loras")
    modules = [lora for name in lists for lora in getattr(network, name, None) or []]
    return {f"{lora.lora_name}.{name}": tensor for lora in modules for name, tensor in lora.state_dict().items()}


def load_normalised(network: nn.Module) -> None:
    """Make `network.load_weights` read what `save_normalised` wrote.

    The network takes its scale from its own alpha, and a file's alpha and shapes may be others: the same delta then
    needs other factors (`normalise.fitted`).
    """
    original: Callable[..., Any] | None = getattr(network, "load_weights", None)
    if original is None:
        return

    def load_weights(file: str) -> Any:
        try:
            tensors, _ = reader.load(file)
        except SPFError:
            return original(file)  # a .pt file, or a broken one: the network's own affair
        wanted = fitted(tensors, own_tensors(network))
        if all(wanted[name] is tensor for name, tensor in tensors.items()):
            return original(file)
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # Windows keeps what is still mapped
            aside = Path(folder) / Path(file).name
            save_file({name: tensor.contiguous() for name, tensor in wanted.items()}, aside)
            return original(str(aside))

    network.load_weights = load_weights  # type: ignore[assignment]  # the network is ours: nothing to put back


def _land(partial: Path, final: Path, dtype: torch.dtype | None, run: Mapping[str, str], *, judged: bool) -> None:
    """Put the inner network's file under its final name, normalised, and its card beside it."""
    try:
        tensors, metadata, notes = normalise(*reader.load(partial), dtype=dtype, judged=judged)
    except SPFError as error:
        said = f"{error.problems[0]} It was kept as {_keep(partial, final)}; {final.name} was not written."
        if is_last(final, run):  # a run without its LoRA is not done
            raise SPFError(said) from error
        logger.error(SPFError(said))
        return
    try:
        writer.save(final, tensors, metadata)
    except SPFError as error:
        kept = _keep(partial, final, as_wanted=not os.path.lexists(final))
        said = f"{error.problems[0]} The LoRA was kept as {kept}, as the network wrote it; spf lora fix does the rest."
        if kept != final and is_last(final, run):
            raise SPFError(said) from error
        logger.error(SPFError(said))
        return
    for note in notes:
        logger.info(f"SPF: {final.name}: {note}")
    if is_last(final, run):
        contents = inspect.gather(tensors.items(), metadata)
        if judged:
            logger.info(f"SPF: {final.name}: {taken(verdicts(contents, inspect.describe(contents)))}")
        for note in sidecars.write_training_card(final, contents, newest_sample(final, run)):
            logger.warning(f"SPF: {final.name}: {note}")


def _keep(partial: Path, final: Path, *, as_wanted: bool = False) -> Path:
    """Give the inner network's complete file a name that a user sees; returns it."""
    kept = final if as_wanted else writer.renamed(final, f".rejected{final.suffix}")
    replace(partial, kept)
    return kept


def is_last(file: Path, run: Mapping[str, str]) -> bool:
    """Whether this is the LoRA that a run ends with, not one along the way (which the host may delete again).

    Args:
        file: its name is `OUTPUT_NAME.safetensors` (`last.safetensors` without one) for the last, and
            `OUTPUT_NAME-000004` or `-step00000100` for the others.
        run: the host's metadata; with `--no_metadata` the output name is missing, and the file's name decides.
    """
    name = run.get("ss_output_name")
    if name is None:
        return re.search(r"-(\d{6}|step\d{8})$", file.stem) is None
    return file.stem == ("last" if name == "None" else PurePath(name).name)  # of "hair/first" the folder is no part


def newest_sample(file: Path, run: Mapping[str, str]) -> Path | None:
    """The last image that this run drew of its first sample prompt (`--sample_prompts`), if it drew any.

    The host calls it `sample/OUTPUT_NAME_e000004_00_20251122103000_SEED.png`: epoch or step, prompt, time.
    """
    name = "" if run.get("ss_output_name", "None") == "None" else re.escape(file.stem) + "_"
    pattern = re.compile(name + r"e?\d{6,}_(\d{2,})_\d{14}(_\d+)?\.png")
    found = []
    try:
        started = float(run["ss_training_started_at"])
        for entry in os.scandir(file.parent / "sample"):
            match, written = pattern.fullmatch(entry.name), entry.stat().st_mtime
            if match and written >= started:  # an older run's image would mislead
                found.append((-int(match[1]), written, Path(entry.path)))
    except (OSError, KeyError, ValueError):  # no samples, or --no_metadata
        return None
    return max(found)[2] if found else None
