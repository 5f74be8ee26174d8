"""The README, CONTRIBUTING and docs/: their commands, links, code and numbers of versions."""

import ast
import re
import tomllib
from pathlib import Path

import numpy as np
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


@pytest.mark.parametrize("name", NAMES)
def test_code_in_the_documents_is_python(name: str):
    for block in blocks(name, "python"):
        ast.parse(block)


def test_the_readme_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    torch = pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))
    inputs, targets = torch.randn(40, 6), torch.randint(3, (40,))
    n = sum(p.numel() for p in model.parameters())
    given = {"model": model, "inputs": inputs, "targets": targets}
    given |= {"w": torch.randn(n), "gradient": torch.randn(n)}
    [code] = blocks("README.md", "python")
    exec(code, given)
    assert given["info"].converged
    assert type(given["u"]) is torch.Tensor
    assert given["K"].shape == (n, n)


def test_the_first_page_runs():
    [code] = blocks("docs/index.md", "python")
    given: dict = {}
    exec(code, given)
    np.testing.assert_allclose(given["x"].mean(), 1.0, atol=0.1)


def test_the_operator_on_the_page_about_operators_keeps_the_contract():
    code = blocks("docs/operators.md", "python")
    from scipy.sparse import diags_array

    A = diags_array([np.ones(59), np.full(60, 3.0), np.ones(59)], offsets=[-1, 0, 1], format="csr")
    given = {"gh": gh, "A": A}
    for block in code[:2]:
        exec(block, given)
    gh.testing.check_operator(given["Shifted"](A, 2.0), A.toarray() + 2 * np.eye(60))


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
