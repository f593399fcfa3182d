"""The `spf` command line. What a command needs is imported when it runs, so that `spf --help` is quick."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

try:
    import rich  # noqa: F401
    import typer
except ImportError as error:
    raise SystemExit(
        f"The spf command lacks {error.name}. In sd-scripts' environment: python path/to/spf-plugin/install.py "
        "--sd-scripts DIR --cli, which moves none of its packages. Elsewhere: "
        'pip install "path/to/spf-plugin[cli]"'
    ) from None

from spf_plugin.terminal import forgiving
from spf_plugin.tools.cli.decoder import decoder
from spf_plugin.tools.cli.plan import plan
from spf_plugin.tools.cli.train import train

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="LoRA training that changes only what you asked for, and tools for the files.",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("train", no_args_is_help=True)(train)
app.command("plan", no_args_is_help=True)(plan)
app.command("decoder", no_args_is_help=True)(decoder)


def _later(name: str, module: str, help: str) -> None:
    """Mount the `app` of a module that is slow to import; it handles its own arguments, `--help` included."""

    def run(context: typer.Context) -> None:
        import_module(module).app(args=context.args, prog_name=f"spf {name}")

    settings = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
    app.command(name, help=help, add_help_option=False, context_settings=settings)(run)


_later("lora", "spf_plugin.tools.cli.lora", "Check, fix and convert LoRA files; write their WebUI cards.")
_later("check", "spf_plugin.tools.cli.check", "See what a training run will do, and what is wrong with it.")
_later(
    "cache-prompts", "spf_plugin.tools.cli.prompts", "Encode the prompts of a musubi-tuner data set, before training."
)
_later("report", "spf_plugin.tools.cli.report", "Show on one page what a LoRA changes in a model, unasked changes too.")
_later(
    "doctor", "spf_plugin.tools.cli.doctor", "Say what is installed here and whether sd-scripts fits, for bug reports."
)


@app.command("lab", add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def lab(context: typer.Context) -> None:
    """Measure semantic pollution, method by method, on the embedded model (in a clone of the repository)."""
    root = Path(__file__).parents[3]
    if not (root / "portraitlab").is_dir():
        raise SystemExit(
            "spf lab: the embedded model and the lab are not part of the installed package. Clone the repository, "
            "install it with pip install -e, and run this there."
        )
    sys.path.insert(0, str(root))
    import_module("portraitlab.lab.app").app(args=context.args, prog_name="spf lab")


def main() -> None:
    """Run the command line."""
    forgiving()
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(130)
