"""How close the program comes to what the machine can do: `python -m benchmarks`, one command, one table.

Every section is a file with one function `run(bench)`, which adds rows to `bench.report`. What is measured is
the agent that the settings name, through `agents.base.Agent` alone.
"""
