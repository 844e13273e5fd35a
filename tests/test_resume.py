"""Runs that are killed, signalled and starved in processes of their own end up where an undisturbed one does."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from builders import small_run
from processes import (
    an_hour_passes_at,
    both,
    fail_at,
    fastgrpo,
    fill_the_disk_at,
    hold_saving,
    interrupt_twice,
    kill_in_the_middle_of_saving,
    signal_at,
)
from runs import without_clock
from safetensors.torch import load_file

from fastgrpo.metrics import read_jsonl

KILL = signal.SIGKILL
CHECKPOINTS = ("step-000002", "step-000004", "step-000006")


def settings(model: str, *more: str) -> list[str]:
    """Six steps with a checkpoint every two, a reference that moves, momentum and groups that are replaced."""
    return [
        "train",
        *small_run(model, reward="varied_if_odd"),
        "train.num_steps=6",
        "train.updates_per_rollout=2",
        "train.lr_schedule=linear",
        "algorithm.reference.schedule=ema",
        "algorithm.reference.ema_decay=0.9",
        "algorithm.dynamic_sampling=true",
        "checkpoint.every=2",
        "checkpoint.keep=3",
        "data.num_problems=12",
        *more,
    ]


@pytest.fixture(scope="module")
def undisturbed(tiny_qwen2, tmp_path_factory):
    """The run directory of the settings, never stopped."""
    directory, home = tmp_path_factory.mktemp("undisturbed"), os.getcwd()
    os.chdir(directory)
    try:
        ended = fastgrpo(*settings(tiny_qwen2))
    finally:
        os.chdir(home)
    assert (ended.code, ended.err) == (0, "")
    rows = read_jsonl(directory / "run" / "metrics.jsonl")
    assert sum(row.get("groups/sampled", 4) - 4 for row in rows) > 0  # dynamic sampling did replace some
    assert rows[-1]["kl"] > 0
    return directory / "run"


def rows_in(run: Path) -> list[dict]:
    return without_clock([json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()])


def assert_same_run(run: Path, expected: Path) -> None:
    """Weights, metrics, samples and the last checkpoint, bit for bit."""
    assert (run / "hf/model.safetensors").read_bytes() == (expected / "hf/model.safetensors").read_bytes()
    assert rows_in(run) == rows_in(expected)
    assert (run / "samples.jsonl").read_bytes() == (expected / "samples.jsonl").read_bytes()
    assert checkpoints(run) == checkpoints(expected)
    newest = [path / "checkpoints" / checkpoints(expected)[-1] for path in (run, expected)]
    mine, theirs = (torch.load(path / "learner/learner.pt", weights_only=True) for path in newest)
    assert_equal(mine, theirs)
    assert (newest[0] / "run.json").read_bytes() == (newest[1] / "run.json").read_bytes()


def assert_equal(mine, theirs) -> None:
    if isinstance(mine, dict):
        assert mine.keys() == theirs.keys()
        mine, theirs = list(mine.values()), list(theirs.values())
    if isinstance(mine, list):
        for a, b in zip(mine, theirs, strict=True):
            assert_equal(a, b)
    else:
        assert torch.equal(mine, theirs) if isinstance(mine, torch.Tensor) else mine == theirs


def checkpoints(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def exports(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "exports").iterdir())


def resume(model: str, *more: str):
    ended = fastgrpo(*settings(model, "resume=auto", *more))
    assert (ended.code, ended.err) == (0, "")
    return ended


# What dies where, and the step after which the next attempt goes on. Updates: two a step. Rows: one at step 0.
MOMENTS = {
    "in the first step": (partial(signal_at, "fastgrpo.trainer:update_policy", 1, KILL), None),
    "in a step's second update": (
        partial(signal_at, "fastgrpo.learner.torch_learner:TorchLearner.update", 6, KILL),
        2,
    ),
    "while the reference moves": (
        partial(signal_at, "fastgrpo.learner.torch_learner:TorchLearner.move_reference", 5, KILL),
        4,
    ),
    "in a checkpoint's largest file": (partial(kill_in_the_middle_of_saving, 2), 2),
    "in the first checkpoint's": (partial(kill_in_the_middle_of_saving, 1), None),
    "while a checkpoint is flushed": (partial(signal_at, "fastgrpo.manifest:flush", 8, KILL), 2),
    "between checkpoint and row": (partial(signal_at, "fastgrpo.metrics:MetricsLog.write", 5, KILL), 2),
    "between row and publication": (
        partial(signal_at, "fastgrpo.checkpoint:Checkpoints._name", 2, KILL),
        2,
    ),
    "after a publication": (partial(signal_at, "fastgrpo.console:Console.step", 5, KILL), 4),
    "after the last step": (partial(signal_at, "fastgrpo.models.hf:save_pretrained", 1, KILL), 6),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_run_goes_on_bit_by_bit(moment, workplace, tiny_qwen2, undisturbed):
    install, step = MOMENTS[moment]
    assert fastgrpo(*settings(tiny_qwen2), install=install).code == -KILL
    out = resume(tiny_qwen2).out
    assert (f"resuming after step {step} from run/checkpoints/step-00000{step}" in out) == (step is not None)
    assert_same_run(Path("run"), undisturbed)


# The same beside the training loop: the checkpoint of step 4 is written while steps 5 and 6 go on.
BACKGROUND_MOMENTS = {
    "in its file": (partial(kill_in_the_middle_of_saving, 2), 2),
    "in a later step": (
        partial(
            both,
            partial(hold_saving, 2, "fastgrpo.trainer:evaluate_if_due", 6),
            partial(signal_at, "fastgrpo.learner.torch_learner:TorchLearner.update", 10, KILL),
        ),
        2,
    ),
    "between its files and its name": (partial(signal_at, "fastgrpo.checkpoint:seal", 2, KILL), 2),
    "when a later step has named it": (
        partial(
            both,
            partial(hold_saving, 2, "fastgrpo.trainer:update_policy", 6),
            partial(signal_at, "fastgrpo.learner.torch_learner:TorchLearner.begin_save", 3, KILL),
        ),
        4,
    ),
}


@pytest.mark.parametrize("moment", BACKGROUND_MOMENTS)
def test_a_run_killed_while_it_saves_in_the_background_goes_on_bit_by_bit(moment, workplace, tiny_qwen2, undisturbed):
    install, step = BACKGROUND_MOMENTS[moment]
    assert fastgrpo(*settings(tiny_qwen2, "checkpoint.background=true"), install=install).code == -KILL
    out = resume(tiny_qwen2, "checkpoint.background=true").out
    assert f"resuming after step {step} from run/checkpoints/step-00000{step}" in out
    assert_same_run(Path("run"), undisturbed)


def test_a_stop_waits_for_the_checkpoint_in_the_background(workplace, tiny_qwen2):
    """Its file is held back until the stop's own save has begun to wait. The stop is a terminal that is closed."""
    install = partial(
        both,
        partial(hold_saving, 2, "fastgrpo.checkpoint:Checkpoints.save", 3),
        partial(signal_at, "fastgrpo.learner.torch_learner:TorchLearner.update", 9, signal.SIGHUP),
    )
    ended = fastgrpo(*settings(tiny_qwen2, "checkpoint.background=true"), install=install)
    assert (ended.code, ended.err) == (129, "")
    assert ended.out.endswith("stopped after step 5, saved; go on with run.dir=run resume=auto\n")
    assert checkpoints(Path("run")) == ["step-000002", "step-000004", "step-000005"]


def test_a_failure_of_the_loop_leaves_no_half_checkpoint_behind(workplace, tiny_qwen2):
    install = partial(
        both,
        partial(hold_saving, 2, "fastgrpo.checkpoint:Checkpoints.__exit__", 1),
        partial(fail_at, "fastgrpo.trainer:update_policy", 5),
    )
    ended = fastgrpo(*settings(tiny_qwen2, "checkpoint.background=true"), install=install)
    assert (ended.code, ended.err) == (2, "fastgrpo: a failure\n")
    assert [path.name for path in Path("run/checkpoints").glob("step-*")] == ["step-000002"]


def test_a_run_killed_again_and_again_goes_on_bit_by_bit(workplace, tiny_qwen2, undisturbed):
    """Each attempt gets a few updates further than its checkpoint."""
    for attempt in range(3):
        kill = partial(signal_at, "fastgrpo.learner.torch_learner:TorchLearner.update", 6, KILL)
        assert fastgrpo(*settings(tiny_qwen2, "resume=auto"), install=kill).code == (-KILL if attempt < 2 else 0)
    assert_same_run(Path("run"), undisturbed)


UPDATE = "fastgrpo.learner.torch_learner:TorchLearner.update"
FINISHING = "finishing this step and saving; once more stops at once, without saving"
# What stops the third step: its exit code, line and settings, and what is saved beside that step and the second.
STOPS = {
    "SIGTERM": (partial(signal_at, UPDATE, 5, signal.SIGTERM), 143, f"SIGTERM: {FINISHING}", [], []),
    "SIGINT": (partial(signal_at, UPDATE, 5, signal.SIGINT), 130, f"SIGINT: {FINISHING}", [], []),
    "limit": (  # of which the third step's update leaves half an hour
        partial(an_hour_passes_at, "fastgrpo.trainer:update_policy", 6),
        124,
        "train.time_limit_minutes=210: another step might not end in time; saving this one",
        ["train.time_limit_minutes=210"],
        ["step-000001"],  # which tells how long it takes
    ),
}


@pytest.mark.parametrize("name", STOPS)
def test_what_stops_a_run_finishes_the_step_saves_and_says_so(name, workplace, tiny_qwen2, undisturbed):
    install, code, line, more, saved = STOPS[name]
    ended = fastgrpo(*settings(tiny_qwen2, *more), install=install)
    assert (ended.code, ended.err) == (code, "")
    assert f"\n{line}\n" in ended.out
    assert ended.out.endswith("stopped after step 3, saved; go on with run.dir=run resume=auto\n")
    assert checkpoints(Path("run")) == [*saved, "step-000002", "step-000003"]
    assert not Path("run/hf").exists()
    assert Path("run/report.html").exists()
    resume(tiny_qwen2)
    # The stop left one checkpoint more than an undisturbed run has; the newest three are kept.
    assert checkpoints(Path("run")) == ["step-000003", "step-000004", "step-000006"]
    Path("run/checkpoints/step-000003").rename("run/checkpoints/step-000002")
    assert_same_run(Path("run"), undisturbed)


def test_a_signal_while_the_row_is_written_takes_one_step_more_and_saves_it(workplace, tiny_qwen2):
    """The step that was being recorded was not to be saved: the one that ends the loop is."""
    at = partial(signal_at, "fastgrpo.metrics:MetricsLog.write", 2, signal.SIGTERM)
    ended = fastgrpo(*settings(tiny_qwen2, "run.profile_steps=[1,5]"), install=at)
    assert ended.code == 143
    assert ended.out.endswith(
        "run.profile_steps=[5]: not profiled, as this run did not make these steps\n"
        "stopped after step 2, saved; go on with run.dir=run resume=auto\n"
    )
    assert (ended.err, checkpoints(Path("run"))) == ("", ["step-000002"])


def test_a_second_signal_ends_the_run_at_once(workplace, tiny_qwen2):
    ended = fastgrpo(*settings(tiny_qwen2), install=partial(interrupt_twice, "fastgrpo.trainer:update_policy"))
    assert (ended.code, ended.err) == (130, "stopped\n")
    assert [row["step"] for row in read_jsonl("run/metrics.jsonl")] == [0]


def test_ctrl_c_in_a_terminal_reaches_the_workers_too_and_harms_nothing(workplace, tiny_qwen2):
    """From outside, to the whole process group, with reward functions in processes of their own."""
    arguments = settings(tiny_qwen2, "train.num_steps=500", "reward.num_workers=1", "eval.every=0")
    command = [sys.executable, "-m", "fastgrpo", *arguments]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    wait_for(lambda: len(read_jsonl("run/metrics.jsonl")) >= 3)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "")
    step = read_jsonl("run/metrics.jsonl")[-1]["step"]
    assert f"stopped after step {step}, saved; go on with run.dir=run resume=auto\n" in out
    assert checkpoints(Path("run"))[-1] == f"step-{step:06d}"


def wait_for(condition, timeout: float = 90) -> None:
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.fixture
def finished(undisturbed, workplace):
    """A copy of the undisturbed run in ./run, to be spoilt."""
    shutil.copytree(undisturbed, "run")
    return Path("run")


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_broken_checkpoint_is_named_and_skipped(finished, tiny_qwen2, undisturbed):
    flip_a_byte(finished / "checkpoints/step-000006/learner/learner.pt")
    out = resume(tiny_qwen2).out
    assert "checkpoint run/checkpoints/step-000006 is broken (learner/learner.pt is not what was written)" in out
    assert "resuming after step 4 from run/checkpoints/step-000004\n" in out
    assert_same_run(finished, undisturbed)


def test_a_finished_run_resumed_only_exports_again(finished, tiny_qwen2, undisturbed):
    shutil.rmtree(finished / "hf")
    resume(tiny_qwen2)
    assert_same_run(finished, undisturbed)


def test_a_run_goes_on_from_any_checkpoint_by_its_path(finished, tiny_qwen2, undisturbed):
    """Rows, checkpoints and exports of the future that is given up go, so that a kill now could not bring them back.

    The kill is in an export, of which only what nobody looks for is left, as of the checkpoint that would have gone on
    without it. And exports disturb nothing."""
    for name in ("step-000002", "step-000005", ".partial-step-000006"):
        (finished / "exports" / name).mkdir(parents=True)
    kill = partial(signal_at, "fastgrpo.exports:flush", 3, KILL)
    arguments = [argument for argument in settings(tiny_qwen2) if argument != "run.dir=run"]
    ended = fastgrpo(*arguments, "resume=run/checkpoints/step-000002", "checkpoint.export_every=2", install=kill)
    assert ended.code == -KILL
    assert checkpoints(finished) == [".partial-step-000004", "step-000002"]
    assert [row["step"] for row in read_jsonl(finished / "metrics.jsonl")] == [0, 1, 2, 3]
    assert exports(finished) == [".partial-step-000004", "step-000002"]
    assert (finished / "exports/.partial-step-000004/model.safetensors").exists()
    resume(tiny_qwen2, "checkpoint.export_every=2")
    assert_same_run(finished, undisturbed)
    assert exports(finished) == ["step-000002", "step-000004", "step-000006"]
    policies = [finished / name for name in ("exports/step-000004", "exports/step-000006", "hf")]
    earlier, last, final = ({file.name: file.read_bytes() for file in policy.iterdir()} for policy in policies)
    assert last == final
    assert {name for name in earlier if earlier[name] != final[name]} == {"model.safetensors"}


def test_a_run_without_any_whole_checkpoint_is_refused_and_loses_nothing(finished, tiny_qwen2):
    for name in CHECKPOINTS:
        flip_a_byte(finished / "checkpoints" / name / "learner/learner.pt")
    rows = (finished / "metrics.jsonl").read_bytes()
    ended = fastgrpo(*settings(tiny_qwen2, "resume=auto"))
    assert ended.out.count(" is broken (learner/learner.pt is not what was written); skipped\n") == 3
    line = "resume: no checkpoint in run/checkpoints is whole; restore one, or begin anew in another run.dir"
    assert (ended.code, ended.err) == (2, f"fastgrpo: {line}\n")
    assert checkpoints(finished) == list(CHECKPOINTS)
    assert (finished / "metrics.jsonl").read_bytes() == rows


def test_other_data_is_refused_on_resume(finished, tiny_qwen2):
    ended = fastgrpo(*settings(tiny_qwen2, "resume=auto", "data.num_problems=13"))
    assert ended.code == 2
    assert ended.err == (
        "fastgrpo: resume: the checkpoint was made with 12 training prompts, the data now has 13; restore the data or "
        "start anew with resume=no\n"
    )


def test_another_model_is_refused_on_resume(finished, tiny_llama):
    ended = fastgrpo(*settings(tiny_llama, "resume=auto"))
    assert ended.code == 2
    assert ended.err == (
        "fastgrpo: resume=run/checkpoints/step-000006/learner: not a state of this model; resume with the model.path "
        "of then\n"
    )
    assert checkpoints(finished) == list(CHECKPOINTS)


def test_a_refusal_loses_no_later_checkpoint(finished, tiny_qwen2):
    fail = partial(fail_at, "fastgrpo.assemble:make_exchange", 1)
    arguments = [argument for argument in settings(tiny_qwen2) if argument != "run.dir=run"]
    ended = fastgrpo(*arguments, "resume=run/checkpoints/step-000002", install=fail)
    assert (ended.code, ended.err) == (2, "fastgrpo: a failure\n")
    assert checkpoints(finished) == list(CHECKPOINTS)


def test_a_reference_that_was_not_saved_is_missed_on_resume(workplace, tiny_qwen2):
    short = ["train", *small_run(tiny_qwen2, "train.num_steps=1")]
    assert fastgrpo(*short, "algorithm.kl_coef=0").code == 0
    ended = fastgrpo(*short, "algorithm.kl_coef=0.1", "resume=auto")
    assert ended.code == 2
    assert ended.err == (
        "fastgrpo: resume=run/checkpoints/step-000001/learner: saved without a reference model; resume with "
        "algorithm.kl_coef=0, or with the algorithm.reference.path of then\n"
    )


@pytest.mark.parametrize("background", ["false", "true"])
def test_a_full_disk_ends_the_run_in_one_line_with_its_checkpoints_whole(
    background, workplace, tiny_qwen2, undisturbed
):
    full = partial(fill_the_disk_at, "fastgrpo.checkpoint:Checkpoints.save", 2, 50_000)
    ended = fastgrpo(*settings(tiny_qwen2, f"checkpoint.background={background}"), install=full)
    assert ended.code == 2
    assert ended.err.count("\n") == 1
    assert ended.err.startswith("fastgrpo: checkpoint of step 4 cannot be written to run/checkpoints: ")
    assert ended.err.endswith("; free space or choose another run.dir, then go on with resume=auto\n")
    assert checkpoints(Path("run")) == ["step-000002"]
    resume(tiny_qwen2)
    assert_same_run(Path("run"), undisturbed)


def test_a_disk_full_at_the_export_leaves_a_run_that_can_go_on(workplace, tiny_qwen2, undisturbed):
    full = partial(fill_the_disk_at, "fastgrpo.models.hf:save_pretrained", 1, 50_000)
    ended = fastgrpo(*settings(tiny_qwen2), install=full)
    assert ended.code == 2
    assert ended.err.count("\n") == 1
    assert ended.err.startswith("fastgrpo: run.dir=run: ")
    resume(tiny_qwen2)
    assert_same_run(Path("run"), undisturbed)


def test_a_disk_full_at_the_metrics_ends_the_run_in_one_line(workplace, tiny_qwen2):
    Path("run").mkdir()
    Path("run/samples.jsonl").symlink_to("/dev/full")
    ended = fastgrpo(*settings(tiny_qwen2))
    assert ended.code == 2
    assert ended.err == (
        "fastgrpo: run.dir=run: [Errno 28] No space left on device; make room or mend the disk, then go on with "
        "resume=auto (checkpoints written before are whole)\n"
    )


def test_the_export_is_the_policy_for_plain_transformers(undisturbed, tiny_qwen2):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = (kind.from_pretrained(undisturbed / "hf") for kind in (AutoModelForCausalLM, AutoTokenizer))
    state = torch.load(undisturbed / "checkpoints/step-000006/learner/learner.pt", weights_only=True)["model"]
    plain = AutoModelForCausalLM.from_pretrained(tiny_qwen2)
    ids = torch.tensor([tokenizer("123+456=")["input_ids"]])
    assert ids.shape == (1, 8)
    assert tokenizer.decode(ids[0]) == "123+456="
    start = plain(ids).logits
    plain.load_state_dict(state)
    assert torch.equal(model(ids).logits, plain(ids).logits)
    assert not torch.equal(model(ids).logits, start)
    assert load_file(undisturbed / "hf/model.safetensors").keys() <= state.keys()
