"""What the documentation shows runs: the README's code, the pages and the notebooks."""

import inspect
import pathlib
import re
import sys
import warnings
from typing import Any

import jax
import matplotlib as mpl
import pytest
from matplotlib import pyplot

import mtl_optax as mtl
from mtl_optax import catalog

mpl.use("Agg")
ROOT = pathlib.Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
BLOCK = re.compile(r'^```python(?: title="([^"]*)")?\n(.*?)^```$', re.DOTALL | re.MULTILINE)
PAGES = [p for p in sorted((ROOT / "docs").glob("*.md")) if BLOCK.search(p.read_text("utf-8"))]
PEERS = ("TorchJD", "LibMTL")  # code of other libraries, not run here
PROCESSES = "jax.distributed.initialize"  # takes several processes
PROMOTES = "import keras"  # whose layers add vectors to matrices
# In `make test`; `make test-long` runs the other notebooks, and the pages that take longest.
QUICK = ("quickstart",)
SLOW = ("compare", "loops")
# The tests see that notebooks run, not what comes out: they train for less long.
SHORTER = {
    "conflict": ("steps=2000", "steps=600"),
    "front": ("STEPS = 20, 11, 800", "STEPS = 20, 11, 40"),
    "iwrm": ("EPOCHS, STARTS = 6, 2", "EPOCHS, STARTS = 1, 2"),
    "own_data": ("STEPS = 400", "STEPS = 40"),
    "pinn": ("steps=1000", "steps=50"),
    "quickstart": ("steps=3000", "steps=100"),
    "which_strategy": ("steps=300", "steps=60"),
}


def test_readme_example_trains_as_it_is_pasted(capsys):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(code, {})
    *steps, weights = capsys.readouterr().out.splitlines()
    losses = [eval(step.split(" ", 1)[1]) for step in steps]
    assert all(losses[-1][task] < losses[0][task] for task in ("click", "buy"))
    assert "weights/buy" in weights


def stem(path):
    return path.stem


def long_if(path, slow):
    return pytest.param(path, marks=[pytest.mark.long] if slow else [])


@pytest.mark.parametrize("path", [long_if(p, p.stem not in QUICK) for p in NOTEBOOKS], ids=stem)
def test_notebook_runs(path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of the notebook machinery, not of the library
        import nbclient
        import nbformat

        text = path.read_text(encoding="utf-8")
        long, short = SHORTER.get(path.stem, ("", ""))
        assert text.count(long) == 1 or not long
        notebook = nbformat.reads(text.replace(long, short), as_version=4)
        nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any(output.output_type == "display_data" for output in outputs)


def execute(text, file, scope):
    """Runs the Python blocks of a page; a block titled as an error must raise it."""
    for block in BLOCK.finditer(text):
        title, code = block.groups()
        if title in PEERS or PROCESSES in code:
            continue
        # With its line numbers, for the traceback.
        program = compile("\n" * text.count("\n", 0, block.start(2)) + code, file, "exec")
        if title is None:
            with jax.numpy_rank_promotion("allow" if PROMOTES in code else "raise"):
                exec(program, scope)
            continue
        kind, message = title.split(": ", 1)
        with pytest.raises(Exception, match=re.escape(message)) as raised:
            exec(program, scope)
        assert raised.type.__name__ == kind


@pytest.mark.parametrize("path", [long_if(p, p.stem in SLOW) for p in PAGES], ids=stem)
def test_page_runs(path, monkeypatch):
    monkeypatch.setattr(catalog, "STRATEGIES", dict(mtl.STRATEGIES))  # a page may register its own
    execute(path.read_text(encoding="utf-8"), str(path), {"__name__": "page"})
    pyplot.close("all")


def test_names_for_users_of_other_libraries_are_ours():
    text = (ROOT / "docs" / "migrating.md").read_text(encoding="utf-8")
    calls = re.findall(r"`(mtl\.\w+\([^`]*\))`", text)
    assert len(calls) > 40
    for call in calls:
        built = eval(call, {"mtl": mtl, "K": 3, "key": jax.random.key(0), "w": [1.0, 2.0, 3.0]})
        assert hasattr(built, "update"), call


def test_every_public_name_is_documented(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    import _pages

    shown = {name: getattr(mtl, name) for name in dir(mtl)}
    public = {n for n, x in shown.items() if inspect.isroutine(x) or inspect.isclass(x)}
    assert public - _pages.documented() == set()
    for path, text in _pages.pages().items():
        execute(text, path, {"__name__": "page"})
    sys.modules.pop("_pages")


def test_docstrings_become_markdown(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    from _docstrings import markdown

    text = markdown(inspect.cleandoc(mtl.scale_by_dwa.__doc__))
    assert "$$\n\\lambda_k = K" in text
    assert "](https://arxiv.org/abs/1803.10704), 2019" in text
    for name in set(dir(mtl)) - {"PerTask", "PerPair"}:  # those of typing.Annotated
        left = markdown(getattr(mtl, name).__doc__ or "")
        assert not re.search(r":math:|\.\. math|>`_", left), name


def test_a_page_lists_the_catalog():
    assert catalog.markdown() in (ROOT / "docs" / "strategies.md").read_text(encoding="utf-8")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"**{len(mtl.STRATEGIES)} strategies**" in readme
    assert len(readme.splitlines()) <= 150


def test_a_release_shows_the_readme_wherever_it_is_read(monkeypatch):
    sys.path.insert(0, str(ROOT))
    import hatch_build

    def built() -> dict[str, Any]:
        metadata = {"version": "1.2.3"}
        hatch_build.Repository(str(ROOT), {}).update(metadata)
        return metadata

    monkeypatch.delenv("REPOSITORY_URL", raising=False)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert built()["readme"]["text"] == readme
    assert "urls" not in built()
    monkeypatch.setenv("REPOSITORY_URL", "https://host/someone/mtl_optax/")
    text = built()["readme"]["text"]
    links = re.findall(r"(!?)\[[^]]*\]\(([^)]*)\)", text)
    assert len(links) == len(re.findall(r"\]\(", readme)) > 20
    assert all(link.startswith("https://") for _, link in links)
    for kind, picture in (("blob", ""), ("raw", "!")):
        start = f"https://host/someone/mtl_optax/{kind}/v1.2.3/"
        ours = [link.removeprefix(start) for p, link in links if p == picture if start in link]
        assert ours
        assert all((ROOT / path).exists() for path in ours)
    assert built()["urls"]["Source"] == "https://host/someone/mtl_optax"
