#!/usr/bin/env bash
# For a machine with a GPU and torch that reaches no package index: leaves in .gpu/ what `gpu_check.sh` needs beside
# torch, as wheels of the versions in constraints.txt (about 33 MB), and that script.
#
#     bash scripts/gpu_prepare.sh && rsync -a . there:lorafit && ssh there bash lorafit/.gpu/gpu_check.sh
#
# PYTHON_VERSION and CUDA are those of that machine. torch, numpy, pandas, pyarrow, accelerate, safetensors and pytest
# are expected there; NAMES="..." chooses others.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-python3} PYTHON_VERSION=${PYTHON_VERSION:-3.12} CUDA=${CUDA:-130}
NAMES=${NAMES:-transformers trl peft tokenizers huggingface_hub datasets bitsandbytes pydantic pydantic_core annotated-types
  typing-inspection typing_extensions multiprocess dill attrs optuna SQLAlchemy alembic Mako colorlog httpx2 httpcore2
  truststore typer click annotated-doc}
platforms=()
for tag in manylinux_2_28 manylinux_2_27 manylinux_2_24 manylinux_2_17 manylinux2014; do
  platforms+=(--platform "${tag}_x86_64")
done
specs=()
for name in $NAMES; do
  specs+=("$(grep -i "^$name==" constraints.txt || { echo "error: constraints.txt: no version of $name" >&2; exit 1; })")
done
rm -rf .gpu/whl && mkdir -p .gpu/whl
"$PYTHON" -m pip download -q --no-deps --only-binary=:all: --python-version "$PYTHON_VERSION" --implementation cp \
  "${platforms[@]}" -d .gpu/whl "${specs[@]}"
"$PYTHON" - "$CUDA" <<'PY'
"""bitsandbytes is built for every CUDA at once, 43 MB: keep one of them, and the CPU's."""
import sys
import zipfile
from pathlib import Path

kept = (f"_cuda{sys.argv[1]}.so", "_cpu.so")
for path in Path(".gpu/whl").glob("bitsandbytes-*.whl"):
    smaller = path.with_suffix(".part")
    with zipfile.ZipFile(path) as whole, zipfile.ZipFile(smaller, "w", zipfile.ZIP_DEFLATED) as part:
        is_left_out = {name: name.endswith(".so") and not name.endswith(kept) for name in whole.namelist()}
        if not any(name.endswith(kept[0]) for name in is_left_out):
            sys.exit(f"error: {path.name} is not built for CUDA {sys.argv[1]}; name another with CUDA=")
        for name in (name for name, is_out in is_left_out.items() if not is_out):
            data = whole.read(name)
            if name.endswith(".dist-info/RECORD"):
                rows = data.decode().splitlines(keepends=True)
                data = "".join(row for row in rows if not is_left_out[row.split(",")[0]]).encode()
            part.writestr(name, data)
    smaller.replace(path)
PY
cp scripts/gpu_check.sh .gpu/
du -sh .gpu
