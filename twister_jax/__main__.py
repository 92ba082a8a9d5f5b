"""`python -m twister_jax`."""

from twister_jax.cli import run

if __name__ == "__main__":
    run()
