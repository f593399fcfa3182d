"""The reference trainer: a short LoRA training loop on accelerate and diffusers. It knows nothing of the objective;
`spf_plugin.hosts.reference` connects the two.

`settings` is what a run is told, `data` reads the training folder, `models` the base model, `cache` encodes the one
with the other, `loop` trains, and `output` writes the file.
"""
