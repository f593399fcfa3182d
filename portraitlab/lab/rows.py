"""The ways to train that the lab compares. A row of a table is one of them, at one learning rate."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import Any

from portraitlab.lab.tasks import Task
from portraitlab.model_files import CLIP_FOLDERS
from spf_plugin import patching
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
        constants: what SPF has no setting for: `module.NAME` of `spf_plugin.core` -> another value.
        steps: another number of steps than the task's: plain training that is stopped early.
        variant: a key of `variants.KINDS`, around SPF: other pairs than in time.
    """

    spf: Mapping[str, Any] = field(default_factory=dict)
    peer: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    with_spf: bool = False
    constants: Mapping[str, float] = field(default_factory=dict)
    steps: int | None = None
    variant: str = ""

    def config(self, task: Task) -> SPFConfig:
        """The SPF settings, defaults included; without any weight where a peer trains in its place."""
        words = PLAIN if self.peer and not self.with_spf else self.spf
        fixed = {"target": task.goal.spf, "network": "lycoris.kohya", "preview_every": 0}
        return parse({PREFIX + name: value for name, value in {**fixed, **words}.items()})

    @contextmanager
    def in_effect(self) -> Iterator[None]:
        """While open, the package's constants are this row's."""
        with ExitStack() as changed:
            for name, value in self.constants.items():
                module, constant = name.split(".")
                changed.enter_context(patching.patched(import_module(f"spf_plugin.core.{module}"), constant, value))
            yield


#: No weights: SPF then trains a plain LoRA and measures its drift; with so rare a log it costs nothing.
PLAIN = {
    "text_consistent_multiplier": 0, "fine_grained_multiplier": 0, "output_multiplier": 0,
    "base_preservation_multiplier": 0, "log_every": 1000,
}  # fmt: skip
_VARIANTS = ("pairs_in_batch", "base_captions", "every_second_pair", "pairs_noisy", "pairs_clear", "batch_1")
_PENALTIES = (3e-4, 1e-3, 3e-3, 1e-2)
_ONLY_OUTPUT = {"text_consistent_multiplier": 0, "fine_grained_multiplier": 0}
_UNWEIGHED = {"losses.MAX_NOISE_WEIGHT": 1}
_GUIDED = {"response": "anchor", "clip": str(CLIP_FOLDERS[0])}
#: What the paper describes: no output loss, no base preservation, only cross-attention is trained, all its layers are
#: compared, the diffusion loss acts everywhere, the response is enhanced. Its weights are not published: 1 each.
_PUBLISHED = {
    **_GUIDED,
    "output_multiplier": 0,
    "base_preservation_multiplier": 0,
    "text_consistent_multiplier": 1,
    "fine_grained_multiplier": 1,
    "diffusion_region": "all",
    "layers": "all",
    "train": "cross_attention",
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
    "spf-300-steps": Row(steps=300),
    "spf-no-text-consistent": Row({"text_consistent_multiplier": 0}),
    "spf-no-fine-grained": Row({"fine_grained_multiplier": 0}),
    "spf-only-output": Row(_ONLY_OUTPUT),
    "spf-only-output-300-steps": Row(_ONLY_OUTPUT, steps=300),
    **{f"spf-output-{w:g}": Row({"output_multiplier": w}) for w in (0, 1, 10)},
    **{f"spf-base-{w:g}": Row({"base_preservation_multiplier": w}) for w in (0, 1, 5, 10, 30)},
    "spf-output-1-base-10": Row({"output_multiplier": 1, "base_preservation_multiplier": 10}),
    # No mean over the map but over the picture; no heed of what an error does to the clean image.
    **{f"spf-region-gain-{g:g}": Row(constants={"sfcm.MAX_REGION_GAIN": g}) for g in (1, 3, 30)},
    **{f"spf-noise-weight-{w:g}": Row(constants={"losses.MAX_NOISE_WEIGHT": w}) for w in (1, 3, 30)},
    # Of the map: what was tried where a hat stayed half.
    "spf-map-difference-300-steps": Row({"map": "difference"}, steps=300),
    "spf-gain-6-300-steps": Row({"map_gain": 6}, steps=300),
    "spf-stage2-0.1-300-steps": Row({"stage2_start": 0.1}, steps=300),
    "spf-output-1-300-steps": Row({"output_multiplier": 1}, steps=300),
    "spf-noise-weight-3-300-steps": Row(constants={"losses.MAX_NOISE_WEIGHT": 3}, steps=300),
    "spf-phrase-weight-0.75-300-steps": Row(constants={"sfcm.MAX_PHRASE_WEIGHT": 0.75}, steps=300),
    # Transformers were trained with this weight at 1 until their new words were seen to leak.
    "spf-noise-weight-1-300-steps": Row(constants=_UNWEIGHED, steps=300),
    "spf-noise-weight-1-only-output": Row(_ONLY_OUTPUT, constants=_UNWEIGHED),
    "spf-noise-weight-1-cross-attention": Row({"train": "cross_attention"}, constants=_UNWEIGHED),
    **{
        f"spf-noise-weight-1-base-{w:g}": Row({"base_preservation_multiplier": w}, constants=_UNWEIGHED)
        for w in (10, 30)
    },
    **{f"spf-gain-{g:g}": Row({"map_gain": g}) for g in (1.5, 6)},
    **{f"spf-map-{kind}": Row({"map": kind}) for kind in ("difference", "paper")},
    "spf-region-all": Row({"diffusion_region": "all"}),
    "spf-stage2-0.25": Row({"stage2_start": 0.25}),
    "spf-cross-attention": Row({"train": "cross_attention"}),
    "spf-anchor": Row(_GUIDED),
    # Other pairs than in time, and pairs of single pictures.
    **{f"spf-{kind.replace('_', '-')}": Row(variant=kind) for kind in _VARIANTS},
    **{f"spf-published-{kind}": Row({**_PUBLISHED, "map": kind}) for kind in ("paper", "soft")},
}  # fmt: skip

#: Until large targets were seen to stay half on a transformer, a phrase took from the map all of what it is attended:
#: each way of SPF whose map is `soft`, as it was then.
FORMER = "spf-phrase-weight-1"
ROWS |= {
    name.replace("spf", FORMER, 1): replace(row, constants={**row.constants, "sfcm.MAX_PHRASE_WEIGHT": 1.0})
    for name, row in ROWS.items()
    if name.startswith("spf") and "phrase-weight" not in name and row.spf.get("map", "soft") == "soft"
}
