"""`spf check`: what a run will do, before it does it. Reads what the host reads, splits captions as training does."""
