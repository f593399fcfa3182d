"""The `spf` command: what looks at runs and files from outside. Nothing that trains imports it."""
