"""`python -m spf_plugin`, for when the `spf` script is not on the path."""

from spf_plugin.tools.cli import main

main()
