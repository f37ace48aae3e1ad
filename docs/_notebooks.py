"""The notebooks as pages of the site, with the outputs that are stored in them."""

import base64
import json
import re
from pathlib import Path
from typing import Any

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"
# In the order in which they are shown.
ORDER = (
    "quickstart", "which_strategy", "conflict", "recommender", "pinn", "own_data", "iwrm", "front",
    "own_loop", "many_devices",
)  # fmt: skip
UNKNOWN = "https://github.com/OWNER/mtl_optax"
COLAB = re.compile(r"\[!\[Open in Colab\].*?\n+")


def notebooks(repository: str = "") -> dict[str, str | bytes]:
    """Path to Markdown or picture, the index first."""
    names = sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb"))
    names.sort(key=lambda name: ORDER.index(name) if name in ORDER else len(ORDER))
    made: dict[str, str | bytes] = {}
    cards = ["# Notebooks", "Each runs on a CPU in a few minutes; here with its outputs."]
    for name in names:
        text = (NOTEBOOKS / f"{name}.ipynb").read_text(encoding="utf-8")
        cells = json.loads(text.replace(UNKNOWN, repository or UNKNOWN))["cells"]
        pictures: dict[str, bytes] = {}
        page = "\n\n".join(_cell(cell, name, pictures) for cell in cells)
        title, _, rest = page.partition("\n")
        made[f"notebooks/{name}.md"] = f"{title}\n\n{_run_it(name, repository)}{rest.lstrip()}\n"
        made |= {f"notebooks/{path}": picture for path, picture in pictures.items()}
        card = f"## [{title.removeprefix('# ')}]({name}.md)\n\n{_first_paragraph(rest)}"
        if pictures:
            card += f"\n\n[![What the notebook draws]({next(iter(pictures))})]({name}.md)"
        cards.append(card)
    return {"notebooks/index.md": "\n\n".join(cards) + "\n", **made}


def _cell(cell: dict[str, Any], name: str, pictures: dict[str, bytes]) -> str:
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        return COLAB.sub("", source + "\n").rstrip()
    parts = [f"```python\n{source}\n```"]
    for output in cell["outputs"]:
        data = output.get("data", {})
        if "image/png" in data:
            path = f"{name}/{len(pictures)}.png"
            pictures[path] = base64.b64decode("".join(data["image/png"]))
            parts.append(f"![Output]({path})")
        else:
            text = "".join(output.get("text", data.get("text/plain", "")))
            parts.append(f'```text title="Output"\n{text.rstrip()}\n```')
    return "\n\n".join(parts)


def _run_it(name: str, repository: str) -> str:
    """A link to run it on Colab, which opens what lies on one host only."""
    _, host, path = repository.rstrip("/").partition("github.com/")
    if not host:
        return ""
    address = f"https://colab.research.google.com/github/{path}/blob/main/notebooks/{name}.ipynb"
    return f"[Open it in Colab]({address}).\n\n"


def _first_paragraph(text: str) -> str:
    return next(p for p in text.split("\n\n") if p.strip()).strip()
