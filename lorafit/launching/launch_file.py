"""The file that starts a recipe on several machines: a SLURM batch script, a Kubernetes job, a SkyPilot task."""

from __future__ import annotations

import json
import re
import shlex
from typing import Literal

from lorafit.recipe.recipe import Recipe

System = Literal["slurm", "kubernetes", "skypilot"]
USUAL_GPUS = 8


def launch_file(recipe: Recipe, typed: str, *, system: System, machines: int | None = None) -> str:
    """Its text; `typed` is the recipe's path as the machines will see it, `machines` how many where the recipe leaves
    that open. What only the user knows stands there in capitals."""
    section = recipe.launch
    count = machines or (section.machines if isinstance(section.machines, int) else 1)
    gpus = section.num_processes if isinstance(section.num_processes, int) else USUAL_GPUS
    stem = typed.rpartition("/")[2].removesuffix(".yaml").removesuffix(".yml")
    name = re.sub(r"[^a-z0-9]+", "-", stem.lower()).strip("-")[:40].strip("-") or "lorafit"
    write = {"slurm": _slurm, "kubernetes": _kubernetes, "skypilot": _skypilot}[system]
    return write(name, typed, count, gpus=gpus)


def _slurm(name: str, typed: str, count: int, *, gpus: int) -> str:
    return f"""\
#!/bin/bash
# sbatch FILE. One task a machine: lorafit starts a process for each of its GPUs, and reads from SLURM's variables which
# machine it is. Before the time is up a checkpoint is written; the same command goes on from there.
#SBATCH --job-name={name}
#SBATCH --nodes={count}
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node={gpus}
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail
srun --kill-on-bad-exit=1 lorafit train {shlex.quote(typed)} --resume
"""


def _kubernetes(name: str, typed: str, count: int, *, gpus: int) -> str:
    pod = f"""\
      restartPolicy: OnFailure
      template:
        spec:
          terminationGracePeriodSeconds: 180  # for a checkpoint
          containers:
            - name: pytorch
              image: IMAGE_WITH_LORAFIT
              workingDir: /work
              command: [lorafit, train, {json.dumps(typed)}, --resume]
              resources:
                limits:
                  nvidia.com/gpu: {gpus}
              volumeMounts:
                - name: work
                  mountPath: /work
          volumes:
            - name: work
              persistentVolumeClaim:
                claimName: CLAIM_OF_RECIPE_AND_ROWS
"""
    workers = f"    Worker:\n      replicas: {count - 1}\n{pod}" if count > 1 else ""
    return f"""\
# kubectl apply -f FILE, with Kubeflow's training operator. A pod is a machine: lorafit starts a process for each of its
# GPUs, and reads from the operator's variables which machine it is.
apiVersion: kubeflow.org/v1
kind: PyTorchJob
metadata:
  name: {json.dumps(name)}
spec:
  pytorchReplicaSpecs:
    Master:
      replicas: 1
{pod}{workers}"""


def _skypilot(name: str, typed: str, count: int, *, gpus: int) -> str:
    words = f"lorafit train {shlex.quote(typed)} --resume"
    if count > 1:
        words += (
            ' --set launch.machines="$SKYPILOT_NUM_NODES" --machine-rank "$SKYPILOT_NODE_RANK"'
            ' --main-address "$(echo "$SKYPILOT_NODE_IPS" | head -n 1)"'
        )
    return f"""\
# sky launch FILE, or sky jobs launch FILE. The disks of the machines are not shared: the first keeps the run.
name: {json.dumps(name)}
num_nodes: {count}
workdir: .
resources:
  accelerators: GPU_NAME:{gpus}
setup: pip install lorafit
run: |
  {words}
"""
