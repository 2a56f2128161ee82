"""`quantization`: becomes `transformers.BitsAndBytesConfig`; leave it out for plain LoRA."""

from typing import Literal

from pydantic import Field

from lorafit.recipe.sections.base import Extra, Names, Section


class QuantizationSection(Section):
    """Hold the frozen base model in 4 or 8 bits (QLoRA, arXiv 2305.14314)."""

    load_in_4bit: bool = False
    """4-bit weights: about 0.5 byte a parameter plus state. Exactly one of load_in_4bit and load_in_8bit is true."""

    load_in_8bit: bool = False
    """8-bit weights (LLM.int8, arXiv 2208.07339): about 1 byte a parameter."""

    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    """4-bit code. Default nf4, as in the QLoRA paper (the library's own default is fp4, which is worse)."""

    bnb_4bit_use_double_quant: bool = True
    """Quantise the quantisation state too: saves about 0.4 bit a parameter. Default true, as in the QLoRA paper."""

    bnb_4bit_compute_dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Type the 4-bit weights are unpacked to for the matrix product. `auto` is bfloat16, as in the QLoRA paper; where
    that would be emulated it is float16 on a GPU and float32 on a CPU."""

    bnb_4bit_quant_storage: Literal["uint8", "bfloat16", "float16", "float32"] = "uint8"
    """Type the packed bytes are stored as. FSDP shards only floating types: set it to `bfloat16` for `fsdp2`."""

    llm_int8_threshold: float = Field(default=6.0, ge=0)
    """8-bit only: columns with an activation above this are computed in 16 bits. Default 6.0, as in the paper."""

    llm_int8_skip_modules: Names | None = None
    """Modules left unquantised. null keeps the library's choice (the output head)."""

    extra: Extra = {}
    """Further arguments of `BitsAndBytesConfig`."""
