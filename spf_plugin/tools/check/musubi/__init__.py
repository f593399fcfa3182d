"""`spf check` of a run inside musubi-tuner: its options, its data set, its caches."""
