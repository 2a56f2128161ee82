"""`quantization` section in, `transformers.BitsAndBytesConfig` out."""

from __future__ import annotations

import inspect

from transformers import BitsAndBytesConfig

from lorafit.errors import ModelError
from lorafit.recipe.sections import QuantizationSection


def bnb_config(section: QuantizationSection) -> BitsAndBytesConfig:
    """The library's config with the section's keys; raises ModelError for a key of `extra` that it does not know.

    `bnb_4bit_compute_dtype: auto` is bfloat16 here, as on the GPUs that are planned for; what loads a model says the
    type that its machine computes.
    The library takes any keyword and only logs what it does not use, so unknown keys are refused here.
    """
    keys = section.model_dump(exclude={"extra", "llm_int8_skip_modules"})
    skipped = section.llm_int8_skip_modules
    if section.bnb_4bit_compute_dtype == "auto":
        keys["bnb_4bit_compute_dtype"] = "bfloat16"
    keys["llm_int8_skip_modules"] = None if skipped is None else list(skipped)
    known = set(inspect.signature(BitsAndBytesConfig.__init__).parameters) - {"self", "kwargs"}
    for key in section.extra:
        if key in keys:
            raise ModelError(f"{key} is a key of quantization; write it there", where="quantization.extra")
        if key not in known:
            raise ModelError(
                f"{key} is not an argument of BitsAndBytesConfig; it takes {', '.join(sorted(known - set(keys)))}",
                where="quantization.extra",
            )
    return BitsAndBytesConfig(**keys, **section.extra)
