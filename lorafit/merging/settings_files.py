"""What a merged model needs besides its weights: config, generation config, tokenizer, chat template, model card."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lorafit import __version__
from lorafit.builders.model_files import GENERATION, TOKENIZER_FILES, BaseModelFiles, is_on_hub
from lorafit.builders.template_files import MORE
from lorafit.merging.adapter_files import Adapter

TOKENIZER = (
    *TOKENIZER_FILES,
    *("special_tokens_map.json", "added_tokens.json", "merges.txt", "chat_template.jinja", "chat_template.json"),
)
BESIDES = (
    *(GENERATION, "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),
    *("LICENSE*", "NOTICE*"),
)


def write_settings(
    directory: Path, *, adapter: Adapter, base_files: BaseModelFiles, config: Mapping[str, Any], dtype: str
) -> None:
    """Everything but the weights. The tokenizer is the adapter's if it has one: training saw the text through it."""
    if config:
        (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    has_tokenizer = any((adapter.directory / name).is_file() for name in TOKENIZER_FILES)
    source = adapter.directory if has_tokenizer else base_files.directory
    copy_tokenizer(source, directory)
    code = ("*.py",) if "auto_map" in base_files.config else ()
    _copy_all(base_files.directory, (*BESIDES, *code), directory)
    _copy_all(adapter.directory, (GENERATION,), directory)  # where it names a stop token
    (directory / "README.md").write_text(_card(adapter, dtype=dtype), encoding="utf-8")


def copy_tokenizer(source: Path, directory: Path) -> None:
    """A tokenizer's files, with all of its chat templates."""
    _copy_all(source, TOKENIZER, directory)
    if (source / MORE).is_dir():
        shutil.copytree(source / MORE, directory / MORE, copy_function=shutil.copyfile)


def _copy_all(source: Path, patterns: Iterable[str], directory: Path) -> None:
    for pattern in patterns:
        for path in source.glob(pattern):
            shutil.copyfile(path, directory / path.name)  # through links, and readable as the umask says


def _card(adapter: Adapter, *, dtype: str) -> str:
    """A model card; a base in a directory is not named by its path, which is nobody else's business."""
    base = adapter.base.model_name_or_path if is_on_hub(adapter.base) else None
    front = ["---", *([f"base_model: {base}", "base_model_relation: finetune"] if base else [])]
    front += ["library_name: transformers", "tags: [lorafit, lora, merged]", "---"]
    kind = "DoRA" if adapter.config.get("use_dora") else str(adapter.config["peft_type"]).replace("LORA", "LoRA")
    text = f"""
# {base or "A base model"} with a {kind} adapter merged in

The weights of the base model with the adapter's update added in float32 and rounded once ({dtype}). It loads with plain
`transformers`; no adapter is needed any more. Written by lorafit {__version__}.
"""
    return "\n".join(front) + "\n" + text
