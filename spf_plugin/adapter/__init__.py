"""The adapter and the frozen base below it: taken off for the reference, kept in few bits, saved as loaders want it."""
