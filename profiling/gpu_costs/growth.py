"""The steps of a nested form at a larger N, from those recorded at two smaller ones.

With leaves as full as they are, 2^p times the rows mean p levels more. The lower half of the
levels, up to the middle one, gets 2^p times the nodes; the middle one comes once more for each new
level, on 2^(p - 1), ..., 1 times its nodes; those towards the root stay. Outside of levels all is
scaled; where half the N had fewer steps (a bisection's, a product's levels), as many are taken from
the middle of the phase once more for each new level. Ranks and samples stay what they were: that is
assumed, and true of HSS and FMM where they have reached max_rank or the matrix's own limit. What
grows faster than N (products of a dense matrix, all rows read of a small one) is not foreseen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from gpu_costs.steps import GRAPH, Step

_NO_LEVEL = 0


def _runs(steps: Sequence[Step]) -> list[list[Step]]:
    """Steps in a row of one phase outside of levels, or of one level."""
    runs: list[list[Step]] = []
    for step in steps:
        same = runs and runs[-1][0].level == step.level
        if same and (step.level != _NO_LEVEL or runs[-1][0].phase == step.phase):
            runs[-1].append(step)
        else:
            runs.append([step])
    return runs


def _counts(runs: Sequence[Sequence[Step]]) -> dict[tuple[str, int], int]:
    """Steps outside of levels by phase and its number among those of the phase."""
    counts: dict[tuple[str, int], int] = {}
    met: dict[str, int] = {}
    for run in runs:
        if run[0].level == _NO_LEVEL:
            phase = run[0].phase
            met[phase] = met.get(phase, -1) + 1
            counts[phase, met[phase]] = len(run)
    return counts


def _middle(run: Sequence[Step], count: int) -> list[Step]:
    start = (len(run) - count) // 2
    return list(run[start : start + count])


def grown(steps: Sequence[Step], half: Sequence[Step], doublings: int) -> list[Step]:
    """The steps of 2^doublings times the N.

    Args:
        steps: recorded at N.
        half: recorded at N / 2.
        doublings: of N, 0 or more.

    Raises:
        ValueError: doublings are negative.
    """
    if doublings < 0:
        raise ValueError(f"doublings must be 0 or more, got {doublings}")
    return _grown(steps, half, doublings) if doublings else list(steps)


def _grown(steps: Sequence[Step], half: Sequence[Step], doublings: int) -> list[Step]:
    runs = _runs(steps)
    fewer = _counts(_runs(half))
    levels = sorted({run[0].level for run in runs} - {_NO_LEVEL}, reverse=True)
    middle = levels[(len(levels) - 1) // 2] if levels else _NO_LEVEL
    graphs = {
        (step.phase, i): step.inside
        for i, step in enumerate(s for s in half if s.kind == GRAPH)
    }  # fmt: skip
    result: list[Step] = []
    met: dict[str, int] = {}
    graph = 0
    for run in runs:
        first = run[0]
        for step in run:
            if step.kind == GRAPH:
                before = graphs.get((step.phase, graph), step.inside)
                inside = _grown(step.inside, before, doublings)
                result.append(replace(step, inside=inside))
                graph += 1
            elif step.level == _NO_LEVEL or step.level >= middle:
                result.append(step.scaled(2**doublings))
            else:
                result.append(step)
        more: list[Step] = []
        if first.level == _NO_LEVEL:
            phase = first.phase
            met[phase] = met.get(phase, -1) + 1
            count = len(run) - fewer.get((phase, met[phase]), len(run))
            more = _middle(run, count) if 0 < count < len(run) else []
        elif first.level == middle:
            more = run
        for level in reversed(range(doublings)):
            result += [step.scaled(2**level) for step in more if step.kind != GRAPH]
    return result
