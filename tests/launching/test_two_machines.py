"""Two machines, as network namespaces, do what one process does: with a shared disk and without, until one is gone."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from torch.testing import assert_close

from lorafit.launching import launch
from lorafit.training.checkpoints import newest_verified
from support import SUPPORT
from support.commands import ENVIRONMENT, is_alive
from support.namespaces import Cluster, reason_against, two_machines
from support.runs import assert_same_curves, run, saved_adapter, small_recipe
from support.tiny import sums, write_jsonl
from support.together import SPREAD

REASON = reason_against()
pytestmark = pytest.mark.skipif(bool(REASON), reason=REASON)

TWO = {"machines": 2, "num_processes": 1}
HALVES = {"per_device_train_batch_size": 2}
ENDLESS = {"max_steps": 10**6}
SECONDS = 30
"""After the death of one machine all is over on the other."""


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    with two_machines() as made:
        yield made


class Run:
    """One run on two machines."""

    def __init__(
        self,
        cluster: Cluster,
        homes: tuple[Path, Path],
        recipes: tuple[Path, Path],
        *words: str,
        variables: tuple[Mapping[str, str], Mapping[str, str]] = ({}, {}),
    ) -> None:
        self.homes = homes
        address = ("--main-address", f"{cluster.addresses[0]}:29400")
        self.machines = [
            cluster.start(
                rank,
                homes[rank],
                *("lorafit", "train", str(recipes[rank])),
                *("--machine-rank", str(rank)),
                *address,
                *words,
                variables=variables[rank],
            )
            for rank in (0, 1)
        ]

    def ended(self) -> list[tuple[int, str, str]]:
        """Exit code, stdout, stderr of each."""
        found = []
        for process in self.machines:
            try:
                out, err = process.communicate(timeout=150)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                raise AssertionError(process.communicate()) from None
            found.append((process.returncode, out, err))
        return found

    def until_step(self, directory: Path, count: int) -> None:
        """So many steps are recorded in a run directory, and a checkpoint."""
        end = time.monotonic() + 120
        metrics = directory / "metrics.jsonl"
        while not (
            metrics.exists()
            and metrics.read_text().count('"loss"') >= count
            and any((directory / "checkpoints").glob("checkpoint-*"))
        ):
            if any(one.poll() is not None for one in self.machines) or time.monotonic() > end:
                for one in self.machines:
                    os.killpg(one.pid, signal.SIGKILL)
                raise AssertionError([one.communicate() for one in self.machines])
            time.sleep(0.05)

    def kill(self, rank: int) -> None:
        """The power of a machine is gone: every process of it, at once."""
        launcher = psutil.Process(self.machines[rank].pid)
        for process in [*launcher.children(recursive=True), launcher]:
            process.kill()


def homes_in(directory: Path) -> tuple[Path, Path]:
    pair = directory / "home 0", directory / "home 1"
    for home in pair:
        home.mkdir()
    return pair


def apart(directory: Path, base: Path, **sections: Any) -> tuple[tuple[Path, Path], tuple[Path, Path]]:
    """Homes and recipes of two machines that share no disk: each has its own copy of base and rows."""
    homes = homes_in(directory)
    for home in homes:
        shutil.copytree(base, home / "base")
        small_recipe(home, home / "base", **sections)
    return homes, (homes[0] / "recipe.yaml", homes[1] / "recipe.yaml")


def one_process(directory: Path, base: Path, **sections: Any) -> list[str]:
    directory.mkdir()
    _, said = run(small_recipe(directory, base, **sections))
    return said


def test_two_machines_that_share_a_disk_leave_what_one_process_leaves(
    cluster: Cluster, tmp_path: Path, tiny_base: Path
) -> None:
    said = one_process(tmp_path / "one", tiny_base)
    two = tmp_path / "two"
    two.mkdir()
    path = small_recipe(two, tiny_base, training=HALVES, launch=TWO | {"shared_disk": True}).path
    (code, out, err), other = Run(cluster, homes_in(tmp_path), (path, path), "--json").ended()
    assert code == 0, (err, other)
    assert other == (0, "", "")
    assert json.loads(out)["steps"] == 3
    in_one = err.replace("2 per device", "4 per device").replace("x 2 processes", "x 1 process").splitlines()
    own = ("self-test", "step ", "waiting for")
    assert [line for line in in_one if not line.startswith(own)] == [line for line in said if not line.startswith(own)]
    assert_same_curves(tmp_path / "one/run", two / "run")
    assert_close(saved_adapter(two), saved_adapter(tmp_path / "one"), rtol=0, atol=1e-4)
    assert json.loads((two / "run/manifest.json").read_text())["world_size"] == 2
    assert {path.name for path in two.iterdir()} == {"recipe.yaml", "train.jsonl", "eval.jsonl", "run"}


@pytest.mark.slow
def test_two_machines_that_share_no_disk_go_on_after_one_is_gone(
    cluster: Cluster, tmp_path: Path, tiny_base: Path
) -> None:
    training = HALVES | {"max_steps": 40, "eval_strategy": "steps", "eval_steps": 5, "load_best_model_at_end": True}
    sections: dict[str, Any] = {
        "training": training,
        "lora": {"r": 4, "lora_dropout": 0.1},
        "checkpoints": {"every": 5},
    }
    homes, recipes = apart(tmp_path, tiny_base, launch=TWO, **sections)
    undisturbed = Run(cluster, homes, recipes, "--quiet", "--output-dir", "run/whole")
    assert [code for code, _, _ in undisturbed.ended()] == [0, 0]
    left = {path.name for path in homes[1].iterdir()}
    assert left == {"base", "train.jsonl", "eval.jsonl", "recipe.yaml", "cache"}, "the first machine alone writes"

    disturbed = Run(cluster, homes, recipes, "--quiet", "--output-dir", "run/broken")
    disturbed.until_step(homes[0] / "run/broken", 12)
    disturbed.kill(1)
    began = time.monotonic()
    (code, out, err), _ = disturbed.ended()
    print(f"seconds to end: {time.monotonic() - began:.1f}")
    assert time.monotonic() - began < SECONDS
    assert (code, out, len(err.splitlines())) == (4, "", 1)
    assert err.startswith("error: machines: machine 1 (") and "has ended without a word (killed?)" in err
    again = Run(cluster, homes, recipes, "--quiet", "--output-dir", "run/broken", "--resume")
    ended = again.ended()
    assert [code for code, _, _ in ended] == [0, 0], ended
    files = [homes[0] / "run" / name / "adapter/adapter_model.safetensors" for name in ("whole", "broken")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert {path.name for path in homes[1].iterdir()} == left
    finished = Run(cluster, homes, recipes, "--output-dir", "run/broken", "--resume").ended()
    assert [code for code, _, _ in finished] == [0, 0] and finished[1][1:] == ("", "")


@pytest.mark.slow
@pytest.mark.parametrize("how", ["first is killed", "cable is cut", "a process is killed"])
def test_a_machine_that_is_gone_ends_the_other(how: str, cluster: Cluster, tmp_path: Path, tiny_base: Path) -> None:
    path = small_recipe(tmp_path, tiny_base, training=HALVES | ENDLESS, launch=TWO, checkpoints={"every": 5}).path
    both = Run(cluster, homes_in(tmp_path), (path, path), "--quiet")
    both.until_step(tmp_path / "run", 8)
    workers = [psutil.Process(one.pid).children()[0].pid for one in both.machines]
    began = time.monotonic()
    if how == "first is killed":
        both.kill(0)
    elif how == "cable is cut":
        cluster.cut()
    else:
        os.kill(workers[1], signal.SIGKILL)
    ended = both.ended()
    print(f"{how}, seconds to end: {time.monotonic() - began:.1f}")
    assert time.monotonic() - began < SECONDS
    assert not any(is_alive(pid) for pid in workers)
    lost = [err for code, _, err in ended if code == 4]
    assert all(err.startswith("error: ") and len(err.splitlines()) == 1 for err in lost), ended
    if how == "first is killed":
        assert [code for code, _, _ in ended] == [-9, 4] and "machine 0 (" in lost[0]
    elif how == "cable is cut":
        assert ["gives no sign of life any more (18 s): dead or cut off" in err for err in lost] == [True, True]
    else:
        assert "process 1 was killed by SIGKILL" in lost[1]
        assert "machine 1 (" in lost[0] and "process 1 was killed by SIGKILL" in lost[0]
    assert newest_verified(tmp_path / "run/checkpoints").newest is not None


@pytest.mark.slow
@pytest.mark.parametrize("asked", [0, 1])
def test_a_request_to_one_machine_stops_both_at_one_step(
    asked: int, cluster: Cluster, tmp_path: Path, tiny_base: Path
) -> None:
    path = small_recipe(tmp_path, tiny_base, training=HALVES | ENDLESS, launch=TWO, checkpoints={"every": 5}).path
    both = Run(cluster, homes_in(tmp_path), (path, path), "--quiet")
    both.until_step(tmp_path / "run", 8)
    both.machines[asked].send_signal(signal.SIGTERM)
    (code, _, err), other = both.ended()
    newest = newest_verified(tmp_path / "run/checkpoints").newest
    assert newest is not None
    assert (code, other) == (75, (75, "", "")), (err, other)
    assert f"stopped at {newest.step}/1000000; go on with `lorafit train {path} --machine-rank 0" in err
    assert len(err.splitlines()) == 1


def test_machines_that_are_not_alike_are_refused_before_anything_is_read(
    cluster: Cluster, tmp_path: Path, tiny_base: Path
) -> None:
    homes, recipes = apart(tmp_path, tiny_base, launch=TWO | {"shared_disk": True})
    changed = yaml.safe_load(recipes[1].read_text())
    changed["training"]["learning_rate"] = 1e-3
    recipes[1].write_text(yaml.safe_dump(changed))
    ours, theirs = Run(cluster, homes, recipes).ended()
    assert ours == theirs
    assert ours[0] == 4 and len(ours[2].splitlines()) == 1
    assert "training.learning_rate 0.005 -> 0.001 (machine 0 -> there); all machines need the same recipe" in ours[2]

    shutil.copy(recipes[0], recipes[1])
    changed["training"]["learning_rate"] = 5e-3
    changed["output_dir"] = str(homes[1] / "elsewhere")
    recipes[1].write_text(yaml.safe_dump(changed))
    ours, theirs = Run(cluster, homes, recipes).ended()
    assert (ours[0], theirs[0]) == (4, 4)
    said = (
        f"launch.shared_disk: true, but {homes[1]}/elsewhere on this machine is not the directory that machine 0 writes"
    )
    assert said in theirs[2] and said in ours[2]
    assert not (homes[0] / "run").exists() and not (homes[1] / "elsewhere").exists()


def test_machines_with_other_versions_of_a_library_are_refused(
    cluster: Cluster, tmp_path: Path, tiny_base: Path
) -> None:
    installed = tmp_path / "installed"
    (installed / "trl-1.0.0.dist-info").mkdir(parents=True)
    (installed / "trl-1.0.0.dist-info/METADATA").write_text("Metadata-Version: 2.4\nName: trl\nVersion: 1.0.0\n")
    path = small_recipe(tmp_path, tiny_base, launch=TWO).path
    older = {"PYTHONPATH": f"{installed}:{ENVIRONMENT['PYTHONPATH']}"}
    for code, out, err in Run(cluster, homes_in(tmp_path), (path, path), variables=({}, older)).ended():
        assert (code, out, len(err.splitlines())) == (4, "", 1)
        assert f'versions.trl "{version("trl")}" -> "1.0.0" (machine 0 -> there); all machines need the same' in err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_rows_that_differ_are_named(cluster: Cluster, tmp_path: Path, tiny_base: Path) -> None:
    homes, recipes = apart(tmp_path, tiny_base, launch=TWO)
    rows = homes[1] / "train.jsonl"
    rows.write_text(rows.read_text().replace("What is", "What was", 1))
    for code, out, err in Run(cluster, homes, recipes, "--quiet").ended():
        assert (code, out) == (4, "")
        assert "data files" in err and "all machines need the same recipe, rows, base and versions" in err
    assert not (homes[0] / "run").exists()


@pytest.mark.slow
def test_a_model_that_fsdp2_spreads_over_machines_needs_no_shared_disk(
    cluster: Cluster, tmp_path: Path, tiny_base: Path
) -> None:
    """Without a GPU accelerate would not start FSDP2; nothing in it needs one, see `together.train_spread_over`."""
    homes = homes_in(tmp_path)
    machines = [
        cluster.start(
            rank,
            home,
            *("lorafit", "processes", "--config_file", str(launch.config_file("ddp")), "--num_processes", "2"),
            *("--num_machines", "2", "--machine_rank", str(rank), "--same_network"),
            *("--main_process_ip", cluster.addresses[0], "--main_process_port", "29400"),
            *("--num_cpu_threads_per_process", "1", str(SUPPORT / "spread_apart.py")),
            *(str(home), str(shutil.copytree(tiny_base, home / "base"))),
            variables={"GLOO_SOCKET_IFNAME": "eth0"},
        )
        for rank, home in enumerate(homes)
    ]
    try:
        ended = [(process.wait(timeout=180), *process.communicate()) for process in machines]
    finally:
        for process in machines:
            process.kill()
    assert [code for code, _, _ in ended] == [0, 0], ended
    one_process(tmp_path / "one", tiny_base, **SPREAD)
    assert_same_curves(tmp_path / "one/run", homes[0] / "whole/run")
    files = [homes[0] / name / "run/adapter/adapter_model.safetensors" for name in ("whole", "resumed")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert json.loads((homes[0] / "resumed/run/manifest.json").read_text())["resumes"]
    read = [json.loads((homes[rank] / f"whole/{rank}/read.json").read_text()) for rank in (0, 1)]
    assert len(read[0]) == 21 and not read[1], "the first machine alone reads the base, and hands it on"
    assert not (homes[1] / "whole/run").exists() and not (homes[1] / "resumed/run").exists()


@pytest.mark.slow
def test_rank_sweeps_on_two_machines_share_their_trials(cluster: Cluster, tmp_path: Path, tiny_base: Path) -> None:
    sections: dict[str, Any] = {"lora": {}, "rank_sweep": {"ranks": [1, 2, 4], "exhaustive": True, "budget": 1.0}}
    path = small_recipe(tmp_path, tiny_base, **sections).path
    write_jsonl(tmp_path / "eval.jsonl", sums(20, first=100))
    words = ("lorafit", "rank-sweep", str(path), "--storage", f"sqlite:///{tmp_path / 'study.db'}", "--json")
    sweeps = [cluster.start(machine, home, *words) for machine, home in enumerate(homes_in(tmp_path))]
    try:
        ended = [(process.wait(timeout=150), *process.communicate()) for process in sweeps]
    finally:
        for process in sweeps:
            process.kill()
    assert [code for code, _, _ in ended] == [0, 0], ended
    ours, theirs = (json.loads(out) for _, out, _ in ended)
    assert ours["trials"] == theirs["trials"] and [row["rank"] for row in ours["trials"]] == [1, 2, 4]
    assert ours["tokens_trained"] == ours["tokens_exhaustive"], "each rank is trained once"
