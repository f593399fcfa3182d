"""What the demo's page adds to `spf_plugin.tools.report`: its template, its plots, and a score of the maps."""

from pathlib import Path

TEMPLATE = Path(__file__).with_name("page.html")
