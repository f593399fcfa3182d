"""The ways to train that the lab compares. A row of a table is one of them, at one learning rate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from portraitlab.lab.tasks import Task
from portraitlab.model_files import CLIP_FOLDERS
from spf_plugin.config import PREFIX, SPFConfig, parse

LEARNING_RATE = 2e-3


@dataclass(frozen=True)
class Row:
    """A way to train.

    Attributes:
        spf: SPF settings without their prefix, on top of the defaults.
        peer: a key of `peers.KINDS` in place of SPF, or nothing.
        options: the peer's parameters.
        steps: another number of steps than the task's: plain training that is stopped early.
    """

    spf: Mapping[str, Any] = field(default_factory=dict)
    peer: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    steps: int | None = None

    def config(self, task: Task) -> SPFConfig:
        """The SPF settings, defaults included; without any weight where a peer trains."""
        words = PLAIN if self.peer else self.spf
        fixed = {"target": task.goal.spf, "network": "lycoris.kohya", "preview_every": 0}
        return parse({PREFIX + name: value for name, value in {**fixed, **words}.items()})


#: No weights: SPF then trains a plain LoRA and measures its drift; with so rare a log it costs nothing.
PLAIN = {
    "text_consistent_multiplier": 0, "fine_grained_multiplier": 0, "output_multiplier": 0, "base_preservation": 0,
    "log_every": 1000,
}  # fmt: skip
_MAPS = ("paper", "difference", "target", "hard", "none")
_GUIDED = {"clip": str(CLIP_FOLDERS[0])}

ROWS: dict[str, Row] = {
    "plain": Row(PLAIN),
    **{f"plain-{steps}-steps": Row(PLAIN, steps=steps) for steps in (25, 50, 75)},
    "plain-cross-attention": Row({**PLAIN, "train": "cross_attention"}),
    # The peers, each with its sweep.
    "masked": Row(peer="masked"),
    "masked-outside-0.1": Row(peer="masked", options={"outside": 0.1}),
    **{f"masked-prior-{w:g}": Row(peer="masked", options={"prior": w}) for w in (1.0, 10.0)},
    **{f"prior-preservation-{w:g}": Row(peer="prior_preservation", options={"multiplier": w}) for w in (1.0, 3.0)},
    **{f"dop-{w:g}": Row(peer="dop", options={"multiplier": w}) for w in (1.0, 10.0, 100.0)},
    **{f"blank-{w:g}": Row(peer="dop", options={"multiplier": w, "blank": True}) for w in (1.0, 10.0, 100.0)},
    **{f"pure-cc-{w:g}": Row(peer="pure_cc", options={"eta": w}) for w in (2.0, 10.0)},
    "pure-cc-own-2": Row(peer="pure_cc", options={"frozen": False}),
    # SPF, and SPF without or with another of its parts.
    "spf": Row(),
    "spf-no-text-consistent": Row({"text_consistent_multiplier": 0}),
    "spf-no-fine-grained": Row({"fine_grained_multiplier": 0}),
    "spf-no-output": Row({"output_multiplier": 0}),
    "spf-only-output": Row({"text_consistent_multiplier": 0, "fine_grained_multiplier": 0}),
    "spf-no-base-preservation": Row({"base_preservation": 0}),
    "spf-base-preservation-0.3": Row({"base_preservation": 0.3}),
    **{f"spf-output-{w:g}": Row({"output_multiplier": w}) for w in (1, 10)},
    **{f"spf-attention-{w:g}": Row({"text_consistent_multiplier": w, "fine_grained_multiplier": w}) for w in (1,)},
    **{f"spf-map-{kind}": Row({"map": kind}) for kind in _MAPS},
    **{f"spf-gain-{g:g}": Row({"map_gain": g}) for g in (1.5, 6)},
    **{f"spf-stage2-{s:g}": Row({"stage2_start": s}) for s in (0, 0.5, 0.75)},
    **{f"spf-every-{n}": Row({"every": n}) for n in (1, 4)},
    "spf-cross-attention": Row({"train": "cross_attention"}),
    "spf-anchor": Row({"response": "anchor", **_GUIDED}),
    "spf-directional": Row({"response": "directional", **_GUIDED}),
}  # fmt: skip
