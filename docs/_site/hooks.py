"""What the site shows of the repository outside of docs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent.parent
PAGES = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}


def on_files(files: Files, config: Any) -> Files:
    """Adds pages for files that belong at the root."""
    for name, page in PAGES.items():
        text = re.sub(r"\]\((?!docs/|http)", "](../", (ROOT / name).read_text())
        files.append(File.generated(config, page, content=text.replace("](docs/", "](")))
    return files


def on_page_markdown(markdown: str, page: Any, **others: Any) -> str:
    """Links that leave docs lead to the page for the file; where there is none, their text stays."""

    def replace(link: re.Match[str]) -> str:
        text, up, path = link[1], link[2], link[3]
        depth = up.count("../") - 1
        if depth != page.file.src_uri.count("/"):
            return link[0]
        if path in PAGES:
            return f"[{text}]({'../' * depth}{PAGES[path]})"
        assert (ROOT / path).exists(), f"{page.file.src_uri}: expected a path of the repository, got {path}"
        return text

    return re.sub(r"\[([^\]]*)\]\(((?:\.\./)+)([^)#]*)\)", replace, markdown)
