"""What an adapter's own files claim, held against what peft would read of them. Before a base is looked at.

peft passes over tensors whose names it does not expect, and over settings it does not know; the rest of the adapter is
then taken for the whole.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import peft
from peft import AdaLoraConfig, LoraConfig, PeftConfig

_KINDS: Mapping[str, type[PeftConfig]] = {"LORA": LoraConfig, "ADALORA": AdaLoraConfig}
_PREFIX = "base_model.model."
_NAMED = re.compile(
    r"\.(lora_(?:A|B|E|embedding_A|embedding_B|magnitude_vector)|ranknum|trainable_tokens_delta)"
    r"\.(?!weight$|bias$)[^.]+(?=\.weight$|\.bias$|$)"
)
"""A factor with the name of its adapter in it, as in a state dict of the whole model."""
_NAMED_WHOLE = re.compile(r"\.modules_to_save\.[^.]+(?=\.(?:weight|bias)$)")
_KOHYA = re.compile(r"lora_(?:unet|te\d*|transformer)_|\.lora_(?:down|up)\.")


def settings_problems(config: Mapping[str, Any]) -> Iterator[str]:
    """Settings that peft would pass over, or put a value of its own in place of."""
    known = _KINDS[config["peft_type"]].__dataclass_fields__
    saved_by = config.get("peft_version")
    by = f"saved by peft {saved_by}" if saved_by else "it does not say by which peft it was saved"
    for key, value in config.items():
        if key not in known and not (value is None or value is False or value in ({}, [])):
            yield (
                f"{key}: {value!r} is not known to the peft installed ({peft.__version__}), which would leave it out; "
                f"{by}: install that one, or a newer"
            )
    needed = ("r", "lora_alpha") if config["peft_type"] == "LORA" else ("lora_alpha",)
    for key in needed:
        if key not in config:
            yield f"has no {key}, for which peft would take {known[key].default}: write the value of training"
        elif not _is_number(config[key]):
            yield f"{key} is {config[key]!r}, not a number: write the value of training"


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def names_problem(names: Iterable[str]) -> str | None:
    """Tensors that peft would pass over because they are called otherwise than it calls them; None where none are."""
    listed = sorted(names)
    if kohya := [name for name in listed if _KOHYA.search(name)]:
        return f"holds {kohya[0]}: that is kohya's layout; convert it to peft's (`lora_A`, `lora_B`) first"
    wrong = [name for name in listed if name != name_in_peft(name)]
    if not wrong:
        return None
    return (
        f"calls {len(wrong)} of its {len(listed)} tensors otherwise than peft, which would pass over them: rename "
        f"{wrong[0]} to {name_in_peft(wrong[0])}, and the others alike"
    )


def name_in_peft(name: str) -> str:
    """What peft calls a tensor in a saved adapter: with one prefix, and without what wrapped the model in training."""
    bare = ".".join(part for part in name.split(".") if part != "_orig_mod").removeprefix("module.")
    while bare.startswith(_PREFIX):
        bare = bare.removeprefix(_PREFIX)
    return _PREFIX + _NAMED_WHOLE.sub("", _NAMED.sub(r".\1", bare))
