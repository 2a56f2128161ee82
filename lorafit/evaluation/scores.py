"""The figures of what models wrote, and how those of two models differ."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any, NoReturn

import numpy as np
from sacrebleu import BLEU, CHRF

from lorafit.errors import DataError
from lorafit.evaluation.eval_rows import Question
from lorafit.evaluation.intervals import Interval, bootstrap
from lorafit.tasks.score import Floats, Score, ratio

MOST_LABELS = 50
"""Answers that still count as labels; of each there must be two rows in the mean."""


def compare(one: Score, other: Score, *, level: float) -> Interval:
    """The figure of `other` less that of `one`, on the same sequences. Equal values differ by nothing."""
    if np.array_equal(one.values, other.values):
        return Interval(0.0, 0.0, 0.0)
    width = one.values.shape[1]
    return bootstrap(
        np.concatenate([one.values, other.values], axis=1),
        lambda sums: one.figure(sums[:, width:]) - one.figure(sums[:, :width]),
        level=level,
    )


def text_scores(
    texts: Sequence[str], questions: Sequence[Question], *, metrics: Sequence[str], answer: str | None
) -> dict[str, Score]:
    """The metrics of `eval.generate` for what a model wrote. Raises DataError for references they cannot be of."""
    wanted = references(questions, answer)
    given = [found(answer, text) for text in texts]
    scores: dict[str, Score] = {}
    for metric in metrics:
        match metric:
            case "exact_match":
                same = [one is not None and one == other for one, other in zip(given, wanted, strict=True)]
                scores[metric] = _mean(same)
            case "rouge_l":
                scores[metric] = _mean([rouge_l(t, q.reference) for t, q in zip(texts, questions, strict=True)])
            case "bleu":
                scores[metric] = _bleu(texts, questions)
            case "chrf":
                chrf = CHRF()
                pairs = zip(texts, questions, strict=True)
                scores[metric] = _mean([chrf.sentence_score(t, [q.reference]).score for t, q in pairs])
            case "json_valid":
                parts = [_part(answer, text) for text in texts]
                scores[metric] = _mean([part is not None and is_json(part) for part in parts])
            case "classification":
                scores["accuracy"] = _mean([one == other for one, other in zip(given, wanted, strict=True)])
                scores["macro_f1"] = _macro_f1(given, wanted)
    return scores


def found(answer: str | None, text: str) -> str | None:
    """The answer in a text, its white space evened out; None where nothing matches."""
    part = _part(answer, text)
    return None if part is None else " ".join(part.split())


def _part(answer: str | None, text: str) -> str | None:
    """The last match, of that the first group if there is one."""
    if answer is None:
        return text
    matches = list(re.finditer(answer, text))
    if not matches:
        return None
    return (matches[-1][1] if matches[-1].re.groups else matches[-1][0]) or ""


def references(questions: Sequence[Question], answer: str | None) -> list[str]:
    """The answers of the rows. Raises DataError naming rows in which there is none to compare with."""
    wanted = [found(answer, question.reference) for question in questions]
    without = [question.where for question, text in zip(questions, wanted, strict=True) if not text]
    if without:
        what = "have an empty answer" if answer is None else f"have no match of {answer!r} in their answer"
        shown = ", ".join(without[:3]) + (", ..." if len(without) > 3 else "")
        mend = "remove them" if answer is None else "correct eval.generate.answer, or remove them"
        raise DataError(f"{len(without)} of {len(wanted)} rows {what} ({shown}): {mend}", where="data.eval")
    return [text or "" for text in wanted]


def labels_of(wanted: Sequence[str]) -> list[str]:
    """The labels of a classification. Raises DataError where the answers are too many different ones."""
    labels = sorted(set(wanted))
    if len(labels) > min(MOST_LABELS, len(wanted) / 2):
        raise DataError(
            f"{len(labels)} different answers in {len(wanted)} rows are no labels (at most {MOST_LABELS}, two rows of "
            "each): leave classification out of eval.generate.metrics, or find the label with eval.generate.answer",
            where="data.eval",
        )
    return labels


def confusion(texts: Sequence[str], questions: Sequence[Question], *, answer: str | None) -> dict[str, Any]:
    """Counts by the row's label and the model's, `other` for what is none; F1 of each label."""
    wanted = references(questions, answer)
    labels = labels_of(wanted)
    counts = np.zeros((len(labels), len(labels) + 1), int)
    for text, label in zip(texts, wanted, strict=True):
        said = found(answer, text)
        counts[labels.index(label), labels.index(said) if said in labels else len(labels)] += 1
    right, said_so, are = np.diag(counts), counts[:, : len(labels)].sum(axis=0), counts.sum(axis=1)
    f1 = 2 * right / np.maximum(1, said_so + are)
    return {
        "labels": labels,
        "counts": counts.tolist(),
        "f1": {label: round(float(value), 6) for label, value in zip(labels, f1, strict=True)},
    }


def _mean(values: Sequence[float | bool]) -> Score:
    scores = np.array(values, np.float64)
    return Score(np.stack([scores, np.ones_like(scores)], axis=1), ratio, True)


def _macro_f1(given: Sequence[str | None], wanted: Sequence[str]) -> Score:
    """Mean F1 over the labels: 2 right / (said + are), from counts of the three."""
    labels = labels_of(wanted)
    said = np.array([[one == label for label in labels] for one in given], np.float64)
    are = np.array([[one == label for label in labels] for one in wanted], np.float64)
    count = len(labels)

    def figure(sums: Floats) -> Floats:
        right, both = sums[:, :count], sums[:, count:]
        return (2 * right / np.maximum(both, 1)).mean(axis=1)

    return Score(np.concatenate([said * are, said + are], axis=1), figure, True)


def _bleu(texts: Sequence[str], questions: Sequence[Question]) -> Score:
    """sacrebleu's corpus BLEU, from the counts it makes of each sentence."""
    bleu = BLEU(effective_order=True)
    rows = []
    for text, question in zip(texts, questions, strict=True):
        made = bleu.sentence_score(text, [question.reference])
        rows.append([*made.counts, *made.totals, made.sys_len, made.ref_len])

    def figure(sums: Floats) -> Floats:
        return np.array([_corpus_bleu(row) for row in sums.astype(int).tolist()])

    return Score(np.array(rows, np.float64), figure, True)


def _corpus_bleu(row: list[int]) -> float:
    counts, totals, (sys_len, ref_len) = row[:4], row[4:8], row[8:]
    return float(BLEU.compute_bleu(counts, totals, sys_len, ref_len, smooth_method="exp").score)


def rouge_l(text: str, reference: str) -> float:
    """F1 of the longest common subsequence of words (Lin 2004), letters and digits of any script, case left out."""
    one, other = (re.findall(r"\w+", part.lower()) for part in (text, reference))
    if not one or not other:
        return 0.0
    row = [0] * (len(other) + 1)
    for word in one:
        diagonal = 0
        for index, wanted in enumerate(other, start=1):
            above = row[index]
            row[index] = diagonal + 1 if word == wanted else max(above, row[index - 1])
            diagonal = above
    return 2 * row[-1] / (len(one) + len(other))


def is_json(text: str) -> bool:
    """Whether all of the text is one JSON value."""

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is not JSON")

    try:
        json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError):
        return False
    return True
