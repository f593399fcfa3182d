"""The report of a comparison: base model, plain LoRA and SPF LoRA, on one self-contained page.

Nothing here knows where images come from: `maps` takes a diffusers pipeline, `figures` arrays and numbers, `page` the
finished pictures and sentences.
"""
