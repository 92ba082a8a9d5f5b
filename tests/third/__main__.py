"""`python -m tests.third COMMAND …`: the project's command line with the third agent and suite registered."""

from tests.third import register
from twister_jax.cli import run

if __name__ == "__main__":
    register()
    run()
