"""kohya sd-scripts: the only package that knows it.

`loop` is the host, for the entry (`spf_plugin.lora`) alone; `rules` and `captions` are `spf check`'s, too.
"""
