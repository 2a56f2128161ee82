"""`model`: the base model, passed to `AutoModelForCausalLM.from_pretrained`."""

from typing import Literal

from pydantic import Field

from lorafit.recipe.sections.base import Extra, Names, Section


class ModelSection(Section):
    """The base model the adapter is trained on."""

    model_name_or_path: str = Field(min_length=1)
    """Hub id (`Qwen/Qwen3-4B`) or directory. What looks like a path (`./base`, `/models/x`, an existing directory)
    never reaches the Hub; a relative path is relative to the recipe."""

    revision: str = Field(default="main", min_length=1)
    """Branch, tag or commit of a Hub model. A commit hash pins the weights. Default: the Hub's own."""

    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Type the base weights are held in. `auto` is the type they were saved in (transformers' own meaning), and float32
    on a CPU that does not compute bfloat16, where 16-bit types are emulated, many times slower. 2 bytes a parameter for
    the 16-bit types, 4 for float32."""

    attn_implementation: Literal[
        "auto", "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"
    ] = "auto"
    """How attention is computed. `auto` lets transformers choose (sdpa where the model has it). Hub kernels
    (`org/repo`) are refused: they run code downloaded at start."""

    trust_remote_code: bool = False
    """Run Python code that comes with the model. Default false: the code of a model repository is a stranger's."""

    add_tokens: Names = ()
    """Tokens to add to the vocabulary, e.g. `["<tool>", "</tool>"]`: each gets a row of its own in embedding and output
    head, which starts from the mean of the pieces it was cut into before, is trained whole and saved with the adapter.
    A token the base has already is trained from where it stands, or anew where it never was."""

    extra: Extra = {}
    """Further arguments of `from_pretrained`, e.g. `subfolder`, `cache_dir`."""
