"""What a merge leaves on disk, in which files, and what it leaves when it is broken off."""

from __future__ import annotations

import errno
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorafit.errors import AdapterError, DiskError, ModelError, RecipeError, RunDirError
from lorafit.lines import heard
from lorafit.merging import merge as merge_module
from lorafit.merging import out_directory
from lorafit.merging import write_weights as write_module
from lorafit.merging.merge import bytes_of
from support import ROOT
from support.random_adapters import adapted, by_peft, difference, logits, merged, random_adapter, weights
from support.runs import logits as logits_of_run
from support.runs import reloaded, run, small_recipe
from support.tiny import build_base, llama_config


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    return random_adapter(tmp_path_factory.mktemp("adapter"), tiny_base)


def _sharded(base: Path, directory: Path, size: str) -> Path:
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(directory, max_shard_size=size)
    AutoTokenizer.from_pretrained(base).save_pretrained(directory)
    assert len(list(directory.glob("model-*.safetensors"))) > 2
    return directory


def test_a_base_in_several_files_gives_a_model_in_the_same_files(
    adapter: Path, tiny_base: Path, tmp_path: Path
) -> None:
    base = _sharded(tiny_base, tmp_path / "base", "100KB")
    merged(adapter, tmp_path / "whole")
    merged(adapter, tmp_path / "parts", base=str(base))
    assert difference(weights(tmp_path / "whole"), weights(tmp_path / "parts")) == 0
    shards = {path.name for path in base.glob("*.safetensors")}
    assert {path.name for path in (tmp_path / "parts").glob("*.safetensors")} == shards
    index = json.loads((tmp_path / "parts/model.safetensors.index.json").read_text())
    assert index["weight_map"] == json.loads((base / "model.safetensors.index.json").read_text())["weight_map"]
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "parts")
    assert (logits(found) - logits(adapted(adapter, base))).abs().max() <= 1e-5


@pytest.mark.parametrize("sharded", [False, True])
def test_files_are_cut_at_the_size_that_is_asked_for(
    sharded: bool, adapter: Path, tiny_base: Path, tmp_path: Path
) -> None:
    base = _sharded(tiny_base, tmp_path / "base", "100KB") if sharded else tiny_base
    merged(adapter, tmp_path / "small", base=str(base), max_shard_size="60KB")
    merged(adapter, tmp_path / "large", base=str(base), max_shard_size="5GB")
    sizes = [path.stat().st_size for path in (tmp_path / "small").glob("*.safetensors")]
    assert len(sizes) > 4 and max(sizes) < 60_000 + 10_000  # a header, and the one tensor of 67,584 bytes
    assert [path.name for path in (tmp_path / "large").glob("*.safetensors*")] == ["model.safetensors"]
    assert difference(weights(tmp_path / "small"), weights(tmp_path / "large")) == 0
    auto_class: Any = AutoModelForCausalLM  # gives two things when asked for both
    _, info = auto_class.from_pretrained(tmp_path / "small", output_loading_info=True)
    assert not any(info.values())


def test_the_type_that_is_asked_for_is_that_of_every_weight_and_of_the_config(adapter: Path, tmp_path: Path) -> None:
    exact = merged(adapter, tmp_path / "float32", dtype="float32")
    for dtype in ("bfloat16", "float16"):
        merged(adapter, tmp_path / dtype, dtype=dtype)
        once = {name: tensor.to(getattr(torch, dtype)) for name, tensor in weights(Path(exact.out)).items()}
        assert difference(weights(tmp_path / dtype), once) == 0
        assert str(AutoModelForCausalLM.from_pretrained(tmp_path / dtype).dtype) == f"torch.{dtype}"


def test_a_weight_beyond_float16_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    adapter = random_adapter(tmp_path / "adapter", tiny_base, lora_alpha=10_000_000)
    with pytest.raises(ModelError, match=r"beyond float16's 65,504: use --dtype bfloat16"):
        merged(adapter, tmp_path / "merged", dtype="float16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


def test_tokenizer_template_settings_and_card_come_along(adapter: Path, tiny_base: Path, tmp_path: Path) -> None:
    merged(adapter, tmp_path / "merged")
    found = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert found.chat_template == AutoTokenizer.from_pretrained(tiny_base).chat_template is not None
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == (2, 0)
    card = (tmp_path / "merged/README.md").read_text()
    assert "library_name: transformers" in card
    assert not any(str(tiny_base) in path.read_text(errors="ignore") for path in (tmp_path / "merged").iterdir())
    assert len({path.stat().st_mode for path in (tmp_path / "merged").iterdir()}) == 1


def test_a_block_more_than_one_row_and_less_than_a_matrix_changes_nothing(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merged(adapter, tmp_path / "whole")
    monkeypatch.setattr(write_module, "BLOCK", 64 * 5)
    monkeypatch.setattr(write_module, "TASK", 64 * 4 * 17)
    merged(adapter, tmp_path / "parts")
    for name, tensor in weights(tmp_path / "whole").items():
        torch.testing.assert_close(weights(tmp_path / "parts")[name], tensor, rtol=0, atol=1e-7)


def test_where_the_kernel_does_not_copy_the_bytes_are_the_same(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merged(adapter, tmp_path / "kernel")

    def refuse(*arguments: Any) -> int:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(os, "copy_file_range", refuse)
    merged(adapter, tmp_path / "plain")
    assert difference(weights(tmp_path / "kernel"), weights(tmp_path / "plain")) == 0


RUNS: dict[str, dict[str, Any]] = {
    "plain": {},
    "adalora": {"lora": None, "adalora": {"init_r": 6, "target_r": 3, "tinit": 1, "tfinal": 1}},
    "lora+": {"optimizer": {"loraplus_lr_ratio": 16.0}},
    "pissa": {"lora": {"init_lora_weights": "pissa"}},
    "olora": {"lora": {"init_lora_weights": "olora"}},
    "corda": {"lora": {"init_lora_weights": "corda", "corda_config": {"corda_method": "kpm"}}},
    "eva": {"lora": {"init_lora_weights": "eva"}},
}


@pytest.mark.filterwarnings("ignore:The following rank_pattern keys:RuntimeWarning")  # peft's, on every loading
@pytest.mark.parametrize("kind", RUNS)
def test_a_run_is_merged_without_a_word_of_its_base(kind: str, tiny_base: Path, tmp_path: Path) -> None:
    changes = RUNS[kind] | ({"training": {"max_steps": 6}} if kind == "adalora" else {})
    training = {"training": {**small_settings(), **changes.get("training", {})}}
    result, _ = run(small_recipe(tmp_path, tiny_base, **(changes | training)))
    merged_run = merged(Path(result.run), None)
    assert merged_run.streamed and merged_run.out == f"{result.run}/merged"
    found = logits_of_run(AutoModelForCausalLM.from_pretrained(merged_run.out).eval())
    expected = logits_of_run(reloaded(result, tiny_base))
    assert (found - expected).abs().max() <= 1e-5
    assert not torch.allclose(found, logits_of_run(AutoModelForCausalLM.from_pretrained(tiny_base)), atol=1e-4)
    assert (
        difference(weights(Path(merged_run.out)), weights(by_peft(Path(result.adapter), tiny_base, tmp_path / "peft")))
        == 0
    )


def small_settings() -> dict[str, Any]:
    from support.runs import QUICK

    return dict(QUICK)


def test_an_adapter_that_changes_its_base_at_loading_is_merged_by_peft_and_that_is_said(
    tiny_base: Path, tmp_path: Path
) -> None:
    adapter = random_adapter(tmp_path / "adapter", tiny_base, init_lora_weights="pissa")
    said: list[str] = []
    with heard(said.append):
        result = merge_module.merge(
            adapter, out=tmp_path / "merged", dtype=None, max_shard_size=None, base=None, onto=None, verify=False,
            progress=lambda total: lambda done: None, cache_dir=None,
        )  # fmt: skip
    assert not result.streamed
    assert any("by peft" in line and "init_lora_weights 'pissa'" in line for line in said)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert (logits(found) - logits(adapted(adapter, tiny_base))).abs().max() <= 1e-4
    assert (tmp_path / "merged/tokenizer.json").is_file()


def test_a_start_that_cannot_be_repeated_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    adapter = random_adapter(tmp_path / "adapter", tiny_base, init_lora_weights="pissa_niter_4")
    with pytest.raises(AdapterError, match="pissa_niter_4, a random decomposition"):
        merged(adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    ("rename", "message"),
    [
        ({"layers.0.self_attn.q_proj": "layers.0.self_attn.w_proj"}, "nothing in this base takes 2 tensors|w_proj"),
        ({"layers.1": "layers.7"}, r"layers\.7|layer"),
    ],
)
def test_a_tensor_that_nothing_takes_is_refused(
    rename: dict[str, str], message: str, adapter: Path, tmp_path: Path
) -> None:
    edited = _copied(adapter, tmp_path / "edited")
    (old, new), tensors = next(iter(rename.items())), load_file(edited / "adapter_model.safetensors")
    save_file(
        {name.replace(old, new): tensor for name, tensor in tensors.items()}, edited / "adapter_model.safetensors"
    )
    with pytest.raises(AdapterError, match=message):
        merged(edited, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_targets_fewer_than_the_weights_are_refused(adapter: Path, tmp_path: Path) -> None:
    edited = _copied(adapter, tmp_path / "edited")
    config = json.loads((edited / "adapter_config.json").read_text())
    config["target_modules"] = ["q_proj"]
    (edited / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(AdapterError, match="nothing in this base takes 24 tensors"):
        merged(edited, tmp_path / "merged")


def _copied(adapter: Path, directory: Path) -> Path:
    import shutil

    return Path(shutil.copytree(adapter, directory))


def test_another_base_of_another_width_is_refused(adapter: Path, tmp_path: Path) -> None:
    other = build_base(tmp_path / "other", config=llama_config(hidden_size=128))
    with pytest.raises((AdapterError, ModelError)):
        merged(adapter, tmp_path / "merged", base=str(other))
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("kind", ["file", "directory", "broken link"])
def test_what_exists_already_is_not_overwritten(kind: str, adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "merged"
    if kind == "file":
        out.write_text("mine")
    elif kind == "directory":
        out.mkdir()
    else:
        out.symlink_to(tmp_path / "nowhere")
    with pytest.raises(RunDirError, match="exists already: remove it, or choose another directory with --out"):
        merged(adapter, out)
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


def test_a_directory_without_an_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunDirError, match="holds no adapter"):
        merged(tmp_path, tmp_path / "merged")
    with pytest.raises(RunDirError, match="is not a directory"):
        merged(tmp_path / "nothing", tmp_path / "merged")


def test_too_little_room_is_refused_before_anything_is_written(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(out_directory.shutil, "disk_usage", lambda path: _Usage())
    with pytest.raises(DiskError, match=r"needs 33,\d+,\d+ bytes, 1,000 are free"):
        merged(adapter, tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []


class _Usage:
    free = 1000


@pytest.mark.parametrize("call", [3, 12])
def test_a_disk_that_fills_up_leaves_nothing(
    call: int, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, calls = os.pwrite, []

    def fill_up(*arguments: Any) -> int:
        calls.append(arguments)
        if len(calls) >= call:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(*arguments)

    monkeypatch.setattr(os, "pwrite", fill_up)
    with pytest.raises(
        DiskError, match=r"No space left on device: the merged model needs [\d,]+ bytes, [\d,]+ are free"
    ):
        merged(adapter, tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []


def test_a_real_disk_that_fills_up_leaves_nothing(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(out_directory, "_refuse_full", lambda parent, needed: None)
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(small)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount a file system")
    try:
        with pytest.raises(DiskError, match="No space left on device"):
            merged(adapter, small / "merged", dtype="float32", max_shard_size="100KB")
        assert list(small.iterdir()) == []
    finally:
        subprocess.run(["umount", str(small)], check=True)


# Imports once; then, for each line, merges in a child that is killed so many seconds after its first file is there.
KILLS = """
import os, signal, sys, time
from pathlib import Path
sys.path[:0] = [{tests!r}]
from support.random_adapters import merged
from lorafit.merging import write_weights as write
rewrite = write._rewrite
def slowly(*arguments):
    time.sleep(0.02)
    return rewrite(*arguments)
write._rewrite = slowly
for line in sys.stdin:
    name, seconds = line.split()
    child = os.fork()
    if child == 0:
        merged(Path({adapter!r}), Path(name))
        os._exit(0)
    while not list(Path(name).parent.glob(f"*{{Path(name).name}}*")):
        time.sleep(0.001)
    time.sleep(float(seconds))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    print("ended", flush=True)
"""


def test_killed_at_any_moment_there_is_no_model_or_a_whole_one_and_the_next_merge_cleans_up(
    adapter: Path, tmp_path: Path
) -> None:
    merged(adapter, tmp_path / "expected")
    expected, moments, partial = weights(tmp_path / "expected"), random.Random(3), 0
    code = KILLS.format(tests=str(ROOT / "tests"), adapter=str(adapter))
    command = [sys.executable, "-W", "ignore", "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as kills:
        assert kills.stdin is not None and kills.stdout is not None
        for attempt in range(10):
            out = tmp_path / f"out{attempt}"
            print(out, moments.uniform(0, 0.25), file=kills.stdin, flush=True)
            assert kills.stdout.readline() == "ended\n"
            if not out.exists():
                partial += len(list(tmp_path.glob(f".out{attempt}.*")))
                merged(adapter, out)
                assert not list(tmp_path.glob(f".out{attempt}.*"))
            assert difference(weights(out), expected) == 0
    assert partial > 2, "hardly killed while it wrote: little was tested"


@pytest.mark.parametrize("name", ["out", "*", "[o]ut"])
def test_a_merge_removes_nothing_of_anybody_else(name: str, adapter: Path, tmp_path: Path) -> None:
    others = [tmp_path / other for other in ("out.tmp-mybackup", "out.tmp-1", "x.tmp-1", ".out.0123.lorafit-stage")]
    for other in others:
        other.mkdir()
        (other / "weights").write_text("mine")
    merged(adapter, tmp_path / name)
    assert [(other / "weights").read_text() for other in others] == ["mine"] * len(others)


def test_a_merge_into_what_exists_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(RunDirError, match="exists already"):
        merged(tmp_path / "no adapter", tmp_path / "out")


# Imports once, then merges each pair of directories in a child, and prints the KiB by which its memory grew.
MEMORY = """
import os, sys, threading, time
from pathlib import Path
sys.path[:0] = [{tests!r}]
from support.random_adapters import merged
import transformers.models.llama.modeling_llama
def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
def watch():
    while True:
        peak[0] = max(peak[0], anonymous())
        time.sleep(0.001)
for adapter, out in {pairs!r}:
    child = os.fork()
    if child == 0:
        before, peak = anonymous(), [0]
        threading.Thread(target=watch, daemon=True).start()
        merged(Path(adapter), Path(out))
        print(peak[0] - before, flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""


def test_memory_does_not_grow_with_the_base(tmp_path: Path) -> None:
    pairs, layers = [], (2, 8)
    for count in layers:
        config = llama_config(hidden_size=512, intermediate_size=2048, num_hidden_layers=count)
        base = build_base(tmp_path / f"base{count}", config=config, dtype=torch.bfloat16)
        adapter = random_adapter(tmp_path / f"adapter{count}", base, target_modules=["down_proj", "q_proj"])
        pairs.append((str(adapter), str(tmp_path / f"out{count}")))
    size = sum(path.stat().st_size for path in (tmp_path / "base8").glob("*.safetensors")) / 2**20
    assert size > 60
    code = MEMORY.format(tests=str(ROOT / "tests"), pairs=pairs)
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    grown = [int(line) / 1024 for line in done.stdout.split()]
    assert len(grown) == 2
    assert abs(grown[1] - grown[0]) < 8, grown  # MiB; of the adapter and the outline there is four times as much
    assert max(grown) < 40, grown


@pytest.mark.parametrize(
    ("text", "expected"), [("5GB", 5 * 10**9), ("100 KB", 10**5), ("1.5gib", 3 * 2**29), ("7", 7), ("2M", 2 * 10**6)]
)
def test_sizes_are_read_as_written(text: str, expected: int) -> None:
    assert bytes_of(text) == expected


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "five", "5XB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="is no size"):
        bytes_of(text)


def test_the_command_prints_one_json_object(adapter: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "lorafit",
        "merge",
        str(adapter),
        "--out",
        str(tmp_path / "m"),
        "--no-verify",
        "--json",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    keys = [
        "out",
        "max_abs_logit_difference",
        "top1_agreement",
        "delta_retained",
        "streamed",
        "onto",
        "bases",
        "seconds",
    ]
    assert list(json.loads(done.stdout)) == keys
    assert "14 weights change" in done.stderr
