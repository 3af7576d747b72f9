"""The pages are whole: the README leads to every page, the guide names every option, the kernels page every file."""

import dataclasses
import importlib.util
import re
from pathlib import Path

import pytest

from tpfuse.options import GIVEN, Options
from tpfuse.passes.plan.sites import REWRITES

pytestmark = pytest.mark.docs  # `make docs-check` runs these

ROOT = Path(__file__).parents[1]


def text(page):
    return (ROOT / page).read_text(encoding="utf-8")


def first_cells(page):
    """The code words in the first cell of each row of the page's tables."""
    rows = re.findall(r"^\| (`[^|]*`) \|", text(page), re.MULTILINE)
    return {word for row in rows for word in re.findall(r"`([^`]+)`", row)}


def test_the_readme_links_every_page():
    linked = set(re.findall(r"\]\((docs/\w+\.md)", text("README.md")))
    assert linked == {f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")}


def test_links_between_pages_lead_somewhere():
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[\w-]+)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links {target}"


def test_the_guide_names_every_option_with_its_default():
    assert set(GIVEN) <= first_cells("docs/guide.md")
    for field in dataclasses.fields(Options):
        if field.name in GIVEN and field.name not in ("inductor", "rewrites"):
            shown = f'"{field.default}"' if isinstance(field.default, str) else str(field.default)
            assert f"| `{field.name}` | {shown} |" in text("docs/guide.md")


def test_the_readme_names_every_rewrite():
    assert [name for name in REWRITES if f"`{name}`" not in text("README.md")] == []


def test_the_kernels_page_names_every_file():
    named = {name for name in first_cells("docs/kernels.md") if name.endswith(".py")}
    files = {str(file.relative_to(ROOT / "kernels")) for file in (ROOT / "kernels").rglob("*.py")}
    assert named == {file for file in files if not file.endswith("__init__.py")}


def test_the_api_page_is_made_from_the_docstrings():
    spec = importlib.util.spec_from_file_location("make_api", ROOT / "docs/make_api.py")
    make_api = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_api)
    assert text("docs/api.md") == make_api.page(), "run `python docs/make_api.py`"
