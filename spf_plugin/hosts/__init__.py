"""Training loops. `base` says what one is; the others are one loop each, and the only ones that know it."""
