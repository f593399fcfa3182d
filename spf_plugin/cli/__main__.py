"""`python -m spf_plugin.cli`, for when the `spf` script is not on the path."""

from spf_plugin.cli import main

main()
