"""Pages of the site that lie outside docs/: what mkdocs calls as it builds (`hooks` of mkdocs.yml)."""

import re
from html import unescape
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
OUTSIDE = {
    "index.md": "README.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "CHANGELOG.md": "CHANGELOG.md",
    "benchmarks/README.md": "benchmarks/README.md",
    "benchmarks/RESULTS.md": "benchmarks/RESULTS.md",
    "tools/neighbours/README.md": "tools/neighbours/README.md",
    "examples/README.md": "examples/README.md",
}
"""Pages of the site, and the files of the repository that they are."""
PAGE_OF = {file: page for page, file in OUTSIDE.items()}
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
FETCHED = re.compile(r'<(?:script|img|link)\b[^>]*?\s(?:src|href)="(https?://[^"]+)"')
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages."""
    for page, file in OUTSIDE.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / file)))
    return files


def on_page_markdown(markdown: str, page: Page, files: Files, **_: object) -> str:
    """Point relative links between repository files at their pages; a link to a file that the site has not becomes its
    name.
    """
    own = page.file.src_uri
    source = ROOT / OUTSIDE[own] if own in OUTSIDE else ROOT / "docs" / own

    def replaced(match: re.Match[str]) -> str:
        image, text, target = match.groups()
        path, _, anchor = target.partition("#")
        if not path or "://" in path or path.startswith("mailto:"):
            return match[0]
        found = (source.parent / path).resolve()
        if not found.is_relative_to(ROOT):
            return match[0]
        in_repository = found.relative_to(ROOT).as_posix()
        on_site = PAGE_OF.get(in_repository, in_repository.removeprefix("docs/"))
        if files.get_file_from_path(on_site) is None:
            return text
        up = "../" * own.count("/")
        return f"{image}[{text}]({up}{on_site}{'#' if anchor else ''}{anchor})"

    return LINK.sub(replaced, markdown)


def on_page_content(html: str, **_: object) -> str:
    """Write formulas as MathML, which browsers show by themselves."""

    def shown(match: re.Match[str]) -> str:
        return convert(unescape(match[2]), display="block" if match[1] == "div" else "inline")

    return FORMULA.sub(shown, html)


def on_post_page(output: str, page: Page, **_: object) -> str:
    """Refuse a page that fetches something from elsewhere: the site opens from the disk, without a network."""
    if found := FETCHED.search(output):
        raise PluginError(f"{page.file.src_uri} fetches {found[1]}. Put it into docs/.")
    return output
