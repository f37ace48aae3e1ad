"""Settings that every test runs under."""

import jax

# Silent broadcasting between ranks has hidden real bugs in (K,) against (K, 1) algebra.
jax.config.update("jax_numpy_rank_promotion", "raise")


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
