"""FLUX.2 dev: `flux2` with a Mistral 3, which is padded before its template."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from tests.hosts.dits.common import CAPTIONS, VOCABULARY
from tests.hosts.musubi import flux2
from tests.hosts.musubi.flux2 import (  # noqa: F401  what a kind is asked for
    LAYERS,
    NETWORK,
    PRECISION,
    SCRIPT,
    SWAPPED,
    TENSORS,
    TEXT_SCRIPT,
    WIDTH,
)

ARCH, CODE, VERSION = "flux_2", "f2d", "dev"
MARKS = ("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "<pad>")
IMAGE = ("[IMG]", "[IMG_BREAK]", "[IMG_END]")
CHAT = (
    "{{ bos_token }}{% for message in messages %}"
    "{% set mark = '[SYSTEM_PROMPT]' if message['role'] == 'system' else '[INST]' %}"
    "{{ mark }}{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{{ '[/' + mark[1:] }}{% endfor %}"
)
options = partial(flux2.options, version=VERSION)
text_options = partial(flux2.text_options, version=VERSION)
latents = partial(flux2.latents, code=CODE, full="flux_2_dev")


def shrink(models: Path) -> None:
    from musubi_tuner.flux_2 import flux2_utils

    flux2.shrink()
    language = {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": 64,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
    }
    vision = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "head_dim": 16,
    }
    theirs = flux2_utils.Mistral3Config

    def config(text_config: dict[str, Any], vision_config: dict[str, Any], **rest: Any) -> Any:
        return theirs(text_config={**text_config, **language}, vision_config={**vision_config, **vision}, **rest)

    flux2_utils.Mistral3Config = config
    flux2_utils.M3_TOKENIZER_ID = str(models / "tokenizer")


def make(folder: Path) -> None:
    from musubi_tuner.flux_2 import flux2_utils

    shrink(folder)
    flux2.make(folder, VERSION)
    parts = {"text_config": {"model_type": "mistral"}, "vision_config": {"model_type": "pixtral", "patch_size": 14}}
    mistral = flux2_utils.Mistral3ForConditionalGeneration(flux2_utils.Mistral3Config(**parts))
    flux2.save(folder / "text.safetensors", mistral, 3, as_published)
    processor(folder / "tokenizer")


def as_published(name: str) -> str:
    name = name.removeprefix("model.").replace("language_model.", "language_model.model.")
    return name.replace("lm_head.", "language_model.lm_head.")


def processor(folder: Path) -> None:
    """Of text and pictures, built as Mistral's: bytes, merged, padded before."""
    from musubi_tuner.flux_2.flux2_utils import SYSTEM_MESSAGE
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PixtralImageProcessor, PixtralProcessor, PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        [*[SYSTEM_MESSAGE] * 8, *CAPTIONS * 3],
        trainers.BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=alphabet, special_tokens=[*MARKS, *IMAGE]),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>",
        padding_side="left",
    )  # fmt: skip
    PixtralProcessor(PixtralImageProcessor(), tokenizer, chat_template=CHAT).save_pretrained(folder)
