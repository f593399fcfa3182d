"""A task's captions without the target, and their conditioning."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from portraitlab.lab.tasks import Task
from spf_plugin.families.base import Text
from spf_plugin.text import map_text
from spf_plugin.trainer.models import BaseModel


class BaseCaptions:
    """What the captions of the training pictures are without the target. Each is encoded once.

    Args:
        task: what is taught.
        seed: the training seed, which also draws the pictures.
        model: has the text encoder.
    """

    def __init__(self, task: Task, seed: int, model: BaseModel):
        self._bases = {example.caption: example.base_caption for example in task.examples(seed)}
        self._model, self._encoded = model, dict[str, Text]()

    def of(self, captions: Sequence[str]) -> list[str]:
        """The base captions of a batch's captions."""
        return [self._bases[caption] for caption in captions]

    def text(self, captions: Sequence[str]) -> Text:
        """Their conditioning, one row a caption."""
        bases = self.of(captions)
        for base in bases:
            if base not in self._encoded:
                self._encoded[base] = self._model.encode([base])
        return map_text(lambda *rows: torch.cat(rows), *(self._encoded[base] for base in bases))
