"""Reading, checking, mending and writing LoRA files that every WebUI loads.

`reader` reads, `names` knows every module name, `inspect` says what a file is, `loaders` re-states the rules of the
programs that load it, `normalise` mends, `writer` writes, `sidecars` makes the WebUI card. Imports torch and
safetensors only.
"""
