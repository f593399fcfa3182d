"""The report: what LoRAs do to a model, on one self-contained page.

`page` fills in templates, `figures` and `maps` make pictures, `prompts` reads a LoRA's metadata, `models` loads and
samples, `measures` and `metrics` make the numbers, `content` the sentences; `run` puts them together for `spf report`.
matplotlib, diffusers and jinja2 are imported where they are used.
"""
