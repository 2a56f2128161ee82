"""Figures of generated answers: those of the libraries, and what each makes of texts that are hard to read."""

from __future__ import annotations

import numpy as np
import pytest
from sacrebleu import CHRF, corpus_bleu

from lorafit.errors import DataError
from lorafit.evaluation.eval_result import SMALLEST, comparison, verdict
from lorafit.evaluation.eval_rows import Question, Rows
from lorafit.evaluation.scores import compare, confusion, is_json, rouge_l, text_scores
from lorafit.tasks.causal_lm import scores as scores_of
from lorafit.tasks.score import Score
from lorafit.tasks.sequences import SequenceLosses

ALL = ("exact_match", "rouge_l", "bleu", "chrf", "json_valid")


def questions(*references: str) -> tuple[Question, ...]:
    return tuple(Question(f"rows.jsonl:{index}", (1,), text) for index, text in enumerate(references, start=1))


def values(texts: list[str], *references: str, metrics: tuple[str, ...] = ALL, answer: str | None = None) -> dict:
    scores = text_scores(texts, questions(*references), metrics=metrics, answer=answer)
    return {name: score.value for name, score in scores.items()}


SENTENCES = ["the cat sat on the mat", "a dog ran in the park today", "it is what it is, he said", ""]
WANTED = ["the cat sat on a mat", "the dog ran in the park today", "it is what it was, she said", "not empty"]


def test_equal_texts_are_as_good_as_can_be() -> None:
    best = values(["a b c d e", '{"a": 1}'], "a b c d e", '{"a": 1}')
    assert best == {"exact_match": 1, "rouge_l": 1, "bleu": pytest.approx(100), "chrf": 100, "json_valid": 0.5}


def test_bleu_and_chrf_are_sacrebleus() -> None:
    found = values(SENTENCES, *WANTED)
    assert found["bleu"] == pytest.approx(corpus_bleu(SENTENCES, [WANTED]).score)
    each = [CHRF().sentence_score(text, [wanted]).score for text, wanted in zip(SENTENCES, WANTED, strict=True)]
    assert found["chrf"] == pytest.approx(np.mean(each))
    nothing = values(["", ""], "a b", "c d")
    assert (nothing["bleu"], nothing["rouge_l"], nothing["exact_match"]) == (0, 0, 0)


def test_rouge_l_is_the_f1_of_the_longest_common_subsequence() -> None:
    assert rouge_l("police kill the gunman", "the gunman police killed") == pytest.approx(2 * 2 / 8)
    assert rouge_l("Der Zug fährt", "der zug FÄHRT!") == 1  # any script; the usual library drops all but a-z
    rouge_score = pytest.importorskip("rouge_score.rouge_scorer", reason="rouge-score is not installed")
    scorer = rouge_score.RougeScorer(["rougeL"])
    for text, wanted in zip(SENTENCES, WANTED, strict=True):
        assert rouge_l(text, wanted) == pytest.approx(scorer.score(wanted, text)["rougeL"].fmeasure)


def test_the_answer_is_the_last_match_of_the_expression() -> None:
    texts = ["first #### 3, no: #### 4", "#### 5", "I do not know"]
    found = values(texts, "so #### 4", "so #### 6", "so #### 7", metrics=("exact_match",), answer=r"#### (\d+)")
    assert found == {"exact_match": pytest.approx(1 / 3)}
    whole = values(["yes", "no  way"], "yes", "no way", metrics=("exact_match",))
    assert whole == {"exact_match": 1}


def test_rows_without_the_answer_are_named() -> None:
    with pytest.raises(DataError, match=r"1 of 2 rows have no match of '\\\\d' in their answer \(rows.jsonl:2\)"):
        values(["1", "2"], "1", "two", metrics=("exact_match",), answer=r"\d")


@pytest.mark.parametrize(
    ("text", "valid"),
    [
        ('{"a": [1, null]}', True), ("3", True), ("", False), ("{'a': 1}", False), ('{"a": NaN}', False),
        ('{"a": 1} and more', False), ("[" * 100_000, False), ("1" * 5000, False), ('"a\nb"', False),
    ],
)  # fmt: skip
def test_only_one_whole_json_value_is_json(text: str, valid: bool) -> None:
    assert is_json(text) == valid


def test_json_may_be_cut_out_of_a_text() -> None:
    fenced = 'Here:\n```json\n{"a": 1}\n```\n'
    assert values([fenced], fenced, metrics=("json_valid",), answer=r"(?s)```json\n(.*)```") == {"json_valid": 1}


def test_classification_counts_labels_and_what_is_none() -> None:
    wanted = questions("cat", "cat", "dog", "dog", "dog", "cat")
    texts = ["cat", "dog", "dog", "dog", "a hamster", ""]
    scores = text_scores(texts, wanted, metrics=("classification",), answer=None)
    assert scores["accuracy"].value == pytest.approx(3 / 6)
    cat, dog = 2 * 1 / (1 + 3), 2 * 2 / (3 + 3)  # 2 right / (said + are)
    assert scores["macro_f1"].value == pytest.approx((cat + dog) / 2)
    table = confusion(texts, wanted, answer=None)
    assert table["labels"] == ["cat", "dog"]
    assert table["counts"] == [[1, 1, 1], [0, 2, 1]]
    assert table["f1"] == pytest.approx({"cat": cat, "dog": dog}, abs=1e-6)


def test_answers_that_are_all_different_are_no_labels() -> None:
    with pytest.raises(DataError, match="3 different answers in 3 rows are no labels"):
        values(["a", "b", "c"], "a", "b", "c", metrics=("classification",))


def rows_of(count: int) -> Rows:
    return Rows([None] * count, ("",) * count, np.full(count, 40), ("rows.jsonl",), ())


def losses(nll: np.ndarray) -> SequenceLosses:
    return SequenceLosses(nll.astype(float), np.full(len(nll), 10), np.full(len(nll), 5))


def test_the_verdict_says_how_much_and_how_sure() -> None:
    random = np.random.default_rng(0)
    base = losses(20 + random.standard_normal(400))
    better = losses(base.nll - 3.1 + random.standard_normal(400))
    scores = {name: scores_of(one, rows_of(400).text_bytes) for name, one in (("base", base), ("adapter", better))}
    found = comparison("rows.jsonl", scores)
    assert found.difference["loss"].verdict == "better"
    assert found.difference["loss"].mean == pytest.approx(-0.31, abs=0.01)
    said = verdict(found)
    assert said.startswith("adapter better by 0.3") and said.endswith("], 400 sequences")
    low, high = (float(part) for part in said.split("[")[1].split("]")[0].split(", "))
    assert 0.28 < low < 0.31 < high < 0.34
    assert found.figures["base"]["bits_per_byte"] == pytest.approx(base.nll.sum() / np.log(2) / (400 * 40))
    assert found.figures["base"]["perplexity"] == pytest.approx(np.exp(base.loss))
    turned = comparison("rows.jsonl", {"base": scores["adapter"], "adapter": scores["base"]})
    assert turned.difference["loss"].verdict == "worse"
    assert turned.difference["perplexity"].verdict == "worse"
    assert verdict(turned).startswith("adapter worse by 0.3")


def test_equal_models_have_no_difference_and_one_sequence_tells_none() -> None:
    base = scores_of(losses(np.linspace(10, 30, 50)), rows_of(50).text_bytes)
    found = comparison("rows.jsonl", {"base": base, "adapter": base})
    assert all((one.mean, one.low, one.high) == (0, 0, 0) for one in found.difference.values())
    assert verdict(found).startswith("no difference: adapter less base +0.000 nats [0.000, 0.000], 50 sequences")
    one = {"base": scores_of(losses(np.array([20.0])), rows_of(1).text_bytes),
           "adapter": scores_of(losses(np.array([10.0])), rows_of(1).text_bytes)}  # fmt: skip
    alone = comparison("rows.jsonl", one)
    assert (alone.difference["loss"].low, alone.difference["loss"].verdict) == (None, "no difference")
    assert verdict(alone) == "adapter and base cannot be told apart by 1 sequence: -1.000 nats there"


def test_a_difference_in_the_last_digits_is_none_however_sure() -> None:
    nll = np.linspace(10, 30, 50)
    scores = {
        "base": scores_of(losses(nll), rows_of(50).text_bytes),
        "adapter": scores_of(losses(nll + 1e-5), rows_of(50).text_bytes),
    }
    found = comparison("rows.jsonl", scores).difference["loss"]
    assert found.low is not None and 0 < found.low < SMALLEST
    assert found.verdict == "no difference"


def test_the_interval_of_bleu_is_about_the_corpus_not_the_mean_of_sentences() -> None:
    one, other = (
        text_scores(texts * 20, questions(*WANTED) * 20, metrics=("bleu",), answer=None)["bleu"]
        for texts in (["the cat", "a dog ran", "he said", "no"], SENTENCES)
    )
    found = compare(one, other, level=0.99)
    assert found.mean == pytest.approx(other.value - one.value)
    assert 0 < found.low < found.mean < found.high
    assert isinstance(one, Score)
