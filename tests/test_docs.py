"""Links and anchors lead somewhere, the README stays short, all pages are found, and the tree in the docs is the tree."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def pages() -> list[str]:
    listed = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:  # sources without their history
        return [str(path.relative_to(ROOT)) for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"))]
    return listed.stdout.split()


def prose(path: Path) -> str:
    return FENCE.sub("", path.read_text(encoding="utf-8"))


def links(path: Path) -> list[tuple[str, str]]:
    """``(file, anchor)`` of every link of a page that stays in the repository; both may be empty."""
    found = [target for target in LINK.findall(re.sub(r"`[^`\n]*`", "", prose(path))) if "://" not in target]
    return [(unquote(file), anchor) for file, _, anchor in (target.partition("#") for target in found)]


def anchors(path: Path) -> set[str]:
    """Of the headings of a page, as GitHub makes them."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ +(.+?)\s*$", prose(path), re.MULTILINE):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        anchor = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
        count = sum(re.fullmatch(rf"{re.escape(anchor)}(-\d+)?", other) is not None for other in found)
        found.add(f"{anchor}-{count}" if count else anchor)
    return found


@pytest.mark.parametrize("page", pages())
def test_links_and_anchors(page):
    broken = []
    for file, anchor in links(ROOT / page):
        target = (ROOT / page).parent / file if file else ROOT / page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(f"{file}#{anchor}" if anchor else file)
    assert not broken, f"{page}: {', '.join(broken)} lead nowhere"


def test_the_readme_is_read_in_three_minutes():
    text = (ROOT / "README.md").read_bytes()
    assert len(text.splitlines()) <= 100
    assert len(text) <= 7 * 1024


def test_every_page_is_found_from_the_index():
    docs = (ROOT / "docs").resolve()
    found, ahead = set(), [docs / "index.md"]
    while ahead:
        page = ahead.pop()
        if page not in found and page.suffix == ".md" and docs in page.parents and page.exists():
            found.add(page)
            ahead += [(page.parent / file).resolve() for file, _ in links(page) if file]
    lost = {path.resolve() for path in docs.rglob("*.md")} - found
    assert not lost, f"docs/index.md does not lead to {', '.join(sorted(path.name for path in lost))}"


def test_the_tree_in_the_docs_is_the_tree():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    tree = re.search(r"<!-- tree: begin -->\n```\n(.*?)```", text, re.DOTALL)
    assert tree, "docs/architecture.md has no tree"
    named, above = [], []
    for line in tree[1].splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        above = [*above[:depth], line.split()[0]]
        named.append("".join(above))
    named += re.findall(r"`((?:idlora_ext|csrc|benchmarks|tests|docs)/[\w/.]+)`", text)
    missing = [name for name in named if not (ROOT / name).exists()]
    assert not missing, f"docs/architecture.md names {', '.join(missing)}"
    package = ROOT / "idlora_ext"
    files = {path.relative_to(ROOT).as_posix() for path in package.rglob("*.py") if path.name != "__init__.py"}
    assert not files - set(named), f"docs/architecture.md leaves out {', '.join(sorted(files - set(named)))}"
