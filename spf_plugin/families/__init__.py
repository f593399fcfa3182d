"""Kinds of denoisers. `base` says what one is, `known.find` tells which; the others are one kind each.

May import `core`, `seam`, `errors`; nothing of a host, an adapter or a run.
"""
