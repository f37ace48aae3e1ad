"""Problems whose answers are known: the shorter version of `benchmarks/known_answers.py`."""

import numpy as np
import pytest

from benchmarks import known_answers
from tests.problems import a_fifth

STRATEGIES = known_answers.toy_strategies()


@pytest.mark.parametrize("name", a_fifth(STRATEGIES))
def test_the_toy_of_cagrad_ends_as_published(name):
    ends = known_answers.descend(
        known_answers.cagrad_toy,
        STRATEGIES[name],
        known_answers.STARTS,
        steps=50_000,
        learning_rate=2e-3,
    )[:, -1]
    reached = known_answers.on_toy_front(np.asarray(ends))
    if name == "sum":  # equal weights get stuck in two of the three starts
        assert reached.tolist() == [False, True, False]
    else:
        assert reached.all(), ends
    if name == "cagrad":  # it converges to the least mean loss on the front
        np.testing.assert_allclose(ends, [[0, known_answers.FRONT_Y]] * 3, atol=0.05)


def test_smooth_tchebycheff_holds_the_centre_of_a_concave_front_where_the_sum_runs_to_an_end():
    ends = known_answers.solve_vlmop2()
    np.testing.assert_allclose(ends["stch"], 1 - np.exp(-1), atol=1e-3)
    assert (np.abs(ends["sum"][:, 0] - ends["sum"][:, 1]) > 0.9).all()


def test_smooth_tchebycheff_spreads_preferences_over_the_front_of_zdt1():
    first, second = known_answers.solve_zdt1().T
    np.testing.assert_allclose(second, 1 - np.sqrt(first), atol=5e-3)
    assert (np.diff(first) < -0.05).all()
