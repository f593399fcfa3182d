"""What kind of value every option of the host takes: one table for all that a file can say.

argparse checks the words of a command line only: from a file the host takes whatever stands there, and fails at the
first place that uses it, without a name.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from spf_plugin.tools.check.host_options import NUMBERS, OPTIONS, SWITCHES, TEXTS_IN_LISTS, TYPES


@dataclass(frozen=True)
class Kind:
    """A kind of value: what it is called, and whether a value is one."""

    name: str
    fits: Callable[[Any], bool]


def is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    return is_whole(value) or (isinstance(value, float) and math.isfinite(value))


def is_text(value: Any) -> bool:
    return isinstance(value, str)


def _list_of(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    # Nothing at all stands for an empty list: the host only asks whether there is something.
    return lambda value: value in ("", 0) or (isinstance(value, list) and all(fits(item) for item in value))


TEXT, WHOLE, NUMBER = Kind("a text in quotes", is_text), Kind("a whole number", is_whole), Kind("a number", is_number)
# The host asks only whether there is something: `settings` warns of texts.
SWITCH = Kind("true or false", lambda value: isinstance(value, bool | int | str))
TEXTS = Kind("a list of texts", _list_of(is_text))
NUMBER_LIST = Kind("a list of numbers", _list_of(is_number))
RATES = Kind("a number, or a list of numbers", lambda value: is_number(value) or NUMBER_LIST.fits(value))


def _kind(option: str) -> Kind:
    if option in SWITCHES:
        return SWITCH
    if option == "text_encoder_lr":
        return RATES
    if option == "base_weights_multiplier":
        return NUMBER_LIST
    if option in TEXTS_IN_LISTS:
        return TEXTS
    if option not in NUMBERS:
        return TEXT
    return WHOLE if TYPES[option] is int else NUMBER


KINDS: dict[str, Kind] = {option: _kind(option) for option in OPTIONS}


def fits(option: str, value: Any) -> bool:
    """Whether the host can work with this value of an option; of what is no option, any."""
    return option not in KINDS or KINDS[option].fits(value)


def is_of(value: Any, wanted: type | tuple[type, ...]) -> bool:
    """Whether a value of a data set's configuration has such a type; inf is no number."""
    return isinstance(value, wanted) and not (isinstance(value, float) and not math.isfinite(value))


#: What of a data set's configuration is two of a kind, as the host's schema has it: a whole number is no float.
_PAIRS = {"resolution": int, "skip_image_resolution": int, "face_crop_aug_range": float}


def in_data_set(key: str, value: Any, wanted: type | tuple[type, ...]) -> bool:
    """Whether the host takes this value of a data set's configuration."""
    if key in _PAIRS and isinstance(value, list):
        return len(value) == 2 and all(is_of(item, _PAIRS[key]) for item in value)
    return is_of(value, wanted)
