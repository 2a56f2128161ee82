"""What was written, as plain transformers loads it: the second process of a verification.

Imports no peft: a merged model has to do without.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open

from lorafit.builders.weight_files import tensor_table
from lorafit.merging.verify_job import TYPES, Difference, Job, load_model, logits, stored_types
from lorafit.merging.weight_sketches import distance, floating_tensors, sketch

LOADING = {
    "missing_keys": "missing, so that transformers starts it at random",
    "unexpected_keys": "there and has no place in the model",
    "mismatched_keys": "of another shape than config.json says",
}
"""What transformers reports of loading a model, in words that follow a tensor's name."""


def compare(job: Job, facts: Mapping[str, Any]) -> dict[str, Any]:
    """What was written, read from disk, beside what the first process has left and found."""
    model, loaded = load_model(job, job.written)
    odd = {said: sorted(map(str, loaded[kind])) for kind, said in LOADING.items()}
    there = dict(floating_tensors(model))
    odd["neither of the base nor of the adapter"] = sorted(there.keys() - facts["tensors"].keys())
    table = {
        name: TYPES[tensor.dtype] for name, tensor in tensor_table(Path(job.written)).items() if tensor.dtype in TYPES
    }
    types = stored_types(model, job, table)
    odd["not stored as asked"] = sorted(f"{name} ({table[name]})" for name in table if table[name] != types[name])
    odd["missing"] = sorted(facts["tensors"].keys() - there.keys())
    rows = []
    with safe_open(job.weights, framework="pt") as file:
        for name in sorted(facts["tensors"].keys() & there.keys()):
            exact, rounded = file.get_tensor(f"exact.{name}"), file.get_tensor(f"rounded.{name}")
            written = sketch(there[name])
            if written.shape != exact.shape:
                odd.setdefault("of another shape", []).append(name)
                continue
            distances = {"off": distance(written, rounded), "lost": distance(written, exact)}
            distances |= {"expected_loss": distance(rounded, exact), "norm": float(rounded.norm())}
            rows.append({"name": name} | facts["tensors"][name] | distances)
        exact_logits, rounded_logits = file.get_tensor("logits.exact"), file.get_tensor("logits.rounded")
        merged_logits = file.get_tensor("logits.merged")
    written_logits = logits(model, job)
    return {
        "odd": {kind: names for kind, names in odd.items() if names},
        "tensors": rows,
        "positions": len(exact_logits),
        "largest_logit": float(exact_logits.abs().max()),
        "effect": facts["effect"],
        "written_to_exact": vars(Difference.of(written_logits, exact_logits)),
        "written_to_rounded": vars(Difference.of(written_logits, rounded_logits)),
        "rounded_to_exact": vars(Difference.of(rounded_logits, exact_logits)),
        "merged_to_exact": vars(Difference.of(merged_logits, exact_logits)),
    }
