"""A run goes on where it was, only as what it was, and says so."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lorafit.cli import _exit_code
from lorafit.data import prepare
from lorafit.errors import LorafitError, RecipeError, RunDirError
from lorafit.lines import heard
from lorafit.recipe import LoadedRecipe, load
from lorafit.recipe.schema_walk import field_at, places, section_in
from lorafit.recipe.yaml_reader import KeyPath
from lorafit.training.must_match import MAY_CHANGE, changes, kept_keys
from lorafit.training.train import run_training, train
from support.forked import EVALUATED, Crash, CrashAfter, adapter_hash, base_model, recipe
from support.tiny import byte_tokenizer, sums, write_jsonl

pytestmark = pytest.mark.xdist_group("training resume")  # its fixtures cost too much to be made by each worker


def crash(loaded: LoadedRecipe, *, after: int) -> LoadedRecipe:
    """A run that ends in the middle of a step, with the checkpoints it has until then."""
    with pytest.raises(Crash):
        run_training(
            loaded,
            cache_dir=loaded.path.parent.parent / "cache",
            watchers=[CrashAfter(after)],
        )
    return loaded


def resume(loaded: LoadedRecipe, begin: Any = "resume") -> tuple[Any, list[str]]:
    """The result, and the lines said about going on."""
    said: list[str] = []
    cache = loaded.path.parent.parent / "cache"
    with heard(said.append):
        result = train(loaded, cache_dir=cache, begin=begin)
    return result, [line for line in said if line.startswith(("resume: ", "warning: "))]


def changed(loaded: LoadedRecipe, *overrides: str) -> LoadedRecipe:
    return load(loaded.path, overrides=overrides)


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("resume")


@pytest.fixture(scope="module")
def base(room: Path) -> Path:
    return base_model(room / "base")


@pytest.fixture(scope="module")
def undisturbed(room: Path, base: Path) -> LoadedRecipe:
    """A finished run of twelve steps."""
    loaded = recipe(room / "undisturbed", base)
    resume(loaded, "new")
    return loaded


@pytest.fixture(scope="module")
def crashed(room: Path, base: Path) -> LoadedRecipe:
    """A run that came to step 7, with checkpoints of steps 4 and 6."""
    return crash(recipe(room / "crashed", base), after=7)


@pytest.fixture
def broken_off(crashed: LoadedRecipe, room: Path) -> Iterator[LoadedRecipe]:
    """A copy of it that a test may do with as it likes."""
    place = room / "copy"
    shutil.copytree(crashed.path.parent, place)
    raw = (place / "recipe.yaml").read_text().replace(str(crashed.path.parent), str(place))
    (place / "recipe.yaml").write_text(raw)
    yield load(place / "recipe.yaml")
    shutil.rmtree(place)


STAYS = {
    *("task", "model.dtype", "model.attn_implementation", "model.trust_remote_code", "model.extra"),
    *("model.add_tokens", "data.stop_token", "data.system"),
    *("quantization.load_in_4bit", "quantization.load_in_8bit", "quantization.bnb_4bit_quant_type"),
    *("quantization.bnb_4bit_use_double_quant", "quantization.bnb_4bit_compute_dtype"),
    *("quantization.bnb_4bit_quant_storage", "quantization.llm_int8_threshold"),
    *("quantization.llm_int8_skip_modules", "quantization.extra"),
    *("lora.r", "lora.lora_alpha", "lora.lora_dropout", "lora.target_modules", "lora.exclude_modules"),
    *("lora.target_parameters", "lora.use_rslora", "lora.use_dora", "lora.init_lora_weights", "lora.eva_config"),
    *("lora.corda_config", "lora.rank_pattern", "lora.alpha_pattern", "lora.layers_to_transform"),
    *("lora.layers_pattern", "lora.modules_to_save", "lora.trainable_token_indices", "lora.bias", "lora.lora_bias"),
    *("lora.extra", "adalora.target_r", "adalora.init_r", "adalora.tinit", "adalora.tfinal", "adalora.delta_t"),
    *("adalora.orth_reg_weight", "data.train.format", "data.train.columns", "data.train.limit", "data.train.weight"),
    *("data.eval_fraction", "data.template_kwargs", "data.train_on", "data.over_length", "data.max_lost_rows"),
    *("training.max_length", "training.packing", "training.num_train_epochs", "training.max_steps"),
    *("training.per_device_train_batch_size", "training.gradient_accumulation_steps", "training.learning_rate"),
    *("training.lr_scheduler_type", "training.lr_scheduler_kwargs", "training.warmup_steps", "training.optim"),
    *("training.weight_decay", "training.max_grad_norm", "training.bf16", "training.fp16"),
    *("training.gradient_checkpointing", "training.neftune_noise_alpha", "training.eval_strategy"),
    *("training.eval_steps", "training.load_best_model_at_end", "training.seed"),
    *("training.train_sampling_strategy", "training.torch_compile", "training.loss_type", "training.extra"),
    *("optimizer.loraplus_lr_ratio", "early_stopping.patience", "early_stopping.min_delta"),
    *("speed.varlen_attention", "speed.fused_lora", "speed.answer_head", "speed.last_layer", "speed.fixed_length"),
}
"""Every key that a run cannot go on with changed. A new key of the schema belongs here, or into `MAY_CHANGE`."""


def _is_free(key: str) -> bool:
    return any(key == free or key.startswith(f"{free}.") for free in MAY_CHANGE)


def _is_value(place: KeyPath) -> bool:
    field = field_at(place)
    return field is not None and section_in(field.annotation) is None


def test_every_key_is_either_kept_or_free_and_flipping_it_says_so() -> None:
    keys = {".".join(map(str, place)) for place in places() if _is_value(place)}
    assert keys - STAYS == {key for key in keys if _is_free(key)}
    assert keys >= STAYS
    assert {free for free in MAY_CHANGE if not any(key == free or key.startswith(f"{free}.") for key in keys)} == {
        f"data.eval.{name}" for name in ("path", "hub", "name", "split", "revision")
    }
    for key in keys:
        steps = key.split(".")
        if steps[:2] == ["data", "train"]:
            steps.insert(2, "0")
        found = list(changes(kept_keys(_tree(steps, 1)), kept_keys(_tree(steps, 2))))
        assert found == ([] if _is_free(key) else [(".".join(steps), "1 -> 2")]), key
    assert len(keys) > 100


def _tree(steps: list[str], value: Any) -> Any:
    for step in reversed(steps):
        value = [value] if step == "0" else {step: value}
    return value


def test_a_crashed_run_goes_on_to_the_same_bytes_and_lines(broken_off: LoadedRecipe, undisturbed: LoadedRecipe) -> None:
    again = broken_off.output_dir()
    with (again / "metrics.jsonl").open("a") as lines:
        lines.write('{"step": 7, "lo')  # what a kill in the middle of a line leaves
    earlier = json.loads((again / "checkpoints/checkpoint-6/checkpoint.json").read_text())["checkpoint"]["seconds"]
    began = time.monotonic()
    result, said = resume(broken_off)
    assert said == ["resume: goes on after step 6, from checkpoints/checkpoint-6"]
    assert adapter_hash(broken_off) == adapter_hash(undisturbed)
    whole = undisturbed.output_dir()
    lines_of = [
        [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (whole, again)
    ]
    for line in lines_of[0] + lines_of[1]:
        assert line.pop("seconds") >= 0
        line.pop("tokens_per_second", None)
    assert lines_of[0] == lines_of[1]
    manifests = [json.loads((run / "manifest.json").read_text()) for run in (whole, again)]
    for key in (
        "steps",
        "tokens",
        "eval_loss_before",
        "eval_loss_after",
        "outcome",
        "planned_steps",
        "data",
        "adapter",
    ):
        assert manifests[0][key] == manifests[1][key], key
    assert [event["step"] for event in manifests[1]["resumes"]] == [6]
    assert manifests[0]["resumes"] == []
    assert earlier > 0
    assert result.seconds == pytest.approx(time.monotonic() - began + earlier, abs=0.5)
    assert manifests[1]["started"] <= manifests[1]["resumes"][0]["time"]


def test_keys_of_logging_may_change_and_the_adapter_stays_the_same(
    broken_off: LoadedRecipe, undisturbed: LoadedRecipe
) -> None:
    other = changed(
        broken_off,
        "training.logging_steps=1",
        "training.dataloader_num_workers=1",
        "training.per_device_eval_batch_size=2",
        "checkpoints.every=5",
        "checkpoints.keep=3",
        "silence=[alpha]",
        "health.on_plateau=ignore",
        "merge.verify=false",
    )
    resume(other)
    assert adapter_hash(other) == adapter_hash(undisturbed)
    steps = [json.loads(line)["step"] for line in (other.output_dir() / "metrics.jsonl").read_text().splitlines()]
    assert steps == [0, 1, 2, 4, 6, 7, 8, 9, 10, 11, 12, 12]
    left = sorted(path.name for path in (other.output_dir() / "checkpoints").iterdir())
    assert left == ["checkpoint-10", "checkpoint-4", "checkpoint-6"]
    assert load(other.output_dir() / "recipe.yaml").recipe.training.logging_steps == 1


def test_changed_keys_are_refused_together_old_to_new(broken_off: LoadedRecipe) -> None:
    before = _contents(broken_off.output_dir())
    other = changed(
        broken_off,
        "training.learning_rate=1e-3",
        "training.lr_scheduler_type=linear",
        "training.max_steps=20",
        "training.per_device_train_batch_size=1",
        "training.seed=7",
        "training.max_length=128",
        "lora.r=8",
        "optimizer.loraplus_lr_ratio=4.0",
        "data.train_on=all",
        "training.logging_steps=1",
    )
    with pytest.raises(RecipeError) as caught:
        resume(other)
    lines = [str(problem).removeprefix("--set: ") for problem in caught.value.problems]
    found = {line.split(": ")[-2]: line.split(": ")[-1] for line in lines[:-1]}
    assert found == {
        "training.learning_rate": "0.005 -> 0.001",
        "training.lr_scheduler_type": '"cosine" -> "linear"',
        "training.max_steps": "12 -> 20",
        "training.per_device_train_batch_size": "2 -> 1",
        "training.seed": "42 -> 7",
        "training.max_length": "64 -> 128",
        "lora.r": "4 -> 8",
        "optimizer.loraplus_lr_ratio": "null -> 4.0",
        "data.train_on": '"answers" -> "all"',
    }
    assert "choose another output_dir" in lines[-1]
    assert _contents(broken_off.output_dir()) == before


def _contents(run: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


@pytest.mark.parametrize("what", ["rows", "base", "template", "tokenizer"])
def test_changed_inputs_are_refused_old_to_new(what: str, broken_off: LoadedRecipe, base: Path) -> None:
    place = broken_off.path.parent
    other = broken_off
    named = {"rows": "data files", "base": "base model", "template": "chat template"}
    if what == "rows":
        write_jsonl(place / "train.jsonl", [*sums(23), {"prompt": "And?", "completion": "No."}])
    else:
        shutil.copytree(base, place / "base")
        other = changed(broken_off, f"model.model_name_or_path={place / 'base'}")
        if what == "base":
            config = json.loads((place / "base/config.json").read_text())
            (place / "base/config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-5}))
        elif what == "template":
            template = place / "base/chat_template.jinja"
            template.write_text(template.read_text() + "{# another #}")
        else:
            tokenizer = byte_tokenizer()
            tokenizer.add_tokens(["sum"])
            tokenizer.save_pretrained(place / "base")
    with pytest.raises(LorafitError) as caught:
        resume(other)
    lines = [str(problem) for problem in caught.value.problems]
    assert any(f"run: {named.get(what, what)}: " in line and " -> " in line for line in lines), lines
    assert not (place / "run/adapter").exists()


def _sealed_anew(seal: Path, change: Any) -> None:
    from lorafit.training import checkpoints

    body = json.loads(seal.read_text())["checkpoint"]
    change(body)
    seal.write_text(json.dumps({"checkpoint": body, "sha256": checkpoints._hash_of(body)}))


def test_a_template_that_writes_the_date_writes_that_of_the_day_the_run_began(
    room: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = base_model(room / "dated base")
    template = base / "chat_template.jinja"
    template.write_text("{{ strftime_now('%d') }}" + template.read_text())
    sections: dict[str, Any] = {"data": {"train": [{"path": "train.jsonl"}]}, "training": {"max_length": 96}}
    whole = recipe(room / "dated/whole", base, **sections)
    resume(whole, "new")
    loaded = crash(recipe(room / "dated/crashed", base, **sections), after=7)
    monkeypatch.setattr(prepare, "date", SimpleNamespace(today=lambda: "2001-02-03"))
    with pytest.raises(RunDirError, match=r'date that the chat template writes: "\d{4}-\d\d-\d\d" -> "2001-02-03"'):
        train(loaded, cache_dir=None, begin="resume")
    resume(loaded)
    assert adapter_hash(loaded) == adapter_hash(whole)


def test_a_base_that_moved_is_still_the_base(broken_off: LoadedRecipe, undisturbed: LoadedRecipe, base: Path) -> None:
    place = broken_off.path.parent
    shutil.copytree(base, place / "moved")
    other = changed(broken_off, f"model.model_name_or_path={place / 'moved'}")
    resume(other)
    assert adapter_hash(other) == adapter_hash(undisturbed)


def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_it_leads_to_the_same_bytes(
    broken_off: LoadedRecipe, undisturbed: LoadedRecipe
) -> None:
    run = broken_off.output_dir()
    (run / "checkpoints/checkpoint-6/rng_state.pth").unlink()
    kept = run / "checkpoints/notes.tmp"
    kept.mkdir()
    _, said = resume(broken_off)
    reason = "checkpoint-6 was set aside as quarantine/checkpoint-6: rng_state.pth is missing"
    assert said == [f"warning: {reason}", "resume: goes on after step 4, from checkpoints/checkpoint-4"]
    assert adapter_hash(broken_off) == adapter_hash(undisturbed)
    assert (run / "quarantine/checkpoint-6/optimizer.pt").is_file()
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    kinds = [(event["kind"], event["step"]) for event in events if event["kind"] != "selftest"]
    assert kinds == [("quarantined", 4), ("resumed", 4)]
    assert kept.is_dir()


def test_where_all_are_damaged_only_restart_starts_over(broken_off: LoadedRecipe, undisturbed: LoadedRecipe) -> None:
    run = broken_off.output_dir()
    for step in (4, 6):
        (run / f"checkpoints/checkpoint-{step}/scheduler.pt").write_bytes(b"")
    before = _contents(run)
    with pytest.raises(RunDirError) as caught:
        resume(broken_off)
    lines = [str(problem) for problem in caught.value.problems]
    assert len(lines) == 3
    assert "checkpoint-6: scheduler.pt has 0 bytes" in lines[0] and "checkpoint-4: scheduler.pt has 0" in lines[1]
    assert "`--resume --restart` starts over" in lines[2]
    assert caught.value.exit_code == 4
    assert _contents(run) == before
    _, said = resume(broken_off, "restart")
    assert said[-1] == "resume: there is no checkpoint to go on from: starts again at the first step"
    assert adapter_hash(broken_off) == adapter_hash(undisturbed)
    assert len(list((run / "quarantine").iterdir())) == 2


def test_restart_goes_on_where_it_can(broken_off: LoadedRecipe) -> None:
    _, said = resume(broken_off, "restart")
    assert said == ["resume: goes on after step 6, from checkpoints/checkpoint-6"]


def test_a_run_killed_before_its_first_checkpoint_starts_again(
    room: Path, base: Path, undisturbed: LoadedRecipe
) -> None:
    loaded = crash(recipe(room / "early", base, every=6), after=3)
    assert not list((loaded.output_dir() / "checkpoints").glob("checkpoint-*"))
    _, said = resume(loaded)
    assert said == ["resume: there is no checkpoint to go on from: starts again at the first step"]
    assert adapter_hash(loaded) == adapter_hash(undisturbed)


def test_resume_where_nothing_is_yet_begins(room: Path, base: Path, undisturbed: LoadedRecipe) -> None:
    loaded = recipe(room / "absent", base)
    _, said = resume(loaded)
    assert said == []
    assert adapter_hash(loaded) == adapter_hash(undisturbed)


def test_a_directory_of_other_files_is_not_gone_on_with(tmp_path: Path, base: Path) -> None:
    loaded = recipe(tmp_path / "mine", base)
    loaded.output_dir().mkdir()
    (loaded.output_dir() / "letter.txt").write_text("mine")
    for begin in ("resume", "restart"):
        with pytest.raises(RunDirError, match="already holds"):
            resume(loaded, begin)
    assert [path.name for path in loaded.output_dir().iterdir()] == ["letter.txt"]


def test_a_finished_run_says_so_and_gives_its_result_again(
    undisturbed: LoadedRecipe, capsys: pytest.CaptureFixture[str]
) -> None:
    before = _contents(undisturbed.output_dir())
    assert _exit_code(["train", str(undisturbed.path), "--resume", "--json"]) == 0
    printed = capsys.readouterr()
    result = json.loads(printed.out)
    assert (result["outcome"], result["steps"]) == ("finished", 12)
    assert result["eval_loss_before"] != result["eval_loss_after"]
    assert Path(result["adapter"]).is_dir()
    assert "the run is finished (finished after 12 steps); nothing was changed" in printed.err
    assert _contents(undisturbed.output_dir()) == before


def test_a_finished_run_is_not_made_longer(undisturbed: LoadedRecipe) -> None:
    with pytest.raises(RecipeError, match=r"training\.max_steps: 12 -> 20: the run is finished"):
        resume(changed(undisturbed, "training.max_steps=20"))


def test_a_used_directory_is_refused_with_the_way_on(crashed: LoadedRecipe) -> None:
    with pytest.raises(RunDirError, match="--resume"):
        resume(crashed, "new")


@pytest.mark.parametrize("words", [["--restart"], ["--resume", "--smoke"]])
def test_words_that_do_not_go_together_are_refused(
    words: list[str], crashed: LoadedRecipe, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _exit_code(["train", str(crashed.path), *words]) == 2
    assert "--resume" in capsys.readouterr().err


def test_checkpoints_name_no_path_of_this_machine(room: Path, base: Path) -> None:
    loaded = recipe(room / "best", base, training=EVALUATED | {"load_best_model_at_end": True})
    resume(loaded, "new")
    texts = [path for path in (loaded.output_dir() / "checkpoints").rglob("*") if path.suffix in (".json", ".jinja")]
    assert len(texts) > 8
    assert not [path for path in texts if str(room) in path.read_text()]


def test_what_changes_the_last_bits_is_said(broken_off: LoadedRecipe) -> None:
    seal = broken_off.output_dir() / "checkpoints/checkpoint-6/checkpoint.json"
    _sealed_anew(seal, lambda body: body["facts"]["how it is computed"].update(torch="2.0.0", threads=99))
    _, said = resume(broken_off)
    now = f'threads 99 -> {torch.get_num_threads()}, torch "2.0.0" -> "{torch.__version__}"'
    assert said[0].startswith(f"warning: {now.partition('+')[0]}")
    assert "may differ in its last bits" in said[0]


def test_resuming_with_other_weights_before_the_first_step_is_refused(broken_off: LoadedRecipe) -> None:
    """What PiSSA computes may differ between machines; then the frozen weights are not those that were trained on."""
    seal = broken_off.output_dir() / "checkpoints/checkpoint-6/checkpoint.json"
    _sealed_anew(seal, lambda body: body["facts"].update({"weights before the first step": "0" * 64}))
    with pytest.raises(RunDirError, match=r'weights before the first step: "0+" -> '):
        resume(broken_off)
