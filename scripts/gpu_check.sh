#!/usr/bin/env bash
# What only a GPU can show, in less than ten minutes: first whether all is right, side by side, then how fast it is.
#
#     bash scripts/gpu_check.sh                        # on a machine with a GPU, offline
#     TINY=1 OUT=/tmp/out bash scripts/gpu_check.sh    # the same path on a CPU, tiny
#
# Every part has a time of its own, and the end of one ends no other. OUT (.gpu/out) takes a line for each part as it
# ends, the results of the benchmarks as they come, and one log; PARTS="speed plan" chooses. Ends with 1 where a part
# failed or found no time. Wheels in .gpu/whl (scripts/gpu_prepare.sh) stand in for libraries that are not installed.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
PARTS=${PARTS:-env kernels lora qlora tests suite speed plan} TINY=${TINY:-} PYTHON=${PYTHON:-python3}
TOTAL=${TOTAL:-${TINY:+7200}} TOTAL=${TOTAL:-570}
mkdir -p "${OUT:=.gpu/out}" && OUT=$(cd "$OUT" && pwd) WORK=$(mktemp -d) && trap 'rm -rf "$WORK"' EXIT || exit
rm -f "$OUT"/{summary,log}.txt "$OUT"/*.{log,json}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false WANDB_MODE=disabled LORAFIT_CACHE="$WORK/cache"

# part NAME SECONDS COMMAND...: its log, and a line of the summary
part() {
  local name=$1 limit=$2 began=$SECONDS code how=ok
  shift 2
  [[ " $PARTS " == *" $name "* ]] || return 0
  [[ $TINY ]] && limit=$((limit * 20))  # few cores, and other work on them
  ((limit <= TOTAL - SECONDS)) || limit=$((TOTAL - SECONDS))
  if ((limit < 5)); then
    printf '%-10s %s\n' "no time" "$name" | tee -a "$OUT/summary.txt"
    return
  fi
  timeout -k 10 "$limit" "$@" >"$OUT/$name.log" 2>&1
  code=$?
  ((code == 0)) || how="failed $code"
  ((code != 124 && code != 137)) || how=killed
  printf '%-10s %-8s %4d s  %s\n' "$how" "$name" $((SECONDS - began)) "$(tail -n 1 "$OUT/$name.log" | cut -c 1-200)" |
    tee -a "$OUT/summary.txt"
}

# A GPU and many cores bear several at a time.
beside() { if [[ $TINY ]]; then part "$@"; else part "$@" & fi; }

if ! "$PYTHON" -c 'import trl, bitsandbytes' 2>/dev/null && compgen -G '.gpu/whl/*.whl' >/dev/null; then
  # All of them: what is there already, a transformers for one, may be older than they need.
  "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target .gpu/site .gpu/whl/*.whl || exit
  export PYTHONPATH="$PWD/.gpu/site:$PYTHONPATH"
fi

QUICKSTART='set -e; run=$0 recipe=$1; shift
"$PYTHON" -m lorafit train "$recipe" --smoke "$@"
"$PYTHON" -m lorafit train "$recipe" --output-dir "$run" "$@"
"$PYTHON" -m lorafit merge "$run"
"$PYTHON" -m lorafit eval "$run"'
export PYTHON
if [[ $TINY ]]; then
  rows='[{path: recipes/quickstart/eval.jsonl, format: prompt_completion, limit: 48}]'
  steps=(--set training.max_steps=20 --set "data.eval=$rows") optim=adamw_torch_fused speed_budget=1500 device=(--tiny)
else
  steps=() optim=paged_adamw_8bit speed_budget=265 device=()
fi
packed=(--set training.packing=true --set training.train_sampling_strategy=random --set "training.optim=$optim")
tests=("$PYTHON" -m pytest -q -p no:cacheprovider -o addopts=)
export ON=${TINY:+cpu}
kernels="attention or fused or hash or log_probabilities"

part env 90 "$PYTHON" -m lorafit doctor
beside kernels 150 "${tests[@]}" -m gpu tests/house/test_on_gpu.py -k "$kernels"
beside lora 170 bash -c "$QUICKSTART" "$WORK/lora" recipes/quickstart.yaml "${steps[@]}"
beside qlora 170 bash -c "$QUICKSTART" "$WORK/qlora" recipes/quickstart-qlora.yaml "${steps[@]}" "${packed[@]}"
beside tests 170 "${tests[@]}" -m gpu tests/house/test_on_gpu.py -k "not ($kernels)"
beside suite 170 "${tests[@]}" -m 'not slow and not gpu' tests/speed/test_speed.py tests/training/test_selftest.py tests/training/test_out_of_memory.py
wait
# Timed, so alone. Their own budgets end them before their time here does.
part speed 280 "$PYTHON" benchmarks/speed_gpu.py --budget $speed_budget "${device[@]}" --out "$OUT/speed.json"
part plan 400 "$PYTHON" benchmarks/plan_vs_gpu.py --budget $((TOTAL - SECONDS - 10)) "${device[@]}" --out "$OUT/plan.json"
(cd "$OUT" && compgen -G '*.log' >/dev/null && tail -n +1 -- *.log >log.txt && rm -f -- *.log)
! grep -qv '^ok ' "$OUT/summary.txt"
