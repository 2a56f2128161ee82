"""A merged model is read back in a fresh process, and what it lost is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lorafit import operating_system
from lorafit.builders.base_model import check_base_model
from lorafit.errors import MachineError, VerificationError
from lorafit.merging import merge as merge_module
from lorafit.merging import verify as verify_module
from lorafit.merging.adapter_files import read_adapter
from lorafit.merging.verification_prompts import prompts_for
from lorafit.merging.verify import verification_device, verify
from lorafit.merging.verify_reference import reference
from lorafit.merging.weight_sketches import distance, round_once, sketch
from lorafit.recipe.sections import ModelSection
from support.merge_cases import Case, case, copied, rewrite, verdict
from support.runs import run, small_recipe

pytestmark = pytest.mark.xdist_group("merging verify")  # its fixtures cost too much to be made by each worker


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A plain LoRA merged right, in bfloat16."""
    return case(tmp_path_factory.mktemp("lora"), "lora", dtype="bfloat16", base_dtype="bfloat16")


def verified(made: Case, written: Path) -> verify_module.MergeReport:
    """As `merge` does it: in processes of their own."""
    return verify(
        written,
        adapter=made.adapter,
        base_files=made.base_files,
        onto="original",
        dtype=made.job.dtype,
        prompts=made.prompts,
    )


def test_a_right_merge_is_verified_in_fresh_processes_and_reported_beside_the_model(lora: Case) -> None:
    report = verified(lora, lora.right)
    left = json.loads((lora.right / "merge_report.json").read_text())
    assert report.passed and left["passed"] and left["wrong"] == []
    assert report == verdict(lora, lora.right), "another process gives the same figures"
    assert 0 < report.max_abs_logit_difference < report.adapter_effect
    assert report.logit_difference_to_reference <= report.allowed_logit_difference
    assert report.mean_kl < 1e-4 and report.top1_agreement > 0.9
    assert len(report.modules) == 14
    assert 0.9 < report.delta_retained < 1
    assert left["modules"][0]["retained"] == min(module.retained for module in report.modules)


@pytest.fixture
def reference_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference in this process, which has the libraries loaded; what was written still in another."""
    of_another = verify_module.child_answer

    class Here:
        facts: Any = None

        def __enter__(self) -> Here:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def call(self, job: Any) -> None:
            self.facts = reference(job)

    def answer(child: Any, **named: Any) -> Any:
        return child.facts if isinstance(child, Here) else of_another(child, **named)

    monkeypatch.setattr(verify_module, "reference_process", Here)
    monkeypatch.setattr(verify_module, "child_answer", answer)


@pytest.mark.usefixtures("reference_here")
def test_a_wrong_merge_ends_in_one_line_naming_the_weight(lora: Case, tmp_path: Path) -> None:
    written, merged = copied(lora, tmp_path / "written")
    merged["model.layers.0.self_attn.q_proj.weight"] *= 1.5
    with pytest.raises(VerificationError, match=r"q_proj.weight is not base \+ update: off by") as caught:
        verified(lora, rewrite(written, merged))
    assert caught.value.exit_code == 5
    assert len(caught.value.problems) == 1 and "\n" not in str(caught.value)


@pytest.mark.usefixtures("reference_here")
def test_a_model_that_does_not_load_is_a_failed_verification(lora: Case, tmp_path: Path) -> None:
    written, _ = copied(lora, tmp_path / "written")
    (written / "config.json").write_text("{}")
    with pytest.raises(VerificationError, match="the merged model does not load: "):
        verified(lora, written)


@pytest.mark.usefixtures("reference_here")
def test_a_merge_that_fails_verification_leaves_no_model(
    tmp_path: Path, lora: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = merge_module.write_merged

    def write_wrong(plan: Any, directory: Path, **keys: Any) -> None:
        write(plan, directory, **keys)
        tensors = load_file(directory / "model.safetensors")
        tensors["model.layers.1.self_attn.v_proj.weight"][0] *= 1.1
        rewrite(directory, tensors)

    monkeypatch.setattr(merge_module, "write_merged", write_wrong)
    with pytest.raises(VerificationError, match=r"the merged model is wrong and was not kept: .*v_proj"):
        merge_module.merge(
            lora.adapter.directory, out=tmp_path / "merged", dtype=None, max_shard_size=None,
            base=str(lora.base_files.directory), onto=None, verify=None,
            progress=lambda total: lambda done: None, cache_dir=None,
        )  # fmt: skip
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_what_peft_merges_in_memory_is_right_too(start: str, tmp_path: Path) -> None:
    made = case(tmp_path, "lora", dtype="bfloat16", base_dtype="bfloat16", init_lora_weights=start)
    merge_module.merge(
        made.adapter.directory, out=tmp_path / "merged", dtype=None, max_shard_size=None,
        base=str(made.base_files.directory), onto=None, verify=False,
        progress=lambda total: lambda done: None, cache_dir=None,
    )  # fmt: skip
    report = verdict(made, tmp_path / "merged")
    assert report.passed, report.wrong


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_what_is_retained_is_what_storage_leaves_of_the_update(dtype: str, tmp_path: Path) -> None:
    made = case(tmp_path, "lora", dtype=dtype, size=0.02, base_dtype="bfloat16")
    report = verdict(made, made.right)
    assert report.passed, report.wrong
    base = load_file(made.base_files.directory / "model.safetensors")
    factors = load_file(made.adapter.weights)
    name = "model.layers.1.mlp.up_proj"
    a, b = (factors[f"base_model.model.{name}.lora_{factor}.weight"] for factor in "AB")
    update = 8 / 4 * (b @ a)
    exact = base[f"{name}.weight"].float() + update
    lost = exact.to(getattr(torch, dtype)).float() - exact
    expected = 1 - float(lost.norm() / update.norm())
    module = next(module for module in report.modules if module.name == f"{name}.weight")
    assert module.retained == pytest.approx(expected, abs=0.03)  # a sketch measures to some percent
    assert module.update == pytest.approx(float(update.norm()), rel=0.1)


def test_float32_is_advised_where_16_bits_swallow_the_update_and_only_there(tmp_path: Path) -> None:
    small = case(tmp_path / "small", "lora", dtype="bfloat16", size=0.002, base_dtype="bfloat16")
    report = verdict(small, small.right)
    assert report.passed, report.wrong
    assert report.advice is not None and "--dtype float32 keeps all of it" in report.advice
    assert report.delta_retained < 0.7
    large = case(tmp_path / "large", "lora", dtype="bfloat16", base_dtype="bfloat16")
    assert verdict(large, large.right).advice is None
    wide = case(tmp_path / "wide", "lora", dtype="float32", size=0.002, base_dtype="bfloat16")
    assert verdict(wide, wide.right).advice is None


def test_a_skipped_module_is_caught_where_storage_swallows_most_of_the_update(tmp_path: Path) -> None:
    made = case(tmp_path / "case", "lora", dtype="bfloat16", size=0.002, base_dtype="bfloat16")
    written, merged = copied(made, tmp_path / "written")
    name = "model.layers.0.mlp.gate_proj.weight"
    merged[name] = load_file(made.base_files.directory / "model.safetensors")[name]
    report = verdict(made, rewrite(written, merged))
    assert [line.split()[0] for line in report.wrong] == [name]


def test_a_run_is_verified_on_its_own_rows_and_a_plain_adapter_on_random_ones(tmp_path: Path, tiny_base: Path) -> None:
    run(small_recipe(tmp_path, tiny_base))
    files = check_base_model(ModelSection(model_name_or_path=str(tiny_base)))
    of_run = prompts_for(read_adapter(tmp_path / "run"), files, cache_dir=None)
    assert of_run.source == "8 held-out rows, 24 training rows, 32 random token sequences (the run has no more rows)"
    assert len(of_run.ids) == 64 and all(0 < len(ids) <= 64 for ids in of_run.ids)
    plain = read_adapter(tmp_path / "run" / "adapter", base=str(tiny_base))
    assert prompts_for(plain, files, cache_dir=None).source.startswith("64 random token sequences (the adapter carries")
    (tmp_path / "train.jsonl").unlink()
    gone = prompts_for(read_adapter(tmp_path / "run"), files, cache_dir=None)
    assert "64 random token sequences (its rows cannot be read: " in gone.source


def test_too_little_memory_is_said_before_anything_is_written(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = check_base_model(ModelSection(model_name_or_path=str(tiny_base)))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert verification_device(files) == "cpu"
    monkeypatch.setattr(operating_system, "available_bytes", lambda: 1000)
    with pytest.raises(MachineError, match=r"verifying needs 0.0 GiB .*--no-verify"):
        verification_device(files)


@pytest.mark.parametrize(("free", "expected"), [(2**33, "cuda"), (1000, "cpu")])
def test_a_model_is_verified_where_there_is_room(
    free: int, expected: str, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = check_base_model(ModelSection(model_name_or_path=str(tiny_base)))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, 2**34))
    assert verification_device(files) == expected


def test_sketches_measure_distances() -> None:
    torch.manual_seed(0)
    one, change = torch.randn(200, 300), 1e-3 * torch.randn(200, 300)
    assert distance(sketch(one), sketch(one)) == 0
    assert distance(sketch(one + change), sketch(one)) == pytest.approx(float(change.norm()), rel=0.1)
    single = one.clone()
    single[7, 8] += 1
    assert distance(sketch(single), sketch(one)) == pytest.approx(1, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_sums_in_another_order_stay_within_what_is_allowed(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight, a, b = torch.randn(256, 256) * 0.02, torch.randn(16, 256) * 0.05, torch.randn(256, 16) * 0.05
    first = weight + 2 * (b @ a)
    other = weight.clone()
    for rank in reversed(range(16)):
        other += (2 * b[:, rank : rank + 1]) @ a[rank : rank + 1]
    assert not torch.equal(first, other)
    update = float((2 * (b @ a)).norm())
    allowed = round_once(first, dtype=dtype, update=update, rank=16)
    round_once(other, dtype=dtype, update=0, rank=16)
    assert torch.equal(first, first.to(dtype).float())
    off = distance(sketch(first), sketch(other))
    assert 0 < off <= allowed < (0.05 if dtype == torch.bfloat16 else 0.3) * update
    assert round_once(first, dtype=dtype, update=0, rank=16) == 0
