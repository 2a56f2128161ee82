"""Rules between fields: each is seen to refuse, with the key it is reported at."""

from pathlib import Path

import pytest

from lorafit.recipe.rules import RULES
from support.recipes import SMALLEST, loaded, problems, written

Q4, Q8 = "quantization: {load_in_4bit: true}\n", "quantization: {load_in_8bit: true}\n"
ADALORA = "adalora: {}\n"
ADDED = SMALLEST.replace("gpt2}", 'gpt2, add_tokens: ["<a>"]}')
EVAL = SMALLEST.replace("]}", "], eval_fraction: 0.1}")


def with_source(source: str) -> str:
    return SMALLEST.replace("{path: rows.jsonl}", source)


def with_variable(value: str) -> str:
    """The smallest recipe with a variable for its template."""
    return SMALLEST.replace("]}", f"], template_kwargs: {{a: {value}}}}}")


def with_extra(extra: str) -> str:
    """The smallest recipe with further arguments of the trainer."""
    return f"{SMALLEST}training: {{extra: {{{extra}}}}}"


def scheduled(schedule: str, arguments: str, *, more: str = "") -> str:
    """The smallest recipe with a schedule and its arguments."""
    return f"{SMALLEST}training: {{lr_scheduler_type: {schedule}, lr_scheduler_kwargs: {{{arguments}}}{more}}}"


BROKEN = {
    "exactly_one_bit_width": [
        (f"{SMALLEST}quantization: {{load_in_4bit: true, load_in_8bit: true}}", "quantization.load_in_8bit"),
        (f"{SMALLEST}quantization: {{bnb_4bit_quant_type: nf4}}", "quantization"),
        (f"{SMALLEST}quantization: {{}}", "quantization"),
    ],
    "no_keys_of_the_other_bit_width": [
        (
            f"{SMALLEST}quantization: {{load_in_8bit: true, bnb_4bit_quant_type: nf4}}",
            "quantization.bnb_4bit_quant_type",
        ),
        (f"{SMALLEST}quantization: {{load_in_4bit: true, llm_int8_threshold: 5}}", "quantization.llm_int8_threshold"),
    ],
    "quantized_weights_can_be_sharded": [
        (f"{SMALLEST}{Q4}launch: {{strategy: fsdp2}}", "quantization.bnb_4bit_quant_storage"),
        (f"{SMALLEST}{Q4}launch: {{strategy: zero3}}", "quantization.bnb_4bit_quant_storage"),
        (f"{SMALLEST}{Q8}launch: {{strategy: fsdp2}}", "quantization.load_in_8bit"),
    ],
    "adapter_can_be_sharded": [
        (f"{SMALLEST}lora: {{init_lora_weights: pissa}}\nlaunch: {{strategy: zero3}}", "lora.init_lora_weights"),
        (f"{SMALLEST}{ADALORA}launch: {{strategy: fsdp2}}", "adalora"),
        (f"{SMALLEST}lora: {{modules_to_save: [lm_head]}}\nlaunch: {{strategy: fsdp2}}", "lora.modules_to_save"),
        (
            f"{SMALLEST}{Q4[:-2]}, bnb_4bit_quant_storage: bfloat16}}\nlora: {{use_dora: true}}\n"
            "launch: {strategy: fsdp2}",
            "lora.use_dora",
        ),
    ],
    "no_adapter_on_the_output_head": [
        (f"{SMALLEST}lora: {{target_modules: [q_proj, lm_head]}}", "lora.target_modules"),
        (f"{SMALLEST}lora: {{target_modules: [model.lm_head]}}", "lora.target_modules"),
        (f"{SMALLEST}lora: {{target_modules: [embed_out]}}", "lora.target_modules"),
        (f"{SMALLEST}lora: {{target_modules: '.*(q_proj|lm_head)'}}", "lora.target_modules"),
        (f"{SMALLEST}lora: {{target_modules: '.*'}}", "lora.target_modules"),
    ],
    "patterns_are_regular_expressions": [
        (f"{SMALLEST}lora: {{target_modules: '*_proj'}}", "lora.target_modules"),
        (f"{SMALLEST}lora: {{exclude_modules: '(mlp'}}", "lora.exclude_modules"),
        (f"{SMALLEST}lora: {{rank_pattern: {{'q[': 4}}}}", "lora.rank_pattern.q["),
        (f"{SMALLEST}lora: {{target_modules: '(.*)+x'}}", "lora.target_modules"),
        (f"{SMALLEST}lora: {{rank_pattern: {{'([\\w.]+)*!': 4}}}}", "lora.rank_pattern.([\\w.]+)*!"),
    ],
    "module_names_stand_in_lists": [
        (f"{SMALLEST}lora: {{target_modules: q_proj}}", "lora.target_modules"),
        (f"{SMALLEST}lora: {{target_modules: all_linear}}", "lora.target_modules"),
        (f"{SMALLEST}lora: {{exclude_modules: mlp}}", "lora.exclude_modules"),
    ],
    "lists_of_modules_name_something": [
        (
            f"{SMALLEST}lora: {{target_modules: [a], layers_to_transform: [0], layers_pattern: ''}}",
            "lora.layers_pattern",
        ),
        (f"{SMALLEST}lora: {{target_modules: []}}", "lora.target_modules"),
        (f"{SMALLEST}lora: {{modules_to_save: []}}", "lora.modules_to_save"),
        (f"{SMALLEST}lora: {{exclude_modules: ''}}", "lora.exclude_modules"),
    ],
    "no_module_adapted_and_saved_whole": [
        (f"{SMALLEST}lora: {{target_modules: [q_proj, v_proj], modules_to_save: [v_proj]}}", "lora.modules_to_save"),
    ],
    "token_rows_or_the_whole_embedding": [
        (
            f"{SMALLEST}lora: {{trainable_token_indices: [1], modules_to_save: [embed_tokens]}}",
            "lora.trainable_token_indices",
        ),
        (
            f"{SMALLEST}lora: {{trainable_token_indices: {{wte: [1]}}, target_modules: [wte]}}",
            "lora.trainable_token_indices",
        ),
    ],
    "layer_choice_needs_listed_targets": [
        (f"{SMALLEST}lora: {{layers_to_transform: [0]}}", "lora.layers_to_transform"),
        (f"{SMALLEST}lora: {{target_modules: [q_proj], layers_pattern: h}}", "lora.layers_pattern"),
    ],
    "initialisation_has_its_settings": [
        (f"{SMALLEST}lora: {{eva_config: {{rho: 1.0}}}}", "lora.eva_config"),
        (f"{SMALLEST}lora: {{corda_config: {{}}, init_lora_weights: eva}}", "lora.corda_config"),
    ],
    "initialisation_fits_the_base_weights": [
        (f"{SMALLEST}{Q4}lora: {{init_lora_weights: pissa}}", "lora.init_lora_weights"),
        (f"{SMALLEST}{Q8}lora: {{init_lora_weights: corda}}", "lora.init_lora_weights"),
        (f"{SMALLEST}{Q4}lora: {{init_lora_weights: orthogonal}}", "lora.init_lora_weights"),
        (f"{SMALLEST}lora: {{init_lora_weights: loftq}}", "lora.init_lora_weights"),
        (f"{SMALLEST}{Q8}lora: {{init_lora_weights: loftq}}", "lora.init_lora_weights"),
    ],
    "start_goes_with_what_else_is_trained": [
        (f"{SMALLEST}lora: {{init_lora_weights: pissa, use_dora: true}}", "lora.use_dora"),
        (f"{SMALLEST}lora: {{init_lora_weights: olora, modules_to_save: [lm_head]}}", "lora.modules_to_save"),
        (f"{SMALLEST}lora: {{init_lora_weights: corda, bias: all}}", "lora.bias"),
        (f"{SMALLEST}lora: {{init_lora_weights: eva, trainable_token_indices: [1]}}", "lora.trainable_token_indices"),
        (f"{ADDED}lora: {{init_lora_weights: eva}}", "model.add_tokens"),
    ],
    "orthogonal_ranks_are_even": [
        (f"{SMALLEST}lora: {{init_lora_weights: orthogonal, r: 3}}", "lora.r"),
        (f"{SMALLEST}lora: {{init_lora_weights: orthogonal, rank_pattern: {{q: 5}}}}", "lora.rank_pattern.q"),
    ],
    "lora_bias_stands_alone": [
        (f"{SMALLEST}lora: {{lora_bias: true, use_dora: true}}", "lora.lora_bias"),
        (f"{SMALLEST}lora: {{lora_bias: true, init_lora_weights: olora}}", "lora.lora_bias"),
    ],
    "parameters_take_plain_lora": [
        (f"{SMALLEST}lora: {{target_parameters: [a.w], lora_dropout: 0.1}}", "lora.lora_dropout"),
        (f"{SMALLEST}lora: {{target_parameters: [a.w], use_dora: true}}", "lora.use_dora"),
        (f"{SMALLEST}lora: {{target_parameters: [a.w], init_lora_weights: pissa}}", "lora.init_lora_weights"),
    ],
    "adalora_takes_no_lora_variant": [
        (f"{SMALLEST}{ADALORA}lora: {{{key}}}", f"lora.{key.split(':')[0]}")
        for key in (
            "use_dora: true",
            "use_rslora: true",
            "lora_bias: true",
            "init_lora_weights: gaussian",
            "rank_pattern: {q: 1}",
            "alpha_pattern: {q: 1}",
            "target_parameters: [a.w]",
            "r: 8",
        )
    ],
    "adalora_prunes": [
        (f"{SMALLEST}adalora: {{target_r: 12, init_r: 12}}", "adalora.target_r"),
    ],
    "one_half_precision": [(f"{SMALLEST}training: {{fp16: true, bf16: true}}", "training.fp16")],
    "step_counts_are_whole": [
        (f"{SMALLEST}training: {{warmup_steps: 10.5}}", "training.warmup_steps"),
        (f"{SMALLEST}training: {{logging_steps: 1.5}}", "training.logging_steps"),
    ],
    "max_steps_leave_room": [
        (f"{SMALLEST}training: {{warmup_steps: 100, max_steps: 100}}", "training.warmup_steps"),
        (f"{SMALLEST}training: {{max_steps: 1, warmup_steps: 0.03}}", "training.warmup_steps"),
        (f"{SMALLEST}adalora: {{tfinal: 9}}\ntraining: {{max_steps: 10}}", "adalora"),
        (f"{EVAL}training: {{eval_strategy: steps, eval_steps: 20, max_steps: 10}}", "training.eval_steps"),
        (
            scheduled("warmup_stable_decay", "num_decay_steps: 100", more=", max_steps: 100"),
            "training.lr_scheduler_kwargs.num_decay_steps",
        ),
        (
            scheduled("warmup_stable_decay", "num_decay_steps: 0.5, num_stable_steps: 9", more=", max_steps: 100"),
            "training.lr_scheduler_kwargs.num_stable_steps",
        ),
        (f"{SMALLEST}adalora: {{tinit: 60, tfinal: 40}}\ntraining: {{max_steps: 100}}", "adalora"),
    ],
    "rates_stay_below_what_any_run_bears": [
        (f"{SMALLEST}optimizer: {{loraplus_lr_ratio: 1e5}}", "optimizer.loraplus_lr_ratio"),
        (f"{SMALLEST}training: {{weight_decay: 0.5, learning_rate: 2}}", "training.weight_decay"),
    ],
    "evaluation_has_rows": [
        (f"{SMALLEST}training: {{load_best_model_at_end: true}}", "training.load_best_model_at_end"),
        (f"{EVAL}training: {{load_best_model_at_end: true}}", "training.load_best_model_at_end"),
        (f"{SMALLEST}early_stopping: {{}}", "early_stopping"),
        (f"{EVAL}early_stopping: {{}}", "early_stopping"),
        (f"{SMALLEST}training: {{eval_strategy: epoch}}", "training.eval_strategy"),
        (f"{EVAL}training: {{lr_scheduler_type: reduce_lr_on_plateau}}", "training.lr_scheduler_type"),
    ],
    "eval_steps_go_with_their_strategy": [
        (f"{EVAL}training: {{eval_steps: 10}}", "training.eval_steps"),
        (f"{EVAL}training: {{eval_strategy: epoch, eval_steps: 10}}", "training.eval_steps"),
        (f"{EVAL}training: {{eval_strategy: steps}}", "training.eval_strategy"),
    ],
    "strategy_is_known_or_a_file": [
        (f"{SMALLEST}launch: {{strategy: fsdp}}", "launch.strategy"),
        (f"{SMALLEST}launch: {{strategy: nowhere.yaml}}", "launch.strategy"),
    ],
    "halving_needs_whole_gradients": [
        (f"{SMALLEST}health: {{on_oom: halve_batch}}\nlaunch: {{strategy: {strategy}}}", "health.on_oom")
        for strategy in ("fsdp2", "zero2", "zero3")
    ],
    "zero_needs_a_shared_disk": [
        (f"{SMALLEST}launch: {{strategy: {strategy}, machines: 2}}", "launch.shared_disk")
        for strategy in ("zero2", "zero3")
    ],
    "optimizer_takes_sharded_weights": [
        (f"{SMALLEST}training: {{optim: adamw_8bit}}\nlaunch: {{strategy: fsdp2}}", "training.optim"),
        (f"{SMALLEST}training: {{optim: adafactor}}\nlaunch: {{strategy: fsdp2}}", "training.optim"),
    ],
    "output_stays_out_of_the_model": [
        (f"{SMALLEST.replace('gpt2', '/srv/base')}output_dir: /srv/base", "output_dir"),
        (f"{SMALLEST.replace('gpt2', '/srv/base')}output_dir: /srv/other/../base/runs/x", "output_dir"),
    ],
    "output_dir_can_be_a_directory": [
        (f"{SMALLEST}output_dir: runs/{'x' * 300}", "output_dir"),
        (f"{SMALLEST}output_dir: ~nobody-of-that-name/x", "output_dir"),
    ],
    "silenced_advice_exists": [(f"{SMALLEST}silence: [alphaa]", "silence")],
    "schedule_knows_its_arguments": [
        (f"{SMALLEST}training: {{lr_scheduler_kwargs: {{num_cycle: 2}}}}", "training.lr_scheduler_kwargs.num_cycle"),
        (f"{SMALLEST}training: {{lr_scheduler_type: cosine_with_min_lr}}", "training.lr_scheduler_type"),
        (f"{SMALLEST}training: {{lr_scheduler_type: warmup_stable_decay}}", "training.lr_scheduler_type"),
        (
            f"{SMALLEST}training: {{lr_scheduler_type: cosine_with_min_lr, "
            "lr_scheduler_kwargs: {min_lr: 1e-5, min_lr_rate: 1}}",
            "training.lr_scheduler_type",
        ),
    ],
    "schedule_takes_these_values": [
        (scheduled("warmup_stable_decay", "num_decay_steps: 10%"), "training.lr_scheduler_kwargs.num_decay_steps"),
        (scheduled("warmup_stable_decay", "num_decay_steps: 2.5"), "training.lr_scheduler_kwargs.num_decay_steps"),
        (
            scheduled("warmup_stable_decay", "num_decay_steps: 9, decay_type: exp"),
            "training.lr_scheduler_kwargs.decay_type",
        ),
        (scheduled("cosine_with_min_lr", "min_lr: 1"), "training.lr_scheduler_kwargs.min_lr"),
        (scheduled("cosine_with_min_lr", "min_lr_rate: 10"), "training.lr_scheduler_kwargs.min_lr_rate"),
        (scheduled("cosine_with_min_lr", 'min_lr: "1e-5"'), "training.lr_scheduler_kwargs.min_lr"),
        (scheduled("cosine", "num_cycles: two"), "training.lr_scheduler_kwargs.num_cycles"),
        (scheduled("cosine", "num_cycles: true"), "training.lr_scheduler_kwargs.num_cycles"),
        (scheduled("polynomial", "lr_end: 0.1"), "training.lr_scheduler_kwargs.lr_end"),
        (f"{SMALLEST}training: {{lr_scheduler_type: polynomial, learning_rate: 1e-8}}", "training.learning_rate"),
        (scheduled("inverse_sqrt", "timescale: 0"), "training.lr_scheduler_kwargs.timescale"),
        (
            f"{EVAL}training: {{eval_strategy: epoch, lr_scheduler_type: reduce_lr_on_plateau, "
            "lr_scheduler_kwargs: {mode: max}}",
            "training.lr_scheduler_kwargs.mode",
        ),
    ],
    "schedule_uses_its_warm_up": [
        (f"{SMALLEST}training: {{warmup_steps: 100, lr_scheduler_type: constant}}", "training.warmup_steps"),
    ],
    "source_is_a_path_or_a_hub_data_set": [
        (with_source("{path: a, hub: b/c}"), "data.train.0.hub"),
        (with_source("{format: text}"), "data.train.0"),
        (with_source("{path: a, split: test}"), "data.train.0.split"),
        (with_source("{path: a, name: main}"), "data.train.0.name"),
        (with_source("{path: a, revision: main}"), "data.train.0.revision"),
    ],
    "hub_names_a_data_set": [(with_source("{hub: nowhere/rows.jsonl}"), "data.train.0.hub")],
    "columns_belong_to_the_format": [
        (with_source("{path: a, format: alpaca, columns: {prompt: x}}"), "data.train.0.columns.prompt"),
        (with_source("{path: a, columns: {question: prompt}}"), "data.train.0.columns.question"),
        (with_source("{path: a, columns: {prompt: a, output: b}}"), "data.train.0.columns"),
        (with_source("{path: a, columns: {prompt: a, completion: a}}"), "data.train.0.columns"),
    ],
    "held_out_rows_come_from_one_place": [
        (EVAL.replace("eval_fraction", "eval: [{path: e}], eval_fraction"), "data.eval_fraction"),
    ],
    "held_out_rows_are_not_trained_on": [
        (SMALLEST.replace("]}", "], eval: [{path: ./rows.jsonl}]}"), "data.eval.0.path"),
        (with_source("{hub: a/b}").replace("]}", "], eval: [{path: x}, {hub: a/b}]}"), "data.eval.1.hub"),
    ],
    "template_is_known_or_a_file": [
        (SMALLEST.replace("]}", "], template: chatml}"), "data.template"),
        (SMALLEST.replace("]}", "], template: nowhere.jinja}"), "data.template"),
    ],
    "template_takes_arguments": [
        (SMALLEST.replace("]}", "], template: plain, template_kwargs: {a: 1}}"), "data.template_kwargs"),
    ],
    "template_variables_do_what_they_say": [
        (with_variable("no"), "data.template_kwargs.a"),
        (with_variable('"False"'), "data.template_kwargs.a"),
        (with_variable("on"), "data.template_kwargs.a"),
        (with_variable("1").replace("{a:", "{tools:"), "data.template_kwargs.tools"),
        (with_variable("1").replace("{a:", "{strftime_now:"), "data.template_kwargs.strftime_now"),
    ],
    "extra_keys_reach_the_library": [
        (f"{SMALLEST}lora: {{extra: {{rr: 1}}}}", "lora.extra.rr"),
        (f"{SMALLEST}training: {{extra: {{save_steps: 1}}}}", "training.extra.save_steps"),
        (f"{SMALLEST}{Q4[:-2]}, extra: {{x: 1}}}}", "quantization.extra.x"),
        (SMALLEST.replace("gpt2}", "gpt2, extra: {token: true}}"), "model.extra.token"),
    ],
    "extra_values_are_taken": [
        (with_extra(f"{key}: {value}"), f"training.extra.{key}")
        for key, value in (
            *(("tf32", "1"), ("adam_beta1", "1.0"), ("adam_beta2", "true"), ("adam_epsilon", "-1")),
            *(("torch_empty_cache_steps", "0"), ("ddp_timeout", "soon"), ("data_seed", "-1"), ("eval_delay", "-1")),
            *(("full_determinism", "no"), ("pad_to_multiple_of", "0"), ("optim_args", "3")),
        )
    ]
    + [
        (
            f"{SMALLEST}training: {{torch_compile: true, extra: {{torch_compile_backend: nope}}}}",
            "training.extra.torch_compile_backend",
        )
    ],
    "optim_args_are_read": [
        (with_extra("optim_args: foo"), "training.extra.optim_args"),
        *(
            (f"{SMALLEST}training: {{optim: sgd, extra: {{optim_args: '{args}'}}}}", "training.extra.optim_args")
            for args in ("foo", "momentun=0.9", "momentum", "momentum=high", "momentum=0.9,nesterov=1")
        ),
    ],
    "workers_are_there_to_be_told": [
        (with_extra("dataloader_prefetch_factor: 2"), "training.extra.dataloader_prefetch_factor"),
        (with_extra("dataloader_persistent_workers: true"), "training.extra.dataloader_persistent_workers"),
    ],
    "compiling_is_asked_for_by_its_key": [
        (
            f"{SMALLEST}training: {{extra: {{torch_compile_backend: eager}}}}",
            "training.extra.torch_compile_backend",
        ),
        (
            f"{SMALLEST}training: {{torch_compile: false, extra: {{torch_compile_mode: default}}}}",
            "training.extra.torch_compile_mode",
        ),
    ],
    "generation_has_held_out_rows": [(f"{SMALLEST}eval: {{generate: {{}}}}", "eval.generate")],
    "answer_is_a_regular_expression": [
        (f"{EVAL}eval: {{generate: {{answer: '(a'}}}}", "eval.generate.answer"),
        (f"{EVAL}eval: {{generate: {{answer: '(.*)+x'}}}}", "eval.generate.answer"),
        (f"{EVAL}eval: {{generate: {{answer: a, metrics: [bleu]}}}}", "eval.generate.answer"),
    ],
    "metrics_are_named_once": [(f"{EVAL}eval: {{generate: {{metrics: [bleu, chrf, bleu]}}}}", "eval.generate.metrics")],
    "general_text_has_a_base_to_compare_with": [
        (f"{EVAL}eval: {{general: [{{path: g.txt}}], compare_base: false}}", "eval.general")
    ],
    "ranks_rise": [
        (f"{EVAL}rank_sweep: {{ranks: [4, 16, 8]}}", "rank_sweep.ranks"),
        (f"{EVAL}rank_sweep: {{ranks: [4, 4, 8]}}", "rank_sweep.ranks"),
    ],
    "two_ranks_at_least": [
        (f"{EVAL}rank_sweep: {{ranks: [4]}}", "rank_sweep.ranks"),
        (f"{EVAL}rank_sweep: {{ranks: []}}", "rank_sweep.ranks"),
    ],
    "alpha_is_the_policys": [
        (f"{EVAL}lora: {{lora_alpha: 16}}\nrank_sweep: {{ranks: [4, 8]}}", "rank_sweep.alpha"),
        (f"{EVAL}lora: {{use_rslora: true}}\nrank_sweep: {{alpha: fixed}}", "rank_sweep.alpha"),
        (f"{EVAL}lora: {{alpha_pattern: {{q_proj: 8}}}}\nrank_sweep: {{}}", "rank_sweep.alpha"),
    ],
    "budget_pays_for_the_largest": [
        (f"{EVAL}rank_sweep: {{ranks: [4, 8], budget: 0.4}}", "rank_sweep.budget"),
        (f"{EVAL}rank_sweep: {{exhaustive: true, budget: 0.5}}", "rank_sweep.budget"),
    ],
    "sweep_has_held_out_rows": [(f"{SMALLEST}rank_sweep: {{ranks: [4, 8]}}", "rank_sweep")],
    "ranks_are_to_be_chosen": [
        (f"{EVAL}rank_sweep: {{}}\n{ADALORA}", "rank_sweep"),
        (f"{EVAL}lora: {{rank_pattern: {{q_proj: 8}}}}\nrank_sweep: {{}}", "rank_sweep"),
    ],
    "one_process_a_trial": [(f"{EVAL}rank_sweep: {{}}\nlaunch: {{strategy: fsdp2}}", "rank_sweep")],
    "added_tokens_are_written_once": [
        (ADDED.replace("<a>", ""), "model.add_tokens"),
        (ADDED.replace("<a>", "  "), "model.add_tokens"),
        (ADDED.replace("<a>", "<a> "), "model.add_tokens"),
        (ADDED.replace('"<a>"', '"<a>", "<a>"'), "model.add_tokens"),
    ],
    "rows_of_added_tokens_can_be_trained": [
        (f"{ADDED}launch: {{strategy: fsdp2}}", "model.add_tokens"),
        (f"{ADDED}launch: {{strategy: zero3}}", "model.add_tokens"),
        (f"{ADDED}lora: {{modules_to_save: [lm_head]}}", "model.add_tokens"),
        (f"{ADDED}lora: {{target_modules: [q_proj, embed_tokens]}}", "model.add_tokens"),
        (f"{ADDED}{Q4[:-2]}, llm_int8_skip_modules: [q_proj]}}", "quantization.llm_int8_skip_modules"),
    ],
}


def test_every_rule_is_seen_to_refuse() -> None:
    assert [rule.__name__ for rule in RULES] == list(BROKEN)


@pytest.mark.parametrize(
    ("text", "key"),
    [case for cases in BROKEN.values() for case in cases],
    ids=[rule for rule, cases in BROKEN.items() for _ in cases],
)
def test_a_broken_rule_is_said_once_at_its_key(tmp_path: Path, text: str, key: str) -> None:
    (line,) = problems(tmp_path, f"{text}\n")
    assert line.split(": ")[1] == key
    assert ";" in line


@pytest.mark.parametrize(
    "text",
    [
        f"{SMALLEST}{Q4}lora: {{use_dora: true}}",
        f"{SMALLEST}{Q4}lora: {{init_lora_weights: olora}}",
        f"{SMALLEST}{Q4}lora: {{init_lora_weights: loftq}}",
        f"{SMALLEST}{Q4}lora: {{init_lora_weights: eva, eva_config: {{rho: 1.5}}}}",
        f"{SMALLEST}{Q4[:-2]}, bnb_4bit_quant_storage: bfloat16}}\nlaunch: {{strategy: fsdp2}}",
        f"{SMALLEST}launch: {{strategy: zero2, machines: 2, shared_disk: true}}",
        f"{SMALLEST}launch: {{strategy: zero2, machines: 1}}",
        f"{SMALLEST}quantization: {{load_in_4bit: true, llm_int8_skip_modules: [lm_head]}}",
        f"{SMALLEST}quantization: {{load_in_8bit: true, load_in_4bit: false}}",
        f"{SMALLEST}lora: {{target_modules: '.*_proj', modules_to_save: [lm_head]}}",
        f"{SMALLEST}lora: {{target_modules: [q_proj], layers_to_transform: 0, layers_pattern: h}}",
        f"{SMALLEST}lora: {{target_parameters: [mlp.experts.gate_up_proj], init_lora_weights: gaussian}}",
        f"{SMALLEST}{ADALORA}{Q4}lora: {{lora_alpha: 32, target_modules: [q_proj]}}",
        f"{EVAL}training: {{eval_strategy: steps, eval_steps: 0.1}}\nearly_stopping: {{}}",
        f"{EVAL}training: {{eval_strategy: epoch, load_best_model_at_end: true}}",
        f"{SMALLEST}training: {{fp16: true, bf16: auto}}",
        f"{SMALLEST}training: {{warmup_steps: 0, lr_scheduler_type: constant}}",
        f"{SMALLEST}training: {{lr_scheduler_type: polynomial, lr_scheduler_kwargs: {{power: 2}}}}",
        scheduled("warmup_stable_decay", "num_decay_steps: 0.1, decay_type: 1-sqrt, min_lr_ratio: 0.1"),
        scheduled("cosine_with_min_lr", "min_lr: 1e-5, num_cycles: 0.5, min_lr_rate: null"),
        f"{SMALLEST}training: {{optim: sgd, extra: {{optim_args: 'momentum=0.9, nesterov=true'}}}}",
        f"{SMALLEST}training: {{dataloader_num_workers: 1, extra: {{dataloader_prefetch_factor: 2}}}}",
        with_extra("pad_to_multiple_of: auto, data_seed: null, eval_delay: 2, adam_epsilon: 1e-6"),
        f"{SMALLEST}lora: {{target_modules: '(model\\.)?(\\w+\\.)*(q|v)_proj', rank_pattern: {{'.*\\.1\\..*': 8}}}}",
        f"{SMALLEST}training: {{max_steps: 10, warmup_steps: 0.5, extra: {{adam_beta2: 0.95}}}}",
        f"{SMALLEST.replace('gpt2', '/srv/base')}output_dir: /srv/base-run",
        f"{SMALLEST}silence: [alpha, no-held-out-rows]",
        with_source("{hub: a/b, name: main, split: test, revision: abc}"),
        with_source("{path: a, columns: {messages: chat}}"),
        with_source("{hub: a/b, split: train}").replace("]}", "], eval: [{hub: a/b, split: test}]}"),
        SMALLEST.replace("]}", "], template_kwargs: {enable_thinking: false}}"),
        f"{EVAL}eval: {{generate: {{answer: '#### (.*)', metrics: [bleu, classification]}}, general: [{{path: g}}]}}",
        f"{SMALLEST}eval: {{compare_base: false, tasks: [hellaswag, ./mine.yaml]}}",
    ],
)
def test_what_the_libraries_can_do_is_not_refused(tmp_path: Path, text: str) -> None:
    assert problems(tmp_path, f"{text}\n") == []


def test_a_strategy_and_a_template_may_be_files(tmp_path: Path) -> None:
    written(tmp_path, "", name="mine.yaml")
    written(tmp_path, "", name="chatml.jinja")
    text = (
        SMALLEST.replace("]}", "], template: chatml.jinja, template_kwargs: {a: 1}}")
        + "launch: {strategy: mine.yaml}\n"
    )
    assert loaded(tmp_path, text).recipe.data.template == str(tmp_path / "chatml.jinja")
