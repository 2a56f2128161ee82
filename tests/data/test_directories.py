"""A directory is not a heap of files: what describes it is no data, and the rows of another split are never trained."""

import gzip
import json
from pathlib import Path

import datasets
import pyarrow
import pytest

from lorafit.data import scan
from lorafit.data.listing import listing
from lorafit.errors import DataError
from lorafit.recipe.sections import DataSection, Source
from support.sources import PAIR, json_lines, rows_of, section

TRAIN = json_lines(PAIR)
HELD_OUT = json_lines({"prompt": "Held?", "completion": "Out."})


def files(directory: Path, *names: str) -> Path:
    """A directory whose files of held-out splits hold other rows."""
    for name in names:
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(TRAIN if "train" in name else HELD_OUT)
    return directory


def problem(data: DataSection) -> str:
    """The one thing that is wrong."""
    with pytest.raises(DataError) as error:
        scan(data, seed=0)
    (found,) = error.value.problems
    return str(found)


@pytest.mark.parametrize(
    "name",
    [
        "test.jsonl",
        "data/test-00000-of-00001.jsonl",
        "valid.jsonl",
        "validation-00001.jsonl",
        "gsm8k_dev.jsonl",
        "eval.jsonl",
        "val/rows.jsonl",
        "Test.jsonl",
        "holdout.jsonl",
    ],
)
def test_a_held_out_split_in_a_directory_to_train_on_is_refused_by_name(tmp_path: Path, name: str) -> None:
    directory = files(tmp_path / "ds", "train-00000-of-00001.jsonl", name)
    said = problem(section(directory))
    assert f"holds held-out rows ({name}); name the others with a glob" in said
    assert f"path: {directory}/train-00000-of-00001.jsonl," in said


@pytest.mark.parametrize("name", ["latest.jsonl", "unit_test_generation.jsonl", "evaluate-me-train.jsonl", "a.jsonl"])
def test_names_that_only_hold_such_a_word_are_no_split(tmp_path: Path, name: str) -> None:
    assert scan(section(files(tmp_path / "ds", "train.jsonl", name)), seed=0).train_rows == 2


def test_the_glob_that_is_offered_takes_the_others_and_only_them(tmp_path: Path) -> None:
    shards = [f"data/train-{number:05}-of-00003.jsonl" for number in range(3)]
    directory = files(tmp_path / "ds", *shards, "data/test-00000-of-00001.jsonl")
    offered = problem(section(directory)).split("path: ")[1].split(", or")[0]
    assert offered.endswith("*-of-00003.jsonl")
    assert len(rows_of(scan(section(offered), seed=0))) == 3


def test_a_file_and_a_glob_mean_what_they_say(tmp_path: Path) -> None:
    directory = files(tmp_path / "ds", "train.jsonl", "test.jsonl")
    assert scan(section(directory / "test.jsonl"), seed=0).train_rows == 1
    assert scan(section(directory / "*.jsonl"), seed=0).train_rows == 2


def test_a_directory_to_measure_on_holds_no_training_rows(tmp_path: Path) -> None:
    directory = files(tmp_path / "ds", "train.jsonl", "test.jsonl")
    train = Source(path=str(directory / "train.jsonl"))
    said = problem(DataSection(train=(train,), eval=(Source(path=str(directory)),)))
    assert f"holds training rows (train.jsonl); name the others with a glob, e.g. path: {directory}/test.jsonl," in said
    only_held_out = files(tmp_path / "held", "test.jsonl", "validation.jsonl")
    assert scan(DataSection(train=(train,), eval=(Source(path=str(only_held_out)),)), seed=0).eval_rows == 2


def test_rows_that_are_only_measured_may_come_from_any_split(tmp_path: Path) -> None:
    directory = files(tmp_path / "ds", "test.jsonl")
    assert "holds held-out rows" in problem(section(directory))
    assert scan(section(directory), seed=0, listed=listing(section(directory), is_held_out=True)).train_rows == 1


def test_what_describes_a_directory_is_no_data(tmp_path: Path) -> None:
    directory = files(tmp_path / "ds", "train.jsonl", "__MACOSX/._train.jsonl", ".cache/train.jsonl")
    (directory / "README.md").write_text("# Rows")
    (directory / "dataset_info.json").write_text("{}")
    (directory / "dataset_infos.json").write_text("{}")
    found = scan(section(directory), seed=0)
    assert found.train_rows == 1
    assert "files of a directory that are not data: 3" in found.warnings[0] and "MACOSX" not in found.warnings[0]


def test_a_data_set_saved_by_datasets_is_read_and_only_its_own_files(tmp_path: Path) -> None:
    rows = [{"prompt": f"{n}?", "completion": f"{n}.", "of": {"a": None, "b": n}} for n in range(5)]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "ds", num_shards=2)
    (tmp_path / "ds" / "cache-0123456789abcdef.arrow").write_bytes(b"what map() left")
    found = scan(section(tmp_path / "ds"), seed=0)
    assert [(row.prompt, row.place) for row in rows_of(found)] == [
        ("0?", (0, 1)),
        ("1?", (0, 2)),
        ("2?", (0, 3)),
        ("3?", (1, 1)),
        ("4?", (1, 2)),
    ]


def test_a_saved_data_set_with_several_splits_is_one_line_that_says_how(tmp_path: Path) -> None:
    one = datasets.Dataset.from_list([PAIR])
    datasets.DatasetDict({"train": one, "test": one}).save_to_disk(tmp_path / "ds")
    assert "holds several splits, written by `save_to_disk` (test, train); write path: DIRECTORY/SPLIT" in problem(
        section(tmp_path / "ds")
    )
    assert scan(section(tmp_path / "ds" / "train"), seed=0).train_rows == 1


def test_a_damaged_saved_data_set_is_one_line(tmp_path: Path) -> None:
    datasets.Dataset.from_list([PAIR]).save_to_disk(tmp_path / "ds")
    (arrow,) = (tmp_path / "ds").glob("*.arrow")
    arrow.write_bytes(arrow.read_bytes()[:200])
    assert "is not a whole Arrow file" in problem(section(tmp_path / "ds"))
    (tmp_path / "ds" / "state.json").write_text("{}")
    assert "was not written whole by `save_to_disk`" in problem(section(tmp_path / "ds"))


def test_a_hub_id_given_as_path_is_offered_the_right_key(tmp_path: Path) -> None:
    said = problem(section(tmp_path / "tatsu-lab" / "alpaca"))
    assert said.endswith("does not exist; for a data set of the Hub write hub: tatsu-lab/alpaca")


def test_the_nearest_file_or_directory_is_offered(tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()
    assert "did you mean rows?" in problem(section(tmp_path / "row"))


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".txt", ".parquet", ".jsonl.gz"])
def test_a_fifo_and_a_directory_with_the_name_of_a_file_are_refused(tmp_path: Path, suffix: str) -> None:
    import os

    os.mkfifo(tmp_path / f"a{suffix}")
    assert "is not a regular file; write the rows to a file first" in problem(section(tmp_path / f"a{suffix}"))
    (tmp_path / f"b{suffix}").mkdir()
    assert "is a directory without data files" in problem(section(tmp_path / f"b{suffix}"))


def test_only_the_columns_that_are_needed_are_read_of_a_parquet_file(tmp_path: Path) -> None:
    table = pyarrow.table({"prompt": ["a"], "completion": ["b"], "image": [{"bytes": b"\x89PNG", "path": None}]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    found = scan(section(tmp_path / "a.parquet"), seed=0)
    assert [row.prompt for row in rows_of(found)] == ["a"] and "image" in found.warnings[0]


def test_a_column_that_stands_twice_in_a_parquet_file_is_refused(tmp_path: Path) -> None:
    table = pyarrow.table([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert 'a.parquet: the column "text" stands twice; rename one' in problem(section(tmp_path / "a.parquet"))


def test_a_compressed_shard_of_another_split_is_seen(tmp_path: Path) -> None:
    directory = files(tmp_path / "ds", "train.jsonl")
    (directory / "test-00000-of-00001.jsonl.gz").write_bytes(gzip.compress(json.dumps(PAIR).encode()))
    assert "holds held-out rows (test-00000-of-00001.jsonl.gz)" in problem(section(directory))
