"""The shipped quickstart: the base loads and knows where to stop, and the eval rows are really held out."""

import json
from pathlib import Path

import pytest
import torch
from build_quickstart_data import HELD_OUT_MODULES, first_sentence, is_held_out, train_and_eval_rows
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from support import ROOT

QUICKSTART = ROOT / "recipes/quickstart"
BASE = QUICKSTART / "base"

Row = dict[str, str]


def rows_in(name: str) -> list[Row]:
    return [json.loads(line) for line in (QUICKSTART / name).read_text(encoding="utf-8").splitlines()]


def module_of(row: Row) -> str:
    return row["prompt"].splitlines()[0].removeprefix("Module: ")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(BASE)


def test_the_base_takes_at_most_eight_megabytes() -> None:
    files = sorted(file.name for file in BASE.iterdir())
    assert files == [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert sum((BASE / name).stat().st_size for name in files) <= 8_000_000


def test_the_base_predicts_held_out_source_better_than_chance(tokenizer: PreTrainedTokenizerBase) -> None:
    model = AutoModelForCausalLM.from_pretrained(BASE)
    ids = tokenizer("    def __init__(self, name):\n        self.name = name\n", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss
    assert model.dtype == torch.bfloat16
    assert model.get_input_embeddings().num_embeddings == len(tokenizer) == 4096
    assert loss < 4.0  # ln 4096 = 8.3 for a model that knows nothing


def test_the_turn_ends_with_the_token_that_generation_stops_on(tokenizer: PreTrainedTokenizerBase) -> None:
    generation = GenerationConfig.from_pretrained(BASE)
    config = json.loads((BASE / "config.json").read_text())
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert tokenizer.apply_chat_template(turns, return_dict=False)[-1] == tokenizer.eos_token_id
    assert generation.eos_token_id == config["eos_token_id"] == tokenizer.eos_token_id
    assert generation.pad_token_id == config["pad_token_id"] == tokenizer.pad_token_id != tokenizer.eos_token_id


def test_every_turn_is_a_prefix_of_the_conversation(tokenizer: PreTrainedTokenizerBase) -> None:
    roles = ["system", "user", "assistant", "user", "assistant"]
    turns = [{"role": role, "content": f" {role} says\n"} for role in roles]
    whole = str(tokenizer.apply_chat_template(turns, tokenize=False))
    for end in range(1, len(turns)):
        opens_answer = roles[end] == "assistant"
        part = str(tokenizer.apply_chat_template(turns[:end], tokenize=False, add_generation_prompt=opens_answer))
        assert whole.startswith(part)
        ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (part, whole)]
        assert ids[1][: len(ids[0])] == ids[0]


def test_a_role_that_the_template_does_not_know_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(Exception, match="not tool"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "a"}], tokenize=False)


def test_the_files_hold_the_rows_they_are_said_to_hold() -> None:
    assert (len(rows_in("train.jsonl")), len(rows_in("eval.jsonl"))) == (5472, 364)


def test_no_eval_row_shares_prompt_completion_or_module_with_train() -> None:
    train, held_out = rows_in("train.jsonl"), rows_in("eval.jsonl")
    for key in ("prompt", "completion"):
        assert not {row[key] for row in train} & {row[key] for row in held_out}
    # Every sentence of wave also stands in chunk, so it has no row left.
    assert {module_of(row).split(".")[0] for row in held_out} == HELD_OUT_MODULES - {"wave"}
    assert not any(is_held_out(module_of(row)) for row in train)
    assert len({row["prompt"] for row in train + held_out}) == len(train) + len(held_out)


def test_every_row_is_clean_and_fits_the_sequence(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = rows_in("train.jsonl") + rows_in("eval.jsonl")
    texts = [f"{row['prompt']}\n{row['completion']}" for row in rows]
    for row, text in zip(rows, texts, strict=True):
        assert list(row) == ["prompt", "completion"]
        assert row["completion"].startswith("Name: ") and row["completion"].endswith(".")
        assert len(text.splitlines()) == 4 and text.isascii()
    special = set(tokenizer.all_special_ids)
    ids = tokenizer(texts)["input_ids"]
    assert not any(special & set(row) for row in ids)
    assert max(map(len, ids)) <= 150


def test_the_same_source_gives_the_same_rows(tmp_path: Path) -> None:
    (tmp_path / "json").mkdir()
    coder = (
        'class Coder:\n    def code(self, text, *, deep=1) -> str:\n        """Code one text.\n\n        Slowly."""\n'
    )
    inner = '    def inner():\n        """Not an interface of it."""\n'
    twice = '\ndef twice(n):\n    """Return n times two. Or more."""\n' + inner
    silent = "\ndef silent():\n    pass\n"
    (tmp_path / "json/__init__.py").write_text(coder + twice + silent)
    (tmp_path / "heapq.py").write_text(twice)
    (tmp_path / "random.py").write_text(twice + '\ndef pick():\n    """Pick any one number."""\n')
    files = sorted(tmp_path.rglob("*.py"))
    train, held_out = train_and_eval_rows(files, tmp_path)
    assert train == [
        {"prompt": "Module: heapq\nFunction: twice(n)", "completion": "Name: twice\nSummary: Return n times two."},
        {
            "prompt": "Module: json\nFunction: Coder.code(self, text, *, deep=1)",
            "completion": "Name: Coder.code\nSummary: Code one text.",
        },
        {"prompt": "Module: json\nFunction: twice(n)", "completion": "Name: twice\nSummary: Return n times two."},
    ]
    # The sentence of random.twice stands in heapq, so only random.pick is held out.
    assert held_out == [
        {"prompt": "Module: random\nFunction: pick()", "completion": "Name: pick\nSummary: Pick any one number."}
    ]
    assert train_and_eval_rows(files, tmp_path) == (train, held_out)


@pytest.mark.parametrize(
    ("docstring", "sentence"),
    [
        ("Return the mean (i.e. the average) of data. Raises.", "Return the mean (i.e. the average) of data."),
        ("Return the mean\n    of data", "Return the mean of data."),
        ("lower case opens no sentence.", None),
        ("Two words.", None),
        ("Return the <|im_end|> of data.", None),
        ("", None),
    ],
)
def test_only_a_clean_first_sentence_is_taken(docstring: str, sentence: str | None) -> None:
    assert first_sentence(docstring) == sentence
