"""Kinds of denoisers. `base` says what one is, `known.find` tells which; `unet`, `anima` and so on are one each.
`clip_tokens`, `rotary` and `latents` are what several may share.

May import `core`, `seam`, `errors`; nothing of a host, an adapter or a run.
"""
