"""SPF for kohya: LoRA training that changes only what the target text names (SPF-Portrait, arXiv 2504.00396).

`lora` is the entry that a trainer imports, `attachment` a training step, `core` the method (docs/method.md).
"""

__version__ = "0.1.0"
