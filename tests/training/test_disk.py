"""Space on disk is reckoned before the model is loaded; a disk that fills up later costs no checkpoint."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from lorafit.builders.base_model import check_base_model
from lorafit.builders.model_files import BaseModelFiles
from lorafit.errors import DiskError
from lorafit.preflight import bf16_choice, this_machine
from lorafit.recipe import LoadedRecipe
from lorafit.storage.no_room import NO_ROOM
from lorafit.training import checkpoints, disk
from lorafit.training import load_model as model_module
from lorafit.training.disk import BESIDES, Space, space_needed
from support.runs import run, small_recipe
from support.tiny import build_base, llama_config

METHODS: dict[str, dict[str, Any]] = {
    "plain": {"lora": {"r": 32}},
    "dora": {"lora": {"r": 32, "use_dora": True}},
    "pissa": {"lora": {"r": 32, "init_lora_weights": "pissa"}},
    "saved modules": {"lora": {"r": 8, "modules_to_save": ["lm_head"]}},
    "embeddings": {"lora": {"r": 8, "target_modules": ["embed_tokens", "q_proj"]}},
    "added tokens": {"model": {"add_tokens": ["What is", "It is", "<never>"]}, "lora": {"r": 8}},
    "qlora": {"quantization": {"load_in_4bit": True}, "lora": {"r": 32}},
    "adalora": {"lora": None, "adalora": {"init_r": 12, "target_r": 8, "tinit": 1, "tfinal": 1, "delta_t": 1}},
    "sgd": {"training": {"optim": "sgd"}, "lora": {"r": 32}},
    "adafactor": {"training": {"optim": "adafactor"}, "lora": {"r": 32}},
}
BY_DEFAULT = ("plain", "embeddings", "qlora")


def files_of(loaded: LoadedRecipe) -> BaseModelFiles:
    return check_base_model(loaded.recipe.model, quantization=loaded.recipe.quantization)


def space_of(loaded: LoadedRecipe) -> Space:
    bf16 = bf16_choice(loaded.recipe.training, this_machine()).value
    return space_needed(loaded, files_of(loaded), bf16=bf16)


def size(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def committed(directory: Path) -> list[Path]:
    return sorted((directory / "run" / "checkpoints").glob("checkpoint-*"))


@pytest.mark.parametrize(
    "method", [pytest.param(name, marks=[] if name in BY_DEFAULT else pytest.mark.slow) for name in METHODS]
)
def test_what_a_run_writes_is_what_was_reckoned_from_the_settings(
    method: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    base = build_base(tmp_path / "base", config=llama_config(hidden_size=256, intermediate_size=512))
    loaded = small_recipe(tmp_path, base, checkpoints={"every": 1}, **METHODS[method])
    space = space_of(loaded)
    assert space.checkpoints == 3
    run(loaded)
    for reckoned, written in ((space.adapter, tmp_path / "run/adapter"), (space.checkpoint, committed(tmp_path)[-1])):
        least = 0.6 if method == "adalora" else 0.85  # AdaLoRA prunes
        assert least * (reckoned - BESIDES) <= size(written) <= reckoned


def test_too_little_space_is_said_before_the_model_is_loaded(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_module, "load_base_model", None)  # calling it would be a TypeError
    loaded = small_recipe(tmp_path, tiny_base)
    space = space_of(loaded)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: usage._replace(free=space.whole - 1))
    expected = f"the run needs {space.whole:,} bytes .* {space.whole - 1:,} are free on its disk; make room"
    with pytest.raises(DiskError, match=expected) as caught:
        run(loaded)
    assert caught.value.exit_code == 74
    assert not (tmp_path / "run").exists()


def test_checkpoints_that_are_there_need_no_more_space(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = small_recipe(tmp_path, tiny_base)
    space, usage = space_of(loaded), shutil.disk_usage(tmp_path)
    there = tmp_path / "run" / "checkpoints" / "checkpoint-1"
    there.mkdir(parents=True)
    (there / "optimizer.pt").write_bytes(bytes(1000))
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: usage._replace(free=space.whole - 1000))
    disk.refuse_too_little_space(space, disk.RunDir(tmp_path / "run"))
    (there / "optimizer.pt").write_bytes(bytes(999))
    with pytest.raises(DiskError, match="999 of them there already"):
        disk.refuse_too_little_space(space, disk.RunDir(tmp_path / "run"))


@pytest.mark.parametrize("number", [*NO_ROOM, errno.EIO])
def test_a_write_that_fails_in_a_checkpoint_keeps_the_one_before(
    number: int, tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = checkpoints.commit
    done: list[Any] = []

    def failing(*rest: Any, **named: Any) -> None:
        if done:
            raise OSError(number, os.strerror(number))
        done.append(commit(*rest, **named))

    monkeypatch.setattr(checkpoints, "commit", failing)
    loaded = small_recipe(tmp_path, tiny_base, checkpoints={"every": 1})
    needed = space_of(loaded).checkpoint
    expected = f"{os.strerror(number)}: a checkpoint needs {needed:,} bytes, .* are free"
    with pytest.raises(DiskError if number in NO_ROOM else OSError, match=expected if number in NO_ROOM else None):
        run(loaded)
    assert_only_the_first_is_left(tmp_path)


def assert_only_the_first_is_left(directory: Path) -> None:
    assert [path.name for path in (directory / "run" / "checkpoints").iterdir()] == ["checkpoint-1"]
    checkpoints.verified(directory / "run" / "checkpoints" / "checkpoint-1")
    assert not list((directory / "run").glob("adapter*"))
    assert not list((directory / "run").glob("*.tmp"))


@pytest.mark.parametrize("number", [*NO_ROOM])
def test_a_write_that_fails_in_the_adapter_leaves_none(
    number: int, tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = PeftModel.save_pretrained

    def failing(self: PeftModel, directory: str, **named: Any) -> None:
        save(self, directory, **named)
        if directory.endswith("/adapter"):
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(PeftModel, "save_pretrained", failing)
    with pytest.raises(DiskError, match=f"{os.strerror(number)}: the adapter needs .* bytes, .* are free"):
        run(small_recipe(tmp_path, tiny_base, checkpoints={"every": 2}))
    assert [path.name for path in committed(tmp_path)] == ["checkpoint-2"]
    assert not list((tmp_path / "run").glob("adapter*"))
    outcome = json.loads((tmp_path / "run/manifest.json").read_text("utf-8"))["outcome"]
    assert os.strerror(number) in outcome


def test_an_error_of_torch_that_is_not_the_disks_stays_what_it_is(tmp_path: Path) -> None:
    torn = "[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"
    with pytest.raises(RuntimeError, match="unexpected pos"), disk.full_disk_is_said(tmp_path, writing="it", needed=1):
        raise RuntimeError(torn)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(place)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting is not allowed here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def fill(directory: Path, *, but: int) -> None:
    """Write until `but` bytes are free."""
    with (directory / "filler").open("wb") as file:
        file.write(bytes(shutil.disk_usage(directory).free - but))


def test_a_disk_too_small_for_the_run_is_refused(small_disk: Path, tmp_path: Path, tiny_base: Path) -> None:
    fill(small_disk, but=2**21)
    with pytest.raises(DiskError, match=r"the run needs .* bytes \(.* for the adapter \+ 3 checkpoints of "):
        run(small_recipe(tmp_path, tiny_base, output_dir=str(small_disk / "run")))
    assert [path.name for path in small_disk.iterdir()] == ["filler"]


@pytest.mark.parametrize("place", ["at once", "adapter_model.safetensors", "optimizer.pt"])
def test_a_disk_that_fills_up_in_a_checkpoint_keeps_the_one_before(
    place: str, small_disk: Path, tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in the middle of the optimizer, where torch does not say why it fails."""
    commit = checkpoints.commit

    def then_full(*rest: Any, **named: Any) -> None:
        commit(*rest, **named)
        written = {path.name: path.stat().st_size for path in rest[1].iterdir()}
        before = {"at once": 0, "optimizer.pt": written["adapter_model.safetensors"] + 8192}.get(place, 0)
        fill(small_disk, but=before + written.get(place, 0) // 2)

    monkeypatch.setattr(checkpoints, "commit", then_full)
    sections = {"output_dir": str(small_disk / "run"), "checkpoints": {"every": 1}, "lora": {"r": 16}}
    with pytest.raises(DiskError, match=r"No space left on device: a checkpoint needs [\d,]+ bytes, [\d,]+ are free"):
        run(small_recipe(tmp_path, tiny_base, **sections))
    assert_only_the_first_is_left(small_disk)
    (small_disk / "filler").unlink()
    assert torch.load(small_disk / "run/checkpoints/checkpoint-1/optimizer.pt", weights_only=True)["state"]
