"""What the audit counts, what it refuses, and what one epoch holds."""

import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from lorafit.data import scan
from lorafit.data.audit import side_audit
from lorafit.errors import DataError
from lorafit.recipe.sections import DataSection, Source
from support.sources import (
    CHATML,
    PAIR,
    TWO_TURNS,
    json_lines,
    prepare_problems,
    prepared,
    rows_of,
    scanned,
    section,
    trained_texts,
    word_tokenizer,
)
from support.tiny import byte_tokenizer, write_jsonl


def pairs(count: int, **more: Any) -> list[dict[str, Any]]:
    return [{"prompt": f"What is {i}?", "completion": f"It is {i}."} | more for i in range(count)]


def held_out(tmp_path: Path, train: list[Any], evaluation: list[Any], **settings: Any) -> DataSection:
    train_path, eval_path = write_jsonl(tmp_path / "a.jsonl", train), write_jsonl(tmp_path / "b.jsonl", evaluation)
    return DataSection(train=(Source(path=str(train_path)),), eval=(Source(path=str(eval_path)),), **settings)


def test_a_clean_audit_is_one_line(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()  # one token a byte, so that the counts can be done by hand
    data = section(write_jsonl(tmp_path / "a.jsonl", [PAIR, PAIR | {"completion": "Two"}]))
    made = prepared(data, tokenizer)
    context = len("user\nOne?\nassistant\n") + 3  # with the three special tokens of ChatML
    assert [len(row["input_ids"]) for row in made.train] == [context + 6, context + 5]  # answer, stop token, line end
    assert made.audit.summary() == "2 rows, 57 tokens, 19 % trained, longest 29, 0 lost"
    assert made.audit.warnings == ()


def test_large_counts_are_shortened() -> None:
    assert side_audit(7473, Counter({179: 7473}), Counter({109: 7473}), 0).summary() == (
        "7,473 rows, 1.34 M tokens, 61 % trained, longest 179, 0 lost"
    )


def test_the_length_table_gives_what_shares_of_the_rows_stay_within() -> None:
    side = side_audit(10, Counter(range(1, 11)), Counter({1: 9, 8: 1}), 0)
    assert (side.lengths, side.trained_lengths) == ((5, 9, 10, 10), (1, 1, 8, 8))


def test_over_long_rows_are_refused_with_their_lengths(tmp_path: Path) -> None:
    data = section(write_jsonl(tmp_path / "a.jsonl", [PAIR, PAIR | {"completion": "long " * 9}]))
    assert prepare_problems(data, byte_tokenizer(), max_length=40) == [
        "a.jsonl:2: 70 tokens, training.max_length is 40",
        "training.max_length: the longest row has 70 tokens; raise it to that, or set data.over_length: drop or "
        "truncate",
    ]
    assert len(prepared(data, byte_tokenizer(), max_length=70).train) == 2


def test_over_long_rows_are_dropped_and_counted(tmp_path: Path) -> None:
    rows = [PAIR, PAIR | {"completion": "long " * 9}]
    data = section(write_jsonl(tmp_path / "a.jsonl", rows), over_length="drop", max_lost_rows=0.5)
    made = prepared(data, byte_tokenizer(), max_length=40)
    assert [row["line"] for row in made.train] == [1]
    assert made.audit.summary().endswith("1 lost")
    assert made.audit.warnings[0].startswith("rows dropped because they are longer than training.max_length: 1, at ")
    problems = prepare_problems(data.model_copy(update={"max_lost_rows": 0.4}), byte_tokenizer(), max_length=40)
    assert problems[0].startswith("data.train: 1 of 2 rows (50.0%) cannot be trained on")


def test_over_long_rows_are_cut_and_counted(tmp_path: Path) -> None:
    rows = [PAIR, PAIR | {"completion": "long " * 9}, PAIR | {"prompt": "long " * 9}]
    data = section(write_jsonl(tmp_path / "a.jsonl", rows), over_length="truncate", max_lost_rows=0.5)
    made = prepared(data, byte_tokenizer(), max_length=40)
    assert [(row["line"], len(row["input_ids"])) for row in made.train] == [(1, 29), (2, 40)]
    lost, cut = made.audit.warnings
    assert lost.startswith("rows of which no answer is left within training.max_length: 1, at ") and ":3 " in lost
    assert cut.startswith("rows whose last answer is cut by training.max_length: 1, at ") and ":2 " in cut


def test_ids_without_an_embedding_are_refused(tmp_path: Path) -> None:
    data = section(write_jsonl(tmp_path / "a.jsonl", [PAIR]))
    tokenizer = byte_tokenizer()
    largest = max(prepared(data, tokenizer).train[0]["input_ids"])
    problems = prepare_problems(data, tokenizer, vocab_size=largest)
    assert problems == [
        f"a.jsonl:1: token {tokenizer.decode([largest])!r} has id {largest}, the base model has {largest} embeddings; "
        "use the model's own tokenizer, or remove the token"
    ]


def test_two_bos_tokens_are_refused(tmp_path: Path) -> None:
    tokenizer = word_tokenizer("{{ bos_token }}" + CHATML.replace("{% for", "{{ bos_token }}{% for", 1))
    data = section(write_jsonl(tmp_path / "a.jsonl", [PAIR]))
    assert prepare_problems(data, tokenizer) == [
        "a.jsonl:1: rows that begin with two BOS tokens; write it once: in the template or in the text"
    ]


def test_special_tokens_inside_text_are_reported(tmp_path: Path) -> None:
    rows = [PAIR, PAIR | {"prompt": "What does <|im_end|> do?"}]
    made = prepared(section(write_jsonl(tmp_path / "a.jsonl", rows)), word_tokenizer(CHATML))
    assert "special tokens inside their text" in made.audit.warnings[0]
    assert "a.jsonl:2 (<|im_end|>)" in made.audit.warnings[0]


def test_a_number_only_some_special_tokens_have_makes_no_special_token(tmp_path: Path) -> None:
    tokenizer = word_tokenizer(CHATML)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<extra_1>", "<extra_22>"]})
    rows = [PAIR | {"prompt": "<extra_7>"}, PAIR | {"prompt": "<extra_7><extra_22>"}]
    (warning,) = prepared(section(write_jsonl(tmp_path / "a.jsonl", rows)), tokenizer).audit.warnings
    assert ": 1, at " in warning and "a.jsonl:2 (<extra_22>)" in warning


def test_text_the_template_drops_is_reported(tmp_path: Path) -> None:
    template = CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}")
    messages = [{"role": "system", "content": "the question"}, *TWO_TURNS]
    data = section(write_jsonl(tmp_path / "a.jsonl", [{"messages": messages}]))
    (warning,) = prepared(data, word_tokenizer(template)).audit.warnings
    assert "the template drops a message's text, a call or a tool: 1" in warning
    assert "(the text of message 1, system; data.system: merge puts the system text" in warning
    made = prepared(data.model_copy(update={"system": "merge"}), word_tokenizer(template))
    assert made.audit.warnings == ()


def test_text_that_a_template_only_quotes_or_trims_is_not_called_dropped(tmp_path: Path) -> None:
    template = CHATML.replace("{{ m.content }}", "{{ m.content.strip() | tojson }}")
    rows = [{"prompt": ' say "hi"\n\nü ', "completion": 'say "ho"'}]
    made = prepared(section(write_jsonl(tmp_path / "a.jsonl", rows)), word_tokenizer(template))
    assert made.audit.warnings == ()


@pytest.mark.parametrize(
    ("message", "drop"),
    [
        ({"role": "assistant", "content": "<think>hm</think>one"}, ("m.content", "m.content.split('</think>')[-1]")),
        ({"role": "assistant", "content": "x", "tool_calls": [{"function": {"name": "weather"}}]}, ("", "")),
    ],
)
def test_a_row_of_which_the_template_drops_part_of_the_answer_is_lost(
    tmp_path: Path, message: dict[str, Any], drop: tuple[str, str]
) -> None:
    rows = [{"messages": [{"role": "user", "content": "one?"}, message]}]
    data = section(write_jsonl(tmp_path / "a.jsonl", rows))
    problems = prepare_problems(data, word_tokenizer(CHATML.replace(*drop)))
    assert problems[0] == "data.train: none of the 1 rows can be trained on"
    assert problems[1].startswith("data.train: rows of which the template drops part of an answer: 1, at a.jsonl:1")


def test_a_prompt_that_changes_once_it_is_answered_is_lost(tmp_path: Path) -> None:
    template = "{{ messages | length }}" + CHATML.replace("<|im_start|>assistant", "{{ messages | length }} says:")
    data = section(write_jsonl(tmp_path / "a.jsonl", [PAIR]))
    problems = prepare_problems(data, word_tokenizer(template))
    assert "whose prompt is rendered differently once the answer follows: 1" in problems[1]


def test_an_answer_is_set_after_the_prompt_that_generation_sees_where_that_changes(tmp_path: Path) -> None:
    tokenizer = word_tokenizer("{{ messages | length }}" + CHATML)
    made = prepared(section(write_jsonl(tmp_path / "a.jsonl", [PAIR])), tokenizer)
    assert trained_texts(made, tokenizer) == [["Two.<|im_end|>\n"]]
    assert str(tokenizer.decode(made.train[0]["input_ids"])).startswith("1<|im_start|>user\nOne?<|im_end|>")
    assert "answers set after the prompt that generation sees" in made.audit.warnings[0]


def test_a_generation_prompt_that_the_conversation_lacks_is_reported(tmp_path: Path) -> None:
    template = CHATML.replace("assistant\n{% endif %}", "assistant\n<think></think>{% endif %}")
    made = prepared(section(write_jsonl(tmp_path / "a.jsonl", [PAIR])), word_tokenizer(template))
    assert "follow another text in training than in generation: 1" in made.audit.warnings[0]
    assert len(made.train) == 1


def test_duplicates_are_reported_with_their_lines(tmp_path: Path) -> None:
    found = scanned(tmp_path / "a.jsonl", json_lines(PAIR, *pairs(3), PAIR, PAIR))
    (warning,) = found.warnings
    assert warning.startswith("rows that are duplicates of earlier ones: 2, at ")
    assert "a.jsonl:5, " in warning and "a.jsonl:6;" in warning


def test_eval_rows_that_are_also_in_train_are_reported(tmp_path: Path) -> None:
    found = scan(held_out(tmp_path, [PAIR, *pairs(2)], [PAIR, *pairs(4)[2:]]), seed=0)
    (warning,) = found.warnings
    assert warning.startswith("eval rows that are also in train: 1, at ")
    assert "b.jsonl:1 (" in warning and "a.jsonl:1);" in warning


def test_eval_rows_that_are_in_train_but_for_case_and_space_are_reported_with_their_pair(tmp_path: Path) -> None:
    almost = {"prompt": f"  {PAIR['prompt'].upper()}\n", "completion": PAIR["completion"].replace(" ", "  ")}
    found = scan(held_out(tmp_path, [*pairs(2), PAIR], [almost, *pairs(4)[2:]]), seed=0)
    (warning,) = found.warnings
    assert warning.startswith("eval rows that are also in train but for case and white space: 1, at ")
    assert "b.jsonl:1 (" in warning and "a.jsonl:3);" in warning


def test_chats_of_the_same_words_that_call_otherwise_are_not_alike(tmp_path: Path) -> None:
    def call(name: str) -> dict[str, Any]:
        calls = [{"type": "function", "function": {"name": name, "arguments": {}}}]
        return {
            "messages": [{"role": "user", "content": "Go"}, {"role": "assistant", "content": "", "tool_calls": calls}]
        }

    found = scan(held_out(tmp_path, [call("north"), call("west")], [call("south")]), seed=0)
    assert not any("but for case" in warning for warning in found.warnings)


def essays(*seeds: int, opening: str = "") -> list[dict[str, str]]:
    """Rows of a hundred words, of which two have no run of five in common, behind the same opening."""
    draws = (random.Random(seed) for seed in seeds)
    return [
        {"prompt": opening + "Go on.", "completion": " ".join(f"w{draw.randrange(3000)}" for _ in range(100))}
        for draw in draws
    ]


def test_eval_rows_that_are_nearly_a_row_of_train_are_reported_with_their_pair(tmp_path: Path) -> None:
    words = essays(2)[0]["completion"].split()
    reworded = {"prompt": "Start anew.", "completion": " ".join(["Well,", *words[:40], "changed", *words[41:], "End."])}
    half = {"prompt": "Go on.", "completion": " ".join(words[:50] + essays(9)[0]["completion"].split()[:50])}
    found = scan(held_out(tmp_path, essays(1, 2, 3), [*essays(4), half, reworded]), seed=0)
    (warning,) = found.warnings
    assert warning.startswith("eval rows of which nearly all is also in one row of train: 1, at ")
    assert "b.jsonl:3 (" in warning and "a.jsonl:2);" in warning


def test_what_all_rows_begin_with_makes_none_nearly_another(tmp_path: Path) -> None:
    opening = essays(0)[0]["completion"] * 3
    short = [row | {"completion": row["completion"][:40]} for row in essays(3, 4, opening=opening)]
    found = scan(held_out(tmp_path, essays(1, 2, opening=opening), short), seed=0)
    assert not found.warnings


def test_an_eval_set_that_is_all_in_train_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.eval: every eval row is also in train"):
        scan(held_out(tmp_path, pairs(3), pairs(2)), seed=0)


def test_the_eval_side_is_audited_too(tmp_path: Path) -> None:
    data = held_out(tmp_path, pairs(3), [PAIR, PAIR | {"completion": "long " * 20}])
    with pytest.raises(DataError, match=r"b\.jsonl:2: 125 tokens"):
        prepared(data, byte_tokenizer(), max_length=60)
    made = prepared(
        data.model_copy(update={"over_length": "drop", "max_lost_rows": 0.5}), byte_tokenizer(), max_length=60
    )
    assert made.eval is not None and len(made.eval) == 1
    assert made.audit.summary().endswith("; held out: 1 rows, 29 tokens, 21 % trained, longest 29, 1 lost")


def test_a_share_is_held_out_by_seed_with_duplicates_on_one_side(tmp_path: Path) -> None:
    rows = pairs(50) + pairs(50)
    data = section(write_jsonl(tmp_path / "a.jsonl", rows), eval_fraction=0.2)
    first, again, other = scan(data, seed=1), scan(data, seed=1), scan(data, seed=2)
    assert (first.train_rows, first.eval_rows) == (80, 20)
    assert {row.prompt for row in rows_of(first)}.isdisjoint(row.prompt for row in rows_of(first, "eval"))
    assert list(first.rows()) == list(again.rows())
    assert rows_of(first, "eval") != rows_of(other, "eval")


def test_a_share_that_leaves_nothing_to_train_on_is_refused(tmp_path: Path) -> None:
    data = section(write_jsonl(tmp_path / "a.jsonl", [PAIR, PAIR]), eval_fraction=0.1)
    with pytest.raises(DataError, match="leaves none to train on"):
        scan(data, seed=0)


def test_weights_say_how_often_the_rows_of_a_source_are_seen(tmp_path: Path) -> None:
    more, less = pairs(10), [row | {"prompt": row["prompt"].upper()} for row in pairs(10)]
    paths = [write_jsonl(tmp_path / name, rows) for name, rows in (("a.jsonl", more), ("b.jsonl", less))]
    sources = (Source(path=str(paths[0]), weight=2.5), Source(path=str(paths[1]), weight=0.3))
    data = DataSection(train=sources)
    assert scan(data, seed=0).train_rows == 25 + 3
    tokenizer = word_tokenizer(CHATML)
    made = prepared(data, tokenizer)
    lines = [(row["file"], row["line"]) for row in made.train]
    assert [sum(file == number for file, _ in lines) for number in (0, 1)] == [25, 3]
    assert {lines.count((0, line)) for line in range(1, 11)} == {2, 3}
    assert made.audit.train.rows == 28 and made.audit.train.tokens == sum(len(row["input_ids"]) for row in made.train)
    assert lines == [(row["file"], row["line"]) for row in prepared(data, tokenizer).train]


def test_hub_data_sets_are_named_by_scan_and_not_reached(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", pairs(2))
    found = scan(DataSection(train=(Source(path=str(path)), Source(hub="openai/gsm8k", name="main"))), seed=0)
    assert found.train_rows == 2 and found.skipped_hub == ("openai/gsm8k",)
    assert "openai/gsm8k" in found.summary()


def test_a_hub_data_set_is_read_through_datasets(tmp_path: Path) -> None:
    # A directory of files is to `datasets` what a repository on the Hub is, and needs no network.
    (tmp_path / "set").mkdir()
    write_jsonl(tmp_path / "set" / "train.jsonl", pairs(4))
    data = DataSection(train=(Source(hub=str(tmp_path / "set"), limit=3),))
    made = prepared(data, word_tokenizer(CHATML))
    assert [row["line"] for row in made.train] == [1, 2, 3]
    assert made.files == (f"hub:{tmp_path / 'set'}[train]",)


@pytest.mark.parametrize("change", [{"hub": "nobody/nothing"}, {"split": "trian"}, {"name": "other"}])
def test_a_hub_data_set_that_cannot_be_loaded_is_one_line(tmp_path: Path, change: dict[str, Any]) -> None:
    (tmp_path / "set").mkdir()
    write_jsonl(tmp_path / "set" / "train.jsonl", pairs(4))
    data = DataSection(train=(Source(**({"hub": str(tmp_path / "set")} | change)),))
    with pytest.raises(DataError) as error:
        prepared(data, word_tokenizer(CHATML))
    (problem,) = error.value.problems
    assert "cannot be loaded: " in problem.message and "\n" not in problem.message


@pytest.mark.parametrize("weight", [0.3, 2.5])
def test_rows_that_are_held_out_of_a_weighted_source_are_measured_once(tmp_path: Path, weight: float) -> None:
    (tmp_path / "a.jsonl").write_text(json_lines(*({"prompt": f"{n}?", "completion": "a"} for n in range(40))))
    data = section(tmp_path / "a.jsonl", source={"weight": weight}, eval_fraction=0.25)
    made = prepared(data, word_tokenizer(CHATML))
    assert made.eval is not None and sorted(set(made.eval["line"])) == sorted(made.eval["line"])
    assert (len(made.train), len(made.eval)) == (int(30 * weight), 10)
