"""Pictures: what is drawn, where it stands and what is said of it."""

import numpy as np
import pytest
from cli_runs import compress, gaussian

import gpu_hodlr as gh
from gpu_hodlr import cli
from gpu_hodlr.cli import measure, plot

pytest.importorskip("matplotlib")


@pytest.fixture
def matrix_file(tmp_path):
    path = tmp_path / "kernel.npy"
    np.save(path, gaussian())
    return path


@pytest.mark.parametrize("suffix", ["png", "pdf", "svg"])
def test_plot(matrix_file, tmp_path, suffix):
    pytest.importorskip("matplotlib")
    path = tmp_path / f"picture.{suffix}"
    assert compress(matrix_file, "--plot", path, "--maxiter", 0) == 0
    start = path.read_bytes()[:200]
    assert {"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<svg"}[suffix] in start or (
        suffix == "svg" and b"<?xml" in start
    )
    if suffix == "png":
        image = pytest.importorskip("matplotlib.image").imread(path)
        assert min(image.shape[:2]) > 100
        assert len(np.unique(image.reshape(-1, image.shape[2]), axis=0)) > 20


@pytest.mark.parametrize("scheme", ["hss", "fmm", "hodlr", "lowrank"])
def test_blocks_tile_the_matrix(scheme):
    """Low-rank and dense blocks of every structure cover each entry once."""
    points = np.random.default_rng(0).random((90, 2))
    K = gh.compress(
        gh.KernelOperator(points, "laplace", 0.1, 0.1), scheme, rtol=1e-3, leaf_size=8,
        budget=0.2 if scheme == "fmm" else 0.0,
    )  # fmt: skip
    far, near = measure.block_pairs(K.structure)
    boxes, ranks = plot.blocks(K.tree.leaf_sizes, K.ranks, far)
    cover = np.zeros((90, 90), int)
    for x, y, width, height in boxes:
        cover[y : y + height, x : x + width] += 1
    edges = np.concatenate([[0], np.cumsum(K.tree.leaf_sizes)])
    for a, b in near:
        cover[edges[a] : edges[a + 1], edges[b] : edges[b + 1]] += 1
        if a != b:
            cover[edges[b] : edges[b + 1], edges[a] : edges[a + 1]] += 1
    if scheme == "lowrank":  # one block, of which both halves are the whole
        cover -= 1
    assert (cover == 1).all()
    assert ranks.max() == max(map(max, K.ranks))
    assert scheme != "fmm" or len(near) > len(K.tree.leaf_sizes)


# --- what stands in them ---


def result(name: str = "K", **options: object) -> measure.Result:
    """A measured result of a small matrix."""
    op = gh.DenseOperator(gaussian(200))
    preset = measure.Preset(options.pop("rtol", 1e-4), options.pop("max_rank", 60), 25, 0.0)
    settings = measure.Settings(name, "1e-4", preset, seed=0, maxiter=0, **options)
    with cli.Progress(5) as progress:
        return measure.measure_product(op, settings, progress)[1]


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were made, in the place of their files."""
    figures = []
    monkeypatch.setattr(plot, "save", lambda figure, path: figures.append(figure))
    return figures


def labels(ax) -> list[str]:
    return [text.get_text() for text in ax.get_legend().get_texts()]


def lines(ax, label: str):
    return [line for line in ax.get_lines() if line.get_label() == label]


def test_one_matrix_has_its_ranks_by_level_and_no_lone_point(drawn):
    r = result()
    plot.draw("a.png", [r], {})
    blocks, ranks, bar = drawn[0].axes
    assert blocks.get_xlabel().startswith("column")
    assert (blocks.get_ylabel(), ranks.get_ylabel()) == ("row", "rank")
    assert bar.get_ylabel() == "rank of block"
    (largest,) = lines(ranks, "largest")
    assert list(largest.get_ydata()) == [max(level) for level in r.block_ranks[::-1]]
    assert list(largest.get_xdata()) == [1, 2, 3]
    plot.draw("a.png", [result(scheme="lowrank")], {})
    assert len(drawn[1].axes) == 2  # a map and its colour bar


def test_maps_have_one_colour_scale(drawn):
    results = [result("loose", rtol=1e-1), result("tight", rtol=1e-9)]
    plot.draw("a.png", results, {1: (5.0, 1e-3)})
    limits = {ax.collections[0].get_clim() for ax in drawn[0].axes[:2]}
    assert limits == {(0, max(max(level) for r in results for level in r.block_ranks))}
    errors = drawn[0].axes[2]
    assert sorted(line.get_ydata()[0] for line in lines(errors, "rtol wanted")) == [1e-9, 1e-1]
    assert labels(errors) == [
        "loose HSS 1e-4", "tight HSS 1e-4", "founding tight HSS 1e-4", "rtol wanted",
    ]  # fmt: skip
    assert "% of N²" in errors.get_xlabel()
    assert errors.get_ylabel() == "relative error"


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_capped_point_is_hollow(drawn):
    capped, whole = result(rtol=1e-8, max_rank=3), result(rtol=1e-4)
    assert (capped.rank_cap_hit, whole.rank_cap_hit) == (True, False)
    plot.draw_lines("a.png", {"HSS": [whole, capped], "FMM": [capped]}, "K")
    ax = drawn[0].axes[0]
    faces = [line.get_markerfacecolor() for line in lines(ax, "HSS")]
    assert [face == "white" for face in faces] == [False, True]
    assert labels(ax) == ["HSS", "FMM", "rtol wanted", "hollow: max_rank hit"]
    plot.draw_matrices("b.png", {"HSS": [whole], "FMM": [capped]}, "K")
    for ax in drawn[1].axes:
        assert [line.get_markerfacecolor() == "white" for line in lines(ax, "FMM")] == [True]
        assert ax.get_ylabel()
    assert drawn[1].axes[1].get_xlabel() == "matrix"
    assert len(lines(drawn[1].axes[1], "rtol wanted")) == 2


def test_an_exact_matrix_is_said_to_be_drawn_elsewhere(drawn):
    r = result()
    r.error = 0.0
    plot.draw_lines("a.png", {"HSS": [r]}, "K")
    ax = drawn[0].axes[0]
    assert ax.get_ylabel() == "relative error (0 at 1e-16)"
    low, high = ax.get_ylim()
    assert low < 1e-16 < r.rtol < high


# --- a form that is sparse in a network's eigenbasis ---


def network_matrix(rtol: float = 1e-2):
    pytest.importorskip("torch")
    from eigenbasis_cases import operator

    op = operator("classifier")
    preset = measure.Preset(rtol, 20, 25, 0.0)
    settings = measure.Settings("net", "1e-2", preset, seed=0, maxiter=0, scheme="kfe")
    with cli.Progress(5) as progress:
        return measure.measure_product(op, settings, progress)


def test_density_counts_every_stored_entry_once():
    K, r = network_matrix()
    edges, share = r.density
    assert (edges[0], edges[-1]) == (0, K.structure.basis.size)
    assert (np.diff(edges) > 0).all()
    np.testing.assert_array_equal(share, share.T)
    counted = (share * np.outer(np.diff(edges), np.diff(edges))).sum()
    assert counted == pytest.approx(2 * K.structure.entries + K.structure.basis.size)
    first = np.argmax(K.structure.D)  # a cell of its own
    lengths, columns, _ = K.structure.rows.gathered()
    row = np.repeat(np.arange(len(lengths)), lengths)
    assert share[0, 0] == 1
    partners = np.count_nonzero((row == first) | (columns == first))
    assert (share[0] * np.diff(edges)).sum() == pytest.approx(1 + partners)
    assert measure.entry_density(gh.compress(gh.DenseOperator(gaussian(50))).structure) is None


def test_entries_in_the_eigenbasis_have_a_colour_scale_of_their_own(drawn):
    pytest.importorskip("torch")
    r = network_matrix()[1]
    plot.draw("a.png", [result(), r], {})
    assert [ax.get_ylabel() for ax in drawn[0].axes[-2:]] == [
        "rank of block", "share of the entries that is stored",
    ]  # fmt: skip
    blocks, entries, _ = drawn[0].axes[:3]
    assert entries.get_xscale() == "log"
    assert "energy" in entries.get_xlabel()
    assert f"{100 * r.storage_fraction:.3g} % of N²" in entries.get_title()
    assert "tree" in blocks.get_xlabel()
    plot.draw("a.png", [r], {})
    assert len(drawn[1].axes) == 2
