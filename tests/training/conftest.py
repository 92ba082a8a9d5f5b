"""Every run of these tests compiles the same few programs; one compilation of each is enough."""

import os

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache


@pytest.fixture(scope="package", autouse=True)
def compiled_once(tmp_path_factory):
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    directory = tmp_path_factory.mktemp("xla")
    os.environ["TWISTER_JAX_CACHE"] = str(directory)
    for name, value in zip(names, (str(directory), 0.0), strict=True):
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    del os.environ["TWISTER_JAX_CACHE"]
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
