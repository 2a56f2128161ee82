"""The process that plans: `python -m lorafit.planning.job QUESTION ANSWER`, both pickles of lorafit's own.

Its own process because it replaces functions of the libraries, and so that its imports and memory end with it.
"""

from __future__ import annotations

import logging
import os
import pickle
import sys
import warnings
from pathlib import Path

# Before torch is imported: a plan uses no GPU, and joins no processes that train together.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
for _name in [name for name in os.environ if name.startswith(("ACCELERATE_", "TORCHELASTIC_", "FSDP_"))]:
    del os.environ[_name]
for _name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
    os.environ.pop(_name, None)

from lorafit.errors import LorafitError  # noqa: E402
from lorafit.planning.answers import answer  # noqa: E402


def main() -> None:
    """Answer the question: a Plan, or the error that keeps it from being answered."""
    question, out = Path(sys.argv[1]), Path(sys.argv[2])
    warnings.filterwarnings("ignore")
    logging.disable(logging.ERROR)
    try:
        result: object = answer(pickle.loads(question.read_bytes()))
    except LorafitError as error:
        result = error
    out.write_bytes(pickle.dumps(result))


if __name__ == "__main__":
    main()
