"""From runs of a few layers to the whole depth: what lies in memory at each place of a step is affine in it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from lorafit.planning.allocator import most_reserved
from lorafit.planning.fake_step import Batch, FakeRun, Measured
from lorafit.planning.roofline import Work
from lorafit.planning.storage_tracker import Moment

DEPTH_OF_REPLAY = 8
"""Layers of the deepest run, whose allocations are replayed: what is reserved beyond them grows evenly, if at all."""


@dataclass(frozen=True)
class WholeStep:
    """A step of the model in its whole depth."""

    peak: Moment
    """The most that is allocated, and what it is made of."""
    label: str
    """Where in the step that is: `forward 31`, `head backward`, `optimizer` ..."""
    reserved: int
    work: dict[str, Counter[Work]]


@dataclass(frozen=True)
class _Deeper:
    """A run with one more layer, and how many of its kind the base run leaves out."""

    measured: Measured
    count: int


def whole_step(
    run: FakeRun,
    batch: Batch,
    *,
    eval_batch: Batch | None,
    passes: int,
    replay: bool,
    expandable: bool = True,
) -> WholeStep:
    """A step from as few layers as show every kind.

    Each further layer of a kind adds the same at each place: the first and the last layer of each kind are places of
    their own, and what is added comes between them. `replay` runs some layers more to see what is reserved; without
    it, `reserved` is what is allocated. `expandable`: with the allocator's expandable segments, as `train` runs.
    """
    sample = run.layers.sample(ends=run.ends)
    base = run.step(sample.base, batch, eval_batch=eval_batch, passes=passes)
    deeper = [
        _Deeper(run.step(sorted([*sample.base, extra]), batch, eval_batch=eval_batch, passes=passes), count)
        for extra, count in sample.extras
    ]
    moments = {label: _moment(label, base, deeper) for label in base.moments}
    label = max(moments, key=lambda label: moments[label].total)
    overhead = 0
    if replay:
        indices = _spread(sample.base, depth=len(run.layers.all))
        longer = (
            run.step(indices, batch, eval_batch=eval_batch, passes=passes) if len(indices) > len(base.layers) else base
        )
        overhead = _overhead(base, longer, depth=len(run.layers.all), expandable=expandable)
    return WholeStep(moments[label], label, moments[label].total + overhead, _work(base, deeper))


def begin_replay(run: FakeRun, batch: Batch, *, eval_batch: Batch | None, passes: int) -> None:
    """Begin the longest run of `whole_step`, beside those that it makes first."""
    base = run.layers.sample(ends=run.ends).base
    indices = _spread(base, depth=len(run.layers.all))
    if len(indices) > len(base):
        run.begin(indices, batch, eval_batch=eval_batch, passes=passes)


def _moment(label: str, base: Measured, deeper: Sequence[_Deeper]) -> Moment:
    start = base.moments[label]
    total, parts = start.total, Counter(start.parts)
    for one in deeper:
        moment = one.measured.moments[label]
        total += one.count * (moment.total - start.total)
        for part in {*moment.parts, *start.parts}:
            parts[part] += one.count * (moment.parts.get(part, 0) - start.parts.get(part, 0))
    return Moment(total, {part: size for part, size in parts.items() if size})


def _work(base: Measured, deeper: Sequence[_Deeper]) -> dict[str, Counter[Work]]:
    work = {kind: Counter(done) for kind, done in base.work.items()}
    for one in deeper:
        for kind, done in one.measured.work.items():
            for what in {*done, *base.work[kind]}:
                work[kind][what] += one.count * (done[what] - base.work[kind][what])
    return work


def _spread(base: Sequence[int], *, depth: int) -> list[int]:
    """The base's layers and the first of the others, DEPTH_OF_REPLAY in all."""
    others = [index for index in range(depth) if index not in base]
    return sorted([*base, *others[: max(0, DEPTH_OF_REPLAY - len(base))]])


def _overhead(base: Measured, longer: Measured, *, depth: int, expandable: bool) -> int:
    """Reserved beyond what is allocated, at the whole depth: by what it grew from the shorter to the longer run.

    In expandable segments it does not grow: over 4 to 80 layers of Llama 3 70B it went up and down around one figure.
    """
    first, last = (most_reserved(one.trace, expandable=expandable) - one.most_allocated for one in (base, longer))
    run_deeper = len(longer.layers) - len(base.layers)
    growth = max(0, last - first) / run_deeper if run_deeper and not expandable else 0.0
    return int(max(first, last) + growth * (depth - len(longer.layers)))
