"""The lab: measure what a way to train teaches, and what else it changes. `python -m portraitlab.lab --help`.

`tasks.py` says what is taught, `rows.py` how (SPF's settings and the peers'), `peers.py` what the peers do,
`training.py` trains one row, `measuring.py` measures it, `running.py` does both for what is missing, `results.py` keeps
what was measured, `curves.py` compares at equal response, `tables.py` and `plots.py` show it.
"""
