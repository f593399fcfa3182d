"""How a trained LoRA reaches the disk: checked, loadable by every WebUI, and never half a file in place of a good one.

The inner network writes its file as always, under a temporary name; what lands under the final name is that file with
normalised names, shapes, alphas and metadata, and the same weight deltas.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from spf_plugin.config import SPFConfig
from spf_plugin.errors import SPFError
from spf_plugin.lorafile import reader, writer
from spf_plugin.lorafile.normalise import normalise

logger = logging.getLogger(__name__)


def save_normalised(network: nn.Module, config: SPFConfig) -> None:
    """Make `network.save_weights` write every SPF setting into `ss_network_args`, and a file that loads everywhere.

    A LoRA that cannot be normalised (not a number somewhere) is kept beside the wanted name, as
    `NAME.rejected.safetensors`, and logged as an error: hours of training are not lost, and a good earlier file is
    not replaced by it.
    """
    original: Callable[..., None] = network.save_weights  # type: ignore[assignment]

    def save_weights(file: str, dtype: torch.dtype | None, metadata: dict[str, str] | None) -> None:
        if metadata is not None and "ss_network_args" in metadata:
            arguments = {**(json.loads(metadata["ss_network_args"]) or {}), **config.to_metadata()}
            metadata = {**metadata, "ss_network_args": json.dumps(arguments)}
        final = Path(file)
        partial = final.with_name(f".{final.stem}.partial{final.suffix}")
        try:
            original(str(partial), dtype, metadata)
            _land(partial, final, dtype)
        finally:
            partial.unlink(missing_ok=True)

    network.save_weights = save_weights  # type: ignore[assignment]  # the network is ours: nothing to put back


def _land(partial: Path, final: Path, dtype: torch.dtype | None) -> None:
    """Put the inner network's file under its final name, normalised."""
    try:
        tensors, metadata, notes = normalise(*reader.load(partial), dtype=dtype)
    except SPFError as error:
        rejected = final.with_name(f"{final.stem}.rejected{final.suffix}")
        os.replace(partial, rejected)
        logger.error(f"{error} It was kept as {rejected}; {final.name} was not written.")
        return
    writer.save(final, tensors, metadata)
    for note in notes:
        logger.info(f"SPF: {final.name}: {note}")
