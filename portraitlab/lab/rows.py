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
        with_spf: the peer trains on top of SPF, not in its place; for peers that predict once a step.
        anchor: `train`, or `self` (`anchors`): the pictures on which SPF aligns.
        steps: another number of steps than the task's: plain training that is stopped early.
    """

    spf: Mapping[str, Any] = field(default_factory=dict)
    peer: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    with_spf: bool = False
    anchor: str = "train"
    steps: int | None = None

    def config(self, task: Task) -> SPFConfig:
        """The SPF settings, defaults included; without any weight where a peer trains in its place."""
        words = PLAIN if self.peer and not self.with_spf else self.spf
        fixed = {"target": task.goal.spf, "network": "lycoris.kohya", "preview_every": 0}
        return parse({PREFIX + name: value for name, value in {**fixed, **words}.items()})


#: No weights: SPF then trains a plain LoRA and measures its drift; with so rare a log it costs nothing.
PLAIN = {
    "text_consistent_multiplier": 0, "fine_grained_multiplier": 0, "output_multiplier": 0, "base_preservation": 0,
    "diffusion_region": "all", "log_every": 1000,
}  # fmt: skip
_EVERYWHERE = {"diffusion_region": "all"}
_LESS = {"output_multiplier": 1, "base_preservation_multiplier": 1}
_PAIRED = {"paired_preservation_multiplier": 10, "output_multiplier": 1, "every": 1, "stage2_start": 0}
_PENALTIES = (3e-4, 1e-3, 3e-3, 1e-2)
_GUIDED = {"clip": str(CLIP_FOLDERS[0])}
#: What the paper describes: no output loss, no base preservation, only cross-attention is trained, all its layers are
#: compared in every step, the response is enhanced everywhere. Its weights are not published: 1 each.
_PUBLISHED = {
    **_EVERYWHERE,
    **_GUIDED,
    "output_multiplier": 0,
    "base_preservation": 0,
    "text_consistent_multiplier": 1,
    "fine_grained_multiplier": 1,
    "every": 1,
    "layers": "all",
    "train": "cross_attention",
    "response": "anchor",
    "response_region": "all",
}

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
    **{f"pure-cc-{w:g}": Row(peer="pure_cc", options={"eta": w}) for w in (0.1, 0.5, 1.0, 2.0, 10.0)},
    "pure-cc-released-2": Row(peer="pure_cc_released", options={"eta": 2.0}),
    # Two that cost one prediction, alone and on top of SPF. For a LoRA of 150 steps without a penalty, the penalty's
    # gradient is as large as the diffusion loss's mean one at a weight of 0.001.
    **{f"weight-penalty-{w:g}": Row(peer="weight_penalty", options={"multiplier": w}) for w in _PENALTIES},
    **{f"t-lora-{share:g}": Row(peer="t_lora", options={"minimum": share}) for share in (0.25, 0.5)},
    **{
        f"spf-weight-penalty-{w:g}": Row(peer="weight_penalty", options={"multiplier": w}, with_spf=True)
        for w in _PENALTIES
    },
    **{f"spf-t-lora-{share:g}": Row(peer="t_lora", options={"minimum": share}, with_spf=True) for share in (0.25, 0.5)},
    # SPF, and SPF without or with another of its parts.
    "spf": Row(),
    "spf-no-text-consistent": Row({"text_consistent_multiplier": 0}),
    "spf-no-fine-grained": Row({"fine_grained_multiplier": 0}),
    "spf-no-output": Row({"output_multiplier": 0}),
    "spf-only-output": Row({"text_consistent_multiplier": 0, "fine_grained_multiplier": 0}),
    "spf-no-base-preservation": Row({"base_preservation": 0}),
    "spf-output-1": Row(_LESS),
    "spf-preservation-0.25-10": Row({"base_preservation": 0.25, "base_preservation_multiplier": 10}),
    **{
        f"spf-output-1-preservation-{share:g}-{w:g}": Row(
            {**_LESS, "base_preservation": share, "base_preservation_multiplier": w}
        )
        for share, w in ((0.3, 1), (0.25, 10), (0.5, 10), (0.1, 30), (0.25, 30))
    },
    **{f"spf-map-{kind}": Row({"map": kind}) for kind in ("difference", "target", "product", "hard")},
    **{f"spf-stage2-{s:g}": Row({"stage2_start": s}) for s in (0, 0.5)},
    "spf-stage2-0.1-preservation-0.1-1": Row({"stage2_start": 0.1, "base_preservation_multiplier": 1}),
    "spf-stage2-0.1-preservation-0": Row({"stage2_start": 0.1, "base_preservation": 0}),
    **{f"spf-every-{n}": Row({"every": n}) for n in (1, 4)},
    "spf-every-1-output-1": Row({**_LESS, "every": 1}),
    # Both prompts in every step, from the first one on; and the same less thoroughly.
    "spf-paired": Row(_PAIRED),
    "spf-paired-output-3": Row({**_PAIRED, "output_multiplier": 3}),
    "spf-paired-every-2": Row({**_PAIRED, "every": 2}),
    "spf-paired-late": Row({**_PAIRED, "stage2_start": 0.25}),
    "spf-self-anchor": Row(anchor="self"),
    "spf-cross-attention": Row({"train": "cross_attention"}),
    "spf-anchor": Row({"response": "anchor", **_GUIDED}),
    **{f"spf-published-{kind}": Row({**_PUBLISHED, "map": kind}) for kind in ("paper", "soft")},
    # The diffusion loss acts everywhere, as published (and as the defaults were when most of these rows were chosen).
    "everywhere": Row(_EVERYWHERE),
    **{f"everywhere-output-{w:g}": Row({**_EVERYWHERE, **_LESS, "output_multiplier": w}) for w in (0, 1)},
    "everywhere-only-output": Row({**_EVERYWHERE, "text_consistent_multiplier": 0, "fine_grained_multiplier": 0}),
    **{f"everywhere-base-preservation-{w:g}": Row({**_EVERYWHERE, "base_preservation": w}) for w in (0, 0.3)},
    **{f"everywhere-map-{kind}": Row({**_EVERYWHERE, "map": kind}) for kind in ("paper", "difference", "none")},
    "everywhere-gain-6": Row({**_EVERYWHERE, "map_gain": 6}),
    **{f"everywhere-stage2-{s:g}": Row({**_EVERYWHERE, "stage2_start": s}) for s in (0, 0.5, 0.75)},
    "everywhere-every-1": Row({**_EVERYWHERE, "every": 1}),
}  # fmt: skip
