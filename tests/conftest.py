"""Settings that every test runs under."""

import gc
import pathlib

import jax
import pytest

# Silent broadcasting between ranks has hidden real bugs in (K,) against (K, 1) algebra.
jax.config.update("jax_numpy_rank_promotion", "raise")

# Tracing makes millions of objects: at Python's pace an eighth of the time goes to collecting them.
gc.set_threshold(50_000, 10, 10)


# `--dist loadfile` hands these out first, or one worker would end with them alone.
LONGEST = (
    "test_strategies",
    "test_docs",
    "test_compare",
    "test_sharding",
    "test_optax_table",
    "test_solvers",
)


def pytest_collection_modifyitems(items):
    """Puts the files that take longest first; the others keep their order."""
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(LONGEST)))


# Each compiled program takes a few maps of memory, of which Linux gives a process 65,530.
MAPS, MANY = pathlib.Path("/proc/self/maps"), 30_000


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item, nextitem):
    """Forgets what was compiled between two files, before XLA runs out of maps and crashes."""
    result = yield
    ends = nextitem is None or nextitem.path != item.path
    if ends and MAPS.exists() and len(MAPS.read_bytes().splitlines()) > MANY:
        jax.clear_caches()
    return result
