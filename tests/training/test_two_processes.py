"""Two CPU processes over gloo do what one does, and speak with one voice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import get_peft_model_state_dict
from safetensors.torch import load_file

from lorafit.launching import launch
from lorafit.precision import cpu_computes_bfloat16
from support import SUPPORT
from support.commands import command, finished
from support.runs import CLOSE, assert_same_curves, metrics, run, saved_adapter, small_recipe
from support.together import SPREAD, SPREAD_QLORA, VARIANTS, lora_model, step_by_hand

IN_BFLOAT16 = {"rtol": 0.01, "atol": 2e-4}
"""The same in bfloat16: 2 units of its 8 bits in a gradient norm."""


def test_two_processes_leave_what_one_leaves(tmp_path: Path, tiny_base: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two words"
    one.mkdir()
    two.mkdir()
    _, said = run(small_recipe(one, tiny_base))
    halves = {"per_device_train_batch_size": 2}
    loaded = small_recipe(two, tiny_base, training=halves, launch={"num_processes": 2})
    code, out, err = finished(command(two, "lorafit", "train", str(loaded.path), "--json"))
    assert code == 0, err
    assert json.loads(out)["steps"] == 3
    left_out = "self-test left out with several processes: `lorafit train RECIPE --selftest` does it in one"
    said = [line for line in said if not line.startswith("self-test passed")]
    # The data, the adapter and all else are told once, in the words of one process.
    in_one = err.replace("2 per device", "4 per device").replace("x 2 processes", "x 1 process")
    steps = [line for line in in_one.splitlines() if line.startswith("step ")]  # which `run` does not ask for
    assert steps and len(steps) == len(set(steps)), "each step's line once, by one process"
    assert [line for line in in_one.splitlines() if line not in (left_out, *steps)] == said
    assert left_out in in_one
    assert_same_curves(one / "run", two / "run")
    manifests = [json.loads((place / "run" / "manifest.json").read_text("utf-8")) for place in (one, two)]
    assert [manifest["world_size"] for manifest in manifests] == [1, 2]
    torch.testing.assert_close(saved_adapter(two), saved_adapter(one), rtol=0, atol=1e-4)
    assert {path.name for path in two.iterdir()} == {"recipe.yaml", "train.jsonl", "eval.jsonl", "run", "cache"}


def test_batches_and_weights_that_do_not_divide_come_out_as_in_one_process(tmp_path: Path, tiny_base: Path) -> None:
    together = command(
        tmp_path,
        *("lorafit", "processes", "--config_file", str(launch.config_file("ddp")), "--num_processes", "2"),
        *("--main_process_port", "0", "--num_cpu_threads_per_process", "1"),
        *(str(SUPPORT / "together.py"), str(tmp_path / "two"), str(tiny_base)),
    )
    code, _, err = finished(together)
    assert code == 0, err
    for name, sections in {**VARIANTS, "fsdp2": SPREAD, "fsdp2 qlora": SPREAD_QLORA}.items():
        place = tmp_path / name
        place.mkdir()
        batch = 2 * sections["training"].get("per_device_train_batch_size", 2)
        alone = sections | {"training": sections["training"] | {"per_device_train_batch_size": batch}}
        run(small_recipe(place, tiny_base, **alone))
        in_bfloat16 = sections["training"].get("bf16", False)
        assert_same_curves(place / "run", tmp_path / "two" / name / "run", close=IN_BFLOAT16 if in_bfloat16 else CLOSE)
        if in_bfloat16:
            continue
        adapters = [
            load_file(run / "run/adapter/adapter_model.safetensors") for run in (place, tmp_path / "two" / name)
        ]
        torch.testing.assert_close(*adapters, rtol=0, atol=1e-4)

    read = [json.loads((tmp_path / "two" / "fsdp2" / process / "read.json").read_text("utf-8")) for process in "01"]
    assert len(read[0]) == 21 and not read[1], "the first process alone reads the base, and hands it on"

    # A loss that was rounded to bfloat16 on its way out of the model is 2e-3 away. What a CPU emulates in bfloat16
    # is summed in another order where there are other rows: 2.3e-4.
    close = 1e-5 if cpu_computes_bfloat16() else 5e-4
    before = [metrics(path / "fsdp2 qlora" / "run")[0]["eval_loss"] for path in (tmp_path, tmp_path / "two")]
    assert before[0] == pytest.approx(before[1], abs=close)

    whole_and_resumed = [tmp_path / "two" / name / "run" for name in ("fsdp2", "fsdp2 resumed")]
    files = [run / "adapter/adapter_model.safetensors" for run in whole_and_resumed]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert json.loads((whole_and_resumed[1] / "manifest.json").read_text("utf-8"))["resumes"]

    whole = lora_model(tiny_base)
    step_by_hand(whole, process=0, processes=1)
    saved = load_file(tmp_path / "two" / "sharded" / "adapter_model.safetensors")
    expected = {name: tensor.detach() for name, tensor in get_peft_model_state_dict(whole).items()}
    torch.testing.assert_close(saved, expected, rtol=0, atol=1e-4)

    seen = json.loads((tmp_path / "two" / "seen.json").read_text("utf-8"))
    assert "did not come together" in seen["own part"]
    assert "3 processes were asked for, 2 started" in seen["asked three"]
    assert "FSDP was asked for, data parallel was started on cpu" in seen["asked fsdp2 by file"]
    assert "FSDP2 was asked for, data parallel was started on cpu" in seen["asked fsdp2 by recipe"]
    assert "lora.init_lora_weights: pissa is computed from whole base weights" in seen["pissa by hand"]
    assert "lora.modules_to_save: lm_head: the loss reads it around fsdp2" in seen["head by hand"]
    assert "write fsdp_state_dict_type: FULL_STATE_DICT" in seen["checkpoints in parts"]
    assert [text[:2] for text in seen.values()] == ["5:", *["4:"] * 6]


def test_a_loss_that_breaks_in_one_process_is_reported_once(tmp_path: Path, tiny_base: Path) -> None:
    broken = {"optim": "sgd", "max_grad_norm": 0.0, "learning_rate": 10.0, "per_device_train_batch_size": 2}
    steep = {"lora_alpha": 10**18}
    loaded = small_recipe(tmp_path, tiny_base, lora=steep, training=broken, launch={"num_processes": 2})
    code, out, err = finished(command(tmp_path, "lorafit", "train", str(loaded.path), "--quiet"))
    assert (code, out) == (6, "")
    assert len(err.splitlines()) == 1, err
    assert err.startswith(("error: process 0: training: step ", "error: process 1: training: step "))
    outcome = json.loads((tmp_path / "run" / "manifest.json").read_text("utf-8"))["outcome"]
    assert outcome.removeprefix("stopped: ") in err


@pytest.mark.slow
@pytest.mark.parametrize("config", ["ddp", "fsdp2"])
def test_accelerate_launch_by_hand_trains_or_says_why_not(tmp_path: Path, tiny_base: Path, config: str) -> None:
    loaded = small_recipe(tmp_path, tiny_base)
    process = command(
        tmp_path,
        *("accelerate.commands.launch", "--config_file", str(launch.config_file(config)), "--main_process_port", "0"),
        *("-m", "lorafit", "train", str(loaded.path), "--json"),
    )
    code, out, err = finished(process)
    if config == "ddp":
        assert code == 0, err
        assert json.loads(out)["steps"] == 3
        return
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, err
    assert "FSDP was asked for, data parallel was started on cpu" in errors[0]
    assert not (tmp_path / "run").exists()
