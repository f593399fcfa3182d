"""The adapter (LoRA, LoCon, LoKr ...): made by an inner network module, and switched off exactly for the reference.

SPF writes no LoRA maths. An inner module is anything with kohya's contract: `create_network`, and on what it returns
`apply_to`, `save_weights`, `unet_loras`, `text_encoder_loras`.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from types import ModuleType
from typing import Any

from torch import nn

from spf_plugin import patching
from spf_plugin.errors import SPFError, nearest


def load_module(name: str, *entries: str) -> ModuleType:
    """Import an inner network module.

    Args:
        name: of the module.
        *entries: functions of which it must have one: `create_network`, where none is named.

    Raises:
        SPFError: it does not exist, misses one of its own dependencies, or is not a network module.
    """
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        missing = error.name or ""
        if missing and (name == missing or name.startswith(missing + ".")):
            hint = " (pip install --no-deps lycoris-lora)" if missing == "lycoris" else ""
            raise SPFError(f"spf_network={name}: there is no such module in this environment{hint}") from error
        raise SPFError(f"spf_network={name} cannot be imported: {error}") from error
    wanted = entries or ("create_network",)
    if not any(hasattr(module, entry) for entry in wanted):
        raise SPFError(f"spf_network={name} is not a network module: it has no {' or '.join(wanted)}")
    return module


@contextmanager
def refusals(name: str, arguments: Mapping[str, Any]) -> Iterator[None]:
    """Turn what an inner network module raises for arguments of the user's into an `SPFError`."""
    try:
        yield
    except SPFError:
        raise
    except (ValueError, TypeError, KeyError, AssertionError) as error:
        raise SPFError(f"{name} refuses its arguments {dict(arguments)}: {error}") from error


def module_for_weights(keys: Sequence[str], default: str) -> str:
    """Which inner module can read a LoRA file with these tensor names."""
    lycoris = re.compile(r"\.(hada_|lokr_|dora_scale|oft_|diff|on_input|a1\.|lora_mid)")
    return "lycoris.kohya" if any(lycoris.search(key) for key in keys) else default


def select(network: nn.Module, which: str, cross_attention: str = "") -> None:
    """Keep only the chosen modules of a network that is not applied yet.

    Args:
        network: what the inner module's `create_network` returned.
        which: `all`, `cross_attention`, or a regular expression that is searched in the LoRA names.
        cross_attention: the expression that `cross_attention` stands for.

    Raises:
        SPFError: nothing matches (with the nearest names), or the network does not list its modules.
    """
    if which == "all":
        return
    lists = [
        name for name in ("unet_loras", "text_encoder_loras", "loras") if isinstance(getattr(network, name, None), list)
    ]
    if "unet_loras" not in lists:
        raise SPFError(f"spf_train={which!r}: {type(network).__name__} does not list its modules; use spf_train=all")
    pattern = re.compile(cross_attention if which == "cross_attention" else which)
    names = [lora.lora_name for name in lists for lora in getattr(network, name)]
    if not any(pattern.search(name) for name in names):
        hint = nearest(which, names, n=3) or f"; the first is {names[0]}" if names else ""
        raise SPFError(f"spf_train={which!r} matches none of the {len(names)} LoRA modules{hint}")
    of_the_unet: Any = network.unet_loras
    if not any(pattern.search(lora.lora_name) for lora in of_the_unet):  # as --network_train_text_encoder_only
        raise SPFError(
            f"spf_train={which!r} leaves only modules of text encoders, and SPF aligns the UNet. Let it match some of "
            "the UNet's, lora_unet_..., too."
        )
    for name in lists:
        setattr(network, name, [lora for lora in getattr(network, name) if pattern.search(lora.lora_name)])


class Adapter:
    """Knows which modules of the base model an inner network has taken over, and can hand them back for a while."""

    def __init__(self) -> None:
        self._originals: dict[nn.Module, Any] = {}

    @contextmanager
    def watching(self, models: Sequence[nn.Module]) -> Iterator[None]:
        """Note every module of `models` whose `forward` is replaced in the block, and what it was.

        Raises:
            SPFError: nothing was replaced, or weights were taken out of the base model: the inner network attaches in a
                way that cannot be switched off exactly.
        """
        before = {
            module: patching.instance_attribute(module, "forward") for model in models for module in model.modules()
        }
        owned = {module: set(module._parameters) for module in before}
        yield
        self._originals = {
            module: state
            for module, state in before.items()
            if patching.instance_attribute(module, "forward") is not state
        }
        if not self._originals:
            raise SPFError(
                "the inner network replaced no module's forward, so SPF cannot switch it off for the reference. Use "
                "networks.lora or lycoris.kohya, and check that the network has any modules."
            )
        emptied = [module for module in self._originals if not owned[module] <= set(module._parameters)]
        if emptied:
            raise SPFError(
                f"the inner network took the weights of {len(emptied)} modules out of the base model, as LyCORIS's "
                "algo=full does, so SPF has no base model to compare with. Use another algorithm: lora, loha, lokr."
            )

    def bypassed(self) -> AbstractContextManager[None]:
        """The base model, bit for bit: no multiplier 0, no dropout drawn, no weight decomposition left over."""
        return patching.bypassed(self._originals)

    def __len__(self) -> int:
        return len(self._originals)


def on_apply(network: nn.Module, around: Callable[[Sequence[nn.Module]], AbstractContextManager[None]]) -> None:
    """Run the network's own `apply_to(text_encoder, unet, ...)` inside `around([unet, text encoders...])`."""
    original: Callable[..., Any] = network.apply_to  # type: ignore[assignment]

    def apply_to(text_encoder: Any, unet: nn.Module, *args: Any, **kwargs: Any) -> Any:
        encoders = text_encoder if isinstance(text_encoder, list | tuple) else [text_encoder]
        with around([unet, *(encoder for encoder in encoders if encoder is not None)]):
            return original(text_encoder, unet, *args, **kwargs)

    network.apply_to = apply_to  # type: ignore[assignment]  # the network is ours from its birth: nothing to put back
