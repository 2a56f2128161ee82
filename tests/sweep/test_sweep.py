"""A whole sweep of a tiny model: what it leaves, that it is what training alone gives, and that no kill changes it."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM

from lorafit import pulse
from lorafit.errors import DataError, LorafitError, MachineError, RecipeError, RunDirError, StopRequested
from lorafit.launching.signals import StopRequest
from lorafit.lines import heard
from lorafit.merging.adapter_files import read_adapter
from lorafit.merging.identity import refuse_wrong_base
from lorafit.merging.merge import read_base
from lorafit.recipe import LoadedRecipe, load
from lorafit.recipe.sections import RankSweepSection
from lorafit.storage.run_dir import RunDir
from lorafit.sweep import sweep as sweeps
from lorafit.sweep import trial as trials
from lorafit.sweep.keys import seeds_of
from lorafit.sweep.search import END, THIRD, TWO_THIRDS
from lorafit.sweep.study import Claim
from lorafit.sweep.sweep import rank_sweep
from lorafit.sweep.sweep_result import SweepResult
from lorafit.sweep.trial import Bench, run_trial, trial_recipe
from lorafit.tasks.sequences import sequence_losses
from lorafit.training.inputs import read_inputs
from lorafit.training.train import train
from support import forked
from support.forked import Child
from support.tiny import sums, write_jsonl

pytestmark = pytest.mark.xdist_group("sweep sweep")  # its fixtures cost too much to be made by each worker

RANKS = [1, 2, 4]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return forked.base_model(tmp_path_factory.mktemp("base"))


def recipe(directory: Path, base: Path, *, out: str = "out", **sections: Any) -> LoadedRecipe:
    """A sweep over three ranks of six steps each, judged by 20 rows."""
    sections["training"] = {"max_steps": 6} | sections.get("training", {})
    sections["rank_sweep"] = {"ranks": RANKS, "budget": 1.0} | sections.get("rank_sweep", {})
    loaded = forked.recipe(
        directory, base, every="50%", **({"output_dir": str(directory / out), "lora": {}} | sections)
    )
    write_jsonl(directory / "eval.jsonl", sums(20, first=100))
    return load(loaded.path)


def sweep(
    loaded: LoadedRecipe, *, storage: str | None = None, new_stop: Callable[[], StopRequest] = StopRequest
) -> SweepResult:
    cache = loaded.path.parent / "cache"
    return rank_sweep(loaded, storage=storage, cache_dir=cache, new_stop=new_stop)


def listening() -> StopRequest:
    stop = StopRequest()
    stop.listen()
    return stop


def told(loaded: LoadedRecipe) -> dict[str, Any]:
    """sweep.json without times and memory."""
    facts: dict[str, Any] = json.loads((loaded.output_dir() / "sweep.json").read_text())
    for row in [facts, *facts["trials"]]:
        row.pop("seconds")
        row.pop("peak_memory_bytes", None)
    return facts


@pytest.fixture(scope="module")
def swept(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[LoadedRecipe, SweepResult]:
    """The sweep that the others are held against; no cut adapter is good enough for it. Its lines are in said.txt."""
    loaded = recipe(tmp_path_factory.mktemp("swept"), base, rank_sweep={"eps": 0.0001})
    said: list[str] = []
    with heard(said.append), patch.object(pulse, "MOST_SECONDS", 0.0):
        result = sweep(loaded)
    (loaded.path.parent / "said.txt").write_text("\n".join(said))
    return loaded, result


def bench(loaded: LoadedRecipe) -> Bench:
    inputs = read_inputs(loaded, cache_dir=loaded.path.parent / "cache")
    return Bench(loaded, inputs, cache_dir=None, new_stop=StopRequest)


def adapter_bytes(run: Path) -> bytes:
    return (run / "adapter/adapter_model.safetensors").read_bytes()


def test_what_is_on_disk_is_the_result(swept: tuple[LoadedRecipe, SweepResult]) -> None:
    loaded, result = swept
    out = loaded.output_dir()
    facts = json.loads((out / "sweep.json").read_text())
    expected = json.loads(json.dumps(asdict(result)))
    relative = {"recipe": "best.yaml", "adapter": str(Path(str(result.adapter)).relative_to(out))}
    assert facts == {key: value for key, value in expected.items() if key != "out"} | relative
    rows = {row.rank: row for row in result.trials}
    assert list(rows) == RANKS and rows[4].decided_by == "direct" and rows[4].loss == rows[4].low == rows[4].high
    assert result.tokens_trained == sum(row.tokens for row in result.trials) <= result.tokens_exhaustive
    assert result.tokens_exhaustive == 3 * rows[4].tokens
    assert rows[1].parameters * 4 == rows[2].parameters * 2 == rows[4].parameters
    assert rows[4].adapter_bytes == 4 * rows[4].parameters  # float32
    assert rows[2].truncated_loss is not None and rows[4].truncated_loss is None


def test_each_rank_is_told_of_and_not_what_its_runs_would_say(swept: tuple[LoadedRecipe, SweepResult]) -> None:
    said = (swept[0].path.parent / "said.txt").read_text().splitlines()
    assert said[0] == "rank 4: training"
    assert any(line.startswith("rank 4: step 3/6: ") for line in said)
    assert all(line.startswith("rank ") for line in said), said


def test_the_best_recipe_validates_and_trains(swept: tuple[LoadedRecipe, SweepResult], tmp_path: Path) -> None:
    loaded, result = swept
    best = load(loaded.output_dir() / "best.yaml", overrides=[f"output_dir={json.dumps(str(tmp_path / 'run'))}"])
    assert (best.recipe.lora.r, best.recipe.lora.lora_alpha) == (result.chosen_rank, 2 * result.chosen_rank)
    trained = train(best, cache_dir=None)
    assert trained.outcome == "finished"
    if Path(str(result.adapter)).name.endswith("seed-42"):  # it was trained, not cut
        assert adapter_bytes(Path(trained.run)) == adapter_bytes(Path(str(result.adapter)))


def test_a_trial_of_a_sweep_is_the_run_that_train_gives(
    swept: tuple[LoadedRecipe, SweepResult], base: Path, tmp_path: Path
) -> None:
    """Neither the base that others trained on before, nor the losses taken on the way, leave a trace."""
    loaded, _ = swept
    alone = trial_recipe(loaded, rank=4, seed=42, learning_rate=5e-3, output_dir=tmp_path / "run")
    train(alone, cache_dir=None)
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(loaded.output_dir() / "trials/rank-4-seed-42")
    shared = bench(loaded)
    other = trial_recipe(loaded, rank=4, seed=7, learning_rate=1e-2, output_dir=tmp_path / "other")
    run_trial(other, until=THIRD, bench=shared)
    paused = trial_recipe(loaded, rank=2, seed=42, learning_rate=5e-3, output_dir=tmp_path / "paused")
    for until in (THIRD, TWO_THIRDS, END):
        outcome = run_trial(paused, until=until, bench=shared)
        assert max(outcome.losses) == until
    fresh = trial_recipe(loaded, rank=2, seed=42, learning_rate=5e-3, output_dir=tmp_path / "fresh")
    train(fresh, cache_dir=None)
    assert adapter_bytes(tmp_path / "paused") == adapter_bytes(tmp_path / "fresh")
    assert outcome.facts["tokens"] == json.loads((tmp_path / "fresh/manifest.json").read_text())["tokens"]


def test_losses_are_those_of_the_adapter_on_disk(swept: tuple[LoadedRecipe, SweepResult], base: Path) -> None:
    loaded, result = swept
    shared = bench(loaded)
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), str(loaded.output_dir() / "trials/rank-4-seed-42/adapter")
    )
    rows = shared.inputs.data.eval
    assert rows is not None and len(rows) == result.eval_sequences == 20
    found = sequence_losses(model, rows, pad_token_id=shared.inputs.tokenizer.pad_token_id)
    assert found.loss == result.trials[-1].loss


def test_a_cut_adapter_is_left_as_a_run_that_other_commands_take(base: Path, tmp_path: Path) -> None:
    loaded = recipe(tmp_path, base, rank_sweep={"eps": 5.0})  # anything is good enough
    result = sweep(loaded)
    assert (result.chosen_rank, result.trials[0].decided_by) == (1, "truncated")
    assert result.tokens_trained == result.tokens_exhaustive / 3
    adapter = read_adapter(Path(str(result.adapter)))
    refuse_wrong_base(adapter, read_base(adapter))
    assert adapter.config["r"] == 1 and adapter.recipe is not None and adapter.recipe.recipe.lora.r == 1
    shared = bench(loaded)
    with shared.adapter_on_base(RunDir(Path(str(result.adapter))).adapter) as model:
        assert shared.losses_of(model).loss == pytest.approx(result.trials[0].loss, abs=1e-6)
    assert "cut from rank 4" in (Path(str(result.adapter)) / "manifest.json").read_text()
    spectra = json.loads((loaded.output_dir() / "spectrum.json").read_text())
    assert len(spectra["modules"]) == 7 and all(len(one["singular_values"]) == 4 for one in spectra["modules"])
    best = yaml.safe_load((loaded.output_dir() / "best.yaml").read_text()) | {"output_dir": str(tmp_path / "pattern")}
    best["lora"]["rank_pattern"] = spectra["rank_pattern"]
    (loaded.output_dir() / "pattern.yaml").write_text(yaml.safe_dump(best))
    if spectra["rank_pattern"]:
        patterned = load(loaded.output_dir() / "pattern.yaml")
        train(patterned, cache_dir=None)


def _killed_at(point: str) -> Callable[[], None]:
    """Kills this process where the sweep stands at `point`."""

    def die(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def arm() -> None:
        if point == "in a step":
            step_end = trials._Marks.on_step_end

            def on_step_end(self: Any, args: Any, state: Any, control: Any, **named: Any) -> None:
                step_end(self, args, state, control, **named)
                if state.global_step == 5:
                    die()

            trials._Marks.on_step_end = on_step_end  # type: ignore[method-assign, assignment]
        elif point == "asked to stop in a step":
            begun = trials._Marks.on_step_begin

            def on_step_begin(self: Any, args: Any, state: Any, control: Any, **named: Any) -> None:
                begun(self, args, state, control, **named)
                if state.global_step == 3:
                    os.kill(os.getpid(), signal.SIGTERM)

            trials._Marks.on_step_begin = on_step_begin  # type: ignore[method-assign]
        elif point == "before the pause is noted":
            trials._Marks._pause = die  # type: ignore[method-assign]
        elif point == "before a commit":
            Claim.commit = die  # type: ignore[method-assign, assignment]
        elif point == "after a commit":
            commit = Claim.commit

            def then_die(self: Claim, *rest: Any) -> bool:
                commit(self, *rest)
                die()
                return True

            Claim.commit = then_die  # type: ignore[method-assign, assignment]
        else:
            sweeps.write_sweep = die  # type: ignore[assignment]

    return arm


def test_a_sweep_that_is_killed_again_and_again_comes_to_the_same(
    swept: tuple[LoadedRecipe, SweepResult], base: Path, tmp_path: Path
) -> None:
    undisturbed, _ = swept
    loaded = recipe(tmp_path, base, rank_sweep={"eps": 0.0001})
    points = [
        "asked to stop in a step",
        "in a step",
        "before a commit",
        "after a commit",
        "before the pause is noted",
        "after a commit",
        "at last",
    ]
    for point in points:

        def work(point: str = point) -> None:
            _killed_at(point)()
            sweep(loaded, new_stop=listening)

        child = Child(work, log=tmp_path / "log")
        expected = StopRequested.exit_code if "asked" in point else -signal.SIGKILL
        assert child.wait() == expected, (point, child.said())
    sweep(loaded)
    assert told(loaded) == told(undisturbed)
    spectra = [(one.output_dir() / "spectrum.json").read_bytes() for one in (loaded, undisturbed)]
    assert spectra[0] == spectra[1]


def test_two_processes_share_a_sweep_and_one_of_them_may_die(base: Path, tmp_path: Path) -> None:
    alone = recipe(tmp_path / "alone", base, rank_sweep={"exhaustive": True}, training={"seed": 3})
    sweep(alone)
    storage = f"sqlite:///{tmp_path / 'study.db'}"
    loaded = recipe(tmp_path / "shared", base, rank_sweep={"exhaustive": True}, training={"seed": 3})

    def work(name: str, dies: bool) -> None:
        sweeps.POLL = 0.1
        trained = []
        original = trials.run_training

        def run_training(trial: LoadedRecipe, **named: Any) -> Any:
            trained.append(trial.recipe.lora.r)
            (tmp_path / f"{name}.trained").write_text(json.dumps(trained))
            if dies and trained[-1] != 4:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(trial, **named)

        trials.run_training = run_training  # type: ignore[assignment]
        sweep(loaded, storage=storage)

    children = [
        Child(lambda: work("one", dies=True), log=tmp_path / "one.log"),
        Child(lambda: work("other", dies=False), log=tmp_path / "other.log"),
    ]
    codes = [child.wait() for child in children]
    assert codes == [-signal.SIGKILL, 0], children[0].said() + children[1].said()
    by = {name: json.loads((tmp_path / f"{name}.trained").read_text()) for name in ("one", "other")}
    assert sorted(set(by["one"] + by["other"])) == RANKS and len(by["one"] + by["other"]) == 4, by
    assert told(loaded) == told(alone)


def test_seeds_are_averaged_sequence_by_sequence(base: Path, tmp_path: Path) -> None:
    loaded = recipe(tmp_path, base, rank_sweep={"ranks": [1, 2], "seeds": 2, "eps": 5.0})
    result = sweep(loaded)
    assert result.seeds == (42, 43) == seeds_of(loaded)
    largest = result.trials[-1]
    assert largest.loss == pytest.approx(sum(largest.losses_by_seed) / 2) and len(set(largest.losses_by_seed)) == 2
    assert largest.tokens == result.tokens_trained == result.tokens_exhaustive / 2


def test_the_learning_rate_is_tuned_at_the_largest_rank(base: Path, tmp_path: Path) -> None:
    loaded = recipe(tmp_path, base, rank_sweep={"ranks": [1, 2], "eps": 5.0, "tune_lr": True, "lr_trials": 3})
    result = sweep(loaded)
    rates = [one.learning_rate for one in result.learning_rates]
    assert len(rates) == 3 and rates[0] == 5e-3 and len(set(rates)) == 3
    assert all(5e-3 / 4 <= rate <= 5e-3 * 4 for rate in rates)
    whole = [one for one in result.learning_rates if one.share == 1]
    best = min(whole, key=lambda one: one.loss or 0.0)
    assert result.learning_rate == best.learning_rate == load(Path(result.recipe)).recipe.training.learning_rate
    assert result.trials[-1].loss == best.loss, "the sweep goes on with the run that was tuned"
    assert result.tokens_tuning == sum(one.tokens for one in result.learning_rates) - result.trials[-1].tokens


FLIPS: dict[str, Any] = {
    "ranks": [1, 3],
    "eps": 0.25,
    "alpha": "fixed",
    "seeds": 2,
    "exhaustive": True,
    "budget": 0.5,
    "tune_lr": True,
    "lr_trials": 3,
}
"""Each is seen at work: ranks, seeds, tune_lr and lr_trials above, eps, exhaustive and budget in the search's tests."""


def test_every_key_is_flipped_somewhere() -> None:
    assert FLIPS.keys() == RankSweepSection.model_fields.keys()
    assert all(
        getattr(RankSweepSection(**{key: value}), key) != getattr(RankSweepSection(), key)
        for key, value in FLIPS.items()
    )


@pytest.mark.parametrize(
    ("policy", "lora", "expected"),
    [
        ("2r", {}, (16, False)),
        ("fixed", {}, (8, False)),
        ("fixed", {"lora_alpha": 5}, (5, False)),
        ("rslora", {"lora_alpha": 5}, (5, True)),
    ],
)
def test_alpha_follows_the_policy(
    policy: str, lora: dict[str, Any], expected: tuple[int, bool], base: Path, tmp_path: Path
) -> None:
    loaded = recipe(tmp_path, base, rank_sweep={"alpha": policy})
    loaded = replace(
        loaded, recipe=loaded.recipe.model_copy(update={"lora": loaded.recipe.lora.model_copy(update={"r": 4} | lora)})
    )
    section = trial_recipe(loaded, rank=8, seed=1, learning_rate=1e-3, output_dir=None).recipe.lora
    assert (section.r, section.lora_alpha, section.use_rslora) == (8, *expected)


def test_bad_input_is_refused_in_one_line(base: Path, tmp_path: Path) -> None:
    loaded = recipe(tmp_path, base)
    with pytest.raises(MachineError, match="cannot be reached"):
        sweep(loaded, storage=f"sqlite:///{tmp_path}/nowhere/study.db")
    rows = {"train": [{"path": "train.jsonl"}]}
    with pytest.raises(RecipeError, match="there are none"):
        recipe(tmp_path, base, data=rows)
    with pytest.raises(RecipeError, match="no meaning with adalora"):
        recipe(tmp_path, base, adalora={})
    write_jsonl(tmp_path / "eval.jsonl", sums(7, first=100))
    with pytest.raises(DataError, match="7 held-out sequences give no interval"):
        sweep(loaded)
    assert not loaded.output_dir().exists()


def test_rules_hold_for_a_recipe_without_the_section(base: Path, tmp_path: Path) -> None:
    loaded = forked.recipe(tmp_path, base, lora=None, adalora={}, data={"train": [{"path": "train.jsonl"}]})
    with pytest.raises(RecipeError) as caught:
        sweep(loaded)
    assert len(caught.value.problems) == 2


def test_another_recipe_does_not_go_on_with_a_sweep(
    swept: tuple[LoadedRecipe, SweepResult], base: Path, tmp_path: Path
) -> None:
    before, result = swept
    changed = load(before.path, overrides=["training.learning_rate=1e-3", "rank_sweep.ranks=[1, 4]"])
    with pytest.raises(RecipeError, match=r"rank_sweep.ranks: \[1, 2, 4\] -> \[1, 4\]") as caught:
        sweep(changed)
    assert "training.learning_rate: 0.005 -> 0.001" in str(caught.value)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("x")
    with pytest.raises(RunDirError, match="already holds"):
        sweep(recipe(tmp_path, base))
    again = sweep(load(before.path))
    assert again == result, "a finished sweep says the same again, and trains nothing"


def test_too_few_steps_to_judge_by_are_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="2 steps"):
        sweep(recipe(tmp_path, base, training={"max_steps": 2}))


def test_the_largest_rank_must_train(base: Path, tmp_path: Path) -> None:
    broken = {"optim": "sgd", "max_grad_norm": 0.0, "learning_rate": 10.0}
    loaded = recipe(tmp_path, base, lora={"lora_alpha": 10**18}, training=broken, rank_sweep={"alpha": "fixed"})
    with pytest.raises(LorafitError) as caught:
        sweep(loaded)
    assert caught.value.exit_code == 6
    assert torch.get_default_dtype() == torch.float32


VARIANTS: dict[str, dict[str, Any]] = {
    "qlora": {"quantization": {"load_in_4bit": True}},
    "dora": {"lora": {"use_dora": True}},
    "pissa": {"lora": {"init_lora_weights": "pissa"}},
    "eva": {"lora": {"init_lora_weights": "eva"}},
    "trained head": {"lora": {"modules_to_save": ["lm_head"]}},
    "early stopping": forked.SETTINGS["early stopping"]
    | {"training": {"max_steps": forked.STEPS} | forked.SETTINGS["early stopping"]["training"]},
}


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_kind_of_adapter_can_be_swept(variant: str, base: Path, tmp_path: Path) -> None:
    """Cut to its own rank's neighbour, judged on the way, and the same beside others as alone."""
    keys = dict(VARIANTS[variant])
    lora = {"r": 8} | keys.pop("lora", {})
    loaded = recipe(tmp_path, base, rank_sweep={"ranks": [2, 4], "exhaustive": True}, **keys)
    text = yaml.safe_load(loaded.path.read_text()) | {"lora": lora}
    loaded.path.write_text(yaml.safe_dump(text))
    loaded = load(loaded.path)
    result = sweep(loaded)
    assert [row.decided_by for row in result.trials] == ["direct", "direct"]
    assert result.trials[0].truncated_loss is not None
    alone = trial_recipe(loaded, rank=2, seed=42, learning_rate=result.learning_rate, output_dir=tmp_path / "alone")
    train(alone, cache_dir=None)
    assert adapter_bytes(tmp_path / "alone") == adapter_bytes(loaded.output_dir() / "trials/rank-2-seed-42")
    if variant == "early stopping":
        manifest = json.loads((loaded.output_dir() / "trials/rank-4-seed-42/manifest.json").read_text())
        assert manifest["outcome"] == "stopped early"
