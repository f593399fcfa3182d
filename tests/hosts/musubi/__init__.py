"""Inside musubi-tuner."""
