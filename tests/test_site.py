"""The site as it is built: it reads without a network, and what is looked for is found."""

import json
import math
import os
import pathlib
import re
import subprocess
import sys

import pytest

import mtl_optax as mtl

ROOT = pathlib.Path(__file__).parent.parent
sys.path.append(str(ROOT / "docs"))
import _check  # noqa: E402
import _methods  # noqa: E402
import _notebooks  # noqa: E402
import _pictures  # noqa: E402

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
needs_browser = pytest.mark.skipif(_check.browser() is None, reason="no Chromium is installed")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", folder],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1", "DOCS_PICTURES": "false"},
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr
    return folder


def test_the_site_has_a_page_for_all_there_is(site):
    names = {path.parent.name for path in site.glob("**/index.html")}
    assert {"results", "performance", "scaling", "glossary", "stability"} <= names
    assert set(mtl.STRATEGIES) <= names
    assert {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")} <= names


def test_the_site_has_no_dead_links(site):
    assert _check.dead_links(site) == []


def test_the_site_loads_nothing_from_elsewhere(site):
    loaded = re.compile(r'<(?:script|img|link rel="(?:stylesheet|preload)")[^>]*?="(https?:[^"]+)"')
    for page in site.glob("**/*.html"):
        assert loaded.findall(page.read_text(encoding="utf-8")) == [], page
    for style in site.glob("assets/**/*.css"):
        assert "url(http" not in style.read_text(encoding="utf-8"), style


def test_what_people_look_for_is_a_heading_and_in_the_search(site):
    entries = json.loads((site / "search" / "search_index.json").read_text("utf-8"))["docs"]
    faq = {entry["title"]: entry for entry in entries if entry["location"].startswith("faq/#")}
    for word, title in _check.SOUGHT.items():
        assert word.lower() in (title + faq[title]["text"]).lower()
    for name in mtl.STRATEGIES:
        assert any(entry["location"] == f"methods/{name}/" for entry in entries)


@needs_browser
def test_the_search_finds_what_people_type(site):
    assert _check.inspect(site, ["/faq/"]) == []


@pytest.mark.long
@needs_browser
def test_pages_are_whole_at_both_widths_without_a_network(site):
    methods = {f"/methods/{name}/" for name in mtl.STRATEGIES}  # by one template
    pages = [page for page in _check.pages(site) if page not in methods]
    assert len(pages) > 30
    # `make docs-check` looks at all of them.
    assert _check.inspect(site, [*pages, *sorted(methods)[::8]], timeout=600) == []


@needs_browser
def test_the_check_finds_what_is_wrong(tmp_path):
    (tmp_path / "search").mkdir()
    (tmp_path / "search" / "search_index.json").write_text('{"docs": []}')
    (tmp_path / "index.html").write_text(
        '<!doctype html><body style="margin: 0"><article><p style="width: 700px">wide</p>'
        '<pre><code style="display: block; overflow: auto; width: 50px">a_long_line_of_code</code>'
        '</pre><p style="width: 40px; word-break: break-all"><code>a_long_name</code></p>'
        r'<img src="none.png"><span class="arithmatex">\(x\)</span> $$y$$ <a href="gone/">'
        '</a><a href="#nowhere"></a></article></body>'
    )
    found = _check.inspect(tmp_path)
    faults = [
        "400: the page is 700",
        "1400: code is cut: a_long",
        "a name is broken: a_long_name",
        "no picture",
        "raw TeX",
        "raw markup $$y$$",
        "search index",
        "search for freeze",
    ]
    for fault in faults:
        assert any(fault in line for line in found), (fault, found)
    assert not any("1400: the page" in line for line in found)
    assert _check.dead_links(tmp_path) == [": no heading #nowhere", ": no gone/", ": no none.png"]


def test_the_gallery_shows_what_there_is_and_where_it_belongs():
    text = (ROOT / "docs" / "gallery.md").read_text(encoding="utf-8")
    shown = re.findall(
        r"^- \[!\[[^]]+\]\(([^)]+)\)\]\(([^)]+)\)\n  .*\n  \[.+\]\(\2\)$", text, re.M
    )
    assert len(shown) == text.count("![")
    images = {path for path, _ in shown}
    folder = ROOT / "docs" / "images"
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {f"images/{path.relative_to(folder).as_posix()}" for path in files} <= images
    assert {path.stem for path in NOTEBOOKS} <= {image.split("/")[1] for image in images}


def test_every_method_says_what_it_is_for():
    for name in mtl.STRATEGIES:
        assert _methods.ADVICE[name].purpose in _methods.PURPOSES, name


def test_pictures_show_what_is_known_of_a_method():
    mean, upgrad, scale = map(_pictures.see, ("mean", "upgrad", "scale_invariant"))
    assert mean.fates() == ("falls", "rises")
    assert upgrad.fates() == ("falls", "falls")
    assert mean.conflict == pytest.approx([1.4, 0.8])
    # By the law of sines: a + b halves their angle of 1.25, a + 10 b leaves it ten to one.
    to_b = 1.25 / 2 - math.radians(mean.turn())
    assert math.sin(1.25 - to_b) / math.sin(to_b) == pytest.approx(10, rel=1e-4)
    assert round(scale.turn()) == 0
    for half in _pictures.draw("mean", mean).values():
        assert (half.startswith("<svg") and "b&#x27;s rises" in half) or "31°" in half


def test_notebooks_become_pages_with_their_pictures():
    pages = _notebooks.notebooks("https://github.com/someone/mtl_optax")
    assert "](https://colab.research.google.com/github/someone/" in pages["notebooks/pinn.md"]
    assert 'REPOSITORY = "https://github.com/someone/mtl_optax"' in pages["notebooks/pinn.md"]
    assert "colab.research" not in _notebooks.notebooks("")["notebooks/pinn.md"]
    for path in NOTEBOOKS:
        assert pages[f"notebooks/{path.stem}/0.png"].startswith(b"\x89PNG")
        assert f"]({path.stem}/0.png)" in pages[f"notebooks/{path.stem}.md"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_can_be_read_and_run_anywhere(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    sources = ["".join(cell["source"]) for cell in cells]
    assert f"/blob/main/notebooks/{path.name})" in sources[0]  # the badge
    assert sum("%pip install -q git+{REPOSITORY}" in source for source in sources) == 1
    assert "## What to try next" in "\n".join(sources[-3:])
    assert path.stat().st_size < 250_000
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    assert outputs
    assert all(output.get("name") != "stderr" for output in outputs)


def test_the_chinese_readme_runs_and_names_what_there_is():
    text = (ROOT / "README.zh.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    scope = {}
    exec(code, scope)
    assert {"task_losses", "tx", "train_step"} <= set(scope)
    for row in re.findall(r"^\| .*$", text, re.MULTILINE):
        for name in re.findall(r"`(?:mtl\.)?([a-z_]+)[`(]", row.replace("tx.update", "")):
            assert hasattr(mtl, name), name
