"""Linear layers anywhere in a model that every sample goes through once."""

from typing import Any

import numpy as np
import pytest
from thread_ranks import on_threads

import gpu_hodlr as gh
from gpu_hodlr.devices import to_host

torch = pytest.importorskip("torch")
nn = torch.nn

from network_models import classes, normal  # noqa: E402
from network_zoo import dense_ggn  # noqa: E402


class Skips(nn.Module):
    """A layer past which the input goes, two branches, and a product of layers."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(7, 3)
        self.left, self.right = nn.Linear(5, 4), nn.Linear(5, 4, bias=False)
        self.over = nn.Linear(4, 4)

    def forward(self, x: Any) -> Any:
        h = torch.tanh(self.left(x)) * torch.sigmoid(self.right(x))
        h = h + torch.relu(self.over(nn.functional.layer_norm(h, (4,))))
        return self.out(torch.cat([h, x[:, :3]], dim=1)).log_softmax(1)


class Frozen(nn.Module):
    """What is not trained before, between and after what is."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 2, 3)
        self.first, self.between = nn.Linear(6, 4), nn.GRU(2, 3, batch_first=True)
        self.last = nn.Linear(3, 2)
        for part in (self.conv, self.between):
            part.requires_grad_(False)

    def forward(self, x: Any) -> Any:
        h = self.first(self.conv(x[:, None]).flatten(1))
        return self.last(self.between(h.unflatten(1, (2, 2)))[0][:, -1]).mul_(2).sin()


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x: Any) -> Any:
        return self.b(self.a(x).mul_(3).tanh_())


class Tokens(nn.Module):
    """Predictions of many places of a sample."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(5, 12)

    def forward(self, x: Any) -> Any:
        return self.mix(x).exp().unflatten(1, (3, 4))


MODELS: dict[str, tuple[Any, str, Any, Any]] = {
    "skips": (Skips, "nll", normal(5), classes(3)),
    "frozen": (Frozen, "mse", normal(5), normal(2)),
    "in place": (InPlace, "huber", normal(5), normal(3)),
    "many places": (Tokens, "cross_entropy", normal(5), classes(3, 4)),
}


def made(name: str, n: int = 6, dtype: Any = torch.float64) -> tuple[Any, ...]:
    """Model, loss, inputs, targets."""
    make, loss, inputs, targets = MODELS[name]
    torch.manual_seed(0)
    model = make().to(dtype).eval()
    generator = torch.Generator().manual_seed(1)
    return model, loss, inputs(generator, n, dtype), targets(generator, n, dtype)


def close(got: Any, want: Any, tolerance: float = 1e-12) -> None:
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * np.abs(want).max())


def check_dual(op: Any, want: Any) -> None:
    """A^T of unit vectors is A, whose two products are K and A A^T; the latter by ranks too."""
    dual = op.dual()
    A = dual.combine(np.eye(dual.rows, dtype=op.dtype)).T
    close(A.T @ A, want)
    close(dual.gram(), A @ A.T)
    for got in on_threads(2, dual.gram):
        close(got, A @ A.T)


@pytest.mark.parametrize("name", MODELS)
def test_products_entries_and_diagonal(name: str):
    """As by the stored root, and where torch alone has the loss as reverse mode has it."""
    given = made(name)
    op = gh.GGNOperator(*given)
    assert op.access == "khatri-rao"
    want = gh.GGNOperator(*given, entries="root").to_dense()
    if given[1] in ("mse", "cross_entropy"):
        close(want, dense_ggn(*given, {}), 1e-11)
    n = len(want)
    for columns in (1, 3, 20):
        v = np.random.default_rng(columns).standard_normal((n, columns))
        close(op @ v, want @ v)
    close(op.to_dense(), want)
    close(op.diagonal(), want.diagonal())
    gh.testing.check_operator(op, want)
    check_dual(op, want)


@pytest.mark.parametrize("params", [["out.weight"], ["left.bias", "over.bias"], ["right.weight"]])
def test_some_of_the_parameters(params: list[str]):
    given = made("skips")
    op = gh.GGNOperator(*given, params=params, entries="khatri-rao")
    want = gh.GGNOperator(*given, params=params, entries="root").to_dense()
    gh.testing.check_operator(op, want)
    v = np.random.default_rng(0).standard_normal(len(want))
    close(op @ v, want @ v)
    check_dual(op, want)


@pytest.mark.parametrize("options", [{"kind": "empirical"}, {"samples": 3}])
def test_fishers(options: dict[str, Any]):
    given = made("skips")
    op = gh.FisherOperator(*given, entries="khatri-rao", **options)
    want = gh.FisherOperator(*given, entries="root", **options).to_dense()
    gh.testing.check_operator(op, want)


def test_uneven_batches_of_as_many_predictions_as_there_are_places():
    """Rows of a shorter sample are zero."""

    class Places(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(5, 4)

        def forward(self, x: Any, places: Any) -> Any:
            return torch.einsum("nc,npc->npc", self.one(x), places)

    torch.manual_seed(0)
    model = Places().double()
    data = [
        ((torch.randn(n, 5).double(), torch.randn(n, p, 4).double()), torch.randn(n, p, 4).double())
        for n, p in ((3, 2), (2, 5))
    ]
    op = gh.GGNOperator(model, "mse", data)
    assert op.access in ("khatri-rao", "dense")
    want = gh.GGNOperator(model, "mse", data, entries="none")
    dense = want @ np.eye(want.shape[0])
    gh.testing.check_operator(gh.GGNOperator(model, "mse", data, entries="khatri-rao"), dense)


def test_float32_and_half_precision():
    want = gh.GGNOperator(*made("skips")).to_dense()
    model, loss, inputs, targets = made("skips", dtype=torch.float32)
    op = gh.GGNOperator(model, loss, inputs, targets)
    assert (op.access, op.dtype) == ("khatri-rao", np.float32)
    assert np.isfinite(op.to_dense()).all()
    assert op.to_dense().shape == want.shape
    gh.testing.check_operator(op)
    half = gh.GGNOperator(model.bfloat16(), loss, inputs, targets)
    assert (half.access, half.widened) == ("khatri-rao", "bfloat16")
    gh.testing.check_operator(half)


def test_shares_of_the_samples_add_up():
    op = gh.GGNOperator(*made("frozen"))
    v = np.random.default_rng(0).standard_normal((op.shape[0], 3))
    parts = [op.summand(i, 4) for i in range(4)]
    close(sum(part @ v for part in parts), op @ v)
    assert not any(part.has_entries for part in parts)


def test_on_a_gpu(cupy: Any):
    """The arrays move; products, entries, a sketch and the eigenbasis are those of the CPU."""
    host = gh.GGNOperator(*made("skips"))
    want = host.to_dense()
    there = host.to("cuda")
    gh.testing.check_operator(there, want)
    for columns in (1, 20):
        v = np.random.default_rng(0).standard_normal((len(want), columns))
        close(to_host(there @ cupy.asarray(v)), want @ v)
    K = gh.compress(there, "kfe", rtol=1e-6)
    close(to_host(K.to_dense()), want, 1e-5)


def test_gram_vectors():
    op = gh.GGNOperator(*made("skips"))
    X = op.gram_vectors(20_000, seed=0)
    want = op.to_dense()
    assert np.linalg.norm(X @ X.T - want) < 0.03 * np.linalg.norm(want)


@pytest.mark.parametrize("scheme", ["hss", "hodlr", "lowrank", "kfe", "auto"])
def test_every_scheme(scheme: str):
    op = gh.GGNOperator(*made("skips", n=30))
    want = op.to_dense()
    K = gh.compress(op, scheme, rtol=1e-6, leaf_size=16)
    close(K.to_dense(), want, 1e-5)


class Shared(InPlace):
    """A layer twice."""

    def forward(self, x: Any) -> Any:
        return self.b(self.a(self.a(x)[:, :1] + x).tanh())


class Used(InPlace):
    """A weight beside its layer."""

    def forward(self, x: Any) -> Any:
        return self.b(self.a(x).tanh()) * self.a.bias.sum()


class Permuted(InPlace):
    """One layer sees the samples in another order."""

    def forward(self, x: Any) -> Any:
        return self.b(self.a(x.flip(0)).tanh().flip(0))


class Spread(InPlace):
    """A layer sees several vectors of a sample."""

    def forward(self, x: Any) -> Any:
        return self.b(self.a(torch.stack([x, x * x], 1)).tanh()).sum(1)


class Idle(InPlace):
    """A layer is not called."""

    def forward(self, x: Any) -> Any:
        return self.b(x[:, :4].tanh())


class Keyword(InPlace):
    """Called by a keyword: its input is not seen."""

    def forward(self, x: Any) -> Any:
        return self.b(input=self.a(x).tanh())


MORE: dict[Any, str] = {
    Shared: "layer a .* is 2 times",
    Used: "more of its Linear layers' parameters",
    Permuted: "mixes samples",
    Spread: r"layer a .* with \(6, 2, 5\) of 6 samples",
    Idle: "layer a .* is 0 times",
    Keyword: "layer b .* by a keyword",
}


@pytest.mark.parametrize("model", MORE)
def test_what_is_more_than_layers_called_once(model: Any):
    """It is told, refused where it is asked for, and read in another way."""
    torch.manual_seed(0)
    net = model().double()
    x, y = torch.randn(6, 5).double(), torch.randn(6, 3).double()
    op = gh.GGNOperator(net, "mse", x, y)
    assert op.access != "khatri-rao"
    close(op @ np.eye(op.shape[0]), dense_ggn(net, "mse", x, y, {}), 1e-11)
    for kind in (gh.GGNOperator, gh.FisherOperator):
        with pytest.raises(gh.errors.UnsupportedLayerError, match=MORE[model]):
            kind(net, "mse", x, y, entries="khatri-rao")


def test_tied_weights_and_other_layers():
    """They are seen before the model is called."""
    tied = Skips().double()
    tied.right.weight = tied.left.weight
    _, loss, x, y = made("skips")
    assert gh.GGNOperator(tied, loss, x, y).access == "root"
    normed = nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4), nn.Linear(4, 3)).double()
    assert gh.GGNOperator(normed, "cross_entropy", x, y).access == "root"
    with pytest.raises(gh.errors.UnsupportedLayerError, match="all parameters in Linear layers"):
        gh.FisherOperator(normed, "cross_entropy", x, y, entries="khatri-rao")
    normed[1].requires_grad_(False)
    assert gh.GGNOperator(normed, "cross_entropy", x, y).access == "khatri-rao"


def test_memory(monkeypatch: pytest.MonkeyPatch):
    """Not unasked where it does not fit into a quarter of what is free."""
    from gpu_hodlr.networks import curvature

    given = made("skips", n=40)
    monkeypatch.setattr(curvature, "free_bytes", lambda device: 10_000)
    assert gh.GGNOperator(*given).access == "none"
    assert gh.GGNOperator(*given, entries="khatri-rao").access == "khatri-rao"
