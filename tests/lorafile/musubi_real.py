"""The loaders themselves, on every kind of file of what musubi-tuner trains, as `real` does it of the others.

    SPF_COMFYUI=DIR SPF_MUSUBI=DIR python -m tests.lorafile.musubi_real    # writes musubi_results.json anew

Of each loader that is at hand; the results of the others stay. diffusers is the installed one.
"""

from __future__ import annotations

import datetime
import json
import os
import sys
from pathlib import Path

from tests.lorafile import musubi_kinds, musubi_programs, real

RECORD = Path(__file__).with_name("musubi_results.json")
CHECKOUTS = {"comfyui": "SPF_COMFYUI", "musubi": "SPF_MUSUBI"}
LABEL = {"comfyui": "ComfyUI", "musubi": "musubi-tuner", "diffusers": "diffusers"}
COMFYUI_LACKS = ("krea2",)  # the release whose record this is


def bases(loader: str) -> list[str]:
    """The models that a loader has; diffusers by its release."""
    if loader == "diffusers":
        return [base for base in musubi_kinds.BASES if musubi_programs.has(base)]
    return [base for base in musubi_kinds.BASES if loader != "comfyui" or base not in COMFYUI_LACKS]


def outcomes(loader: str, checkout: str | Path, wanted: list[str], kinds: tuple[str, ...] = ()) -> dict[str, str]:
    """``kind; base`` -> what the loader made of it; of `kinds` only, if any are named."""
    out = {}
    for base in wanted:
        weights = musubi_kinds.model(base)
        names = [kind for kind in musubi_kinds.of_base(base) if not kinds or kind in kinds]
        files = [musubi_kinds.build(kind, base, weights) for kind in names]
        done = run(loader, checkout, base, files, weights)
        out |= {f"{k}; {base}": real.outcome(f, *d) for k, f, d in zip(names, files, done, strict=True)}
    return out


def run(loader, checkout, base, files, weights):  # type: ignore[no-untyped-def]
    """`real.run` of this program."""
    return real.run(loader, checkout, base, files, weights, musubi_programs.__file__, musubi_programs.CONFIG[base])


def main() -> None:
    record = json.loads(RECORD.read_text("utf-8")) if RECORD.exists() else {}
    for loader in sys.argv[1:] or [*CHECKOUTS, "diffusers"]:
        checkout = Path(os.environ.get(CHECKOUTS.get(loader, ""), "."))
        version = real.installed() if loader == "diffusers" else real.commit(checkout)
        name = f"{LABEL[loader]} {version}" if loader == "diffusers" else LABEL[loader]
        results = outcomes(loader, checkout, bases(loader))
        record[name] = {"version": version, "date": datetime.date.today().isoformat(), "results": results}
    RECORD.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n", "utf-8")


if __name__ == "__main__":
    main()
