"""One evaluation, top to bottom: find what is compared, measure each model, say how they differ."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lorafit import operating_system
from lorafit.builders.adapter import base_of
from lorafit.builders.positions import positions
from lorafit.errors import DataError, HealthStop, RecipeError, RunDirError
from lorafit.evaluation.eval_result import Comparison, EvalResult, comparison, verdict
from lorafit.evaluation.eval_rows import Question, RowReader, Rows
from lorafit.evaluation.generate import answers, own_texts
from lorafit.evaluation.harness import Harness
from lorafit.evaluation.memory import scoring_tokens
from lorafit.evaluation.models import models
from lorafit.evaluation.scores import confusion, text_scores
from lorafit.evaluation.subject import Subject, read_subject
from lorafit.pulse import Counting, counting_unseen
from lorafit.recipe.sections import GenerateSection
from lorafit.storage.files import read_regular, write_file
from lorafit.tasks import TASKS, Task
from lorafit.tasks.pages import page
from lorafit.tasks.score import Score
from lorafit.tasks.sequences import SequenceLosses

logger = logging.getLogger(__name__)

RESULT = "eval.json"
SAMPLES = 10
"""Answers kept in the result where the command line does not say."""

SEED = 0
"""Of what the base writes unasked."""


def evaluate(
    run_or_adapter: str,
    *,
    data: Path | None = None,
    merged: Path | None = None,
    base: str | None = None,
    tasks: Sequence[str] = (),
    samples: int | None = None,
    fail_if_worse: bool = False,
    overrides: Sequence[str] = (),
    counting: Counting = counting_unseen,
    cache_dir: Path | None,
) -> EvalResult:
    """Measure the base, the adapter and, where there is one, the merged model on the same held-out rows.

    Leaves eval.json in a run directory when all is done. `samples` asks for answers even where the recipe does not.
    Raises RecipeError, DataError, ModelError, AdapterError and RunDirError before a model is loaded; HealthStop when a
    loss is not finite.
    """
    started = time.monotonic()
    subject = read_subject(run_or_adapter, data=data, merged=merged, base=base, overrides=overrides)
    section = subject.recipe.eval
    if subject.adapter.run_dir is not None:
        _refuse_unwritable(subject.adapter.run_dir.path / RESULT)
    if fail_if_worse and not section.compare_base:
        raise RecipeError("needs the base to compare with: leave eval.compare_base true", where="--fail-if-worse")
    harness = Harness([*section.tasks, *tasks], subject.tokenizer)
    material = _material(subject, samples=samples, cache_dir=cache_dir)
    measured: dict[str, _Measured] = {}
    for name, model in models(subject, with_base=section.compare_base):
        logger.info(f"{name}: measuring")
        measured[name] = _measure(name, model, material, harness, counting)
        if name == "base" and material.general is None:
            material = material.with_own_texts(model, subject.tokenizer)
        if material.general is not None:
            measured[name].general = _losses(name, model, material.general, material, counting)
        _say_speed(name, measured[name], material)
        del model  # the next is loaded when this one is gone
    result = _result(run_or_adapter, subject, material, measured, seconds=time.monotonic() - started)
    if subject.adapter.run_dir is not None:
        text = json.dumps(result.as_dict(), indent=2, ensure_ascii=False, allow_nan=False)
        write_file(subject.adapter.run_dir.path / RESULT, f"{text}\n")
    return result


def _refuse_unwritable(result: Path) -> None:
    """Where the result cannot be put, before anything is measured. Raises RunDirError."""
    if result.exists() and not result.is_file():
        raise RunDirError("is not a file, and the result goes there; move it away", where=str(result))
    if not os.access(result.parent, os.W_OK | os.X_OK):
        raise RunDirError(
            "may not be written, and the result goes there; copy the run to where you may", where=str(result.parent)
        )


@dataclass(frozen=True)
class _Material:
    """What every model is measured on."""

    task: Task
    rows: Rows
    general: Rows | None
    general_source: str | None
    questions: tuple[Question, ...]
    generate: GenerateSection | None
    samples: int
    pad_token_id: int
    stop_token_ids: frozenset[int]
    tokenizer: PreTrainedTokenizerBase
    positions: int | None
    """Where the models end, if they look positions up in a table."""

    def with_own_texts(self, base: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase) -> _Material:
        """With text of the base itself to see what the adapter has lost."""
        table = own_texts(base, tokenizer, seed=SEED)
        sizes = [len(str(tokenizer.decode(ids[1:], skip_special_tokens=True)).encode()) for ids in table["input_ids"]]
        own = Rows(table, ("",) * len(table), np.array(sizes, np.int64), (), ())
        length = len(table["input_ids"][0]) - 1
        source = f"{len(table)} texts of {length} tokens that the base wrote by itself"
        return _Material(**{**vars(self), "general": own, "general_source": source})


@dataclass
class _Measured:
    """What one model made of the material."""

    losses: SequenceLosses
    general: SequenceLosses | None = None
    texts: list[str] = field(default_factory=list)
    tasks: Mapping[str, Mapping[str, Score]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


def _material(subject: Subject, *, samples: int | None, cache_dir: Path | None) -> _Material:
    recipe = subject.recipe
    section = recipe.eval
    reader = RowReader(recipe, subject.base_files, subject.tokenizer, cache_dir=cache_dir)
    rows = reader.held_out()
    for warning in rows.warnings:
        logger.warning(warning)
    _warn_of_another_split(subject, reader)
    generate = section.generate or (GenerateSection() if samples else None)
    questions: tuple[Question, ...] = ()
    if generate is not None:
        answerable = rows if recipe.data.train_on != "all" else reader.held_out(answers_only=True)
        questions = _spread(reader.questions(answerable, stop_token_ids=subject.stop_token_ids), generate.limit)
        if not questions:
            message = "has no row with a prompt and an answer to compare with: leave eval.generate and --samples out"
            raise DataError(message, where="data.eval")
        text_scores(["" for _ in questions], questions, metrics=generate.metrics, answer=generate.answer)
    general = reader.general(section.general) if section.general else None
    logger.info(f"held-out rows: {len(rows.table):,} sequences, {len(questions):,} to answer")
    return _Material(
        task=TASKS[recipe.task],
        rows=rows,
        general=general,
        general_source=", ".join(general.files) if general else None,
        questions=questions,
        generate=generate,
        samples=SAMPLES if samples is None else samples,
        pad_token_id=int(subject.tokenizer.pad_token_id),
        stop_token_ids=subject.stop_token_ids,
        tokenizer=subject.tokenizer,
        positions=_last_position(subject, questions, generate),
    )


def _last_position(subject: Subject, questions: Sequence[Question], generate: GenerateSection | None) -> int | None:
    """Where answers end whatever `max_new_tokens` says; said of those that it is in the way of."""
    known = positions(subject.base_files.config)
    if known is None or not known.is_a_limit or generate is None:
        return None
    cut = sum(len(question.prompt) + generate.max_new_tokens - 1 > known.count for question in questions)
    if cut:
        logger.warning(
            f"eval.generate.max_new_tokens {generate.max_new_tokens} leads beyond the {known.count:,} "
            f"positions that the base has learned after {cut:,} of {len(questions):,} prompts; answers end there"
        )
    return known.count


def _spread(questions: tuple[Question, ...], limit: int | None) -> tuple[Question, ...]:
    count = len(questions) if limit is None else min(limit, len(questions))
    return tuple(questions[index * len(questions) // count] for index in range(count))


def _warn_of_another_split(subject: Subject, reader: RowReader) -> None:
    now = reader.split_fingerprint()
    if now is None or subject.adapter.run_dir is None:
        return
    manifest = json.loads(read_regular(subject.adapter.run_dir.manifest))
    if manifest.get("data", {}).get("fingerprint") != now:
        logger.warning(
            "data.eval_fraction: the data are not those of training (manifest.json), so rows that were "
            "trained on may be held out now; name other rows with --data FILE"
        )


def _measure(
    name: str, model: PreTrainedModel | PeftModel, material: _Material, harness: Harness, counting: Counting
) -> _Measured:
    seconds: dict[str, float] = {}
    with _timed(seconds, "scored"):
        losses = _losses(name, model, material.rows, material, counting)
    measured = _Measured(losses, seconds=seconds)
    if material.generate is not None:
        with _timed(seconds, "answered"):
            written = answers(
                model,
                [question.prompt for question in material.questions],
                stop_token_ids=material.stop_token_ids,
                pad_token_id=material.pad_token_id,
                max_new_tokens=material.generate.max_new_tokens,
                positions=material.positions,
                batch_size=material.generate.answers_at_once,
                counted=counting(f"{name}: answers", len(material.questions)),
            )
        decode = material.tokenizer.decode
        measured.texts = [
            str(decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)).strip() for ids in written
        ]
    measured.tasks = harness.scores(model)
    return measured


@contextmanager
def _timed(seconds: dict[str, float], what: str) -> Iterator[None]:
    started = time.monotonic()
    yield
    seconds[what] = time.monotonic() - started


def _losses(
    name: str, model: PreTrainedModel | PeftModel, rows: Rows, material: _Material, counting: Counting
) -> SequenceLosses:
    batch_tokens = scoring_tokens(base_of(model))
    losses = page(material.task.name).held_out(
        model,
        rows.table,
        pad_token_id=material.pad_token_id,
        batch_tokens=batch_tokens,
        counted=counting(f"{name}: sequences scored", len(rows.table)),
    )
    broken = np.flatnonzero(~np.isfinite(losses.nll))
    if len(broken):
        where = f" (first in {rows.where[broken[0]]})" if rows.where[broken[0]] else ""
        raise HealthStop(
            f"the loss of {len(broken)} of {len(losses.nll)} sequences is not finite{where}: the weights are broken, "
            "or too large for this type; try --set model.dtype=float32",
            where=name,
        )
    return losses


def _say_speed(name: str, measured: _Measured, material: _Material) -> None:
    rates = _rates(measured, material)
    said = [f"loss {measured.losses.loss:.4f}", f"{rates['scored']:,.1f} sequences/s"]
    if measured.texts:
        said += [f"{rates['answered']:,.2f} answers/s"]
    logger.info(f"{name}: {', '.join(said)}")
    empty = sum(not text for text in measured.texts)
    if empty:
        logger.warning(f"{name}: {empty} of {len(measured.texts)} answers are empty; they count as wrong")


def _rates(measured: _Measured, material: _Material) -> dict[str, float]:
    counts = {"scored": len(material.rows.table), "answered": len(material.questions)}
    return {what: round(counts[what] / max(seconds, 1e-9), 3) for what, seconds in measured.seconds.items()}


def _result(
    run: str, subject: Subject, material: _Material, measured: Mapping[str, _Measured], *, seconds: float
) -> EvalResult:
    held_out = comparison(
        ", ".join(material.rows.files),
        {name: _scores(one.losses, material.rows, material) for name, one in measured.items()},
    )
    generate = material.generate
    written = None
    if generate is not None:
        metrics = {"metrics": generate.metrics, "answer": generate.answer}
        texts = {
            name: text_scores(one.texts, material.questions, **metrics)  # type: ignore[arg-type]
            for name, one in measured.items()
        }
        written = comparison(held_out.source, texts)
    return EvalResult(
        run=run,
        base_model=subject.base_files.name,
        merged_model=None if subject.merged is None else str(subject.merged),
        held_out=held_out,
        answers=written,
        general=_general(material, measured),
        tasks=_tasks(measured),
        details={name: _details(one, material) for name, one in measured.items()} if generate else {},
        samples=_samples(material, measured),
        verdict=verdict(held_out, unit=material.task.unit),
        task=material.task,
        speed=_rates(measured["adapter"], material),
        peak_memory_bytes=_peak_memory_bytes(),
        seconds=round(seconds, 2),
    )


def _scores(losses: SequenceLosses, rows: Rows, material: _Material) -> dict[str, Score]:
    return page(material.task.name).scores(losses, rows.text_bytes)


def _general(material: _Material, measured: Mapping[str, _Measured]) -> Comparison | None:
    if material.general is None:
        return None
    scores = {
        name: _scores(one.general, material.general, material)
        for name, one in measured.items()
        if one.general is not None
    }
    return comparison(str(material.general_source), scores)


def _tasks(measured: Mapping[str, _Measured]) -> dict[str, Comparison]:
    names = next(iter(measured.values())).tasks
    return {task: comparison(task, {name: one.tasks[task] for name, one in measured.items()}) for task in names}


def _details(measured: _Measured, material: _Material) -> dict[str, Any]:
    generate = material.generate
    details: dict[str, Any] = {"empty": sum(not text for text in measured.texts)}
    if generate is not None and "classification" in generate.metrics:
        details["confusion"] = confusion(measured.texts, material.questions, answer=generate.answer)
    return details


def _samples(material: _Material, measured: Mapping[str, _Measured]) -> tuple[dict[str, Any], ...]:
    """Answers side by side, spread over the rows."""
    questions = material.questions
    count = min(material.samples, len(questions))
    chosen = [index * len(questions) // count for index in range(count)]
    return tuple(
        {
            "where": questions[index].where,
            "prompt": material.tokenizer.decode(list(questions[index].prompt), clean_up_tokenization_spaces=False),
            "reference": questions[index].reference,
            **{name: one.texts[index] for name, one in measured.items()},
        }
        for index in chosen
    )


def _peak_memory_bytes() -> int:
    """Peak of the GPU allocator, or of this process's memory on CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return operating_system.peak_bytes()
