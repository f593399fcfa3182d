"""Drawn portraits, a small text-to-image model trained on them, and a judge: all that runs offline."""
