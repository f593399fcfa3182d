"""The network module that kohya's trainers import: `--network_module spf_plugin.lora`.

sd-scripts calls `create_network`, musubi-tuner `create_arch_network`. Both return the *inner* network itself, so
everything the host does with it (optimizer groups, state, saving) is what it would do without SPF. SPF is attached
beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
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
from spf_plugin.hosts.kohya import loop as kohya
from spf_plugin.hosts.kohya.loop import KohyaHost
from spf_plugin.hosts.musubi import loop as musubi
from spf_plugin.hosts.musubi.loop import MusubiHost
from spf_plugin.lorafile.normalise import fitted
from spf_plugin.network_args import check_words, read_words, split_network_args, split_words
from spf_plugin.shown.watch import Watch

__all__ = [
    "attach",
    "create_arch_network",
    "create_arch_network_from_weights",
    "create_network",
    "create_network_from_weights",
]

logger = terminal.logger(__name__)


@dataclass(frozen=True)
class _Trainer:
    """A trainer that is calling, as far as its entry is another than that of another trainer.

    Attributes:
        find: its host. Raises SPFError.
        network: the inner network module where the user names none.
        entries: functions by which it knows a network module; it takes the first that is there.
        create: (that function, multiplier, rank, alpha, the inner network's arguments) -> a network.
        folders: where a relative `spf_config` is looked for.
    """

    find: Callable[[], KohyaHost | MusubiHost]
    network: str
    entries: tuple[str, ...]
    create: Callable[[Callable[..., nn.Module], float, Any, Any, dict[str, Any]], nn.Module]
    folders: list[Path]

    def entry(self, inner: ModuleType) -> Callable[..., nn.Module]:
        """The function of an inner module that makes its network."""
        return next(getattr(inner, name) for name in self.entries if hasattr(inner, name))


def _kohya(text_encoder: Any, vae: Any, unet: nn.Module) -> _Trainer:
    def create(entry: Any, multiplier: float, dim: Any, alpha: Any, theirs: dict[str, Any]) -> nn.Module:
        return entry(multiplier, dim, alpha, vae, text_encoder, unet, **theirs)

    find = partial(KohyaHost.find, text_encoder, vae, unet)
    return _Trainer(find, kohya.default_network(), ("create_network",), create, kohya.calling_folders())


def _musubi(vae: Any, unet: nn.Module, neuron_dropout: float | None) -> _Trainer:
    def create(entry: Any, multiplier: float, dim: Any, alpha: Any, theirs: dict[str, Any]) -> nn.Module:
        dropout = {"neuron_dropout": neuron_dropout} if entry.__name__ == "create_arch_network" else {}
        return entry(multiplier, dim, alpha, vae, None, unet, **dropout, **theirs)  # as the host does it, too

    find, entries = partial(MusubiHost.find, unet, families.find), ("create_arch_network", "create_network")
    return _Trainer(find, musubi.default_network(), entries, create, musubi.calling_folders())


def _stop_on_stray_words() -> None:
    """The host splits every word of --network_args at "=" right after importing us, and fails without a reason."""
    words = raw_network_args()
    if check_words(words) or musubi.fails_before_us():
        if musubi.is_calling():
            trainer = _musubi(callers_variable("vae"), callers_variable("transformer"), None)
        else:
            encoders, vae, denoiser = (callers_variable(name) for name in ("text_encoder", "vae", "unet"))
            trainer = _kohya(encoders, vae, denoiser)
        given = {} if isinstance(words, str) else split_words(words)[1]
        _start(read_words(words, trainer.folders), given, trainer)


def _start(found: Read, theirs: dict[str, Any], trainer: _Trainer) -> KohyaHost | MusubiHost:
    """The host that is calling, where nothing is wrong with the run as far as it shows before the network is made.

    Args:
        found: SPF's settings.
        theirs: the inner network's arguments.
        trainer: that is calling.

    Raises:
        SPFError: with every mistake, those included that would show only then.
    """
    problems = list(found.problems)
    config, wrong = found.config, found.wrong
    host: KohyaHost | MusubiHost | None = None
    with collected(problems):
        host = trainer.find()
    if host is not None:
        problems += host.problems(config, wrong)
    name = config.network or trainer.network
    inner = None
    if "network" not in wrong:
        with collected(problems):
            inner = adapters.load_module(name, *trainer.entries)
    if host is not None and not problems:
        return host
    # Nothing will be trained: make what the rest of the mistakes are about, only to look at it.
    if host is not None:
        family = network = None
        with collected(problems):
            family = families.find(host.denoiser)
        if family is not None and inner is not None:
            with collected(problems), adapters.refusals(name, theirs):
                sizes = host.args.network_dim, host.args.network_alpha
                network = trainer.create(trainer.entry(inner), 1.0, *sizes, theirs)
        if family is not None:
            # The response term is refused for a transformer, and its model would be downloaded for nothing.
            unknown = wrong if host.is_unet else {*wrong, "clip"}
            with collected(problems):
                fit(network, host, config, unknown, family)
    raise SPFError(list(dict.fromkeys(problems)))


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
    return _created(kwargs, _kohya(text_encoder, vae, unet), network_dim, network_alpha, multiplier)


def create_arch_network(
    multiplier: float,
    network_dim: int | None,
    network_alpha: float | None,
    vae: nn.Module | None,
    text_encoder: Any,
    unet: nn.Module,
    neuron_dropout: float | None = None,
    **kwargs: Any,
) -> nn.Module:
    """musubi-tuner's entry: an adapter for `unet`, trained with the dual-path objective.

    Args:
        multiplier: passed to the inner network, like everything below that is not an `spf_` setting.
        network_dim: rank.
        network_alpha: alpha.
        vae: the host's, where it draws samples.
        text_encoder: None; this trainer has none.
        unet: the host's transformer.
        neuron_dropout: of the inner network.
        **kwargs: `--network_args`: `spf_` settings are SPF's, all others the inner network's.

    Raises:
        SPFError: with every mistake found, before anything is created.
    """
    return _created(kwargs, _musubi(vae, unet, neuron_dropout), network_dim, network_alpha, multiplier)


def _created(
    arguments: dict[str, Any], trainer: _Trainer, dim: int | None, alpha: float | None, multiplier: float
) -> nn.Module:
    """A network with SPF, as a trainer's entry gives it."""
    ours, theirs = split_network_args(arguments)
    found = read(ours, trainer.folders)
    host, config = _start(found, theirs, trainer), found.config
    name = config.network or trainer.network
    with adapters.refusals(name, theirs):
        entry = trainer.entry(adapters.load_module(name, *trainer.entries))
        network = trainer.create(entry, multiplier, dim, alpha, theirs)
    return _with_spf(network, host, config)


def _with_spf(network: Any, host: KohyaHost | MusubiHost, config: SPFConfig) -> nn.Module:
    save_normalised(network, config, judged=host.is_unet, ran=lambda: network.spf.numbers.run())
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
        inner = adapters.load_module(adapters.module_for_weights(keys, kohya.default_network()))
        network, weights = inner.create_network_from_weights(
            multiplier, file, vae, text_encoder, unet, weights_sd=weights_sd, for_inference=True, **kwargs
        )
        return network, fitted(weights, own_tensors(network))
    trainer = _kohya(text_encoder, vae, unet)
    ours, theirs = split_network_args(kwargs)
    found = read(ours, trainer.folders)
    host, config = _start(found, theirs, trainer), found.config
    inner = adapters.load_module(config.network or trainer.network)
    network, weights = inner.create_network_from_weights(
        multiplier, file, vae, text_encoder, unet, weights_sd=weights_sd, for_inference=False, **theirs
    )
    return _with_spf(network, host, config), weights


def create_arch_network_from_weights(
    multiplier: float,
    weights_sd: dict[str, torch.Tensor],
    text_encoders: Any = None,
    unet: nn.Module | None = None,
    for_inference: bool = False,
    **kwargs: Any,
) -> Any:
    """musubi-tuner's entry for `--base_weights` (merged, so in the reference) and `--dim_from_weights` (trained with
    SPF; the trainer's own network modules fail at that).

    Args:
        multiplier: of the network.
        weights_sd: a LoRA file's tensors.
        text_encoders: None; this trainer has none.
        unet: the host's transformer.
        for_inference: to be merged.
        **kwargs: passed to the inner network's module.

    Returns:
        for inference the network; else also the tensors, as the trainer expects.

    Raises:
        SPFError: with every mistake found, before anything is created.
    """
    assert unet is not None  # every caller names it
    if for_inference:
        module = musubi.network_for(weights_sd)
        entry = adapters.load_module(module, "create_arch_network_from_weights").create_arch_network_from_weights
        return entry(multiplier, weights_sd, text_encoders, unet, for_inference=True, **kwargs)
    words = raw_network_args()  # the trainer passes none of them on
    trainer = _musubi(None, unet, None)
    found, theirs = read_words(words, trainer.folders), split_words(words)[1]
    host, config = _start(found, theirs, trainer), found.config
    name = config.network or trainer.network
    entry = adapters.load_module(name, "create_arch_network_from_weights").create_arch_network_from_weights
    with adapters.refusals(name, theirs):
        network = entry(multiplier, weights_sd, text_encoders, unet, **kwargs, **theirs)
    return _with_spf(network, host, config), weights_sd


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
