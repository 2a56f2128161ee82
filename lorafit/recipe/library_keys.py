"""What the library objects behind the sections take, as frozen lists: the recipe is checked without importing them.

`tests/recipe/test_extra.py` compares them with the installed libraries.
"""

from collections.abc import Mapping

from lorafit.tasks import Task

_FROM_PRETRAINED = """
    adapter_kwargs adapter_name allow_all_kernels attn_implementation cache_dir config device_map device_mesh
    disable_mmap distributed_config dtype experts_implementation force_download fusion_config generation_config
    gguf_file ignore_mismatched_sizes kernel_config key_mapping local_files_only max_memory offload_buffers
    offload_folder output_loading_info proxies quantization_config revision state_dict subfolder token torch_dtype
    tp_plan tp_size tqdm_class trust_remote_code use_kernels use_safetensors variant weights_only
"""

_BITS_AND_BYTES = """
    load_in_8bit load_in_4bit llm_int8_threshold llm_int8_skip_modules llm_int8_enable_fp32_cpu_offload
    llm_int8_has_fp16_weight bnb_4bit_compute_dtype bnb_4bit_quant_type bnb_4bit_use_double_quant bnb_4bit_quant_storage
"""

_LORA_CONFIG = """
    task_type peft_type auto_mapping peft_version base_model_name_or_path revision inference_mode r target_modules
    exclude_modules lora_alpha lora_dropout fan_in_fan_out bias use_rslora modules_to_save init_lora_weights
    layers_to_transform layers_pattern rank_pattern alpha_pattern megatron_config megatron_core trainable_token_indices
    loftq_config eva_config corda_config lora_ga_config use_dora velora_config alora_invocation_tokens use_qalora
    qalora_group_size monteclora_config layer_replication runtime_config lora_bias target_parameters use_bdlora
    arrow_config kasa_config ensure_weight_tying
"""

_TRAINING_ARGUMENTS = """
    output_dir per_device_train_batch_size num_train_epochs max_steps learning_rate lr_scheduler_type
    lr_scheduler_kwargs warmup_steps optim optim_args weight_decay adam_beta1 adam_beta2 adam_epsilon
    optim_target_modules gradient_accumulation_steps average_tokens_across_devices max_grad_norm label_smoothing_factor
    bf16 fp16 bf16_full_eval fp16_full_eval tf32 activation_checkpointing activation_checkpointing_kwargs
    gradient_checkpointing gradient_checkpointing_kwargs torch_compile torch_compile_backend torch_compile_mode
    use_liger_kernel liger_kernel_config use_cache neftune_noise_alpha torch_empty_cache_steps auto_find_batch_size
    logging_strategy logging_steps logging_first_step log_on_each_node logging_nan_inf_filter
    include_num_input_tokens_seen log_level log_level_replica disable_tqdm report_to run_name project trackio_space_id
    trackio_bucket_id trackio_static_space_id eval_strategy eval_steps eval_delay per_device_eval_batch_size
    prediction_loss_only eval_on_start eval_do_concat_batches eval_use_gather_object eval_accumulation_steps
    include_for_metrics batch_eval_metrics save_only_model save_strategy save_steps save_on_each_node save_total_limit
    enable_jit_checkpoint push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision
    load_best_model_at_end metric_for_best_model greater_is_better ignore_data_skip
    restore_callback_states_from_checkpoint full_determinism seed data_seed use_cpu accelerator_config
    parallelism_config dataloader_drop_last dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers
    dataloader_prefetch_factor dataloader_multiprocessing_context dataloader_in_order remove_unused_columns label_names
    train_sampling_strategy length_column_name ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers
    ddp_static_graph ddp_backend ddp_timeout fsdp fsdp_config deepspeed debug skip_memory_metrics do_train do_eval
    do_predict resume_from_checkpoint local_rank
"""

LIBRARY_KEYS: Mapping[str, frozenset[str]] = {
    "model": frozenset(_FROM_PRETRAINED.split()),
    "quantization": frozenset(_BITS_AND_BYTES.split()),
    "lora": frozenset(_LORA_CONFIG.split()),
    "training": frozenset(_TRAINING_ARGUMENTS.split()),
}
"""By section; in `training` what the arguments of every task take."""


def library_keys(task: Task) -> dict[str, frozenset[str]]:
    """By section, for a recipe of this task."""
    return {**LIBRARY_KEYS, "training": LIBRARY_KEYS["training"] | task.arguments.own_keys}


def library_object(section: str, task: Task) -> str:
    """What becomes of a section, as the libraries call it."""
    return {
        "model": f"{task.model.auto_class}.from_pretrained",
        "quantization": "BitsAndBytesConfig",
        "lora": "peft.LoraConfig",
        "training": task.arguments.name,
    }[section]


_HUB = "nothing is pushed to the Hub while training"
_CHECKPOINTS = "write checkpoints.every and checkpoints.keep"
_LAUNCH = "write launch.strategy (ddp, fsdp2, zero2, zero3, or an accelerate file)"
_TRAIN_ON = "write data.train_on (answers, last_answer or all)"
_OWN_ROWS = "lorafit renders and tokenises the rows itself (section data)"
_OWN = "lorafit sets it itself"
_RECORD = "metrics.jsonl, the loggers and the table at the end are lorafit's; it sets it itself"
_WEIGHTS = "lorafit loads the weights itself, and only whole safetensors files"
_OTHER_METHOD = "lorafit has no training path for it"
_CODE = "it runs code downloaded at start"

NOT_FOR_RECIPES: dict[str, dict[str, str]] = {
    "model": {
        "token": "log in with `hf auth login` or set HF_TOKEN; a recipe holds no secret",
        "quantization_config": "write the quantization section",
        "torch_dtype": "renamed: write model.dtype",
        "device_map": "lorafit places the model; see launch.strategy",
        "max_memory": "lorafit places the model; see launch.strategy",
        "offload_folder": "training needs the whole base model in memory; see quantization and launch.strategy",
        "offload_buffers": "training needs the whole base model in memory; see quantization and launch.strategy",
        **dict.fromkeys(("tp_plan", "tp_size", "device_mesh", "distributed_config"), _LAUNCH),
        **dict.fromkeys(
            ("config", "state_dict", "use_safetensors", "weights_only", "gguf_file", "output_loading_info"), _WEIGHTS
        ),
        "ignore_mismatched_sizes": "weights of another shape would be replaced by random ones",
        **dict.fromkeys(("adapter_kwargs", "adapter_name"), "lora describes the only adapter of a run"),
        **dict.fromkeys(("allow_all_kernels", "use_kernels", "kernel_config"), _CODE),
        **dict.fromkeys(("generation_config", "tqdm_class"), "not a value that YAML can hold"),
    },
    "quantization": {
        "llm_int8_enable_fp32_cpu_offload": "training needs the whole base model on its device",
        "llm_int8_has_fp16_weight": "it keeps 16-bit weights beside the 8-bit ones; leave quantization out instead",
    },
    "lora": {
        **dict.fromkeys(("task_type", "peft_type", "peft_version", "auto_mapping", "inference_mode"), _OWN),
        "base_model_name_or_path": "write model.model_name_or_path",
        "revision": "write model.revision",
        "fan_in_fan_out": "lorafit reads it off the model",
        "loftq_config": "LoftQ here fits the adapter to the quantization section's own 4 bits; leave it out",
        **dict.fromkeys(("megatron_config", "megatron_core", "arrow_config", "runtime_config"), _OTHER_METHOD),
        **dict.fromkeys(("use_qalora", "qalora_group_size"), "peft reads it for GPTQ bases alone"),
        **dict.fromkeys(("alora_invocation_tokens", "use_bdlora"), _OTHER_METHOD),
        "layer_replication": "such an adapter cannot be merged: the repeated layers share their weights",
        **dict.fromkeys(("lora_ga_config", "kasa_config", "monteclora_config", "velora_config"), _OTHER_METHOD),
    },
    "training": {
        "output_dir": "write output_dir at the top of the recipe",
        **dict.fromkeys(("save_steps", "save_strategy", "save_total_limit", "save_on_each_node"), _CHECKPOINTS),
        "save_only_model": "a checkpoint without its optimizer cannot be resumed; " + _CHECKPOINTS,
        **dict.fromkeys(("enable_jit_checkpoint", "restore_callback_states_from_checkpoint"), _OWN),
        "ignore_data_skip": "a resumed run goes on with the next row; lorafit sets it itself",
        "resume_from_checkpoint": "give it to the command: `lorafit train RECIPE --resume`",
        **dict.fromkeys(("push_to_hub", "hub_private_repo", "hub_model_id", "hub_strategy", "hub_always_push"), _HUB),
        "hub_revision": _HUB,
        "hub_token": "log in with `hf auth login` or set HF_TOKEN; a recipe holds no secret",
        **dict.fromkeys(("fsdp", "fsdp_config", "deepspeed", "parallelism_config", "accelerator_config"), _LAUNCH),
        **dict.fromkeys(("local_rank", "ddp_backend"), _LAUNCH),
        "use_cpu": "lorafit trains on the GPU where there is one; hide it with CUDA_VISIBLE_DEVICES= otherwise",
        **dict.fromkeys(("completion_only_loss", "assistant_only_loss"), _TRAIN_ON),
        "chat_template_path": "write data.template",
        "dataset_text_field": "write data.train[].columns: {text: ...}",
        **dict.fromkeys(("dataset_kwargs", "dataset_num_proc", "shuffle_dataset"), _OWN_ROWS),
        "eos_token": "write data.stop_token",
        **dict.fromkeys(("pad_token", "remove_unused_columns", "label_names"), _OWN_ROWS),
        "length_column_name": _OWN_ROWS,
        "truncation_mode": "write data.over_length (error, drop or truncate)",
        "packing_strategy": "bfd is the only one: the others cut documents in two or let them see each other",
        "padding_free": "packing: true is padding-free",
        "eval_packing": "held-out rows are never packed: every row counts once",
        "auto_find_batch_size": "it changes the global batch silently; lower per_device_train_batch_size and raise "
        "gradient_accumulation_steps",
        "model_init_kwargs": "write the model section",
        "trust_remote_code": "write model.trust_remote_code",
        "activation_checkpointing": "write training.gradient_checkpointing",
        **dict.fromkeys(("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"), _OWN),
        **dict.fromkeys(("logging_nan_inf_filter", "logging_strategy", "logging_first_step", "disable_tqdm"), _RECORD),
        **dict.fromkeys(("log_level", "log_level_replica", "log_on_each_node", "prediction_loss_only"), _RECORD),
        **dict.fromkeys(("include_for_metrics", "batch_eval_metrics", "include_num_input_tokens_seen"), _RECORD),
        **dict.fromkeys(("eval_do_concat_batches", "eval_use_gather_object", "skip_memory_metrics"), _RECORD),
        **dict.fromkeys(
            ("metric_for_best_model", "greater_is_better"), "the best adapter has the lowest held-out loss"
        ),
        "eval_on_start": "the held-out loss is always measured before training",
        "use_cache": "training never caches keys and values: with packing they leak between documents",
        "dataloader_pin_memory": _OWN,
        "ddp_find_unused_parameters": _OWN,
        "label_smoothing_factor": "it costs a second forward pass and full logits; lorafit has no path for it",
        **dict.fromkeys(("use_liger_kernel", "liger_kernel_config"), "TRL's own loss already skips the full logits"),
        "optim_target_modules": "only GaLore, APOLLO and LOMO read it; " + _OTHER_METHOD,
        **dict.fromkeys(("do_train", "do_eval", "do_predict", "debug"), "the commands decide that"),
    },
}
"""Keys the libraries take but a recipe does not, and what to do instead."""
