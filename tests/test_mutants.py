"""What `mutants.py` plants: every fault is another module, and there is one of every kind."""

import ast
import json
import re

import mutants

SOURCE = '''
"""A docstring with 1 number."""


def function(a: int, b: "float" = 2.0) -> int:
    """Another."""
    if a < b and not a == 3:
        a += 1
        touch(a, b)
    x = a @ b.T - a[: len(b)]
    return min(x, -a) if flag(True) else raised(a)


def check(a):
    if a > 1:
        raise ValueError(f"{a + 1} is more than 1")
'''


def test_faults_are_planted_one_at_a_time():
    found = mutants.mutants(SOURCE)
    original = ast.unparse(ast.parse(SOURCE))
    sources = [mutant.source for mutant in found]
    assert original not in sources
    assert len(set(sources)) == len(sources)
    lines = original.splitlines()
    for mutant in found:
        ast.parse(mutant.source)
        changed = mutant.source.splitlines()
        assert len(changed) == len(lines)
        assert sum(a != b for a, b in zip(changed, lines, strict=True)) == 1


def test_there_is_one_of_every_kind():
    said = {(mutant.before, mutant.after) for mutant in mutants.mutants(SOURCE)}
    assert said >= {
        ("a < b", "a <= b"), ("a < b", "a > b"), ("a == 3", "a != 3"), ("3", "4"), ("2.0", "7.0"),
        ("a < b and (not a == 3)", "a < b or not a == 3"), ("not a == 3", "a == 3"),
        ("a += 1", "a -= 1"), ("a += 1", "pass"), ("touch(a, b)", "pass"),
        ("touch(a, b)", "touch(b, a)"), ("a @ b.T", "b.T @ a"), ("b.T", "b"), ("True", "False"),
        (":len(b)", ":len(b) + 1"), ("min", "max"), ("-a", "a"), ("a > 1", "a >= 1"),
    }  # fmt: skip
    assert not {before for before, _ in said} & {"a + 1", "int"}  # messages, annotations


def test_verdicts_are_of_modules_and_tests_that_there_are():
    results = json.loads((mutants.ROOT / "profiling/results/mutants.json").read_text())
    tests = mutants.ROOT / "tests"
    known = re.findall(r"def (test_\w+)", "".join(p.read_text() for p in tests.glob("test_*.py")))
    for module, result in results["modules"].items():
        assert (mutants.ROOT / module).is_file(), module
        assert len(result["survivors"]) + result.get("gone", 0) <= result["mutants"], module
        said = " ".join([*result["tests"], *(s["verdict"] for s in result["survivors"])])
        for name in re.findall(r"test_\w+", said):
            assert name in known or (tests / f"{name}.py").is_file(), (module, name)
