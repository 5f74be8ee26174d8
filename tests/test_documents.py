"""The README, CONTRIBUTING and docs/: their links, what they name, and numbers of versions."""

import re
import tomllib
from pathlib import Path

import pytest
from test_package import FLOORS

import gpu_hodlr as gh

ROOT = Path(__file__).parents[1]
DOCUMENTS = [*ROOT.glob("*.md"), *(p for p in ROOT.glob("docs/**/*.md") if "_build" not in p.parts)]
NAMES = [str(p.relative_to(ROOT)) for p in DOCUMENTS]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
MOST_WORDS = 750  # of the README: what, how to set up, one table, where to read on


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(name: str, language: str) -> list[str]:
    """The fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text(name), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize(
    ("words", "command"),
    [
        ("The main job", 'pip install ".[demo]" && python -m gpu_hodlr table'),
        ("The tests", 'pip install ".[test]" && python -m pytest'),
    ],
)
def test_the_two_commands_of_the_readme(words: str, command: str):
    """CI takes each from the first shell block after the line that begins with these words."""
    after = re.search(rf"^{words}.*?^```sh\n(.*?)^```", text("README.md"), re.M | re.DOTALL)
    assert after is not None
    assert after[1].strip() == command


def test_the_readme_is_short():
    assert len(text("README.md").split()) <= MOST_WORDS


def anchors(document: Path) -> set[str]:
    """Of the headings, as GitHub and MyST make them."""
    found = re.findall(r"^#+ (.*)$", document.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in found}


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name: str):
    document = ROOT / name
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text(encoding="utf-8")):
        if target.startswith(("https://", "http://")):
            continue
        path, _, anchor = target.partition("#")
        file = (document.parent / path).resolve() if path else document
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


@pytest.mark.parametrize("name", NAMES)
def test_files_named_in_the_documents_exist(name: str):
    folders, endings = "docs|tests|profiling|gpu_hodlr|kernels", "py|sh|md|cuh?|json"
    named = re.findall(rf"`((?:{folders})/[\w./]+\.(?:{endings}))`", text(name))
    missing = [f for f in named if not (ROOT / f).exists()]
    assert [f for f in missing if "NAME" not in f] == []  # NAME stands for one's own


def test_the_table_of_rooms_is_the_one_that_is_tested():
    rooms: dict[int, set[str]] = {}
    for floor, names in re.findall(r"^\| (\d) \| (.*?) \|", text("docs/house.md"), re.MULTILINE):
        rooms.setdefault(int(floor), set()).update(re.findall(r"`(\w+)/?`", names))
    assert rooms == {floor: set(names) for floor, names in FLOORS.items()}


def test_versions_agree():
    version = PROJECT["project"]["version"]
    assert version == gh.__version__
    assert f"\nversion: {version}\n" in text("CITATION.cff")
    assert f"\n## {version}" in text("CHANGELOG.md")


def test_type_information_is_marked_and_everything_is_packed():
    assert (Path(gh.__file__).parent / "py.typed").exists()
    packed = PROJECT["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]
    assert [name for name in packed if not (ROOT / name).exists()] == []
    assert set(packed) >= {*(p.name for p in ROOT.glob("*.md")), "docs", "CITATION.cff", "LICENSE"}
