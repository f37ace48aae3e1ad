"""The toy of the GradNorm paper: the same kind of function at ten different scales."""

import numpy as np

from benchmarks.data.base import Recipe, Split, Task, hard_sharing
from mtl_optax.compare import Problem

NUM_INPUTS, NUM_OUTPUTS = 250, 10
SCALES = (1, 2, 5, 10, 20, 50, 100)


def gradnorm_toy(*, sizes: tuple[int, int, int] = (5_000, 1_000, 1_000)) -> Problem:
    r"""Regressions of :math:`\sigma_k \tanh((B + \epsilon_k) x)` with scales from 1 to 100.

    The tasks are alike but for :math:`\epsilon_k` and the scale, so all can be learnt equally well.

    References:
      Chen et al., `GradNorm <https://arxiv.org/abs/1711.02257>`_, 2018, section 4.
    """
    rng = np.random.default_rng(0)
    base = rng.normal(scale=np.sqrt(10), size=(NUM_INPUTS, NUM_OUTPUTS))
    own = rng.normal(scale=np.sqrt(3.5), size=(len(SCALES), NUM_INPUTS, NUM_OUTPUTS))
    names = [f"scale{scale:03d}" for scale in SCALES]

    def split(size: int) -> Split:
        # Short inputs keep tanh away from its flat ends.
        x = rng.normal(scale=0.01, size=(size, NUM_INPUTS)).astype(np.float32)
        y = [s * np.tanh(x @ (base + b)) for s, b in zip(SCALES, own, strict=True)]
        labels = {name: label.astype(np.float32) for name, label in zip(names, y, strict=True)}
        return Split(x / np.float32(0.01), labels)

    train, validation, test = map(split, sizes)
    return hard_sharing(
        title=f"GradNorm toy: {len(SCALES)} regressions at scales from 1 to 100",
        source="made from random matrices, as in the GradNorm paper",
        tasks=tuple(Task(name, NUM_OUTPUTS, "regression") for name in names),
        train=train,
        validation=validation,
        test=test,
        recipe=Recipe(
            steps=500, batch_size=128, hidden=(100, 100), learning_rates=(1e-3, 3e-3, 1e-2)
        ),
    )
