"""Is what was written the base with the adapter in it? Read from disk in a process of its own, and compared with both.

What "right" is comes out of the merge itself, not from a table of thresholds. The reference merges in memory, in
float32, with peft, and rounds every weight once to the type it is stored in. A right merge differs from that

- in a weight: only where two orders of the same float32 sums round to different sides (`round_once` in sketch.py counts
  how far that can go; 0 for what the adapter leaves alone);
- in a logit: by less than the rounding itself costs, plus what float32 sums in another order cost, both measured on the
  reference. One position in 100 may differ more: a mixture of experts sends a token elsewhere over a last bit.

A wrong merge misses by its share of the update, which no order of sums explains.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from lorafit import operating_system
from lorafit.builders.model_files import BaseModelFiles
from lorafit.errors import MachineError, VerificationError
from lorafit.merging.adapter_files import Adapter
from lorafit.merging.child_answer import child_answer
from lorafit.merging.identity import REPORT
from lorafit.merging.processes import Processes, reference_process, written_process
from lorafit.merging.verification_prompts import Prompts
from lorafit.merging.verify_job import TYPES, Job
from lorafit.storage.files import sha256_of
from lorafit.storage.stage import scratch
from lorafit.tasks import DEFAULT_TASK, MODEL_KINDS

SAME_MODEL_TWICE = 2.0**-20
"""Of the largest logit: what equal weights may give in two processes, eight units of float32."""

NOISE_OF_FLOAT32 = 2.0**-14
"""Of the largest logit: sums of a deep model in float32 keep some 14 of its 24 bits."""

SHARE_OF_EFFECT = 0.1
"""Of what the adapter changes in the logits (rms): above this the noise of storage is more than 1 % of the effect's
power, and float32 is worth its size. Also what keeps peft's own merge from being taken for the reference."""

MOST_NAMED = 3


@dataclass(frozen=True)
class ModuleReport:
    """How much of the update of one weight is in the written model."""

    name: str
    update: float
    """Frobenius norm of W_exact - W_base, where W_exact is base + update in float32."""
    retained: float
    """1 - ‖W_written - W_exact‖ / ‖W_exact - W_base‖, but at least 0: the share of the update that storage keeps. 1 in
    float32; 0 where rounding moves the weight as far as training did."""
    expected: float
    """The same of W_exact rounded once."""


@dataclass(frozen=True)
class MergeReport:
    """What a verification found; merge_report.json."""

    passed: bool
    wrong: tuple[str, ...]
    prompts: str
    """Where the token sequences come from."""
    positions: int
    """Positions of them whose logits were compared, all in float32."""
    max_abs_logit_difference: float
    """Between the written model and base + adapter."""
    logit_difference_to_reference: float
    """Between the written model and what is right in its type, but for one position in 100."""
    allowed_logit_difference: float
    """The most that may be: see the module's text."""
    mean_kl: float
    """KL(base + adapter ‖ written) in nats, mean over positions."""
    top1_agreement: float
    """Share of positions where both prefer the same token."""
    adapter_effect: float
    """Root mean square of what the adapter changes in a logit."""
    storage_effect: float
    """Root mean square of what storing the merged weights changes in a logit."""
    delta_retained: float
    """As of a module, over all weights the adapter changes."""
    modules: tuple[ModuleReport, ...]
    """Every weight the adapter changes, the one that kept least first."""
    dtype: str
    advice: str | None
    adapter_sha256: str
    """Of the adapter's weights: by it a second merge of the same adapter is refused."""
    onto: str
    """`original`, or `dequantized`: the base that it was merged into and compared with."""


def verification_device(base_files: BaseModelFiles) -> str:
    """`cuda` where a copy of the model in float32 fits into the GPU's free memory, else `cpu`.

    Raises MachineError when it fits into neither.
    """
    needed = sum(tensor.nbytes // _item_bytes(tensor.dtype) for tensor in base_files.tensors.values()) * 4
    if torch.cuda.is_available() and needed <= torch.cuda.mem_get_info()[0]:
        return "cuda"
    free = operating_system.available_bytes()
    if needed > free:
        raise MachineError(
            f"verifying needs {needed / 2**30:.1f} GiB (the model in float32), this machine has {free / 2**30:.1f} "
            "free; merge on a larger one, or without verification (--no-verify)",
            where=base_files.name,
        )
    return "cpu"


def _item_bytes(dtype: str) -> int:
    return {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}.get(dtype, 1)


def verify(
    written: Path,
    *,
    adapter: Adapter,
    base_files: BaseModelFiles,
    onto: str,
    dtype: str | None,
    prompts: Prompts,
    processes: Processes | None = None,
) -> MergeReport:
    """Compare the model in `written` with base + adapter, and leave merge_report.json in it.

    `processes` are those of `merging.processes` that wait. `dtype` is the type that was asked for, None for each
    tensor's own. Raises VerificationError naming what is wrong.
    """
    with scratch() as work:
        job = verification_job(written, adapter=adapter, base_files=base_files, dtype=dtype, prompts=prompts, work=work)
        where = adapter.directory
        # The second imports while the first works, and loads no model before that has ended: their memory is not added.
        with (
            processes.reference if processes else reference_process() as first,
            processes.written if processes else written_process() as second,
        ):
            first.call(job)
            facts = child_answer(first, what="base and adapter could not be loaded to verify", where=where)
            second.call(job, facts)
            findings = child_answer(second, what="the merged model does not load", where=where)
    report = judge(findings, job=job, prompts=prompts, adapter=adapter, onto=onto)
    (written / REPORT).write_text(json.dumps(asdict(report), indent=2) + "\n", encoding="utf-8")
    if not report.passed:
        more = f" and {len(report.wrong) - MOST_NAMED} more faults" if len(report.wrong) > MOST_NAMED else ""
        message = f"the merged model is wrong and was not kept: {'; '.join(report.wrong[:MOST_NAMED])}{more}"
        raise VerificationError(message, where=str(adapter.directory))
    return report


def verification_job(
    written: Path, *, adapter: Adapter, base_files: BaseModelFiles, dtype: str | None, prompts: Prompts, work: Path
) -> Job:
    """What the two processes are told."""
    task_type = adapter.config.get("task_type") or DEFAULT_TASK.model.peft_type
    if task_type not in MODEL_KINDS:
        raise VerificationError(f"cannot verify an adapter of task_type {task_type}", where=str(adapter.directory))
    heads = [
        tensor.shape[0]
        for name, tensor in adapter.tensors.items()
        if name.endswith(("score.weight", "classifier.weight"))
    ]
    return Job(
        base=str(base_files.directory),
        adapter=str(adapter.directory),
        written=str(written),
        work=str(work),
        task_type=task_type,
        device=verification_device(base_files),
        labels=heads[0] if heads else None,
        rows=adapter.rows_needed,
        trust_remote_code=adapter.base.trust_remote_code,
        dtype=dtype,
        types={name: TYPES[tensor.dtype] for name, tensor in base_files.tensors.items() if tensor.dtype in TYPES},
        prompts=[list(ids) for ids in prompts.ids],
    )


def judge(findings: Mapping[str, Any], *, job: Job, prompts: Prompts, adapter: Adapter, onto: str) -> MergeReport:
    """Right or wrong, and why."""
    tensors, exact = findings["tensors"], findings["written_to_exact"]
    changed = [row for row in tensors if row["update"]]
    modules = sorted(map(_module_report, changed), key=lambda module: module.retained)
    kept = _share(sum(row["lost"] ** 2 for row in changed) ** 0.5, sum(row["update"] ** 2 for row in changed) ** 0.5)
    allowed = (
        findings["rounded_to_exact"]["usual"]
        + findings["merged_to_exact"]["usual"]
        + SAME_MODEL_TWICE * findings["largest_logit"]
    )
    wrong = [
        *(
            f"{names[0]} and {len(names) - 1} more tensors are {kind}" if len(names) > 1 else f"{names[0]} is {kind}"
            for kind, names in findings["odd"].items()
        ),
        *map(_wrong_weight, sorted((row for row in tensors if _is_off(row)), key=lambda row: -row["off"])),
        *_wrong_logits(findings, allowed=allowed),
    ]
    effect, noise = findings["effect"]["rms"], exact["rms"]
    return MergeReport(
        passed=not wrong,
        wrong=tuple(wrong),
        prompts=prompts.source,
        positions=findings["positions"],
        max_abs_logit_difference=exact["largest"],
        logit_difference_to_reference=findings["written_to_rounded"]["usual"],
        allowed_logit_difference=allowed,
        mean_kl=exact["kl"],
        top1_agreement=exact["top1"],
        adapter_effect=effect,
        storage_effect=noise,
        delta_retained=kept,
        modules=tuple(modules),
        dtype=job.main_type,
        advice=_advice(job.main_type, kept=kept, noise=noise, effect=effect, worst=modules[:1]),
        adapter_sha256=sha256_of(adapter.weights),
        onto=onto,
    )


def _share(lost: float, whole: float) -> float:
    return max(0.0, 1 - lost / whole) if whole else 1.0


def _module_report(row: Mapping[str, Any]) -> ModuleReport:
    expected = _share(row["expected_loss"], row["update"])
    return ModuleReport(row["name"], row["update"], _share(row["lost"], row["update"]), expected)


def _is_off(row: Mapping[str, Any]) -> bool:
    """Twice, because a sketch gives a norm but for the scatter of its signs; 2**-40 for its own sums in float64."""
    return not row["off"] <= 2 * row["allowed"] + 2.0**-40 * row["norm"]


def _wrong_weight(row: Mapping[str, Any]) -> str:
    if not row["update"]:
        return f"{row['name']} is changed, and the adapter leaves it alone"
    module = _module_report(row)
    return (
        f"{row['name']} is not base + update: off by {row['off'] / row['update']:.2g} of the update, which keeps "
        f"{module.retained:.0%} where rounding keeps {module.expected:.0%}"
    )


def _wrong_logits(findings: Mapping[str, Any], *, allowed: float) -> list[str]:
    wrong = []
    off, largest = findings["written_to_rounded"]["usual"], findings["largest_logit"]
    reference = findings["merged_to_exact"]["usual"]
    if not reference <= max(SHARE_OF_EFFECT * findings["effect"]["usual"], NOISE_OF_FLOAT32 * largest):
        wrong.append(
            f"peft's own merge differs from base + adapter by {reference:.3g} in a logit: no reference to trust"
        )
    if not off <= allowed:
        wrong.append(f"a logit differs by {off:.3g} where rounding and the order of sums explain {allowed:.3g}")
    return wrong


def _advice(dtype: str, *, kept: float, noise: float, effect: float, worst: list[ModuleReport]) -> str | None:
    if dtype == "float32" or not worst or noise <= SHARE_OF_EFFECT * effect:
        return None
    return (
        f"stored in {dtype} the model keeps {kept:.0%} of the update ({worst[0].name}: {worst[0].retained:.0%}) and "
        f"its logits are off by {noise / effect:.0%} of what the adapter changes; --dtype float32 keeps all of it, in "
        "twice the space"
    )
