"""A model and a training loop that SPF does not know, and what it takes to make them known: one file each."""
