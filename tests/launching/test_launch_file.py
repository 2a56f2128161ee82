"""The printed files are what their readers take: bash for SLURM, YAML for Kubernetes and SkyPilot."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from lorafit import cli
from lorafit.launching.launch_file import launch_file
from lorafit.recipe import load

RECIPE = """
output_dir: runs/x
model: {model_name_or_path: org/base}
data: {train: [{path: rows.jsonl}]}
launch: {machines: 3, num_processes: 4}
"""


def written(directory: Path, text: str = RECIPE, *, name: str = "My recipe's.yaml") -> Path:
    (directory / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    path = directory / name
    path.write_text(text)
    return path


def text_of(path: Path, system: Any, **more: Any) -> str:
    return launch_file(load(path).recipe, path.name, system=system, **more)


def test_a_batch_script_is_bash_with_one_task_a_machine(tmp_path: Path) -> None:
    text = text_of(written(tmp_path), "slurm")
    subprocess.run(["bash", "-n"], input=text, text=True, check=True, timeout=10)
    options = dict(
        line.removeprefix("#SBATCH --").partition("=")[::2] for line in text.splitlines() if line.startswith("#SBATCH")
    )
    assert (options["nodes"], options["ntasks-per-node"], options["gpus-per-node"]) == ("3", "1", "4")
    assert options["job-name"] == "my-recipe-s"
    echoed = text.splitlines()[-1].replace("srun --kill-on-bad-exit=1 lorafit", "printf '%s|'")
    said = subprocess.run(["bash", "-c", echoed], capture_output=True, text=True, check=True, timeout=10).stdout
    assert said == "train|My recipe's.yaml|--resume|"


@pytest.mark.parametrize(("machines", "workers"), [(3, 2), (1, None)])
def test_a_job_has_a_pod_for_each_machine(machines: int, workers: int | None, tmp_path: Path) -> None:
    path = written(tmp_path, RECIPE.replace("machines: 3, ", ""))
    job = yaml.safe_load(text_of(path, "kubernetes", machines=machines))
    assert (job["apiVersion"], job["kind"], job["metadata"]["name"]) == ("kubeflow.org/v1", "PyTorchJob", "my-recipe-s")
    replicas = job["spec"]["pytorchReplicaSpecs"]
    counts = {name: spec["replicas"] for name, spec in replicas.items()}
    assert counts == {"Master": 1} | ({"Worker": workers} if workers else {})
    for spec in replicas.values():
        (container,) = spec["template"]["spec"]["containers"]
        assert container["name"] == "pytorch", "the operator gives its variables to no other"
        assert container["command"] == ["lorafit", "train", "My recipe's.yaml", "--resume"]
        assert container["resources"]["limits"] == {"nvidia.com/gpu": 4}


def test_a_task_tells_each_machine_its_place(tmp_path: Path) -> None:
    task = yaml.safe_load(text_of(written(tmp_path), "skypilot"))
    assert (task["num_nodes"], task["resources"]) == (3, {"accelerators": "GPU_NAME:4"})
    subprocess.run(["bash", "-n"], input=task["run"], text=True, check=True, timeout=10)
    echoed = task["run"].replace("lorafit", "printf '%s|'")
    variables = {"SKYPILOT_NUM_NODES": "3", "SKYPILOT_NODE_RANK": "1", "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2"}
    said = subprocess.run(
        ["bash", "-c", echoed], env=variables | {"PATH": "/usr/bin:/bin"}, capture_output=True, text=True, timeout=10
    ).stdout.split("|")
    assert said[:5] == ["train", "My recipe's.yaml", "--resume", "--set", "launch.machines=3"]
    assert said[5:-1] == ["--machine-rank", "1", "--main-address", "10.0.0.1"]


def test_the_command_prints_it_or_says_what_contradicts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path)
    monkeypatch.setattr("sys.argv", ["lorafit", "launch-file", str(path), "--for", "slurm"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert (ended.value.code, capsys.readouterr().out.splitlines()[0]) == (0, "#!/bin/bash")
    monkeypatch.setattr("sys.argv", ["lorafit", "launch-file", str(path), "--for", "slurm", "--machines", "2"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert "launch.machines: 3, but --machines is 2; leave one out" in capsys.readouterr().err
