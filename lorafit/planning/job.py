"""The process that plans, or measures: `python -m lorafit.planning.job plan|measure QUESTION ANSWER`.

Question and answer are pickles of lorafit's own. A process of its own because planning replaces functions of the
libraries, and so that its imports and memory end with it.
"""

from __future__ import annotations

import logging
import os
import pickle
import sys
import warnings
from pathlib import Path

# Before torch is imported: a plan uses no GPU, and neither joins processes that train together.
if sys.argv[1:2] == ["plan"]:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
for _name in [name for name in os.environ if name.startswith(("ACCELERATE_", "TORCHELASTIC_", "FSDP_"))]:
    del os.environ[_name]
for _name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
    os.environ.pop(_name, None)

from lorafit.errors import LorafitError  # noqa: E402
from lorafit.imports import without_collections  # noqa: E402
from lorafit.planning.plan import Refused  # noqa: E402

with without_collections():
    from lorafit.planning.answers import answer, measured


def main() -> None:
    """Answer the question, or give the error that keeps it from being answered."""
    kind, question, out = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    warnings.filterwarnings("ignore")
    logging.disable(logging.ERROR)
    try:
        asked = pickle.loads(question.read_bytes())
        result: object = answer(asked) if kind == "plan" else measured(asked)
    except LorafitError as error:
        result = Refused(type(error), error.problems)
    out.write_bytes(pickle.dumps(result))


if __name__ == "__main__":
    main()
