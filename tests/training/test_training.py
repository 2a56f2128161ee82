"""What a run promises: checked before and after, stopped at the first NaN, everything measured and left on disk."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lorafit.errors import (
    HealthStop,
    LorafitError,
    RecipeError,
    RunDirError,
    StopRequested,
    VerificationError,
)
from lorafit.tasks.causal_lm_trainer import CausalLm
from lorafit.training import load_model as model_module
from support.runs import QUICK, logits, reloaded, run, small_recipe
from support.tiny import sums, write_jsonl


def _metrics(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "run/metrics.jsonl").read_text().splitlines()]


def test_a_run_leaves_everything_its_directory_promises(tmp_path: Path, tiny_base: Path) -> None:
    result, _ = run(small_recipe(tmp_path, tiny_base))
    left = {str(path.relative_to(tmp_path / "run")) for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert {
        "recipe.yaml",
        "manifest.json",
        "metrics.jsonl",
        "adapter/adapter_model.safetensors",
        "adapter/adapter_config.json",
        "adapter/tokenizer.json",
        "adapter/chat_template.jinja",
    } <= left
    assert result.steps == 3
    assert result.outcome == "finished"
    assert result.eval_loss_after is not None and result.eval_loss_before is not None
    assert result.eval_loss_after < result.eval_loss_before
    manifest = json.loads((tmp_path / "run/manifest.json").read_text())
    assert manifest["outcome"] == "finished"
    assert manifest["planned_steps"] == manifest["steps"] == 3
    assert len(manifest["modules"]) == 14
    assert len(manifest["base"]["fingerprint"]) == 64
    weights = (tmp_path / "run/adapter/adapter_model.safetensors").read_bytes()
    assert manifest["adapter"]["adapter_model.safetensors"] == hashlib.sha256(weights).hexdigest()


def test_the_run_directory_names_no_path_of_this_machine_and_holds_no_pickle(tmp_path: Path, tiny_base: Path) -> None:
    run(small_recipe(tmp_path, tiny_base))
    assert list((tmp_path / "run/checkpoints").iterdir())
    for path in (tmp_path / "run").rglob("*"):
        if path.suffix in (".json", ".yaml", ".jsonl", ".md", ".jinja"):
            text = path.read_text(encoding="utf-8")
            assert str(tmp_path) not in text and str(tiny_base) not in text, path
    assert not list((tmp_path / "run").rglob("training_args.bin"))
    assert not list((tmp_path / "run/adapter").glob("*.bin"))


def test_the_resolved_recipe_of_a_run_trains_the_same_adapter(tmp_path: Path, tiny_base: Path) -> None:
    from lorafit.recipe import load

    first, _ = run(small_recipe(tmp_path, tiny_base))
    again, _ = run(load(tmp_path / "run/recipe.yaml", overrides=[f"output_dir={tmp_path / 'again'}"]))
    assert (Path(first.adapter) / "adapter_model.safetensors").read_bytes() == (
        Path(again.adapter) / "adapter_model.safetensors"
    ).read_bytes()


def test_adapter_files_are_readable_as_the_umask_says(tmp_path: Path, tiny_base: Path) -> None:
    previous = os.umask(0o027)
    try:
        result, _ = run(small_recipe(tmp_path, tiny_base))
    finally:
        os.umask(previous)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in Path(result.run).rglob("*") if path.is_file()}
    assert modes == {0o640}


def test_the_adapter_gives_the_same_logits_in_a_new_process(tmp_path: Path, tiny_base: Path) -> None:
    result, _ = run(small_recipe(tmp_path, tiny_base))
    here = logits(reloaded(result, tiny_base))
    script = (
        "import sys, torch; from transformers import AutoModelForCausalLM; from peft import PeftModel\n"
        "model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(sys.argv[1]), sys.argv[2]).eval()\n"
        "with torch.no_grad(): torch.save(model(input_ids=torch.arange(3, 15).unsqueeze(0)).logits, sys.argv[3])"
    )
    subprocess.run(
        [sys.executable, "-c", script, str(tiny_base), result.adapter, str(tmp_path / "logits.pt")],
        check=True,
        capture_output=True,
        env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())},
    )
    assert torch.equal(here, torch.load(tmp_path / "logits.pt"))


def test_a_second_run_into_the_same_directory_is_refused_and_changes_nothing(tmp_path: Path, tiny_base: Path) -> None:
    loaded = small_recipe(tmp_path, tiny_base)
    run(loaded)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(RunDirError, match="already holds a run"):
        run(loaded)
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}


@pytest.mark.parametrize("obstacle", ["file", "inside a file", "broken link"])
def test_an_output_dir_that_cannot_become_one_is_refused(obstacle: str, tmp_path: Path, tiny_base: Path) -> None:
    target = tmp_path / "run"
    if obstacle == "file":
        target.write_text("mine")
    elif obstacle == "inside a file":
        (tmp_path / "file").write_text("mine")
        target = tmp_path / "file" / "run"
    else:
        target.symlink_to(tmp_path / "nowhere")
    with pytest.raises(RunDirError, match="choose another output_dir"):
        run(small_recipe(tmp_path, tiny_base, output_dir=str(target)))


def test_nothing_is_created_when_the_adapter_does_not_fit(tmp_path: Path, tiny_base: Path) -> None:
    with pytest.raises(LorafitError):
        run(small_recipe(tmp_path, tiny_base, lora={"target_modules": ["q_porj"]}))
    with pytest.raises(RecipeError, match="leave none of the run's 6 steps to prune in"):
        adalora = {"tinit": 3, "tfinal": 3}
        run(small_recipe(tmp_path, tiny_base, lora=None, adalora=adalora, training={"max_steps": None}))
    assert not (tmp_path / "run").exists()


def test_the_loss_curve_of_a_seeded_run_is_pinned(tmp_path: Path, tiny_base: Path) -> None:
    run(small_recipe(tmp_path, tiny_base, training={"max_steps": 20}))
    losses = [round(entry["loss"], 3) for entry in _metrics(tmp_path) if "loss" in entry]
    assert len(losses) == 20
    assert [*losses[::5], losses[-1]] == pytest.approx(PINNED, abs=2e-3), losses


PINNED = [5.564, 5.244, 4.975, 4.843, 4.786]


def test_the_held_out_loss_does_not_depend_on_the_evaluation_batch(tmp_path: Path, tiny_base: Path) -> None:
    losses = []
    for size in (1, 3, 8):
        directory = tmp_path / str(size)
        directory.mkdir()
        result, _ = run(small_recipe(directory, tiny_base, training={"per_device_eval_batch_size": size}))
        losses.append(result.eval_loss_after)
    assert losses == pytest.approx([losses[0]] * 3, abs=1e-6)


def test_packing_does_not_let_documents_see_each_other(tmp_path: Path, tiny_base: Path) -> None:
    """Held-out rows are flattened into one row under packing; each must score as it does alone."""
    losses = []
    for packing in (False, True):
        directory = tmp_path / str(packing)
        directory.mkdir()
        result, _ = run(small_recipe(directory, tiny_base, training={"packing": packing, "max_length": 64}))
        losses.append(result.eval_loss_before)
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def test_a_loss_that_is_not_finite_stops_the_run_naming_step_and_rows(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _poison_third_step(monkeypatch)
    with pytest.raises(HealthStop, match=r"step 3: loss is nan; rows .*train\.jsonl:\d+") as caught:
        run(small_recipe(tmp_path, tiny_base))
    assert caught.value.exit_code == 6
    assert not (tmp_path / "run/adapter").exists()
    assert "step 3" in json.loads((tmp_path / "run/manifest.json").read_text())["outcome"]


def test_a_gradient_that_is_not_finite_stops_before_the_optimizer_step(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backward = CausalLm.training_step

    def poison(self: Any, model: Any, inputs: Any, *rest: Any, **named: Any) -> Any:
        loss = backward(self, model, inputs, *rest, **named)
        if self.state.global_step == 1:
            next(p for p in model.parameters() if p.grad is not None).grad.fill_(float("inf"))
        return loss

    monkeypatch.setattr(CausalLm, "training_step", poison)
    with pytest.raises(HealthStop, match=r"step 2: gradient norm is (inf|nan); rows .*train\.jsonl:\d+"):
        run(small_recipe(tmp_path, tiny_base, training={"gradient_accumulation_steps": 2}))


def test_ctrl_c_ends_the_run_in_one_line_and_writes_no_adapter(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = CausalLm.training_step

    def interrupt(self: Any, *rest: Any, **named: Any) -> Any:
        if self.state.global_step == 2:
            raise KeyboardInterrupt
        return step(self, *rest, **named)

    monkeypatch.setattr(CausalLm, "training_step", interrupt)
    with pytest.raises(StopRequested, match="stopped on request after step 2 of 3; no adapter was written") as caught:
        run(small_recipe(tmp_path, tiny_base))
    assert caught.value.exit_code == 75
    assert not (tmp_path / "run/adapter").exists()
    assert json.loads((tmp_path / "run/manifest.json").read_text())["outcome"].startswith("stopped on request")


def test_on_nan_warn_goes_on_but_never_saves_a_broken_adapter(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _poison_third_step(monkeypatch)
    with pytest.raises(VerificationError, match="not finite"):
        run(small_recipe(tmp_path, tiny_base, health={"on_nan": "warn"}))
    assert not (tmp_path / "run/adapter").exists()


def _poison_third_step(monkeypatch: pytest.MonkeyPatch) -> None:
    compute = CausalLm.compute_loss

    def poison(self: Any, *rest: Any, **named: Any) -> Any:
        loss = compute(self, *rest, **named)
        return loss * float("nan") if self.state.global_step == 2 and self.model.training else loss

    monkeypatch.setattr(CausalLm, "compute_loss", poison)


NOTHING_LEARNED = {"frozen": "did not move", "no gradient": "every logged gradient was zero"}


@pytest.mark.parametrize("fault", NOTHING_LEARNED)
def test_a_run_that_learned_nothing_is_refused(
    fault: str, tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if fault == "frozen":
        monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, closure=None: None)
    else:
        compute = CausalLm.compute_loss
        monkeypatch.setattr(CausalLm, "compute_loss", lambda self, *a, **k: compute(self, *a, **k) * 0.0)
    with pytest.raises(VerificationError, match=NOTHING_LEARNED[fault]) as caught:
        run(small_recipe(tmp_path, tiny_base))
    assert caught.value.exit_code == 5
    assert not (tmp_path / "run/adapter").exists()


def test_a_base_that_changes_during_training_is_refused(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = CausalLm.training_step

    def leak(self: Any, model: Any, *rest: Any, **named: Any) -> Any:
        with torch.no_grad():
            next(p for n, p in model.named_parameters() if "embed_tokens" in n).add_(0.01)
        return step(self, model, *rest, **named)

    monkeypatch.setattr(CausalLm, "training_step", leak)
    with pytest.raises(VerificationError, match="frozen base changed"):
        run(small_recipe(tmp_path, tiny_base))


def test_a_quantised_base_still_passes_gradients_after_an_evaluation(tmp_path: Path, tiny_base: Path) -> None:
    """bitsandbytes repacks 4-bit weights in evaluation on some CPUs; then no gradient reaches the lower layers."""
    weights = []
    for name, changes in {"with": {}, "without": {"data": {"train": [{"path": "train.jsonl"}]}}}.items():
        directory = tmp_path / name
        directory.mkdir()
        quantization = {"load_in_4bit": True}
        result, _ = run(small_recipe(directory, tiny_base, quantization=quantization, **changes))
        weights.append(load_file(Path(result.adapter) / "adapter_model.safetensors"))
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_early_stopping_keeps_the_best_adapter(tmp_path: Path, tiny_base: Path) -> None:
    """A learning rate that overshoots: the loss falls, then rises, and the adapter saved is the one at the bottom."""
    training = QUICK | {"max_steps": 40, "learning_rate": 0.2, "eval_strategy": "steps", "eval_steps": 2}
    loaded = small_recipe(tmp_path, tiny_base, training=training, early_stopping={"patience": 2})
    result, _ = run(loaded)
    losses = [entry["eval_loss"] for entry in _metrics(tmp_path) if "eval_loss" in entry and entry["step"] > 0]
    assert result.outcome == "stopped early"
    assert result.steps < 40
    assert result.eval_loss_after == pytest.approx(min(losses), abs=1e-6)


def test_every_logged_step_is_in_the_metrics_file(tmp_path: Path, tiny_base: Path) -> None:
    run(small_recipe(tmp_path, tiny_base))
    steps = [entry for entry in _metrics(tmp_path) if "loss" in entry]
    assert [entry["step"] for entry in steps] == [1, 2, 3]
    assert {"loss", "grad_norm", "lr", "tokens", "tokens_per_second", "epoch", "seconds"} <= steps[0].keys()
    tokens = [entry["tokens"] for entry in steps]
    assert tokens == sorted(tokens) and tokens[0] > 0


def test_loraplus_gives_b_its_own_learning_rate(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates: set[float] = set()
    create = CausalLm.create_optimizer

    def look(self: Any, model: Any = None) -> Any:
        optimizer = create(self, model)
        if self.args.learning_rate:  # the self-test learns nothing
            rates.update(group["lr"] for group in optimizer.param_groups if group["params"])
        return optimizer

    monkeypatch.setattr(CausalLm, "create_optimizer", look)
    run(small_recipe(tmp_path, tiny_base, optimizer={"loraplus_lr_ratio": 4.0}))
    assert sorted(rates) == pytest.approx([5e-3, 2e-2])


@pytest.mark.filterwarnings("ignore:Adapter 'default'")  # peft takes a module pruned to rank 0 for a broken one
def test_adaloras_orthogonality_term_reaches_the_gradient(tmp_path: Path, tiny_base: Path) -> None:
    norms = []
    for weight in (0.0, 5.0):
        directory = tmp_path / str(weight)
        directory.mkdir()
        adalora = {"init_r": 6, "target_r": 3, "tinit": 1, "tfinal": 1, "orth_reg_weight": weight}
        with contextlib.suppress(VerificationError):  # so few steps may prune a module before it has moved
            run(small_recipe(directory, tiny_base, lora=None, adalora=adalora, training={"max_steps": 6}))
        norms.append(_metrics(directory)[1]["grad_norm"])
    assert norms[1] > 1.1 * norms[0], norms


def test_checkpoints_come_at_the_interval_and_only_the_newest_stay(tmp_path: Path, tiny_base: Path) -> None:
    run(small_recipe(tmp_path, tiny_base, training={"max_steps": 7}, checkpoints={"every": 2, "keep": 2}))
    assert sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir()) == ["checkpoint-4", "checkpoint-6"]


@pytest.mark.parametrize(("every", "steps"), [("10%", 10), ("1%", 1), ("0.1%", 1), (7, 7)])
def test_a_share_of_the_run_becomes_steps(every: int | str, steps: int) -> None:
    from lorafit.training.callbacks import steps_between

    assert steps_between(every, 100) == steps


@pytest.mark.parametrize(("every", "seconds"), [("30s", 30), ("10min", 600), ("2h", 7200)])
def test_a_time_becomes_seconds(every: str, seconds: int) -> None:
    from lorafit.training.callbacks import seconds_of

    assert seconds_of(every) == seconds


def test_derived_numbers_are_said_with_their_arithmetic(tmp_path: Path, tiny_base: Path) -> None:
    _, said = run(small_recipe(tmp_path, tiny_base, training={"gradient_accumulation_steps": 2}))
    assert "8 sequences per step = 4 per device x 2 accumulated x 1 process" in said
    assert any(line.startswith("adapter: 14 modules") for line in said)


def test_advice_is_said_and_can_be_silenced(tmp_path: Path, tiny_base: Path) -> None:
    for silence, expected in (((), 1), (["low-learning-rate"], 0)):
        directory = tmp_path / str(expected)
        directory.mkdir()
        _, said = run(small_recipe(directory, tiny_base, training={"learning_rate": 1e-5}, silence=list(silence)))
        assert len([line for line in said if "1e-05 is a rate for full fine-tuning" in line]) == expected


@pytest.mark.parametrize("kind", ["chat", "alpaca", "file", "file with variables"])
def test_the_adapters_chat_template_prompts_as_it_was_trained(kind: str, tmp_path: Path, tiny_base: Path) -> None:
    from transformers import AutoTokenizer

    from lorafit.training.inputs import read_inputs

    (tmp_path / "own.jinja").write_text(
        "{{ mood }}{% for m in messages %}<|im_start|>[{{ m.role }}]{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>[assistant]{% endif %}"
    )
    template = "own.jinja" if kind.startswith("file") else kind
    variables = {"mood": "calm"} if kind == "file with variables" else {}
    data = {"template": template, "template_kwargs": variables, "over_length": "truncate"}
    loaded = small_recipe(tmp_path, tiny_base, data=data, training={"max_length": 256})
    result, _ = run(loaded)
    tokenizer = AutoTokenizer.from_pretrained(result.adapter)
    prepared = read_inputs(loaded, cache_dir=None).data
    row = sums(1)[0]
    turns = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]
    assert tokenizer.apply_chat_template(turns, return_dict=False) == prepared.train[0]["input_ids"]
    prompt = tokenizer.apply_chat_template(turns[:1], add_generation_prompt=True, return_dict=False)
    first_trained = next(i for i, label in enumerate(prepared.train[0]["labels"]) if label != -100)
    assert prompt == prepared.train[0]["input_ids"][:first_trained]
    assert str(tokenizer.decode(prepared.train[0]["input_ids"][:first_trained])).startswith("calm") == bool(variables)


def test_a_template_that_will_prompt_otherwise_ends_the_run_before_the_base_is_read(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_module, "load_base_model", lambda *_, **__: pytest.fail("the base was read"))
    (tmp_path / "own.jinja").write_text(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>{% endif %}"
    )
    loaded = small_recipe(tmp_path, tiny_base, data={"template": "own.jinja"})
    with pytest.raises(VerificationError, match=r"train\.jsonl:1: generation will go on with '<think>'") as error:
        run(loaded)
    assert error.value.exit_code == 5
    assert not (tmp_path / "run").exists()


def test_rows_that_cannot_be_trained_on_end_before_the_base_is_read(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_module, "load_base_model", lambda *_, **__: pytest.fail("the base was read"))
    loaded = small_recipe(tmp_path, tiny_base)
    write_jsonl(tmp_path / "train.jsonl", [*sums(3), {"prompt": "x", "completion": None}])
    with pytest.raises(LorafitError, match=r"train\.jsonl:4"):
        run(loaded)
    assert not (tmp_path / "run").exists()
