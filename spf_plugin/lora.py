"""The network module that sd-scripts imports: `--network_module spf_plugin.lora`.

`create_network` returns the *inner* network itself, so everything the host does with it (optimizer groups, state,
saving) is what it would do without SPF. SPF is attached beside it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from spf_plugin import terminal
from spf_plugin.adapter import bypass as adapters
from spf_plugin.adapter.bypass import Adapter
from spf_plugin.adapter.files import load_normalised, own_tensors, save_normalised
from spf_plugin.adapter.quantised import QuantisedBase
from spf_plugin.attachment import Attachment
from spf_plugin.config import Read, SPFConfig, read
from spf_plugin.enhancement import term as enhancement
from spf_plugin.enhancement.term import Enhancement
from spf_plugin.errors import SPFError, collected
from spf_plugin.families import known as families
from spf_plugin.families.base import Family
from spf_plugin.hosts.base import Host
from spf_plugin.hosts.frames import callers_variable, raw_network_args
from spf_plugin.hosts.kohya.loop import KohyaHost, calling_folders, default_network
from spf_plugin.lorafile.normalise import fitted
from spf_plugin.network_args import check_words, read_words, split_network_args, split_words
from spf_plugin.shown.watch import Watch

__all__ = ["attach", "create_network", "create_network_from_weights"]

logger = terminal.logger(__name__)


def _stop_on_stray_words() -> None:
    """The host splits every word of --network_args at "=" right after importing us, and fails without a reason."""
    words = raw_network_args()
    if check_words(words):
        encoders, vae, denoiser = (callers_variable(name) for name in ("text_encoder", "vae", "unet"))
        given = {} if isinstance(words, str) else split_words(words)[1]
        _start(read_words(words, calling_folders()), given, encoders, vae, denoiser)


def _start(found: Read, theirs: dict[str, Any], text_encoder: Any, vae: Any, unet: nn.Module) -> KohyaHost:
    """The host that is calling, where nothing is wrong with the run as far as it shows before the network is made.

    Args:
        found: SPF's settings.
        theirs: the inner network's arguments.
        text_encoder: one, or a list.
        vae: the host's.
        unet: the host's denoiser.

    Raises:
        SPFError: with every mistake, those included that would show only then.
    """
    problems = list(found.problems)
    config, wrong = found.config, found.wrong
    host = None
    with collected(problems):
        host = KohyaHost.find(text_encoder, vae, unet)
    if host is not None:
        problems += host.problems(config, wrong)
    name = config.network or default_network()
    inner = None
    if "network" not in wrong:
        with collected(problems):
            inner = adapters.load_module(name)
    if host is not None and not problems:
        return host
    # Nothing will be trained: make what the rest of the mistakes are about, only to look at it.
    if host is not None:
        family = network = None
        with collected(problems):
            family = families.find(unet)
        if family is not None and inner is not None:
            sizes = host.args.network_dim, host.args.network_alpha
            with collected(problems), adapters.refusals(name, theirs):
                network = inner.create_network(1.0, *sizes, vae, text_encoder, unet, **theirs)
        if family is not None:
            # The response term is refused for a transformer, and its model would be downloaded for nothing.
            unknown = wrong if host.dit is None else {*wrong, "clip"}
            with collected(problems):
                fit(network, host, config, unknown, family)
    raise SPFError(problems)


def fit(
    network: nn.Module | None, host: Host, config: SPFConfig, wrong: Collection[str], family: Family
) -> Enhancement | None:
    """The response term, if it is on; the network with the modules only that `spf_train` chooses.

    Raises:
        SPFError: `spf_train` or `spf_layers` matches nothing; the response term's models cannot be loaded.
    """
    problems: list[str] = []
    enhanced = None
    if network is not None:
        with collected(problems):
            adapters.select(network, config.train, family.cross_attention)
    with collected(problems):
        family.layers(config.layers)
    if config.enhances and not {"clip", "decoder"}.intersection(wrong):
        with collected(problems):
            enhanced = enhancement.load(config, host, family.latents)
    if problems:
        raise SPFError(problems)
    return enhanced


def create_network(
    multiplier: float,
    network_dim: int | None,
    network_alpha: float | None,
    vae: nn.Module,
    text_encoder: Any,
    unet: nn.Module,
    **kwargs: Any,
) -> nn.Module:
    """kohya's entry: an adapter for `unet` and `text_encoder`, trained with the dual-path objective.

    Args:
        multiplier: passed to the inner network, like everything below that is not an `spf_` setting.
        network_dim: rank.
        network_alpha: alpha.
        vae: decodes for the response term, if `spf_decoder` says so.
        text_encoder: one, or a list (SDXL).
        unet: the host's UNet.
        **kwargs: `--network_args`: `spf_` settings are SPF's, all others the inner network's.

    Raises:
        SPFError: with every mistake found, before anything is created.
    """
    ours, theirs = split_network_args(kwargs)
    found = read(ours, calling_folders())
    host, config = _start(found, theirs, text_encoder, vae, unet), found.config
    name = config.network or default_network()
    with adapters.refusals(name, theirs):
        network = adapters.load_module(name).create_network(
            multiplier, network_dim, network_alpha, vae, text_encoder, unet, **theirs
        )
    save_normalised(network, config, judged=host.dit is None, ran=lambda: network.spf.numbers.run())
    load_normalised(network)
    return attach(network, host, config)


def create_network_from_weights(
    multiplier: float,
    file: str,
    vae: nn.Module,
    text_encoder: Any,
    unet: nn.Module,
    weights_sd: dict[str, torch.Tensor] | None = None,
    for_inference: bool = False,
    **kwargs: Any,
) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """kohya's entry for `--dim_from_weights` (trained with SPF) and `--base_weights` (merged, so in the reference)."""
    if for_inference:
        from safetensors import safe_open

        keys = list(weights_sd or {})
        if not keys and str(file).endswith(".safetensors"):
            with safe_open(file, "pt") as reader:  # type: ignore[attr-defined]
                keys = list(reader.keys())
        inner = adapters.load_module(adapters.module_for_weights(keys, default_network()))
        network, weights = inner.create_network_from_weights(
            multiplier, file, vae, text_encoder, unet, weights_sd=weights_sd, for_inference=True, **kwargs
        )
        return network, fitted(weights, own_tensors(network))
    ours, theirs = split_network_args(kwargs)
    found = read(ours, calling_folders())
    host, config = _start(found, theirs, text_encoder, vae, unet), found.config
    inner = adapters.load_module(config.network or default_network())
    network, weights = inner.create_network_from_weights(
        multiplier, file, vae, text_encoder, unet, weights_sd=weights_sd, for_inference=False, **theirs
    )
    save_normalised(network, config, judged=host.dit is None, ran=lambda: network.spf.numbers.run())
    load_normalised(network)
    return attach(network, host, config), weights


def attach(network: nn.Module, host: Host, config: SPFConfig) -> nn.Module:
    """Attach SPF to a network that is created and not applied yet, and to the host that will train it.

    The attachment is at `network.spf`; `network.spf.close()` detaches it (the end of training does, too). With
    `spf_base` the denoiser is quantised when the network is applied, and stays so: dense weights may not fit in.

    Raises:
        SPFError: the denoiser is of no known family; `spf_train` or `spf_layers` matches nothing; the response term's
            models cannot be loaded.
    """
    previous = getattr(host.trainer, "spf", None)
    if previous is not None:
        previous.close()  # an earlier run of the same trainer object that ended in an exception
    family = families.find(host.denoiser)
    enhanced = fit(network, host, config, (), family)
    adapter = Adapter()
    watch = Watch(config, host, family.latents) if host.accelerator.is_main_process else None
    attachment = Attachment(
        host, config, family, adapter, lambda: getattr(network, "multiplier", 1.0), enhancement=enhanced, watch=watch
    )

    captions = host.captions_before_training
    if captions is not None:
        attachment.text.encode_early(captions, text_encoder_trained=host.text_encoder_trained)

    @contextmanager
    def applying(models: Sequence[nn.Module]) -> Iterator[None]:
        base = None
        if config.base != "off":  # first, so that what the adapter takes for the original is the quantised base
            base = QuantisedBase(family.linear_layers(), config.base, host.accelerator.device)
            logger.info(
                f"SPF: {len(base)} linear layers kept as {config.base}: {base.after / 2**20:.0f} MB in "
                f"place of {base.before / 2**20:.0f} MB"
            )
        try:
            with adapter.watching(models):
                yield
            attachment.open()
        except BaseException:
            if base is not None:
                base.remove()
            raise
        logger.info(
            f"SPF: target {'|'.join(map(str, config.target)) or '(per subset)'}; {len(adapter)} modules trained, "
            f"{len(attachment.layers)} attention layers compared"
            + ("" if config.active else "; no weights: measures drift only")
        )

    adapters.on_apply(network, applying)
    network.spf = attachment  # type: ignore[assignment]
    host.trainer.spf = attachment
    return network


_stop_on_stray_words()
