"""The address of the repository is known where a release is built, not in the sources."""

import os
import re
from pathlib import Path

from hatchling.metadata.plugin.interface import MetadataHookInterface

RELATIVE = re.compile(r"(!?)\[([^]]*)\]\((?!https?:|#)([^)]+)\)")


class Repository(MetadataHookInterface):
    """`[project.urls]` and the README's links from REPOSITORY_URL.

    Without it there are no addresses rather than false ones, and links stay within the sources.
    """

    def update(self, metadata: dict) -> None:
        """Called at each build."""
        text = Path(self.root, "README.md").read_text(encoding="utf-8")
        if url := os.environ.get("REPOSITORY_URL", "").rstrip("/"):
            metadata["urls"] = {
                "Source": url,
                "Issues": f"{url}/issues",
                "Changelog": f"{url}/blob/main/CHANGELOG.md",
            }
            tag = f"v{metadata['version']}"  # what an index shows is of one release

            def absolute(link: re.Match) -> str:
                picture, words, path = link.groups()
                return f"{picture}[{words}]({url}/{'raw' if picture else 'blob'}/{tag}/{path})"

            text = RELATIVE.sub(absolute, text)
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
