"""kohya sd-scripts: the only package that imports it and touches its loop.

`loop` is the host, for the entry (`spf_plugin.lora`) alone: `frames` finds the trainer that is calling, `text` encodes
as it does, `state` keeps SPF's state beside its own. `rules`, `trainers` and `captions` say what it can, what its
trainers do differently and what it makes of a caption; `spf check` uses them, too. `preparing` is its own reading of a
data set, in a process apart.
"""
