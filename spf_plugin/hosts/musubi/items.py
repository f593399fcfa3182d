"""The items of musubi-tuner's data sets: whose cached text is in a batch, and what its caption is now.

An item is known by the file with its cached text: this is what the host trains with, and there is one for each item.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any

from spf_plugin import patching

ITEMS = "spf_items"  # in a batch


def captions(datasets: Sequence[Any]) -> dict[str, list[str]]:
    """For each item the captions that the data sets have for it now, from caption files or JSONL, as the host's own
    code reads them: one, but where several items have the same name, of which the host keeps one encoding.

    Raises:
        Exception: whatever the host's code raises for a caption that it cannot read.
    """
    found: dict[str, list[str]] = {}
    for dataset in datasets:
        source = dataset.datasource
        only = source.caption_only
        source.set_caption_only(True)
        try:
            for fetch in source:
                key, caption = fetch()
                path = dataset.get_text_encoder_output_cache_path(SimpleNamespace(item_key=key))
                said = found.setdefault(path, [])
                if caption not in said:
                    said.append(caption)
        finally:
            source.set_caption_only(only)
    return found


def trained(datasets: Sequence[Any]) -> list[str]:
    """The items that a run trains on, each once: those with a cached latent and cached text, whatever the folder of
    images has now."""
    return list(
        dict.fromkeys(
            item.text_encoder_output_cache_path
            for dataset in datasets
            for bucket in dataset.batch_manager.buckets.values()
            for item in bucket
        )
    )


def latents(datasets: Sequence[Any]) -> list[str]:
    """The cached latents that a run trains on."""
    return list(
        dict.fromkeys(
            item.latent_cache_path
            for dataset in datasets
            for bucket in dataset.batch_manager.buckets.values()
            for item in bucket
        )
    )


def showing(paths: Iterable[str], name: str) -> list[str]:
    """Those of cached latents that have a tensor whose name begins so. A file that cannot be read is left to the
    host."""
    from safetensors import SafetensorError, safe_open  # type: ignore[attr-defined]

    found = []
    for path in paths:
        try:
            with safe_open(path, "pt") as file:  # type: ignore[attr-defined]
                if any(key.startswith(name) for key in list(file.keys())):
                    found.append(path)
        except (OSError, SafetensorError):
            continue
    return found


class NamedBatches:
    """A data set's batches (the host's `BucketBatchManager`), each with the names of its items.

    Args:
        batches: the host's.
    """

    def __init__(self, batches: Any):
        self._batches = batches

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        size = self._batches.batch_size
        bucket, place = self._batches.bucket_batch_indices[index]
        items = self._batches.buckets[bucket][place * size : (place + 1) * size]
        return {**self._batches[index], ITEMS: [item.text_encoder_output_cache_path for item in items]}

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_batches":  # a copy in a worker has nothing yet while it is made
            raise AttributeError(name)
        return getattr(self._batches, name)


@contextmanager
def named(datasets: Sequence[Any]) -> Iterator[None]:
    """While it is open, batches of these data sets name their items. The loader's workers are made meanwhile."""
    with ExitStack() as patches:
        for dataset in datasets:
            patches.enter_context(patching.patched(dataset, "batch_manager", NamedBatches(dataset.batch_manager)))
        yield
