"""Prints the XLA flags under which the tests compile in half the time, as far as XLA knows them.

What the tests compile runs for an instant. The second flag picks XLA's older generator of CPU code.
"""

import os
import subprocess
import sys

WISHES = ("--xla_backend_optimization_level=0", "--xla_cpu_use_fusion_emitters=false")


def known(flag: str) -> bool:
    """Whether JAX starts with a flag; an unknown one ends the process."""
    env = os.environ | {"XLA_FLAGS": flag}
    start = [sys.executable, "-c", "import jax; jax.devices()"]
    return subprocess.run(start, env=env, capture_output=True).returncode == 0


if __name__ == "__main__":
    print(os.environ.get("XLA_FLAGS", ""), *filter(known, WISHES))
