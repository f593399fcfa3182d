"""The method: pure functions of text and tensors.

`prompt` splits captions into base and target, `coverage` says which captions have one; `attention` is what positions
give to words, `sfcm` the control map, `losses` the terms, `schedule` what a prediction says of the clean image;
`objective` is all of it for one aligned step. May import torch and each other, and nothing else of this package.
"""
