"""sd-scripts' diffusion transformers in small, one module a kind.

    python -m tests.hosts.dits make KIND HOST FOLDER       random weights and tokenizers, in the formats the host loads
    python -m tests.hosts.dits planted KIND HOST FOLDER    how the attention to a planted key is spread, as JSON
    python -m tests.hosts.dits joint KIND HOST FOLDER      how far queries and keys are from the model's own, as JSON

The host's own loaders build and load the small models; nothing of a checkout is changed. Sizes that a loader writes
into its constructor call are overridden in memory, so the classes, their names and everything they do stay the host's.
"""
