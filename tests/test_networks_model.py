"""The model as it is: left as it was, in torch's modes, with derivatives of its own layers."""

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

import gpu_hodlr as gh

torch = pytest.importorskip("torch")
nn = torch.nn

from network_models import OwnForward, made  # noqa: E402
from network_zoo import dense_ggn, dense_hessian  # noqa: E402
from test_networks_operator import WAYS, close, products  # noqa: E402


def test_the_model_is_left_as_it_was():
    """Parameters, buffers, gradients, modes; and training goes on without a change of K."""
    model, loss, inputs, targets, _ = made("lenet")
    op = gh.GGNOperator(model, loss, inputs, targets, entries="none")
    want = products(op)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    model.train()
    np.testing.assert_array_equal(products(op), want)
    assert all(part.training for part in model.modules())
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert all(p.grad is None and type(p) is nn.Parameter for p in model.parameters())
    model(inputs)  # changes the running statistics
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    inputs.zero_()
    np.testing.assert_array_equal(products(op), want)


class Paused(OwnForward):
    """One that waits in the middle of what another thread asks of it."""

    def __init__(self) -> None:
        super().__init__()
        self.there, self.go = threading.Event(), threading.Event()
        self.go.set()

    def forward(self, x: Any) -> Any:
        self.there.set()
        assert self.go.wait(60)
        return super().forward(x)


def test_a_model_is_not_read_while_another_thread_computes_with_it():
    """Its parameters are torch's then, and no longer there to be chosen."""
    model = Paused().double()
    inputs, targets = torch.randn(6, 5).double(), torch.arange(6) % 3
    problem = model, "cross_entropy", inputs, targets
    op = gh.GGNOperator(*problem, entries="none")
    want = products(op)
    model.there.clear()
    model.go.clear()
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(products, op)
        assert model.there.wait(60)
        second = pool.submit(lambda: products(gh.GGNOperator(*problem, entries="none")))
        with pytest.raises(TimeoutError):  # it waits as well
            second.result(0.2)
        model.go.set()
        for job in (first, second):
            np.testing.assert_array_equal(job.result(60), want)


def test_old_hooks_leave_tensors_of_ones_own_behind():
    """Weight normalization by hooks puts what it computes into the module."""
    torch.manual_seed(0)
    with pytest.warns(FutureWarning, match="weight_norm"):
        layer = nn.utils.weight_norm(nn.Linear(5, 4))
    model = nn.Sequential(layer, nn.Tanh(), nn.Linear(4, 2)).double()
    x = torch.randn(6, 5, dtype=torch.float64)
    y = torch.randn(6, 2, dtype=torch.float64)
    model(x)
    op = gh.GGNOperator(model, "mse", x, y, entries="none")
    close(products(op), dense_ggn(model, "mse", x, y, {}))
    assert type(layer.weight) is torch.Tensor
    assert float(layer.weight.detach().sum()) == float(layer.weight.detach().numpy().sum())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_modes_without_gradients(mode: Any):
    model, loss, inputs, targets, _ = made("transformer")
    want = products(gh.GGNOperator(model, loss, inputs, targets, entries="none"))
    with mode():
        op = gh.GGNOperator(model, loss, inputs.clone(), targets, entries="none")
        np.testing.assert_array_equal(products(op), want)
    np.testing.assert_array_equal(products(op), want)


def test_autocast_changes_nothing():
    model, loss, inputs, targets, _ = made("lenet", dtype=torch.float32)
    op = gh.GGNOperator(model, loss, inputs, targets, entries="none")
    want = products(op)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        np.testing.assert_array_equal(products(op), want)


def test_attention_by_flash_and_by_the_fused_path():
    """Neither has a forward mode; both are as they were afterwards."""
    model, loss, inputs, targets, _ = made("transformer")
    assert torch.backends.mha.get_fastpath_enabled()
    op = gh.GGNOperator(model, loss, inputs, targets, entries="none")
    assert op._access.problem.derivatives.forward
    products(op)
    assert torch.backends.mha.get_fastpath_enabled()
    assert torch.backends.cuda.flash_sdp_enabled()


class Backwards(torch.autograd.Function):
    """A square without a forward mode, as many have written one."""

    @staticmethod
    def forward(ctx: Any, x: Any) -> Any:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, g: Any) -> Any:
        return 2 * ctx.saved_tensors[0] * g


class OwnFunction(OwnForward):
    def forward(self, x: Any) -> Any:
        return self.last(Backwards.apply(self.first(x.flatten(1))))


class NewStyle(torch.autograd.Function):
    """The same, which `torch.func` can transform, but not in forward mode."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Any) -> Any:
        return x * x

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, g: Any) -> Any:
        return 2 * ctx.saved_tensors[0] * g


class NewFunction(OwnForward):
    def forward(self, x: Any) -> Any:
        return self.last(NewStyle.apply(self.first(x.flatten(1))))


class WrongForward(NewStyle):
    """Its forward mode is off by a tenth."""

    generate_vmap_rule = False

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def jvp(ctx: Any, t: Any) -> Any:
        return 2.2 * ctx.saved_tensors[0] * t

    @staticmethod
    def vmap(info: Any, places: Any, x: Any) -> Any:
        return WrongForward.apply(x), places[0]


class WrongFunction(OwnForward):
    def forward(self, x: Any) -> Any:
        return self.last(WrongForward.apply(self.first(x.flatten(1))))


@pytest.mark.parametrize("kind", [NewFunction, WrongFunction])
def test_layers_without_a_right_forward_mode(kind: Any):
    """Reverse mode twice takes over, told by the vectors that derivatives are tried with."""
    torch.manual_seed(0)
    model = kind().double()
    x = torch.randn(6, 5, dtype=torch.float64)
    y = torch.arange(6) % 3
    want = dense_ggn(model, "cross_entropy", x, y, {})
    for entries in WAYS:
        op = gh.GGNOperator(model, "cross_entropy", x, y, entries=entries)
        close(products(op), want)
    assert not op._access.problem.derivatives.forward
    hessian = gh.HessianOperator(model, "cross_entropy", x, y)
    close(products(hessian), dense_hessian(model, "cross_entropy", x, y, {}))


def test_a_layer_that_torch_func_cannot_transform():
    model = OwnFunction().double()
    with pytest.raises(gh.errors.UnsupportedLayerError, match=r"torch\.func.*setup_context"):
        gh.GGNOperator(model, "mse", torch.ones(4, 5).double(), torch.ones(4, 3).double())


def test_nested_forward_modes_of_layer_norm_are_wrong_in_torch_and_not_used():
    """`torch.func.hessian` is off by some per cent; a torch that has mended it passes too."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 2)).double()
    x, y = torch.randn(5, 3).double(), torch.randn(5, 2).double()
    want = dense_hessian(model, "mse", x, y, {})
    close(products(gh.HessianOperator(model, "mse", x, y, entries="none")), want)
