"""Predicted memory: against torch's CPU allocator, known figures, and itself."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import pairwise
from typing import Any

import pytest

from support import SUPPORT

pytestmark = pytest.mark.xdist_group("planning memory")  # its fixtures cost too much to be made by each worker

PROBE = SUPPORT / "plan_probe.py"


@pytest.fixture(scope="module")
def answers() -> Any:
    return probed()


def probed(*arguments: str) -> Any:
    command = [sys.executable, str(PROBE), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def slow_answers() -> Any:
    return probed("slow")


def assert_as_allocated(cases: dict[str, list[int]]) -> None:
    assert len(cases) == 4
    for name, (predicted, measured) in cases.items():
        assert predicted == pytest.approx(measured, rel=0.005), name


def test_the_tracker_gives_what_the_cpu_allocator_gives_out(answers: Any) -> None:
    assert_as_allocated(answers["cpu"])


@pytest.mark.slow
def test_the_tracker_gives_what_the_cpu_allocator_gives_out_in_other_cases(slow_answers: Any) -> None:
    assert_as_allocated(slow_answers["cpu"])


def test_an_8b_step_takes_what_is_known_of_it(answers: Any) -> None:
    known = {"checkpointing": 16.59, "4 bits, 4 rows, kept": 51.26}
    assert answers["llama3-8b"] == pytest.approx(known, abs=0.006)


@pytest.mark.slow
def test_other_8b_steps_take_what_is_known_of_them(slow_answers: Any) -> None:
    assert slow_answers["llama3-8b"] == pytest.approx({"kept": 29.02, "4 bits": 6.58}, abs=0.006)


def test_a_published_run_is_met(answers: Any) -> None:
    assert answers["published"] == [pytest.approx(16.374, rel=0.005)]  # A100, Mistral 7B QLoRA, 4 rows


def test_a_step_is_run_once_for_a_batch(answers: Any) -> None:
    first, with_replay, of_another_batch, of_the_first_again = answers["steps"]
    assert first and len(with_replay) == 1 and max(with_replay) > max(first)
    assert of_another_batch == of_the_first_again == first


def test_a_replay_in_a_copy_of_the_process_comes_to_the_same_and_is_made_up_for(answers: Any) -> None:
    beside_it, without_it, is_same = answers["elsewhere"]
    assert (beside_it, without_it, is_same) == ([2, 3], [2, 3, 6], True)


def test_the_peak_is_exactly_affine_in_depth_with_two_kinds_of_layers(answers: Any) -> None:
    ((extrapolated, whole),) = answers["affine"]
    assert extrapolated == whole


@pytest.mark.slow
def test_the_peak_is_exactly_affine_in_depth_with_every_activation_kept(slow_answers: Any) -> None:
    ((extrapolated, whole),) = slow_answers["affine"]
    assert extrapolated == whole


def test_the_peak_grows_with_each_knob(answers: Any) -> None:
    assert set(answers["monotone"]) == {"batch", "length", "rank", "passes"}
    for knob, peaks in answers["monotone"].items():
        assert all(one < other for one, other in pairwise(peaks)), knob


def test_fsdp2_leaves_each_gpu_its_share_of_the_weights(answers: Any) -> None:
    assert answers["spread"] / 2**30 == pytest.approx(14.96 / 4, rel=0.01)


def test_each_gpu_holds_all_of_a_4_bit_base_before_fsdp2_shares_it_out(answers: Any) -> None:
    peak_at, weights = answers["loading"]
    assert peak_at == "loading the base model"
    packed, in_16_bits = 6_979_321_856 // 2, 2 * (2 * 128_256 * 4096)  # linear layers; embedding and head
    assert weights == pytest.approx(packed + in_16_bits, rel=0.01)


def test_an_adapter_has_the_type_it_is_trained_in(answers: Any) -> None:
    on_16_bits, on_4_bits, with_fp16 = answers["adapter"]
    assert on_16_bits == 2 * on_4_bits == with_fp16 > 0


def test_auto_checkpointing_follows_the_plan_and_says_why(answers: Any) -> None:
    (is_on_small, why_small), (is_on_large, why_large) = answers["checkpointing"]
    assert (is_on_small, is_on_large) == (True, False)
    assert "of the GPU's memory" in why_small
    assert "under 85%" in why_large


@pytest.mark.slow
def test_the_largest_batch_fits_and_the_next_one_does_not(slow_answers: Any) -> None:
    (batch, length, rank), verdicts = slow_answers["largest"]
    assert verdicts[0] == "fits" and verdicts[1] != "fits"
    assert batch > 1 and length % 256 == 0 and rank & (rank - 1) == 0
