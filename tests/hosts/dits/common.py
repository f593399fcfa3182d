"""What the kinds share: small constructors, weights of any shape, tokenizers."""

from __future__ import annotations

import functools
import inspect
import math
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional

VOCABULARY = 600
CAPTIONS = (
    "a woman in a brown jacket, curtain background, smiling, blonde hair, with a red hat and sunglasses",
    "portrait of an old sailor at a harbour, blue shirt, a man, standing on a ship at night",
)


class _Seen(Exception):
    """The shapes are known; nothing need be loaded."""


def overridden(cls: type, **arguments: Any) -> None:
    """Let `cls(...)` be called with these arguments, whatever the caller says of them."""
    original, signature = cls.__init__, inspect.signature(cls.__init__)  # type: ignore[misc]

    @functools.wraps(original)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        bound = signature.bind(self, *args, **kwargs)
        bound.arguments.update(arguments)
        original(*bound.args, **bound.kwargs)

    cls.__init__ = init  # type: ignore[misc]


def reconfigured(module: Any, name: str, **settings: Any) -> None:
    """Let a config class that a module has by this name be called with these settings, whatever its caller says."""
    original = getattr(module, name)
    setattr(module, name, lambda **theirs: original(**{**theirs, **settings}))


def hub_folder(cache: Path, name: str) -> Path:
    """Where transformers looks for a repository of the hub in a `cache_dir`, without a network."""
    repository, revision = cache / f"models--{name.replace('/', '--')}", "0" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(revision, encoding="utf-8")
    folder = repository / "snapshots" / revision
    folder.mkdir(parents=True)
    return folder


def swap_in_place() -> None:
    """Let block swap move nothing where the device is the CPU.

    There the host's exchange of two blocks' weights copies one over the other, for both lie in the same memory: it
    trains on broken weights. Everything around the copy stays: the order, the waiting, and what a pass must prepare.
    """
    from library import custom_offloading_utils

    original = custom_offloading_utils.swap_weight_devices_no_cuda

    def swap(device: Any, *layers: nn.Module) -> None:
        if torch.device(device).type != "cpu":
            original(device, *layers)

    custom_offloading_utils.swap_weight_devices_no_cuda = swap


def shapes(cls: type[nn.Module], load: Callable[[], object]) -> dict[str, torch.Size]:
    """Of the tensors that a loader wants to load into a `cls`."""
    found: dict[str, torch.Size] = {}

    def record(self: nn.Module, *_args: Any, **_kwargs: Any) -> None:
        found.update({name: tensor.shape for name, tensor in self.state_dict().items()})
        raise _Seen

    with mock.patch.object(cls, "load_state_dict", record):
        try:
            load()
        except _Seen:
            return found
    raise AssertionError("the loader loads nothing")


def random_weights(wanted: dict[str, torch.Size], seed: int) -> dict[str, Tensor]:
    """Matrices that keep a signal's size, scales about 1, biases about 0: nothing is 0, so that everything counts."""
    generator = torch.Generator().manual_seed(seed)
    out = {}
    for name, shape in wanted.items():
        noise = torch.randn(shape, generator=generator)
        if len(shape) > 1 and math.prod(shape[1:]) > 1:
            out[name] = noise / math.sqrt(math.prod(shape[1:]))
        else:
            out[name] = 0.05 * noise if name.endswith("bias") else 1 + 0.1 * noise
    return out


def t5_tokenizer(texts: Iterable[str]) -> Any:
    """Built as T5's: cut at white space, then pieces of a unigram model; one `</s>` behind."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import T5TokenizerFast

    made = Tokenizer(models.Unigram())
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    made.decoder = decoders.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    made.train_from_iterator(
        texts, trainers.UnigramTrainer(vocab_size=VOCABULARY, special_tokens=special, unk_token="<unk>")
    )
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return T5TokenizerFast(tokenizer_object=made, extra_ids=0, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def qwen_tokenizer(texts: Iterable[str]) -> Any:
    """Built as Qwen's: bytes, merged; nothing before the text and nothing behind."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=alphabet, special_tokens=["<|endoftext|>"])
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<|endoftext|>", eos_token="<|endoftext|>")


def gemma_tokenizer(texts: Iterable[str]) -> Any:
    """Built as Gemma's: a space is a letter that words begin with, merged; `<bos>` before the text, nothing behind."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.normalizer = normalizers.Replace(" ", "\u2581")
    made.pre_tokenizer = pre_tokenizers.Sequence(  # its pieces are of one script, and signs are a script
        [pre_tokenizers.Split("\u2581", "merged_with_next"), pre_tokenizers.Split(Regex("[,.<>]"), "isolated")]
    )
    made.decoder = decoders.Metaspace(prepend_scheme="never")
    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    made.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special))
    made.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>"
    )


def qwen_vl_tokenizer(texts: Iterable[str], folder: Path) -> None:
    """As `qwen_tokenizer`, with the marks of a chat, written as Qwen2.5-VL's is."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import Qwen2TokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    marks = ["<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        (part for text in texts for part in re.split("|".join(map(re.escape, marks)), text)),
        trainers.BpeTrainer(vocab_size=VOCABULARY - 8, initial_alphabet=alphabet),
    )
    folder.mkdir(parents=True)
    vocabulary, merges = made.model.save(str(folder))
    Qwen2TokenizerFast(vocabulary, merges, additional_special_tokens=marks).save_pretrained(folder)


def layer_norm_of_cards() -> None:
    """Under autocast a card computes layer_norm in float32, whatever it is given. A CPU has no such rule, and fails
    where the types differ."""
    original = functional.layer_norm

    def layer_norm(*args: Any, **kwargs: Any) -> Tensor:
        if torch.is_autocast_enabled("cpu"):
            args = tuple(arg.float() if isinstance(arg, Tensor) else arg for arg in args)
            kwargs = {name: arg.float() if isinstance(arg, Tensor) else arg for name, arg in kwargs.items()}
        return original(*args, **kwargs)

    functional.layer_norm = layer_norm  # type: ignore[assignment]


def quick_half_convolutions() -> None:
    """Most CPUs take fifty times as long for a convolution in float16 as in float32."""
    original = functional.conv2d

    def conv2d(image: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        if image.device.type != "cpu" or image.dtype != torch.float16:
            return original(image, weight, bias, *args, **kwargs)
        return original(image.float(), weight.float(), None if bias is None else bias.float(), *args, **kwargs).half()

    functional.conv2d = conv2d  # type: ignore[assignment]


def shifted(*shape: int) -> Tensor:
    """Noise whose left half differs from its right one."""
    noisy = torch.randn(*shape)
    noisy[..., : shape[-1] // 2] += 2
    return noisy
