"""The documentation site: it builds without a warning, and every link in it leads somewhere."""

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import torchgraft
from hosts_support import ROOT, made_once, run

sys.path.insert(0, str(ROOT / "scripts"))

import cpp_reference  # noqa: E402

READERS = ["adapterhub", "serve_cpp", "train", "many_adapters", "peft"]


class Page(HTMLParser):
    """What a page links to, and the anchors that it has."""

    def __init__(self, path: Path):
        super().__init__()
        self.links: set[str] = set()
        self.anchors: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        for name, value in attributes:
            if value and name in ("href", "src"):
                self.links.add(value)
            if value and name in ("id", "name"):
                self.anchors.add(value)


@pytest.fixture(scope="module")
def site() -> Path:
    def build(folder: Path) -> None:
        run(ROOT / "scripts" / "docs")

    made_once("docs", build)
    return ROOT / "build" / "docs" / "site"


@pytest.fixture(scope="module")
def pages(site) -> dict[Path, Page]:
    return {path.resolve(): Page(path) for path in site.rglob("*.html") if path.name != "404.html"}


def test_every_link_leads_somewhere(site, pages):
    broken = []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            known = target in pages and (not parts.fragment or unquote(parts.fragment) in pages[target].anchors)
            # Material's own anchors of the page's top, and of its search, are made by scripts.
            if not (known or (target.is_file() and target not in pages) or parts.fragment.startswith("__")):
                broken.append(f"{path.relative_to(site)}: {link}")
    assert broken == []
    assert len(pages) > 20


def test_each_reader_has_a_page(site, pages):
    for reader in READERS:
        assert (site / "docs" / "readers" / f"{reader}.html").resolve() in pages


def test_the_references_are_complete(site, pages):
    python = pages[(site / "docs" / "reference" / "python.html").resolve()]
    missing = [name for name in torchgraft.__all__ if name.lower() not in python.anchors]
    assert missing == ["cmake_prefix_path"]
    cpp = pages[(site / "docs" / "reference" / "cpp.html").resolve()]
    headers = [ROOT / header for header in cpp_reference.installed_headers()]
    declared = {name.lower() for header in headers for name in cpp_reference.names_in(header.read_text())}
    assert len(declared) > 100 and declared - cpp.anchors == set()
