"""Our docstrings for MkDocs: the maths and the links of Sphinx become those of Markdown."""

import re

import griffe


class Markdown(griffe.Extension):
    """Rewrites every docstring when it is loaded."""

    def on_object(self, *, obj: griffe.Object, **kwargs: object) -> None:
        """Called once an object; aliases share the docstring of what they name."""
        del kwargs
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value)


def markdown(text: str) -> str:
    r"""Blocks `.. math::`, spans :math:`x` and links `text <url>`_ as Markdown has them."""
    text = re.sub(r"^( *)\.\. math:: ?(.*(?:\n\1 +.*)*)", _block, text, flags=re.MULTILINE)
    text = re.sub(r":math:`([^`]+)`", lambda m: f"${_line(m[1])}$", text)
    return re.sub(r"`([^`<]+?)\s*<([^>`]+)>`_", lambda m: f"[{_line(m[1])}]({m[2]})", text)


def _block(match: re.Match) -> str:
    indent = match[1]
    return f"{indent}$$\n{indent}{_line(match[2])}\n{indent}$$"


def _line(text: str) -> str:
    return " ".join(text.split())
