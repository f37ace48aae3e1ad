"""Random programs in every way of the library against `jax.jacrev`; more by `tests.programs`."""

import pytest

from tests import programs
from tests.problems import a_fifth

# In these every building block, kind of task and form of the losses occurs:
# `python -m tests.programs 1000 --cover` finds them.
COVER = (111, 758, 470, 80, 403, 18, 141, 743, 160, 658, 7, 688, 698, 84, 382, 42, 46)
# Complex features, backward passes of one's own, indices out of range, empty leaves.
ONCE_WRONG = (11, 36, 49, 56, 71, 99, 139)


WAYS = tuple(programs.WAYS)


@pytest.mark.parametrize(
    ("seed", "ways"),
    # A sixth of the ways of most: compiling takes time, and `make test-long` has all of 2,000.
    [pytest.param(seed, WAYS[i % 6 :: 6], id=f"{seed}") for i, seed in enumerate(COVER)]
    + [*a_fifth(pytest.param(seed, WAYS, id=f"{seed}, all") for seed in ONCE_WRONG)],
)
def test_every_way_agrees_with_jacrev(seed, ways):
    with programs.precision():
        found = programs.check(seed, ways)
    wrong = {": ".join(at): error for at, error in found.items() if error}
    assert not wrong, f"tests.programs 1 --seed {seed} --verbose"


def test_every_building_block_occurs():
    with programs.precision():
        used = set().union(*(programs.draw(seed).used for seed in COVER))
    assert used >= programs.NAMES
