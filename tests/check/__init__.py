"""Tests of `spf check`."""
