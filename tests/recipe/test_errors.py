"""What a wrong recipe says, word for word."""

from pathlib import Path

import pytest

from support.recipes import SMALLEST, problems

GOLDEN = {
    "lora: {lora_alfa: 32}": "lora.lora_alfa: not a key of lora; did you mean lora_alpha?",
    "lora: {load_in_4bit: true}": "lora.load_in_4bit: not a key of lora; write quantization.load_in_4bit",
    "training: {warmup_ratio: 0.1}": "training.warmup_ratio: not a key of training; here it is training.warmup_steps "
    "(below 1 it is a share of all steps)",
    "training: {packing_strategy: wrapped}": "training.packing_strategy: not a key of training; bfd is the only one: "
    "the others cut documents in two or let them see each other",
    "training: {adam_beta2: 0.95}": "training.adam_beta2: not a key of training; trl.SFTConfig knows it: write it "
    "under training.extra",
    "micro_batch_size: 2": "micro_batch_size: not a key of a recipe; here it is training.per_device_train_batch_size",
    'lora: {r: "16"}': 'lora.r: "16" is not a whole number of at least 1; write 16 without quotes',
    "lora: {r: 0}": "lora.r: 0 is not a whole number of at least 1",
    "lora: {lora_dropout: 1}": "lora.lora_dropout: 1 is not a number of at least 0 and below 1",
    'launch: {strategy: "a\\nb"}': 'launch.strategy: "a\\nb" is not a strategy or an accelerate file; there is no such '
    "file; write one of ddp, fsdp2, zero2, zero3",
    '"a\\nb": 1': "a\\nb: not a key of a recipe; its keys are output_dir, task, model, quantization, lora, adalora, "
    "data, training, optimizer, early_stopping, checkpoints, speed, health, launch, eval, merge, rank_sweep, silence, "
    "extends",
    "lora: {lora_alpha: 0}": "lora.lora_alpha: 0 is not a whole number of at least 1 or null",
    "training: {max_steps: 0}": "training.max_steps: 0 is not a whole number of at least 1 or null",
    "training: {learning_rate: 0}": "training.learning_rate: 0 is not a number above 0 and at most 10",
    "training: {learning_rate: 1e6}": "training.learning_rate: 1000000.0 is not a number above 0 and at most 10",
    "training: {weight_decay: 1e4}": "training.weight_decay: 10000 x learning_rate 0.0002 = 2 is the share that every "
    "step takes from each weight, all of it and more; usual are 0 to 0.1",
    "training: {neftune_noise_alpha: 5e6}": "training.neftune_noise_alpha: 5000000.0 is not a number above 0 and at "
    "most 1000 or null",
    "optimizer: {loraplus_lr_ratio: 16e4}": "optimizer.loraplus_lr_ratio: 160000 makes the rate of B 0.0002 x 160000 = "
    "32, no run bears it; usual is 16",
    "lora: {use_dora: yes}": 'lora.use_dora: "yes" is not true or false; write true',
    "lora: {r: true}": "lora.r: true is not a whole number of at least 1",
    "lora:": "lora: null is not a mapping (`key: value`); write its keys beneath it, or leave it out",
    "lora: {target_modules: [q_proj, 1]}": "lora.target_modules.1: 1 is not text",
    "lora: {init_lora_weights: pissa_niter_16}": 'lora.init_lora_weights: "pissa_niter_16" is not true, false or one '
    "of gaussian, orthogonal, olora, pissa, eva, corda, loftq; its fast SVD is not the same after reloading; write "
    "pissa, which is exact",
    "training: {gradient_checkpointing: 1}": "training.gradient_checkpointing: 1 is not true, false or auto",
    "training: {lr_scheduler_type: cosin}": 'training.lr_scheduler_type: "cosin" is not one of linear, cosine, '
    "cosine_with_restarts, polynomial, constant, constant_with_warmup, inverse_sqrt, reduce_lr_on_plateau, "
    "cosine_with_min_lr, cosine_warmup_with_min_lr, warmup_stable_decay; did you mean cosine?",
    "checkpoints: {every: 10 %}": 'checkpoints.every: "10 %" is not a share of the run (10%), a number of steps (200) '
    "or a time (30s, 10min, 2h)",
    "checkpoints: {every: 0%}": 'checkpoints.every: "0%" is not a share of the run (10%), a number of steps (200) or a '
    "time (30s, 10min, 2h)",
    "early_stopping: {patience: null}": "early_stopping.patience: null is not a whole number of at least 1; leave it "
    "out for the default",
}


@pytest.mark.parametrize(("line", "said"), GOLDEN.items())
def test_a_wrong_line_is_said_in_one_line(tmp_path: Path, line: str, said: str) -> None:
    assert problems(tmp_path, f"{SMALLEST}{line}\n") == [f"x.yaml:3: {said}"]


@pytest.mark.parametrize(
    ("override", "written"),
    [
        ("eval.generate=true", "eval.generate={max_new_tokens: 256, metrics: [exact_match, rouge_l]}"),
        ("early_stopping=5", "early_stopping={patience: 3}"),
        ("quantization=4bit", "quantization={load_in_4bit: true}"),
        ("optimizer=adamw", "optimizer={loraplus_lr_ratio: ...}"),
        ("model=gpt2", "model={model_name_or_path: gpt2}"),
        ("data=rows.jsonl", "data={train: [{path: rows.jsonl}]}"),
        ("data.train=[rows.jsonl]", "data.train.0={path: rows.jsonl}"),
        ("eval.general=books.txt", "eval.general=[{path: books.txt}]"),
        ("eval.tasks=hellaswag", "eval.tasks=[hellaswag]"),
        ("training.report_to=wandb", "training.report_to=[wandb]"),
        ("rank_sweep.ranks=8", "rank_sweep.ranks=[8]"),
    ],
)
def test_a_single_value_for_a_mapping_or_a_list_is_answered_with_what_to_type(
    tmp_path: Path, override: str, written: str
) -> None:
    [said] = problems(tmp_path, SMALLEST, overrides=[override])
    assert said.endswith(f"; write --set '{written}'")
    if "..." not in written:
        assert not any(" is not a " in more for more in problems(tmp_path, SMALLEST, overrides=[written]))


def test_in_a_file_it_is_answered_in_yaml(tmp_path: Path) -> None:
    [said] = problems(tmp_path, f"{SMALLEST}eval: {{generate: true}}\n")
    assert said.endswith("; write `generate: {max_new_tokens: 256, metrics: [exact_match, rouge_l]}`")


MODEL_LINE = "model: {model_name_or_path: gpt2}\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "data: {train: [{path: a}]}\n",
            ["x.yaml: model: is missing; name the base model: `model: {model_name_or_path: ...}`"],
        ),
        (
            MODEL_LINE,
            ["x.yaml: data: is missing; name the training rows: `data: {train: [{path: ...}]}`"],
        ),
        (
            f"data: {{}}\n{MODEL_LINE}",
            ["x.yaml:1: data.train: is missing; name the training rows: `train: [{path: ...}]`"],
        ),
        (
            SMALLEST.replace("gpt2", "gpt2, attn_implementation: org/kernel"),
            [
                'x.yaml:1: model.attn_implementation: "org/kernel" is not one of auto, eager, sdpa, flash_attention_2, '
                "flash_attention_3, flex_attention; a Hub kernel runs code downloaded at start"
            ],
        ),
        (f"{MODEL_LINE}data: {{train: []}}\n", ["x.yaml:2: data.train: [] is empty; write at least one"]),
        (
            f"{MODEL_LINE}data: {{train: rows.jsonl}}\n",
            [
                'x.yaml:2: data.train: "rows.jsonl" is not a list of mappings (`- {path: ...}`); write '
                "`train: [{path: rows.jsonl}]`"
            ],
        ),
        (
            f"{MODEL_LINE}data:\n  train:\n    - rows.jsonl\n",
            ['x.yaml:4: data.train.0: "rows.jsonl" is not a mapping (`key: value`); write `- {path: rows.jsonl}`'],
        ),
        (
            f"{MODEL_LINE}data:\n  train:\n    - {{pth: rows.jsonl}}\n",
            ["x.yaml:4: data.train.0.pth: not a key of data.train.0; did you mean path?"],
        ),
        (
            "model: {model_name_or_pth: gpt2}\ndata: {train: [{path: a}]}\n",
            ["x.yaml:1: model.model_name_or_pth: not a key of model; did you mean model_name_or_path?"],
        ),
        (
            "modle: {model_name_or_path: gpt2}\ndata: {train: [{path: a}]}\n",
            ["x.yaml:1: modle: not a key of a recipe; did you mean model?"],
        ),
    ],
)
def test_missing_and_shapeless_parts_are_said_in_one_line(tmp_path: Path, text: str, said: list[str]) -> None:
    assert problems(tmp_path, text) == said


def test_every_problem_is_named_at_once_in_the_order_of_the_file(tmp_path: Path) -> None:
    text = f"""\
training: {{max_seq_length: 512, learning_rate: fast}}
{SMALLEST}quantization:
  load_in_8bit: true
  load_in_4bit: true
lora:
  init_lora_weights: pissa
  target_modules: [lm_head]
"""
    assert [line.rpartition("x.yaml:")[2].split(" ")[0] + line.split(" ")[1] for line in problems(tmp_path, text)] == [
        "1:training.max_seq_length:",
        "1:training.learning_rate:",
        "5:quantization.load_in_8bit:",
        "8:lora.init_lora_weights:",
        "9:lora.target_modules:",
    ]


def test_a_wrong_key_does_not_break_the_rules_that_look_at_it(tmp_path: Path) -> None:
    text = f"{SMALLEST}quantization: {{load_in_4bit: 1}}\ntraining: {{eval_strategy: stps, eval_steps: 10}}\n"
    assert [line.split(" ")[1] for line in problems(tmp_path, text)] == [
        "quantization.load_in_4bit:",
        "training.eval_strategy:",
    ]


def test_long_values_are_cut(tmp_path: Path) -> None:
    (line,) = problems(tmp_path, f"{SMALLEST}lora: {{r: {'x' * 500}}}\n")
    assert "..." in line and len(line) < 200


@pytest.mark.parametrize("value", ["[[1]]", "{a: {b: c}}", "'\\n'", "é", "1.5", "-0.0", "[]", "0x10", "1e308"])
def test_pydantic_never_speaks(tmp_path: Path, value: str) -> None:
    keys = [
        ("lora", "target_modules"),
        ("lora", "trainable_token_indices"),
        ("lora", "layers_to_transform"),
        ("lora", "rank_pattern"),
        ("lora", "use_dora"),
        ("training", "bf16"),
        ("training", "report_to"),
        ("training", "learning_rate"),
        ("training", "lr_scheduler_kwargs"),
        ("checkpoints", "every"),
        ("launch", "num_processes"),
    ]
    for section, key in keys:
        for line in problems(tmp_path, f"{SMALLEST}{section}: {{{key}: {value}}}\n"):
            assert line.startswith(f"x.yaml:3: {section}.{key}")
            for foreign in ("Input", "valid", "validation", "pydantic", "type=", "\n"):
                assert foreign not in line
