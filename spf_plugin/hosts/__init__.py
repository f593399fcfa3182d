"""Training loops that SPF can attach to: one module per host."""
