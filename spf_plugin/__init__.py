"""SPF for kohya: LoRA training that changes only what the target text names (SPF-Portrait, arXiv 2504.00396)."""

__version__ = "0.1.0"
