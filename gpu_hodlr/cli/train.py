"""`train`: a built-in network trained by Gauss-Newton steps and by Adam, side by side."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gpu_hodlr as gh
from gpu_hodlr.applications.pictures import COLOURS, FONT, save
from gpu_hodlr.cli import Commands, Progress, networks, require
from gpu_hodlr.cli.digits import load_digits
from gpu_hodlr.cli.options import above_zero, add_common_options, check_outputs, positive
from gpu_hodlr.cli.summary import Columns, fixed, write_json
from gpu_hodlr.devices import resolve_device

if TYPE_CHECKING:
    import torch

# Adam's best rates of a grid: profiling/training.py.
ADAM_BATCH = 100


@dataclass(frozen=True)
class Task:
    """A network to train.

    Attributes:
        layers: the widths.
        loss: "cross_entropy", or "mse" of the input itself.
        rate: of Adam.
        batch: of Gauss-Newton steps.
    """

    layers: tuple[int, ...]
    loss: str
    rate: float
    batch: int


TASKS = {
    "mnist": Task(networks.LAYERS["mnist"], "cross_entropy", 5e-3, 2500),
    "autoencoder": Task((784, 250, 30, 250, 784), "mse", 2e-3, 1000),
}
WIDTHS = {"": 12, "batch": 5, "epoch": 5, "steps": 5, "CPU s": 6, "loss": 8, "right": 6}
SIZE = 6.3, 2.8  # inches


@dataclass
class Curve:
    """How a training went, from before it on.

    Attributes:
        name: of the optimizer.
        batch: samples of a step.
        epochs: passes through the data so far.
        steps: made so far.
        seconds: of them, CPU seconds of all threads.
        losses: over all data.
        right: shares of the digits that are classified right; None of an autoencoder.
    """

    name: str
    batch: int
    epochs: list[float] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    right: list[float | None] = field(default_factory=list)

    def reached(self, loss: float) -> float | None:
        """Seconds to a loss, between two that were measured; None where it was not reached."""
        for i in range(1, len(self.losses)):
            if self.losses[i] <= loss:
                before, after = self.losses[i - 1 : i + 1]
                share = (before - loss) / (before - after) if before > loss else 0.0
                return self.seconds[i - 1] + share * (self.seconds[i] - self.seconds[i - 1])
        return None


class Trial:
    """A network and its digits, for one optimizer after the other from the same weights.

    Args:
        name: of `TASKS`.
        seed: of the weights and the batches.
        device: "cpu" or "cuda".
        dtype: "float32" or "float64".
    """

    def __init__(self, name: str, seed: int, device: str, dtype: str) -> None:
        import torch

        self.task, self._seed = TASKS[name], seed
        images, labels = load_digits()
        self.inputs = torch.from_numpy(images).to(device, getattr(torch, dtype))
        self.targets = (
            torch.from_numpy(labels).to(device) if self.task.loss != "mse" else self.inputs
        )
        functional = torch.nn.functional
        self.criterion: Any = getattr(
            functional, "mse_loss" if self.task.loss == "mse" else self.task.loss
        )

    def network(self) -> torch.nn.Sequential:
        """With the first weights."""
        import torch

        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self._seed)
            model = networks.build(self.task.layers)
        return model.to(self.inputs)

    def by_gradients(
        self, make: Callable[..., torch.optim.Optimizer], **options: float
    ) -> tuple[torch.nn.Sequential, Callable[..., object]]:
        """A network and a step of one of torch's optimizers."""
        model = self.network()
        optimizer = make(model.parameters(), **options)

        def step(x: torch.Tensor, y: torch.Tensor) -> None:
            optimizer.zero_grad()
            self.criterion(model(x), y).backward()
            optimizer.step()

        return model, step

    def by_gauss_newton(self, **options: Any) -> tuple[torch.nn.Sequential, Callable[..., object]]:
        """A network and a step of `gh.GaussNewton`."""
        # What torch.func loads at its first use is not of the training.
        few = networks.build((4, 3)).to(self.inputs)
        gh.GaussNewton(few, "mse").step(self.inputs[:8, :4], self.inputs[:8, :3])
        model = self.network()
        optimizer = gh.GaussNewton(model, self.task.loss, seed=self._seed, **options)
        return model, optimizer.step

    def curve(
        self, name: str, model: torch.nn.Sequential, step: Callable[..., object], batch: int,
        epochs: int, *, until: float = 0.0, every: int | None = None,
        most: float = math.inf,
    ) -> Curve:  # fmt: skip
        """Train, and measure in between; the clock stands still then.

        Args:
            name: of the curve.
            model: what is trained.
            step: of a batch.
            batch: samples of a step.
            epochs: passes at most.
            until: a loss that is enough.
            every: steps between measurements; an epoch by default.
            most: seconds that are enough.
        """
        import torch

        found = Curve(name, batch)
        self._measure(found, model, 0, 0.0)
        seconds = 0.0
        per_epoch = -(-len(self.inputs) // batch)
        for count, chosen in enumerate(self._batches(batch, epochs), 1):
            x, y = self.inputs[chosen], self.targets[chosen]
            start = time.process_time()
            step(x, y)
            if x.is_cuda:
                torch.cuda.synchronize()
            seconds += time.process_time() - start
            if count % (every or per_epoch) == 0:
                self._measure(found, model, count, seconds)
                if not found.losses[-1] > until or seconds >= most:
                    break
        return found

    def _batches(self, size: int, epochs: int) -> Iterator[torch.Tensor]:
        import torch

        generator = torch.Generator().manual_seed(self._seed)
        for _ in range(epochs):
            order = torch.randperm(len(self.inputs), generator=generator)
            yield from order.to(self.inputs.device).split(size)

    def _measure(
        self, found: Curve, model: torch.nn.Sequential, steps: int, seconds: float
    ) -> None:
        import torch

        with torch.no_grad():
            outputs = model(self.inputs)
            loss = float(self.criterion(outputs, self.targets))
            right = None
            if self.targets is not self.inputs:
                right = float(outputs.argmax(1).eq(self.targets).double().mean())
        found.epochs.append(steps * found.batch / len(self.inputs))
        found.steps.append(steps)
        found.seconds.append(seconds)
        found.losses.append(loss)
        found.right.append(right)


def add_parser(commands: Commands) -> None:
    """Add the sub-command `train` and its options."""
    parser = commands.add_parser(
        "train",
        help="train a network by Gauss-Newton steps, and by Adam",
        description="Train a network on 5,000 real digits by Adam, then, from the same weights, by"
        " gh.GaussNewton until it has Adam's last loss."
        ' Needs: pip install "gpu_hodlr[demo]".',
        epilog="example: python -m gpu_hodlr train --net autoencoder --plot curves.pdf",
    )
    parser.add_argument(
        "--net", choices=[*TASKS], default="mnist",
        help="mnist: 784-20-20-10; autoencoder: 784-250-30-250-784 (default mnist)",
    )  # fmt: skip
    parser.add_argument(
        "--epochs", type=positive, default=networks.EPOCHS, metavar="NUMBER",
        help=f"of Adam, and most of Gauss-Newton (default {networks.EPOCHS})",
    )  # fmt: skip
    parser.add_argument(
        "--rate", type=above_zero, metavar="NUMBER",
        help="of Adam (default: the best of a grid)",
    )  # fmt: skip
    parser.add_argument(
        "--batch", type=positive, metavar="NUMBER",
        help=f"of Gauss-Newton steps (default 2500, of autoencoder 1000; Adam's are {ADAM_BATCH})",
    )  # fmt: skip
    add_common_options(
        parser,
        maxiter=None,
        damping=False,
        dtype="float32",
        picture="the loss by epoch and by CPU second",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """The sub-command."""
    require("torch", "mlxtend", *(["matplotlib"] if args.plot else []))
    import torch

    check_outputs(args)
    device = resolve_device(args.device)
    trial = Trial(args.net, args.seed, device, args.dtype or "float32")
    task, columns = trial.task, Columns(WIDTHS)
    batch = min(args.batch or task.batch, len(trial.inputs))
    curves: list[Curve] = []
    with Progress(2) as progress, networks.one_thread():
        n = sum(p.numel() for p in trial.network().parameters())
        widths = "-".join(map(str, task.layers))
        said = f"{args.net}: network {widths}, N = {n:,}, {task.loss} loss"
        progress.write(f"{said}, {len(trial.inputs)} samples\n{columns.header}")
        for name in ("Adam", "Gauss-Newton"):
            with progress.step(f"{args.net} {name}"):
                if name == "Adam":
                    made = trial.by_gradients(torch.optim.Adam, lr=args.rate or task.rate)
                    found = trial.curve(name, *made, ADAM_BATCH, args.epochs)
                else:
                    made = trial.by_gauss_newton()
                    found = trial.curve(
                        name, *made, batch, args.epochs, until=curves[0].losses[-1], every=1
                    )
            curves.append(found)
            for line in _lines(columns, found):
                progress.write(line)
            if args.json:  # what there is so far: a long run may be interrupted
                write_json(args.json, args, [*map(asdict, curves)], n=n)
    print(_verdict(*curves))
    if args.plot:
        draw(args.plot, [curves])


def _lines(columns: Columns, found: Curve) -> Iterator[str]:
    """A few rows of a curve, the last one among them."""
    last = len(found.losses) - 1
    for i in dict.fromkeys([0, last // 4, last // 2, 3 * last // 4, last]):
        right = found.right[i]
        yield columns.line({
            "": found.name if i == 0 else "", "batch": str(found.batch) if i == 0 else "",
            "epoch": f"{found.epochs[i]:.3g}", "steps": str(found.steps[i]),
            "CPU s": fixed(found.seconds[i], 2), "loss": fixed(found.losses[i], 5),
            "right": "-" if right is None else f"{right:.1%}",
        })  # fmt: skip


def _verdict(adam: Curve, own: Curve) -> str:
    loss, seconds = adam.losses[-1], adam.seconds[-1]
    mine = own.reached(loss)
    if mine is None:
        return f"Gauss-Newton did not reach Adam's loss of {loss:.5f} in as many epochs"
    return (
        f"Adam's loss of {loss:.5f}, {seconds:.2f} CPU s: Gauss-Newton in {mine:.2f} CPU s and"
        f" {own.steps[-1]} steps"
    )


def draw(path: Path, panels: Sequence[Sequence[Curve]], titles: Sequence[str] = ()) -> None:
    """Losses by epoch and by CPU second, a row of two for each list of curves."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(SIZE[0], SIZE[1] * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels), 2, sharey="row", squeeze=False)
    for row, (pair, curves) in enumerate(zip(axes, panels, strict=True)):
        for ax, what, label in zip(
            pair, ("epochs", "seconds"), ("epoch", "CPU seconds"), strict=True
        ):
            for i, curve in enumerate(curves):
                ax.plot(
                    getattr(curve, what), curve.losses, color=COLOURS[i], linewidth=1.2,
                    label=curve.name,
                )  # fmt: skip
            ax.set_yscale("log")
            ax.set_xlim(0, None)
            ax.set_xlabel(label, fontsize=FONT)
            ax.tick_params(labelsize=FONT, which="both")
            ax.spines[["top", "right"]].set_visible(False)
        pair[0].set_ylabel("training loss", fontsize=FONT)
        if titles:
            pair[0].set_title(titles[row], fontsize=FONT, loc="left")
    axes[0, 1].legend(fontsize=FONT - 1, frameon=False)
    save(figure, path)
