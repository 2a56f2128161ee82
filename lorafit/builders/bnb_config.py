"""`quantization` section in, `transformers.BitsAndBytesConfig` out."""

from __future__ import annotations

import inspect

from transformers import BitsAndBytesConfig

from lorafit.errors import ModelError
from lorafit.recipe.sections import QuantizationSection


def bnb_config(section: QuantizationSection) -> BitsAndBytesConfig:
    """The library's config with the section's keys; raises ModelError for a key of `extra` that it does not know.

    The library takes any keyword and only logs what it does not use, so unknown keys are refused here.
    """
    keys = section.model_dump(exclude={"extra", "llm_int8_skip_modules"})
    skipped = section.llm_int8_skip_modules
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
