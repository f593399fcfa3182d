"""`python -m portraitlab.lab`."""

from portraitlab.lab.app import app

app(prog_name="python -m portraitlab.lab")
