"""See the package."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from tests.hosts import launcher
from tests.hosts.dits.joint import off
from tests.hosts.dits.kinds import MARK, kind
from tests.hosts.dits.planted import spread

command, name, host, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3]).resolve(), Path(sys.argv[4]).resolve()
launcher.prepare(host)
module = kind(name)
module.shrink()
torch.manual_seed(0)
if command == "make":
    folder.mkdir(parents=True, exist_ok=True)
    module.make(folder)
    (folder / MARK).write_text(name, encoding="utf-8")
elif command == "joint":
    print(json.dumps(off(module.joint(folder))))  # type: ignore[attr-defined]
else:
    made = module.planted(folder)
    print(json.dumps({which: spread(made, which) for which in made.layers}))
