"""Which strategy for my problem? Trains them on your model and data, and says which helps.

A `Problem` is what you already have: parameters from a key, the loss function, batches, metrics.
`run` compares strategies on it with baselines that are tuned as they are; `diagnose` looks at one
short training under equal weights. The command `mtl-compare module:problem` does the first from a
terminal. The pictures, the live table and the command need the extra "compare".
"""

from mtl_optax.compare._comparison import Comparison, diagnose, run
from mtl_optax.compare._diagnosis import Diagnosis
from mtl_optax.compare._problem import Draw, Problem, adam, labelled

__all__ = ["Comparison", "Diagnosis", "Draw", "Problem", "adam", "diagnose", "labelled", "run"]
