"""Lines about the Hub, accelerate and ports."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Mapping
from pathlib import Path

import yaml
from huggingface_hub import constants, get_token

from lorafit.doctor.diagnosis import Line
from lorafit.doctor.probe_answers import Answers
from lorafit.launching import placement
from lorafit.launching.launch import CONFIGS

TOKEN_NAMES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
STRATEGIES = ("ddp", "fsdp2", "zero2", "zero3")


def hub_cache() -> Path:
    """Where models and data sets of the Hub are kept."""
    return Path(constants.HF_HOME)


def token_source(environment: Mapping[str, str]) -> str:
    """Where the token comes from; empty when there is none. The token itself is never shown."""
    named = [name for name in TOKEN_NAMES if environment.get(name)]
    if get_token() is None:
        return ""
    return named[0] if named else str(constants.HF_TOKEN_PATH)


def login_line(source: str, hub: Answers | None) -> Line:
    """Who is logged in at the Hub. `hub` is None when it was not asked."""
    if not source:
        return Line("hub login", "none: public models only; `hf auth login` is for gated and private ones")
    if hub is None:
        return Line("hub login", f"token from {source}; not asked whose it is, HF_HUB_OFFLINE is set")
    answer = hub.stages.get("hub", {})
    if name := answer.get("name"):
        return Line("hub login", f"{name}, token from {source}")
    if answer.get("status") in (401, 403):
        return Line("hub login", f"the Hub does not accept the token from {source}", "hf auth login")
    return Line("hub login", f"token from {source}; the Hub cannot be reached now, so whose it is is not known")


def accelerate_lines(environment: Mapping[str, str]) -> Iterator[Line]:
    """The shipped launch files, and what a shell may have left that would change a launch."""
    for name in STRATEGIES:
        file = CONFIGS / f"{name}.yaml"
        try:
            is_whole = isinstance(yaml.safe_load(file.read_text(encoding="utf-8")), dict)
        except (OSError, UnicodeDecodeError, yaml.YAMLError):
            is_whole = False
        if not is_whole:
            yield Line("accelerate", f"{file} is missing or broken", "pip install --force-reinstall --no-deps lorafit")
            return
    left = [name for name in placement.FOREIGN if name in environment and not name.startswith("ACCELERATE_")]
    if any(not name.startswith("MASTER_") for name in left):
        yield Line("accelerate", f"the shell sets {', '.join(left)}, as in a run of several", f"unset {' '.join(left)}")
        return
    changing = sorted(name for name in environment if name.startswith("ACCELERATE_"))
    if changing:
        yield Line("accelerate", f"the shell sets {', '.join(changing)}", f"unset {' '.join(changing)}")
        return
    yield Line("accelerate", "lorafit's own launch files; the default_config.yaml of accelerate is not read")


def port_line(host: str = "localhost") -> Line:
    """Whether processes of this machine can speak to each other, as those of one run do."""
    try:
        with socket.create_server((host, 0)) as server, socket.create_connection((host, server.getsockname()[1]), 5):
            return Line("ports", f"{host} answers")
    except OSError as error:
        mend = "add the line `127.0.0.1 localhost` to /etc/hosts, and let the firewall pass it"
        return Line("ports", f"{host} cannot be spoken to ({error.strerror or error})", mend)


def shown_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that change how training runs; scrub before showing."""
    prefixes = (
        "HF_",
        "CUDA_",
        "NCCL_",
        "TORCH",
        "PYTORCH_",
        "ACCELERATE_",
        "OMP_",
        "TRANSFORMERS_",
        "LORAFIT_",
        "BNB_",
    )
    others = (*placement.FOREIGN, *TOKEN_NAMES, "TOKENIZERS_PARALLELISM", "XDG_CACHE_HOME")
    return {name: value for name, value in sorted(environment.items()) if name.startswith(prefixes) or name in others}


def is_offline() -> bool:
    """Whether the Hub must not be asked."""
    return bool(constants.HF_HUB_OFFLINE)
