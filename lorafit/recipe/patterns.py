"""Regular expressions of a recipe, which can take longer to match than anybody waits."""

from __future__ import annotations

import re
import subprocess
import sys
from functools import cache

SECONDS = 1
"""Of processor time, for a few names: what is matched at all takes microseconds."""

_NAMES = (
    *("model.layers.10.self_attn.q_proj", "base_model.model.transformer.h.11.attn.c_attn.base_layer"),
    *("model.language_model.layers.31.mlp.experts.127.gate_up_proj", "gpt_neox.layers.3.attention.query_key_value"),
)
_MATCH = """
import re, resource, sys
resource.setrlimit(resource.RLIMIT_CPU, (int(sys.argv[2]), int(sys.argv[2])))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
for name in sys.argv[3:]:
    re.fullmatch(sys.argv[1], name)
"""


@cache
def backtracks_for_ever(pattern: str) -> bool:
    """Whether an expression that compiles does not come to an end on names as models have them, as `(.*)+x` does.

    Nothing interrupts a match, so that one that may be of the kind is tried in a process of its own.
    """
    repeats = re.findall(r"[*+]|\{\d*,\d*\}", pattern)
    if not re.search(r"\)\s*(?:[*+]|\{)", pattern) and len(repeats) < 4:
        return False
    command = [sys.executable, "-I", "-S", "-c", _MATCH, pattern, str(SECONDS), *_NAMES]
    return subprocess.run(command, capture_output=True, check=False).returncode < 0  # ended by the limit
