"""The reference trainer: a short LoRA training loop on accelerate and diffusers that offers SPF the same two calls as
sd-scripts does. It knows nothing of the objective; `spf_plugin.hosts.reference` connects the two.

`data` reads the training folder, `models` the base model, `cache` encodes the one with the other, `loop` trains, and
`saving` writes the file.
"""
