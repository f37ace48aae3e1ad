"""The address of the repository is known where a release is built, not in the sources."""

import os

from hatchling.metadata.plugin.interface import MetadataHookInterface


class Urls(MetadataHookInterface):
    """`[project.urls]` from REPOSITORY_URL; without it, none rather than false ones."""

    def update(self, metadata: dict) -> None:
        """Called at each build."""
        if url := os.environ.get("REPOSITORY_URL", "").rstrip("/"):
            metadata["urls"] = {
                "Source": url,
                "Issues": f"{url}/issues",
                "Changelog": f"{url}/blob/main/CHANGELOG.md",
            }
