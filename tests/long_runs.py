"""Every strategy over 20,000 steps with a task that is 0, negative, or absent for a while.

`python -m tests.long_runs` prints a line for each strategy and ends with an error where a state or
a parameter is not finite, or the other tasks do not come down as they do without that task's quirk.
Too long for `make test`: some minutes.
"""

import argparse
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.progress import track

import mtl_optax as mtl

STEPS, WIDTH = 20_000, 6
TARGETS = np.random.default_rng(0).normal(size=(3, WIDTH)).astype(np.float32)
KPIS = jnp.array([0.5, 0.7, 0.9])
# What the third task is: its loss as it is, times 0, minus a constant, absent from step 2,000 on.
CASES = ("usual", "zero", "negative", "absent")
# The zero row of a task that is present is the shortest combination: a Pareto-stationary point. Of
# a balancer the heads rest too.
RESTS = {("pareto", "zero")}


def run_of(name):
    """`case -> (losses of the first two at the start and the end, all finite)`, jitted."""
    batches = mtl.STRATEGIES[name].needs == "batches"
    tx = optax.chain(mtl.make(name, 3, key=jax.random.key(0)), optax.adam(1e-3))

    def losses_fn(params, case):
        # Heads of their own, and a shared trunk on which they can agree in part.
        errors = [
            jnp.sum((params["trunk"] * params[k] - t) ** 2)
            for k, t in zip("abc", TARGETS, strict=True)
        ]
        odd = jnp.where(case == 1, 0.0, 1.0) * errors[2] - jnp.where(case == 2, 50.0, 0.0)
        return [errors[0] + 0.1, errors[1] + 0.1, odd + jnp.where(case == 1, 0.0, 0.1)]

    def step(carry, count):
        params, state, case = carry
        gone = (case == 3) & (count >= 2_000) & (count < 3_000)
        _, jac = mtl.value_and_jac(losses_fn)(params, case)
        jac = (jac, jac) if batches else jac
        present = jnp.array([True, True, False]) | ~gone
        same_batch = lambda p: losses_fn(p, case)  # noqa: E731
        more = {"kpis": KPIS, "validation_fn": same_batch, "losses_fn": same_batch}
        updates, state = tx.update(jac, state, params, present=present, **more)
        return (optax.apply_updates(params, updates), state, case), None

    @jax.jit
    def run(case):
        params = {"trunk": jnp.ones(WIDTH)} | {k: 0.5 * jnp.ones(WIDTH) for k in "abc"}
        (end, state, _), _ = jax.lax.scan(step, (params, tx.init(params), case), jnp.arange(STEPS))
        floats = [x for x in jax.tree.leaves((end, state)) if jnp.issubdtype(x.dtype, jnp.floating)]
        finite = jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in floats]))
        others = lambda p: jnp.stack(losses_fn(p, case)[:2])  # noqa: E731
        return others(params), others(end), finite

    return run


def failures(name):
    """What is wrong with a strategy, as a list of words, and the final losses by case."""
    run, wrong, ends = run_of(name), [], {}
    for i, case in enumerate(CASES):
        start, end, finite = (np.asarray(x) for x in run(jnp.int32(i)))
        ends[case] = end
        if not finite:
            wrong.append(f"{case}: not finite")
        elif (name, case) not in RESTS and not np.all(end < start):
            wrong.append(f"{case}: the others do not fall")
    return wrong, ends


def main(names):
    """Runs them all; the exit status is the number of those with a failure."""
    failed = 0
    for name in track(names, "20,000 steps of each", disable=not sys.stderr.isatty()):
        wrong, ends = failures(name)
        failed += bool(wrong)
        numbers = "  ".join(f"{case} {end[0]:.3f} {end[1]:.3f}" for case, end in ends.items())
        print(f"{name:16} {numbers}  {'; '.join(wrong) or 'ok'}", flush=True)
    return failed


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", default=sorted(mtl.STRATEGIES))
    sys.exit(main(parser.parse_args().names))
