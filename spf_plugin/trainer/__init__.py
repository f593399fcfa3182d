"""The reference trainer: a short LoRA training loop on accelerate and diffusers. It knows nothing of the objective;
`spf_plugin.hosts.reference` connects the two.

`settings` is what a run is told, `data` reads the training folder, `models` the base model, `cache` encodes the one
with the other, `start` gathers these, `steps` trains, `output` writes the file, and `loop` is a run as a whole.
"""
