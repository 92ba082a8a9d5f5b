"""`python -m tests.third COMMAND …`: the project's command line with the third agent and suite registered."""

import jax

from tests.third import register
from twister_jax import runtime
from twister_jax.cli import run

if __name__ == "__main__":
    register()
    keep = runtime.keep_compiled_programs

    def keep_all(backend: str) -> None:
        keep(backend)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)

    runtime.keep_compiled_programs = keep_all
    run()
