"""The script that measures large networks, on small ones."""

import json
from pathlib import Path

import pytest
from scripts import script

pytest.importorskip("torch")
pytest.importorskip("matplotlib")

from network_cases import NETWORKS  # noqa: F401  one thread of torch


def test_jobs_files_and_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Rows of another run stay in the file; a job above its limits is told of."""
    scale = script("network_scale")
    monkeypatch.setattr(scale, "SHARES", (1, 2))
    monkeypatch.setattr(scale, "in_own_process", scale.measure)
    monkeypatch.setattr(
        scale, "JOBS",
        {
            "kept": scale.Job("mlp 2", 30, {"scheme": "hss", "rtol": 0.1}, 1e9, 1e9),
            "missed": scale.Job("mlp 2", 30, {"scheme": "lowrank"}, 0.0, 1e9),
        },
    )  # fmt: skip
    file, picture = tmp_path / "found.json", tmp_path / "found.png"
    assert scale.main(["kept", "--json", str(file)]) == 0
    assert scale.main(["missed", "--json", str(file)]) == 1
    assert scale.main(
        ["growth", "--smallest", "1e3", "--json", str(file), "--plot", str(picture)]
    ) == 0  # fmt: skip
    found = json.loads(file.read_text())
    assert set(found["rows"]) == {"kept", "missed"}
    assert [row["N"] for row in found["growth"]] == [3165, 6328]
    assert [scale.parameters(f"mlp {width}") for width in (1, 2)] == [3165, 6328]
    for row in [*found["rows"].values(), *found["growth"]]:
        assert row["peak_GB"] >= row["before_GB"] > 0
        assert row["compress_s"] > 0
    assert found["rows"]["missed"]["error"] <= 1e-2
    assert picture.stat().st_size > 1000
    with pytest.raises(SystemExit):
        scale.main(["unknown"])


def test_the_networks_of_the_rows():
    scale = script("network_scale")
    sizes = {
        name: sum(p.numel() for p in scale.network(name).parameters())
        for name in ("mlp 256", "conv")
    }
    assert sizes["mlp 256"] == scale.parameters("mlp 256") == 1_068_810
    assert sizes["conv"] >= 1e6
    assert scale.parameters(f"mlp {scale.SHARES[-1]}") >= 1e7
