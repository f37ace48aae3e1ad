"""What the documentation shows runs: the README's code and the notebooks."""

import pathlib
import re
import warnings

import jax
import jax.numpy as jnp
import pytest

from mtl_optax import catalog

ROOT = pathlib.Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def test_readme_example_trains():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    scope = {}
    exec(code, scope)
    keys = jax.random.split(jax.random.key(0), 5)
    params = {
        "trunk": jax.random.normal(keys[0], (6, 4)),
        "click": jax.random.normal(keys[1], (4,)),
        "buy": jax.random.normal(keys[2], (4,)),
    }
    x = jax.random.normal(keys[3], (32, 6))
    y = {"click": jnp.ones(32), "buy": jnp.zeros(32)}
    opt_state = scope["tx"].init(params)
    first = scope["task_losses"](params, x, y)
    for _ in range(100):
        params, opt_state, losses = scope["train_step"](params, opt_state, x, y)
    assert sum(losses.values()) < sum(first.values())


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of the notebook machinery, not of the library
        nbclient = pytest.importorskip("nbclient")
        import nbformat

        notebook = nbformat.read(path, as_version=4)
        nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any(output.output_type == "display_data" for output in outputs)


def test_readme_lists_the_catalog():
    assert catalog.markdown() in (ROOT / "README.md").read_text(encoding="utf-8")
