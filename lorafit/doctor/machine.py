"""Lines about Python, its libraries, the devices and the disk."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

from lorafit import operating_system
from lorafit.doctor.diagnosis import Line
from lorafit.doctor.probe_answers import Answers
from lorafit.packages import COMPILER_MEND, missing_compiler

CONSTRAINTS = Path(__file__).parents[1] / "constraints.txt"
"""The newest tested set; a link in a checkout, the file itself in a wheel, as is the oldest."""

OLDEST_CONSTRAINTS = CONSTRAINTS.with_name("constraints-oldest.txt")
PROJECT = CONSTRAINTS.parents[1] / "pyproject.toml"
"""Of a checkout."""

REINSTALL_TORCH = f"pip install --force-reinstall -c {CONSTRAINTS} torch"
OLDEST_PYTHON = (3, 11)
LEAST_FREE_BYTES = 2 << 30
"""An adapter, two checkpoints with their optimizer, and the tokens of a small data set."""

SMI_SECONDS = 15
DRIVER_MEND = "install a newer NVIDIA driver (https://www.nvidia.com/drivers), then reboot"


def python_line(found: tuple[int, ...] = sys.version_info[:3]) -> Line:
    """The interpreter."""
    name = ".".join(map(str, found))
    if found < OLDEST_PYTHON:
        return Line("python", f"{name}; lorafit needs 3.11", "python3.11 -m venv venv && venv/bin/pip install lorafit")
    return Line("python", f"{name} at {sys.executable}")


def library_lines() -> Iterator[Line]:
    """What is missing or of another version; one line for all that are as they should be."""
    tested = tested_versions()
    as_tested = []
    for requirement in map(Requirement, own_requirements()):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        name, wanted = requirement.name, str(requirement.specifier)
        try:
            found = version(name)
        except PackageNotFoundError:
            yield Line(name, f"is not installed; {wanted} is needed", f"pip install '{name}{wanted}'")
            continue
        if not requirement.specifier.contains(found, prereleases=True):
            yield Line(name, f"{found}; {wanted} is needed", f"pip install '{name}{wanted}'")
        elif Version(found).public not in (known := tested.get(name.lower(), (found,))):
            yield Line(name, f"{found} (tested with {' and '.join(known)})")
        else:
            as_tested.append(f"{name} {found}")
    yield Line("libraries", f"{len(as_tested)} as tested: {', '.join(as_tested[:7])} ...")


def own_requirements() -> list[str]:
    """What lorafit needs, as it was installed; as its checkout says where that is only on the path."""
    try:
        return requires("lorafit") or []
    except PackageNotFoundError:
        project = tomllib.loads(PROJECT.read_text(encoding="utf-8")) if PROJECT.is_file() else {}
        needed: list[str] = project.get("project", {}).get("dependencies", [])
        return needed


def tested_versions() -> Mapping[str, tuple[str, ...]]:
    """Distribution -> its versions in the sets that lorafit is tested with, the oldest first."""
    found: dict[str, tuple[str, ...]] = {}
    for path in (OLDEST_CONSTRAINTS, CONSTRAINTS):
        lines = path.read_text(encoding="utf-8").splitlines()
        for name, number in (line.split("==") for line in lines if line and not line.startswith("#")):
            known = found.get(name.lower(), ())
            found[name.lower()] = known if number in known else (*known, number)
    return found


@dataclass(frozen=True)
class Driver:
    """What the NVIDIA driver says, without torch."""

    gpus: tuple[str, ...] = ()
    version: str = ""
    problem: str = ""

    @property
    def is_there(self) -> bool:
        """Whether this machine seems to have a GPU of NVIDIA."""
        return bool(self.gpus or self.problem)


def nvidia_driver() -> Driver:
    """Asked through nvidia-smi, which comes with the driver; empty when there is none."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return Driver(problem="nvidia-smi is not on the PATH") if operating_system.has_nvidia_driver() else Driver()
    query = [program, "--query-gpu=driver_version,name", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=SMI_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return Driver(problem=f"nvidia-smi gave no answer in {SMI_SECONDS} s: the driver hangs")
    lines = [line.strip() for line in done.stdout.splitlines() if "," in line]
    if done.returncode or not lines:
        said = (done.stdout or done.stderr).strip().partition("\n")[0]
        return Driver(problem=f"nvidia-smi: {said or f'exit code {done.returncode}'}")
    return Driver(tuple(line.partition(", ")[2] for line in lines), lines[0].partition(", ")[0])


def device_lines(torch: Answers, driver: Driver) -> Iterator[Line]:
    """torch, the GPUs, their driver, bfloat16 and the 4-bit kernels."""
    if error := torch.error("torch_import"):
        yield Line("torch", error, REINSTALL_TORCH)
        return
    about = torch.stages["torch_import"]
    built = f"for CUDA {about['cuda']}" if about["cuda"] else f"for ROCm {about['hip']}" if about["hip"] else "for CPU"
    yield Line("torch", f"{about['version']}, built {built}, imported in {about['seconds']:.1f} s")
    if driver.is_there:
        mend = "reboot; if that does not help, install the driver again" if driver.problem else ""
        yield Line("driver", driver.problem or f"NVIDIA {driver.version}", mend)
    yield _gpu_line(torch, driver, is_cpu_build=not (about["cuda"] or about["hip"]))
    devices = torch.stages.get("gpus", {}).get("devices")
    if devices:
        lack = missing_compiler()
        yield Line("compiler", lack or "there for Triton's kernels", COMPILER_MEND if lack else "")
    if torch.error("cpu") and not devices:
        yield Line("bf16", torch.error("cpu"), REINSTALL_TORCH)
    else:
        has_bf16 = torch.stages["gpus" if devices else "cpu"].get("bf16")
        yield Line("bf16", "computed natively" if has_bf16 else _without_bfloat16(is_gpu=bool(devices)))
    yield _four_bit_line(torch)


def _without_bfloat16(*, is_gpu: bool) -> str:
    if is_gpu:
        return "not native here: write training.fp16: true; a base saved in bfloat16 needs model.dtype: float16"
    return "not native here: model.dtype: auto and bf16: auto train in float32"


def _gpu_line(torch: Answers, driver: Driver, *, is_cpu_build: bool) -> Line:
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if error := torch.error("gpus"):
        hangs = "the driver hangs: reboot" if "gave no answer" in error else DRIVER_MEND
        return Line("gpu", error, hangs)
    answer = torch.stages["gpus"]
    if devices := answer["devices"]:
        names = ", ".join(f"{one['name']} ({one['memory_bytes'] / 2**30:.0f} GiB)" for one in devices)
        wrong = [one["name"] for one in devices if not one["computes"]]
        return Line("gpu", f"{', '.join(wrong)} computes wrongly" if wrong else names, DRIVER_MEND if wrong else "")
    if driver.gpus and is_cpu_build:
        mend = f"{REINSTALL_TORCH} --index-url https://pypi.org/simple"
        return Line("gpu", f"{', '.join(driver.gpus)}, but this torch is built for CPU", mend)
    if driver.gpus and hidden is not None:
        return Line("gpu", f"hidden by CUDA_VISIBLE_DEVICES={hidden!r}", "unset CUDA_VISIBLE_DEVICES", is_needed=False)
    if driver.gpus:
        return Line("gpu", f"torch cannot use it: {answer['reason'] or 'no reason given'}", DRIVER_MEND)
    return Line("gpu", f"none; training runs on {operating_system.usable_cores()} CPU cores")


def _four_bit_line(torch: Answers) -> Line:
    error = torch.error("bitsandbytes")
    if not error and torch.stages["bitsandbytes"]["off"] > 0.01:
        error = f"4 bits of 1 come back as 1 ± {torch.stages['bitsandbytes']['off']:.2g}"
    if error:
        return Line("bitsandbytes", error, f"pip install --force-reinstall --no-deps -c {CONSTRAINTS} bitsandbytes")
    return Line("bitsandbytes", f"4 bits and back on {torch.stages['bitsandbytes']['device']}")


def disk_line(name: str, directory: Path, *, mend: str, least: int = LEAST_FREE_BYTES) -> Line:
    """Whether a directory can be written to, and has room."""
    place = directory
    while not place.exists():
        place = place.parent
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(b"0")
    except OSError as error:
        return Line(name, f"{directory} cannot be written to ({error.strerror})", mend)
    free = shutil.disk_usage(place).free
    room = f"{directory}, {free / 2**30:.1f} GiB free"
    return Line(
        name, room if free >= least else f"{room}; {least / 2**30:.1f} are little enough", mend * (free < least)
    )


def platform_name() -> str:
    """Operating system and processor."""
    return f"{platform.system()} {platform.release()} {platform.machine()}"
