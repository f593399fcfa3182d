"""Runs in a trainer's place (`launcher.py`): writes what the trainer's own parser makes of a command line, and ends.

parse_only.py --parsed_by sd3_train_network ARGS... -> args.json in the output folder
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

if __name__ == "__main__":
    at = sys.argv.index("--parsed_by")
    _, trainer = sys.argv[at : at + 2]
    del sys.argv[at : at + 2]
    args = importlib.import_module(trainer).setup_parser().parse_args()
    Path(args.output_dir, "args.json").write_text(json.dumps(vars(args), default=str), encoding="utf-8")
