"""Whole benchmarks from one command: suites of runs, their scores with intervals, figures, and packs.

`python -m experiments` lists the commands. Everything here stands on run directories as
`python -m twister_jax train` writes them, and nothing imports JAX: what trains is a process of its own.
"""
