"""One validated YAML recipe in, a LoRA or QLoRA adapter out."""

__version__ = "0.1.0"
