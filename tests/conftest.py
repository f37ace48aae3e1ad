"""Settings that every test runs under."""

import jax
import pytest

# Silent broadcasting between ranks has hidden real bugs in (K,) against (K, 1) algebra.
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_collection_modifyitems(items):
    """Keeps tests that share compiled programs on one worker of pytest-xdist."""
    for item in items:
        module = item.module.__name__ if hasattr(item, "module") else item.nodeid
        if module == "tests.test_benchmarks":
            item.add_marker(pytest.mark.xdist_group(module))
        elif module == "tests.test_strategies" and hasattr(item, "callspec"):
            item.add_marker(pytest.mark.xdist_group(item.callspec.params.get("name", module)))
