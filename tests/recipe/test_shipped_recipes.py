"""Every recipe that ships: valid, without advice against it, explained, and of a model that is known offline."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lorafit.builders.base_model import check_base_model
from lorafit.builders.bnb_config import bnb_config
from lorafit.builders.model_files import is_on_hub
from lorafit.builders.tokenizer import load_tokenizer
from lorafit.data import scan
from lorafit.planning.known_shapes import architecture, known_shape
from lorafit.planning.targets import target_table
from lorafit.recipe import advise, load
from support import ROOT

RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
NAMES = (
    *("gemma-2-2b-lora", "gpt2-lora", "llama3-70b-qlora-fsdp2", "llama3-8b-lora", "llama3-8b-qlora"),
    *("mistral-7b-lora", "phi-3-mini-lora", "quickstart-qlora", "quickstart", "qwen3-4b-qlora", "smollm2-135m-lora"),
)
RECIPES_OF_HUB_MODELS = [path for path in RECIPES if not path.stem.startswith("quickstart")]
every_recipe = pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)


def size(count: float) -> str:
    """Bytes for people."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def test_eleven_recipes_ship() -> None:
    assert len(RECIPES) == 11 and len(RECIPES_OF_HUB_MODELS) == 9
    assert tuple(path.stem for path in RECIPES) == NAMES


@every_recipe
def test_it_is_valid_and_nothing_is_advised_against_it(path: Path) -> None:
    loaded = load(path)
    assert loaded.recipe.lora.target_modules == "all-linear"
    assert [str(advice) for advice in advise(loaded.recipe)] == []
    assert ("qlora" in path.stem) == (loaded.recipe.quantization is not None)
    assert ("fsdp2" in path.stem) == (loaded.recipe.launch.strategy == "fsdp2")


@every_recipe
def test_it_opens_with_what_it_trains_what_it_needs_and_the_commands(path: Path) -> None:
    comment = path.read_text(encoding="utf-8").split("\n\n")[0]
    for word in ("# Trains  ", "# Needs   ", f"lorafit train recipes/{path.name}\n"):
        assert word in f"{comment}\n"
    assert set(re.findall(r"recipes/[\w.-]+\.yaml", comment)) <= {f"recipes/{path.name}"}


@every_recipe
def test_its_data_ships_and_every_row_has_its_shape(path: Path) -> None:
    recipe = load(path).recipe
    rows = scan(recipe.data, seed=recipe.training.seed)
    assert (rows.train_rows, rows.eval_rows) == (5472, 364)


@every_recipe
def test_its_architecture_is_known_offline(path: Path) -> None:
    model = load(path).recipe.model
    assert architecture(model).architectures
    assert is_on_hub(model) == (known_shape(model.model_name_or_path) is not None)


@pytest.mark.parametrize("path", RECIPES_OF_HUB_MODELS, ids=lambda path: path.stem)
def test_its_figures_are_the_arithmetic_of_its_architecture(path: Path) -> None:
    """Weights: each quantised weight 4 bits + 8 / 64 for its block + 32 / (64 x 256) for the block of blocks."""
    recipe = load(path).recipe
    table = target_table(architecture(recipe.model), r=recipe.lora.r)
    adapter = table.all_linear().lora_parameters
    linear = sum(target.parameters for target in table.targets if target.all_linear)
    text = path.read_text(encoding="utf-8")
    assert f"# Trains  {adapter:,} adapter parameters" in text
    assert f"at most {size(adapter * 16)} for adapter, gradients and AdamW: {adapter:,} x 16 bytes" in text
    if recipe.quantization is None:
        each = 4 if recipe.model.dtype == "float32" else 2
        assert f"# Needs   {size(table.parameters * each)} for the weights: {table.parameters:,} x {each} bytes" in text
    else:
        rest = table.parameters - linear
        weights = linear * (4 + 8 / 64 + 32 / (64 * 256)) / 8 + rest * 2
        arithmetic = f"{linear:,} x 4.127 bits + {rest:,} (embeddings, head, norms) x 2 bytes"
        assert f"# Needs   {size(weights)} for the weights: {arithmetic}" in text


@every_recipe
def test_its_quantisation_is_the_qlora_papers(path: Path) -> None:
    quantization = load(path).recipe.quantization
    if quantization is not None:
        config = bnb_config(quantization)
        assert (config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant) == ("nf4", True)


def test_the_quickstart_base_passes_every_check() -> None:
    recipe = load(ROOT / "recipes" / "quickstart.yaml").recipe
    files = check_base_model(recipe.model)
    tokenizer = load_tokenizer(recipe.model)
    assert files.total_bytes <= 8_000_000
    assert tokenizer.eos_token_id in files.stop_token_ids
    assert tokenizer.pad_token_id not in files.stop_token_ids
