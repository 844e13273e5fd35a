"""Worker processes: light, reused, deaf to Ctrl-C, and never left behind."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from fastgrpo.config import RewardConfig, UserError
from fastgrpo.rewards import Rewards

REPORT_PID = "import os\ndef score(completion):\n    return os.getpid()"


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


def worker_pids(rewards, group, decode):
    pids = set()
    for _ in range(5):
        for scored in rewards.score([group(["a"] * 8)], decode).groups:
            pids |= {int(pid) for pid in scored.rewards.tolist()}
    return pids


def test_workers_are_reused_and_gone_afterwards(group, decode, reward_file):
    with Rewards(RewardConfig(path=reward_file(REPORT_PID), num_workers=2)) as rewards:
        pids = worker_pids(rewards, group, decode)
        assert len(pids) <= 2
        assert os.getpid() not in pids
        assert all(alive(pid) for pid in pids)
    assert wait_until(lambda: not any(alive(pid) for pid in pids))


NOTES = """
from pathlib import Path
def note(text):
    with open(Path(__file__).with_name("calls"), "a") as file:
        file.write(text)
"""
KINDS = {
    "one": "def score(completion):\n    note(completion)\n    return ord(completion)",
    "all": "def score(completions):\n    note(''.join(completions))\n    return [ord(text) for text in completions]",
    "async": "async def score(completion):\n    note(completion)\n    return ord(completion)",
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_has_begun_runs_at_once_and_is_collected(kind, group, decode, reward_file, tmp_path):
    """A function of one completion runs before its siblings have ended, and none runs twice."""
    (tmp_path / "calls").touch()
    called = (tmp_path / "calls").read_text
    first, second = group(list("abc")), group(list("de"), number=1)
    with Rewards(RewardConfig(path=reward_file(NOTES + KINDS[kind]), num_workers=1)) as rewards:
        for place in (2, 0, 2):  # once more: drawn anew, the same
            rewards.begin(first.prompt, first.rollouts[place], 3, decode)
        if kind == "one":
            assert wait_until(lambda: called() == "ca")
        rewards.begin(first.prompt, first.rollouts[1], 3, decode)
        assert wait_until(lambda: called() == {"one": "cab"}.get(kind, "abc"))
        rewards.begin(second.prompt, second.rollouts[1], 2, decode)
        scored = rewards.score([second, first], decode).groups
    assert [g.rewards.tolist() for g in scored] == [[100, 101], [97, 98, 99]]
    assert called() == {"one": "cabed"}.get(kind, "abcde")


def test_what_begins_again_takes_the_place_of_what_began(group, decode, reward_file):
    drawn, again = group(list("abc")), group(list("xyz"))
    for kind in KINDS:
        with Rewards(RewardConfig(path=reward_file("def note(text): ...\n" + KINDS[kind]), num_workers=1)) as rewards:
            for rollout in [*drawn.rollouts, *again.rollouts]:
                rewards.begin(drawn.prompt, rollout, 3, decode)
            assert rewards.score([again], decode).groups[0].rewards.tolist() == [120, 121, 122]


def test_workers_start_without_heavy_imports(group, decode):
    def score(completion):
        import sys

        heavy = {"torch", "numpy", "transformers", "hydra", "pyarrow"}
        return len(heavy & set(sys.modules))

    with Rewards(RewardConfig(num_workers=1), score) as rewards:
        assert rewards.score([group(["a"])], decode).groups[0].rewards.tolist() == [0]


@pytest.mark.parametrize("pause", [0, 0.05, 0.5])  # before, while and after the pool finds out
def test_a_killed_idle_worker_is_replaced(pause, group, decode, reward_file):
    with Rewards(RewardConfig(path=reward_file(REPORT_PID), num_workers=1)) as rewards:
        (pid,) = worker_pids(rewards, group, decode)
        time.sleep(0.2)  # it has put down the lock on the pipe
        os.kill(pid, signal.SIGKILL)
        time.sleep(pause)
        (other,) = worker_pids(rewards, group, decode)
        assert other != pid
    assert wait_until(lambda: not alive(other))


def test_calls_that_a_broken_pool_had_not_sent_are_made_by_the_next(group, decode, reward_file):
    # More than the pipe to the workers holds, so that most calls are still queued when the pool breaks.
    groups = [group(["a"] * 8) for _ in range(8)]
    with Rewards(RewardConfig(path=reward_file(REPORT_PID), num_workers=1)) as rewards:
        (pid,) = worker_pids(rewards, group, decode)
        time.sleep(0.2)  # it has put down the lock on the pipe
        os.kill(pid, signal.SIGKILL)
        result = rewards.score(groups, lambda token_ids: "a" * 20000)
    assert len(result.groups) == 8
    assert result.metrics["reward/error_count"] == 0
    assert {int(value) for scored in result.groups for value in scored.rewards.tolist()}.isdisjoint({0, pid})


@pytest.mark.parametrize(("ending", "kind"), [("child.wait()", "timeout"), ("os._exit(3)", "error")])
def test_a_worker_over_its_limit_or_dead_takes_what_it_started_along(
    group, decode, reward_file, tmp_path, ending, kind
):
    source = f"""
import os, subprocess
def score(completion):
    child = subprocess.Popen(["sleep", "60"])
    open({str(tmp_path / "pid")!r}, "w").write(str(child.pid))
    {ending}
"""
    config = RewardConfig(path=reward_file(source), num_workers=1, timeout_s=1.0, on_error="zero")
    with Rewards(config) as rewards:
        assert rewards.score([group(["a"])], decode).metrics[f"reward/{kind}_count"] == 1
        assert wait_until(lambda: not alive(int((tmp_path / "pid").read_text())))


def test_functions_that_cannot_travel_say_so():
    lock = threading.Lock()

    def score(completion):
        return lock.locked()

    with pytest.raises(UserError, match=r"^score cannot be sent to worker processes \(.*\); set reward.num_workers=0"):
        Rewards(RewardConfig(num_workers=1), score)


SCRIPT = """
import os, sys, time
print("started", flush=True)  # twice, if a worker imported this unguarded script
import torch
from fastgrpo.config import RewardConfig
from fastgrpo.rewards import Rewards
from fastgrpo.types import Prompt, Rollout, RolloutGroup

def score(completion):
    if completion == "a":
        os.write(1, b"worker %d\\n" % os.getpid())  # in one piece, beside the other's
        {body}
    return 1

prompt = Prompt(prompt_id="train/0", token_ids=torch.tensor([1]), text="?")
rollout = Rollout(prompt_id="train/0", token_ids=torch.tensor([97]), loss_mask=torch.tensor([True]),
                  sampler_logprobs=torch.zeros(1), finish_reason="stop", policy_version=0)
rewards = Rewards(RewardConfig(num_workers=2), score)
result = rewards.score([RolloutGroup(prompt=prompt, rollouts=(rollout, rollout))], lambda ids: chr(ids[0]))
print("result", result.groups[0].rewards.tolist(), flush=True)
"""


def start_script(tmp_path, body):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT.replace("{body}", body))
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, script], start_new_session=True, **streams)


def pids_of_two_workers(process):
    said = [process.stdout.readline() for _ in range(3)]
    assert said[0] == "started\n"
    assert all(line.startswith("worker ") for line in said[1:]), (said, process.communicate(timeout=60))
    return [int(line.split()[1]) for line in said[1:]]


def test_a_script_without_a_main_guard_ends_by_itself_and_leaves_nothing(tmp_path):
    process = start_script(tmp_path, "time.sleep(0.5)")
    pids = pids_of_two_workers(process)
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, output, errors) == (0, "result [1.0, 1.0]\n", "")
    assert len(set(pids)) == 2
    assert wait_until(lambda: not any(alive(pid) for pid in pids))


@pytest.mark.parametrize("body", ["time.sleep(60)", "import re; re.fullmatch('(a+)+b', 'a' * 60)"])
def test_workers_die_with_a_killed_parent_even_when_stuck(tmp_path, body):
    process = start_script(tmp_path, body)
    pids = pids_of_two_workers(process)
    process.kill()
    process.communicate(timeout=60)
    assert wait_until(lambda: not any(alive(pid) for pid in pids))


def test_ctrl_c_reaches_the_trainer_alone(tmp_path):
    process = start_script(tmp_path, "time.sleep(1.5)")
    pids = pids_of_two_workers(process)
    for pid in pids:
        os.kill(pid, signal.SIGINT)
        os.kill(pid, signal.SIGTERM)
    assert process.stdout.readline() == "result [1.0, 1.0]\n"
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, output, errors) == (0, "", "")


def test_a_terminals_ctrl_c_ends_the_script_with_one_traceback(tmp_path):
    process = start_script(tmp_path, "time.sleep(60)")
    pids = pids_of_two_workers(process)
    os.killpg(process.pid, signal.SIGINT)  # what a terminal does: every process of the foreground group
    _, errors = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT
    assert errors.count("Traceback") == 1
    assert errors.rstrip().endswith("KeyboardInterrupt")
    assert wait_until(lambda: not any(alive(pid) for pid in pids))


def test_a_ctrl_c_while_workers_start_is_not_theirs(tmp_path):
    script = tmp_path / "early.py"
    script.write_text(
        "import os, signal, time\n"
        "from fastgrpo.config import RewardConfig\n"
        "from fastgrpo.rewards import Rewards\n"
        "signal.signal(signal.SIGINT, lambda *_: None)\n"
        "with Rewards(RewardConfig(num_workers=4)):\n"
        "    for _ in range(40):\n"
        "        os.killpg(0, signal.SIGINT)\n"
        "        time.sleep(0.01)\n"
    )
    process = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, start_new_session=True, timeout=60
    )
    assert (process.returncode, process.stderr) == (0, "")
