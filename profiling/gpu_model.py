"""What an H100 or H200 might take for every job: a prediction from counts, nothing is measured.

    python profiling/gpu_model.py --json profiling/results/gpu_prediction.json
    python profiling/gpu_model.py --cases "mnist low hss" --update FILE
    python profiling/gpu_model.py --predicted FILE --measured gpu_check.json

The real algorithm runs on the tests' stand-in for CuPy at the matrix's true N, and all that it
asks of a GPU is recorded: launches with grids, blocks and arguments, library calls, CuPy's
operations, copies, reads, graphs with their dependencies (gpu_costs/record.py, watch.py; how values
are computed in bearable time: twins.py). Every step becomes bytes, operations, thread blocks and
dependent steps (kernels.py, libraries.py), and seconds by what is assumed of the GPU (gpus.py: all
of it is printed); clocks of host and streams add them up (clock.py). Larger kernel matrices are
grown from recorded ones (growth.py). --measured puts gpu_check.py's measurements beside the
predictions, with the ratio.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER))

from gpu_costs import prediction  # noqa: E402
from gpu_costs.gpus import GPUS, MODELLED, Gpu  # noqa: E402
from gpu_costs.jobs import CASES, Case, record  # noqa: E402
from gpu_costs.measured import ComparisonError, check_prediction, compared  # noqa: E402
from gpu_costs.record import recording  # noqa: E402

RESULTS = FOLDER / "results" / "gpu_prediction.json"
KERNEL_N = (1 << 17, 1 << 20)  # grown from the kernel case: gpu_check's, and the goal's
SMALL_N = 300


def predict(
    cases: Sequence[Case], gpus: Sequence[Gpu], *, small: bool = False, primitives: bool = True,
    sizes: Sequence[int] = KERNEL_N, progress: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Record the cases on the stand-in and predict all their jobs.

    Args:
        cases: to record; each once small before, so that nothing is imported or compiled in it.
        gpus: to predict for.
        small: matrices of a trial instead.
        primitives: whether to predict those that gpu_check.py measures as well.
        sizes: N that the kernel case is grown to.
        progress: whether to say on stderr what is recorded.
    """
    rows: list[dict[str, Any]] = []
    kernels: list[dict[str, Any]] = []
    with recording() as recorder:
        for case in cases:
            if progress:
                print(f"recording {case.name}", file=sys.stderr, flush=True)
            trial = record(recorder, replace(case, n=case.n and SMALL_N), small=True)
            found = trial if small else record(recorder, case)
            rows.append(prediction.case_row(found, gpus))
            doublings = _doublings(found.about["N"], sizes) if case.n else []
            if doublings:
                half = record(recorder, replace(case, n=found.about["N"] // 2), small=small)
                rows += [prediction.grown_row(found, half, p, gpus) for p in doublings]
        if primitives:
            kernels = prediction.kernel_rows(recorder, _levels(small), gpus)
        executed = sorted(recorder.executed)
    return {
        "prediction": True,
        "about": "predicted from recorded steps and assumptions; nothing here is measured on a GPU",
        "size": "small" if small else "full",
        "assumptions": prediction.assumptions(gpus),
        "executed_on_the_stand_in": executed,
        "cases": [{**row, "date": datetime.date.today().isoformat()} for row in rows],
        "founding": [] if small else prediction.founding_rows(rows, gpus),
        "kernels": kernels,
    }


def updated(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """The old predictions, with the cases and primitives that are new in their place.

    Raises:
        ComparisonError: they assume other things, or are of another size.
    """
    check_prediction(old)
    for what in ("assumptions", "size"):
        if old.get(what) != new[what]:
            raise ComparisonError(f"the file's {what} are others: predict all of it anew")

    def key(row: dict[str, Any]) -> tuple[Any, ...]:
        return row["case"], row["N"], row["dtype"]

    replaced = {key(row) for row in new["cases"]}
    cases = [row for row in old["cases"] if key(row) not in replaced] + new["cases"]
    executed = {*old["executed_on_the_stand_in"], *new["executed_on_the_stand_in"]}
    founding = [] if new["size"] == "small" else prediction.founding_rows(
        cases, prediction.chosen(list(new["assumptions"]["gpus"]))
    )  # fmt: skip
    return {
        **new, "cases": cases, "founding": founding, "kernels": new["kernels"] or old["kernels"],
        "executed_on_the_stand_in": sorted(executed),
    }  # fmt: skip


def _doublings(n: int, sizes: Sequence[int]) -> list[int]:
    """By how many the N is grown to the sizes, each rounded to a power of two of it."""
    return [p for p in ((size // n).bit_length() - 1 for size in sizes) if p > 0]


def _levels(small: bool) -> list[tuple[Any, str, bool]]:
    """As gpu_check.py has them."""
    known = prediction.kernel_calls()
    if small:
        return [(known.TINY, "float64", False)]
    return [
        *((level, "float64", False) for level in known.LEVELS),
        (known.LEVELS[0], "float32", False), (known.DEEP, "float64", True),
    ]  # fmt: skip


# ---- Text ------------------------------------------------------------------------------------


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.2g}" if value < 1 else f"{value:.3g}"


def founding_table(document: dict[str, Any]) -> str:
    """The founding tables' jobs beside goals and predictions."""
    names = list(document["assumptions"]["gpus"])
    head = ["matrix", "job", "192 cores, s", "goal, s", "form",
            *(f"{name} predicted, s" for name in names)]  # fmt: skip
    rows = [
        [f"{row['matrix']} {row['accuracy']}", row["job"], _seconds(row["founding"]),
         _seconds(row["goal"]), (row["scheme"] or "-").upper(),
         *(_seconds(row["predicted"][name]) for name in names)]
        for row in document["founding"]
    ]  # fmt: skip
    return markdown(head, rows)


def job_table(document: dict[str, Any]) -> str:
    """Every job and every phase of compress."""
    names = list(document["assumptions"]["gpus"])
    head = ["case", "N", "job", *(f"{name}, s" for name in names), "GPU at work", "host's own, s",
            "steps", "waits", "depth", "chain, s", "GB", "GF", "slowest"]  # fmt: skip
    rows = []
    for case in document["cases"]:
        for job, row in case["jobs"].items():
            rows.append(_line(case, job, row, names))
            for phase, part in row.get("phases", {}).items():
                rows.append(_line(case, f"- {phase}", part, names))
    return markdown(head, rows)


def _line(case: dict[str, Any], job: str, row: dict[str, Any], names: Sequence[str]) -> list[str]:
    first = names[0]
    share = row["busy"][first] / row["seconds"][first] if row["seconds"][first] else 0.0
    slowest = next(iter(row["slowest"][first]), "") if "slowest" in row else ""
    return [
        case["case"], f"{case['N']:,}", job, *(_seconds(row["seconds"][name]) for name in names),
        f"{share:.0%}", _seconds(row["host"]), str(row["steps"]), str(row["waits"]),
        str(row["depth"] or "-"), _seconds(row["chain"][first] if "chain" in row else None),
        f"{row['bytes'] / 1e9:.3g}", f"{row['flops'] / 1e9:.3g}", slowest,
    ]  # fmt: skip


def assumptions_text(gpus: Sequence[Gpu]) -> str:
    """Every assumption, a line each; what is the same on all GPUs once."""
    lines = ["assumed:"]
    for values in zip(*(gpu.assumptions() for gpu in gpus), strict=True):
        name, _, why = values[0]
        given = [f"{value:.4g}" for _, value, _ in values]
        if len(set(given)) == 1:
            given = given[:1]
        else:
            given = [f"{gpu.name} {value}" for gpu, value in zip(gpus, given, strict=True)]
        lines.append(f"  {name} = {', '.join(given)}: {why}")
    return "\n".join([*lines, "the model:", *(f"  {text}" for text in MODELLED)])


def describe(document: dict[str, Any], gpus: Sequence[Gpu]) -> str:
    """All of a document's text."""
    return "\n\n".join((
        "PREDICTED, NOT MEASURED", assumptions_text(gpus),
        "Founding tables: " + f"goals {prediction.COMPRESS_GOAL:g} times faster (compress) and"
        f" {prediction.OTHER_GOAL:g} times (the others) than GOFMM on 192 cores\n"
        + founding_table(document), job_table(document),
    ))  # fmt: skip


def comparison_text(gpu: str, rows: Sequence[dict[str, Any]]) -> str:
    """Predicted and measured side by side."""
    table = [
        [row["what"], f"{row['predicted']:.3g}", f"{row['measured']:.3g}", f"{row['ratio']:.2f}"]
        for row in rows
    ]
    head = ("what", f"{gpu} predicted", "measured", "measured / predicted")
    return markdown(head, table)


# ---- The command -----------------------------------------------------------------------------


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    names = [case.name for case in CASES]
    add("--cases", metavar="A,B", help=f"default all: {', '.join(names)}")
    add("--gpu", action="append", choices=GPUS, help="repeat it; default all")
    sizes = " ".join(map(str, KERNEL_N))
    add("--n", type=int, action="append", metavar="N",
        help=f"that the kernel matrix is grown to, default {sizes}")  # fmt: skip
    add("--size", choices=("full", "small"), default="full", help="small: a trial")
    add("--json", type=Path, metavar="FILE", help="write the predictions there")
    add("--update", type=Path, metavar="FILE", help="predict cases anew in a file that has others")
    add("--primitives", action="store_true",
        help="with --cases: also the primitives that gpu_check.py measures")  # fmt: skip
    add("--measured", type=Path, metavar="FILE", help="gpu_check.json to compare with")
    add("--predicted", type=Path, metavar="FILE", help=f"compared with it, default {RESULTS.name}")
    return parser


def _chosen_cases(text: str | None) -> list[Case]:
    if text is None:
        return list(CASES)
    wanted = [name.strip() for name in text.split(",")]
    known = {case.name: case for case in CASES}
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise ComparisonError(f"no such case: {', '.join(unknown)}; there are {', '.join(known)}")
    return [known[name] for name in wanted]


def main(argv: Sequence[str] | None = None) -> int:
    """The program."""
    parser = _parser()
    options = parser.parse_args(argv)
    gpus = prediction.chosen(options.gpu or list(GPUS))
    try:
        if options.predicted and not options.measured:
            raise ComparisonError("--predicted goes with --measured")
        if any(n < 2 for n in options.n or ()):
            raise ComparisonError("--n must be 2 or more")
        if options.measured:
            document = _read(options.predicted or RESULTS)
            check_prediction(document)
            print(comparison_text(*compared(document, _read(options.measured))))
            return 0
        cases = _chosen_cases(options.cases)
        before = _read(options.update) if options.update else None
        if before is not None:
            check_prediction(before)
    except (ComparisonError, OSError, ValueError) as error:
        parser.error(" ".join(str(error).split()))
    document = predict(
        cases, gpus, small=options.size == "small", sizes=options.n or KERNEL_N, progress=True,
        primitives=options.cases is None or options.primitives,
    )  # fmt: skip
    if before is not None:
        try:
            document = updated(before, document)
        except ComparisonError as error:
            parser.error(str(error))
    print(describe(document, gpus))
    for path in filter(None, (options.json, options.update)):
        path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
