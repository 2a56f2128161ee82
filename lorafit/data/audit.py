"""What the tokens of a run are: counts, lengths, and everything that was found."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import Any

from lorafit.data.findings import Findings

QUANTILES = ((0.5, "half of the rows"), (0.9, "90 %"), (0.99, "99 %"), (1.0, "all"))


@dataclass(frozen=True)
class SideAudit:
    """Counts of the train or the eval side, as trained in one epoch."""

    rows: int
    """Rows of the files; weights included."""
    sequences: int
    """Sequences they became: more than rows when a template needs a row split."""
    tokens: int
    trained_tokens: int
    longest: int
    lost: int
    lengths: tuple[int, ...]
    """Tokens that half, 90 %, 99 % and all of the sequences stay within."""
    trained_lengths: tuple[int, ...]
    """The same for their trained tokens."""

    def summary(self) -> str:
        """One line: "7,473 rows, 1.34 M tokens, 61 % trained, longest 512, 0 lost"."""
        split = f" in {self.sequences:,} sequences" if self.sequences != self.rows else ""
        share = self.trained_tokens / self.tokens if self.tokens else 0.0
        return (
            f"{self.rows:,} rows{split}, {_short(self.tokens)} tokens, {share:.0%} trained, ".replace("%", " %")
            + f"longest {self.longest:,}, {self.lost:,} lost"
        )


def side_audit(rows: int, lengths: Counter[int], trained: Counter[int], lost: int) -> SideAudit:
    """The counts of one side. `lengths`: how many sequences have so many tokens; `trained`: so many trained ones."""
    return SideAudit(
        rows=rows,
        sequences=lengths.total(),
        tokens=sum(length * count for length, count in lengths.items()),
        trained_tokens=sum(length * count for length, count in trained.items()),
        longest=max(lengths, default=0),
        lost=lost,
        lengths=_quantiles(lengths),
        trained_lengths=_quantiles(trained),
    )


def _quantiles(counts: Counter[int]) -> tuple[int, ...]:
    """The smallest number that at least each share of QUANTILES stays within."""
    if not counts:
        return tuple(0 for _ in QUANTILES)
    ordered = sorted(counts)
    up_to = list(accumulate(counts[number] for number in ordered))
    total = up_to[-1]
    return tuple(ordered[bisect_left(up_to, max(1, -int(-share * total // 1)))] for share, _ in QUANTILES)


@dataclass(frozen=True)
class Audit:
    """Both sides and the findings."""

    train: SideAudit
    eval: SideAudit | None
    train_findings: Findings
    eval_findings: Findings
    files: tuple[str, ...]

    @property
    def warnings(self) -> tuple[str, ...]:
        """One sentence per kind, lost rows first."""
        return tuple(
            sentence
            for findings in (self.train_findings, self.eval_findings)
            for level in ("lost", "warning")
            for sentence in findings.sentences(level, self.files)
        )

    def summary(self) -> str:
        """One line for the training rows; the held-out ones after it."""
        held_out = f"; held out: {self.eval.summary()}" if self.eval else ""
        return self.train.summary() + held_out

    def table(self) -> str:
        """Lengths in tokens, one line per share of the rows."""
        sides = [("train", self.train)] + ([("eval", self.eval)] if self.eval else [])
        lines = [f"{'':6} {'rows':>18} {'tokens':>8} {'trained':>8}"]
        for name, side in sides:
            for index, (_, label) in enumerate(QUANTILES):
                tokens, trained = side.lengths[index], side.trained_lengths[index]
                lines.append(f"{name if index == 0 else '':6} {label:>18} {tokens:>8,} {trained:>8,}")
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """For JSON; `from_dict` reads it back."""
        return {
            "train": asdict(self.train),
            "eval": asdict(self.eval) if self.eval else None,
            "train_findings": self.train_findings.as_dict(),
            "eval_findings": self.eval_findings.as_dict(),
            "files": list(self.files),
        }

    @classmethod
    def from_dict(cls, facts: dict[str, Any], *, files: tuple[str, ...]) -> Audit:
        """What `as_dict` wrote, with the files named as they are named now."""
        return cls(
            train=_side(facts["train"]),
            eval=_side(facts["eval"]) if facts["eval"] else None,
            train_findings=Findings.from_dict(facts["train_findings"]),
            eval_findings=Findings.from_dict(facts["eval_findings"]),
            files=files,
        )


def _side(facts: dict[str, Any]) -> SideAudit:
    lengths = {name: tuple(facts[name]) for name in ("lengths", "trained_lengths")}
    return SideAudit(**{**facts, **lengths})


def _short(count: int) -> str:
    """1,340,000 as `1.34 M`."""
    for unit, name in ((10**9, "G"), (10**6, "M"), (10**4, "k")):
        if count >= unit:
            scale = 10**3 if name == "k" else unit
            return f"{count / scale:.3g} {name}"
    return f"{count:,}"
