"""Tokenizers and text encoders of musubi-tuner, loaded and asked by its own functions. Only the command that encodes
prompts needs them: torch and musubi-tuner are imported when one is loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from spf_plugin.errors import SPFError

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Encoder:
    """What encodes the prompts of an architecture.

    Attributes:
        tokenize: text -> its token ids, without begin, end and padding.
        encode: a prompt -> the tensors that the host's script would write for it (`Architecture.tensors`), on the CPU;
            and as `pooled` `[E]` a vector of its words alone, where the states of the template would drown them, or
            stand before them.
        prefix: what it puts before every prompt, as text; as far as its tokens are in what it writes.
    """

    tokenize: Callable[[str], Sequence[int]]
    encode: Callable[[str], dict[str, Tensor]]
    prefix: str = ""


def _plain(tokenizer: Any) -> Callable[[str], Sequence[int]]:
    """Of a tokenizer of transformers."""

    def tokenize(text: str) -> Sequence[int]:
        return tokenizer(text, add_special_tokens=False, truncation=False, verbose=False).input_ids

    return tokenize


def zimage(args: Any, device: torch.device) -> Encoder:
    """Qwen3, whose states the host cuts behind the last token."""
    import torch
    from musubi_tuner.zimage import zimage_utils

    dtype = torch.float8_e4m3fn if args.fp8_llm else torch.bfloat16
    tokenizer, model = zimage_utils.load_qwen3(args.text_encoder, dtype=dtype, device=device, disable_mmap=True)
    model.eval()

    def encode(prompt: str) -> dict[str, Tensor]:
        states, mask = zimage_utils.get_text_embeds(tokenizer, model, [prompt])
        return {"llm_embed": states[0, : int(mask[0].sum())].cpu()}

    mark = "SPF"
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": mark}], tokenize=False, add_generation_prompt=True, enable_thinking=True
    )
    return Encoder(_plain(tokenizer), encode, chat.partition(mark)[0])


@contextmanager
def _read(model: Any) -> Iterator[list[Sequence[int]]]:
    """Keep the token ids that a language model is given for the first prompt of each call, padding and all."""
    from spf_plugin.seam import Call, intercepted

    rows: list[Sequence[int]] = []

    def look(call: Call) -> None:
        rows.append(call.kwargs["input_ids"][0].tolist())

    with intercepted(model, look):
        yield rows


def _hold(given: Sequence[int], counted: Sequence[int], prompt: str) -> None:
    """Raises SPFError: the language model was given other tokens than phrases are counted in."""
    if list(given) != list(counted):
        raise SPFError(
            f"musubi-tuner reads {prompt!r} in other tokens than SPF counts, or elsewhere among its padding, so the "
            "phrases would be looked for at wrong places. Is its tokenizer, or transformers, of another version? "
            "Report it."
        )


_MARK = "SPF"  # stands for a prompt
_BEHIND = 1  # tokens of Mistral's template behind the prompt, as the model's family counts them


def flux_2(args: Any, device: torch.device) -> Encoder:
    """Mistral (dev), which is padded before its template, or Qwen3 (klein), padded behind."""
    import torch
    from musubi_tuner.flux_2 import flux2_utils

    info = flux2_utils.FLUX2_MODEL_INFO[args.model_version]
    dtype = torch.float8_e4m3fn if args.fp8_text_encoder else torch.bfloat16
    embedder = flux2_utils.load_text_embedder(info, args.text_encoder, dtype=dtype, device=device, disable_mmap=True)
    mistral = info.qwen_variant is None
    model = embedder.mistral3 if mistral else embedder.model
    model.eval()
    if mistral:
        tokenizer, chat = embedder.tokenizer.tokenizer, embedder.format_input([_MARK])[0]
        template = embedder.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=False)
    else:
        tokenizer, chat = embedder.tokenizer, [{"role": "user", "content": _MARK}]
        template = tokenizer.apply_chat_template(
            chat, tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
    prefix, plain = template.partition(_MARK)[0], _plain(tokenizer)

    def tokenize(text: str) -> Sequence[int]:
        return plain(text.replace("[IMG]", "")) if mistral else plain(text)  # as the host takes it out of prompts

    def encode(prompt: str) -> dict[str, Tensor]:
        calculated = torch.bfloat16 if embedder.dtype.itemsize == 1 else embedder.dtype
        with _read(model) as rows, torch.autocast(device.type, dtype=calculated), torch.no_grad():
            states = embedder([prompt])[0].cpu()
        whole = tokenize(prefix + prompt)
        place = max(len(states) - len(whole) - _BEHIND, 0) if mistral else 0
        _hold(rows[-1][place : place + len(whole)], whole[: len(states) - place], prompt)
        words = states[place + len(tokenize(prefix)) :][: max(len(whole) - len(tokenize(prefix)), 1)]
        return {"ctx_vec": states, "pooled": words.float().mean(dim=0)}

    return Encoder(tokenize, encode, prefix)


def krea2(args: Any, device: torch.device) -> Encoder:
    """Qwen3-VL, of which the host drops the template before the prompt, and keeps what stands behind it."""
    import torch
    from musubi_tuner.krea2 import krea2_utils
    from musubi_tuner.utils.model_utils import str_to_dtype

    dtype = str_to_dtype(args.text_encoder_dtype, torch.bfloat16)
    encoder = krea2_utils.load_krea2_text_encoder(args.text_encoder, dtype=dtype, device=device)
    tokenize = _plain(encoder.tokenizer)
    dropped, behind = encoder.prompt_template_encode_start_idx, encoder.prompt_template_encode_suffix_start_idx

    def encode(prompt: str) -> dict[str, Tensor]:
        with _read(encoder.qwen) as rows:
            states, mask = krea2_utils.get_krea2_prompt_embeds(encoder, [prompt])
        states = states[0][mask[0]].cpu()
        words = len(states) - behind
        _hold(rows[-1][dropped : dropped + words], tokenize(prompt)[: encoder.max_length - behind], prompt)
        return {"krea2_vl_embed": states, "pooled": states[: max(words, 1)].float().mean(dim=0).flatten()}

    return Encoder(tokenize, encode)


def qwen_image(args: Any, device: torch.device) -> Encoder:
    """Qwen2.5-VL, of whose states the host drops those of the template before the prompt."""
    import torch
    from musubi_tuner.qwen_image import qwen_image_utils

    dtype = torch.float8_e4m3fn if args.fp8_vl else torch.bfloat16
    tokenizer, model = qwen_image_utils.load_qwen2_5_vl(
        args.text_encoder, dtype=dtype, device=device, disable_mmap=True
    )
    model.eval()
    tokenize = _plain(tokenizer)

    def encode(prompt: str) -> dict[str, Tensor]:
        with _read(model) as rows, torch.autocast(device.type, torch.bfloat16, enabled=bool(args.fp8_vl)):
            states, mask = qwen_image_utils.get_qwen_prompt_embeds(tokenizer, model, prompt)
        states = states[0, : int(mask[0].sum())]
        ids, kept = tokenize(prompt), rows[-1][-len(states) :]
        _hold(kept[: len(ids)], ids[: len(kept)], prompt)
        return {"vl_embed": (states.bfloat16() if args.fp8_vl else states).cpu()}

    return Encoder(tokenize, encode)


def wan(args: Any, device: torch.device) -> Encoder:
    """UMT5, which is given a prompt with its white space put in order."""
    import torch
    from musubi_tuner.wan.configs.wan_t2v_14B import t2v_14B as config  # that of all Wan models, as far as text goes
    from musubi_tuner.wan.modules.t5 import T5EncoderModel

    model = T5EncoderModel(
        text_len=config.text_len, dtype=config.t5_dtype, device=device, weight_path=args.t5, fp8=args.fp8_t5
    )

    def tokenize(text: str) -> Sequence[int]:
        whole = {"padding": False, "truncation": False, "max_length": None, "verbose": False}
        ids: list[int] = model.tokenizer(text, add_special_tokens=False, **whole)[0].int().tolist()
        return ids

    def encode(prompt: str) -> dict[str, Tensor]:
        with torch.autocast(device.type, config.t5_dtype, enabled=bool(args.fp8_t5)):
            (states,) = model([prompt], device)
        return {"t5": states.cpu()}

    return Encoder(tokenize, encode)
