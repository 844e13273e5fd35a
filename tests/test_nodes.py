"""What a job of several nodes does beside one of several processes; tests/learner/megatron/test_nodes.py runs one."""

import itertools
import os
import threading
import time
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from fastgrpo import agreement, lookout, main, network, warm_start
from fastgrpo.config import Config, DataConfig, EnvironmentConfig, RewardConfig, RunConfig, TrainConfig, UserError
from fastgrpo.data import PromptSets
from fastgrpo.lookout import failing_together
from fastgrpo.nodes import JobError
from fastgrpo.ranks import Ranks
from fastgrpo.types import Prompt

ON_NODE_1 = {"GROUP_RANK": "1", "GROUP_WORLD_SIZE": "2", "RANK": "2", "LOCAL_RANK": "0", "WORLD_SIZE": "4"}
FIRST = f"{lookout.LINE}/0"
BROKEN = (
    "[/torch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [10.0.0.7]:9. This is typical."
)


@pytest.fixture
def node_1(monkeypatch):
    """This process is the first of the second of two nodes of two."""
    for name, value in ON_NODE_1.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("socket.gethostname", lambda: "worker-1")


# --- which line is printed, and by whom -------------------------------------------------------------------------------


@pytest.fixture
def slept(monkeypatch):
    seconds = []
    monkeypatch.setattr(main.time, "sleep", seconds.append)
    return seconds


def test_a_nodes_first_process_speaks_at_once_and_says_which_it_is(node_1, slept, capsys):
    with pytest.raises(SystemExit):
        main.fail("key=value: mend it")
    assert (slept, capsys.readouterr().err) == ([], "fastgrpo: rank 2 on worker-1: key=value: mend it\n")


def test_its_other_processes_let_it_speak_first(node_1, slept, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit):
        main.fail("key=value: mend it")
    assert slept == [main.SPEAK_AFTER_FIRST_S]


def test_a_line_of_the_whole_job_is_nobodys_in_particular(node_1, slept, capsys):
    with pytest.raises(SystemExit):
        main.fail("rank 3 on worker-1: key=value", of_job=True)
    assert capsys.readouterr().err == "fastgrpo: rank 3 on worker-1: key=value\n"


# --- one fails, all end -----------------------------------------------------------------------------------------------


@pytest.fixture
def store(node_1, monkeypatch):
    """torchrun's, in this process; and nobody waits for long."""
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    here = dist.HashStore()
    monkeypatch.setattr(lookout, "torchrun_store", lambda *_: here)
    monkeypatch.setattr(lookout, "_blocks", itertools.count())
    for name, seconds in (("LOOK_EVERY_S", 0.01), ("LINGER_S", 0.1), ("PATIENCE_S", 30)):
        monkeypatch.setattr(lookout, name, seconds)
    return here


def fail(error: BaseException, after=lambda: True) -> None:
    with failing_together():
        while not after():
            time.sleep(0.01)
        raise error


def lookouts() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "lookout"]


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (UserError("model.path=m: no such directory"), "rank 2 on worker-1: model.path=m: no such directory"),
        (KeyError("x"), "rank 2 on worker-1: KeyError: 'x'; its output says where"),
        (KeyboardInterrupt(), "rank 2 on worker-1: stopped"),
    ],
)
def test_a_process_that_fails_leaves_its_line(store, error, line):
    with pytest.raises(type(error)) as raised:
        fail(error)
    assert raised.value is error
    assert store.get(FIRST).decode() == line


def test_the_first_line_stands(store):
    store.set(FIRST, "rank 0 on worker-0: x=1")
    with pytest.raises(UserError, match="y=2"):
        fail(UserError("y=2"))
    assert store.get(FIRST) == b"rank 0 on worker-0: x=1"


def test_a_sweeps_next_run_does_not_end_with_the_line_of_the_one_before(store, monkeypatch):
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    with pytest.raises(UserError, match="x=1"):
        fail(UserError("x=1"))
    monkeypatch.setattr(lookout, "PATIENCE_S", 0.0)
    with failing_together():
        time.sleep(0.2)
    assert codes == []


@pytest.mark.parametrize("error", [RuntimeError(BROKEN), dist.DistBackendError("NCCL error"), UserError("disk full")])
def test_in_place_of_a_broken_exchange_its_cause_is_told(store, error):
    store.set(FIRST, "rank 0 on worker-0: x=1")
    if isinstance(error, UserError):  # as of a checkpoint's writing, which catches what torch raises
        error.__cause__ = RuntimeError(BROKEN)
    with pytest.raises(JobError) as raised:
        fail(error)
    assert str(raised.value) == "rank 0 on worker-0: x=1"


def test_where_nobody_tells_the_cause_the_line_says_what_to_do(store):
    line = (
        "an exchange with another process broke off (Connection closed by peer [10.0.0.7]:9): it was killed, or its "
        "node is gone; look for what it says, then go on with resume=auto"
    )
    with pytest.raises(UserError) as raised:
        fail(RuntimeError(BROKEN))
    assert str(raised.value) == line
    assert store.get(FIRST).decode() == f"rank 2 on worker-1: {line}"


def test_where_torchruns_store_has_ended_nobody_is_told(store, monkeypatch):
    asked = []

    def gone(*of: object) -> None:
        asked.append(of)
        raise dist.DistNetworkError("Broken pipe")

    monkeypatch.setattr(lookout, "torchrun_store", gone)
    with pytest.raises(UserError, match="x=1"):
        fail(UserError("x=1"), after=lambda: asked and not lookouts())
    assert asked == [()]


def test_a_waiting_process_is_ended_with_the_line_of_the_one_that_failed(store, monkeypatch, capfd):
    ended = threading.Event()
    codes = []
    monkeypatch.setattr(lookout, "PATIENCE_S", 0.1)
    monkeypatch.setattr(os, "_exit", lambda code: (codes.append(code), ended.set()))
    with failing_together():
        store.set(FIRST, "rank 0 on worker-0: x=1")
        assert ended.wait(30)
    assert (codes, capfd.readouterr().err) == ([2], "fastgrpo: rank 0 on worker-0: x=1\n")


def test_torchrun_ends_the_others_of_a_node(store, monkeypatch):
    codes: list[int] = []
    monkeypatch.setattr(lookout, "PATIENCE_S", 0.0)
    monkeypatch.setattr(os, "_exit", codes.append)
    monkeypatch.setenv("LOCAL_RANK", "1")
    store.set(FIRST, "rank 0 on worker-0: x=1")
    with pytest.raises(JobError, match="rank 0 on worker-0: x=1"):
        fail(RuntimeError(BROKEN), after=lambda: not lookouts())
    assert codes == []


def test_a_process_that_is_done_is_left_alone(store, monkeypatch):
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    with failing_together():
        store.set(FIRST, "rank 0 on worker-0: x=1")
        time.sleep(0.2)  # in which it is seen
    assert not lookouts()
    assert codes == []


# --- the network between the nodes ------------------------------------------------------------------------------------


@pytest.fixture
def addresses(node_1, monkeypatch):
    """Where this node, and the others, send packets from: {host: address}; and nothing is set."""
    monkeypatch.setenv("MASTER_ADDR", "worker-0")
    for name in ("GLOO_SOCKET_IFNAME", "VLLM_HOST_IP"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    towards: dict[str, str] = {}
    monkeypatch.setattr(network, "_towards", towards.__getitem__)
    interfaces = {"lo": ["127.0.0.1"], "eth0": ["192.168.0.4", "fe80::1"], "ib0": ["10.0.0.7"]}
    listed = {name: [SimpleNamespace(address=a) for a in found] for name, found in interfaces.items()}
    monkeypatch.setattr("psutil.net_if_addrs", lambda: listed)
    return towards


def chosen() -> tuple[str | None, str | None]:
    network._name_the_network(dist.HashStore())
    return os.environ.get("GLOO_SOCKET_IFNAME"), os.environ.get("VLLM_HOST_IP")


def named(monkeypatch, address: str) -> None:
    """This machine's name leads to the address."""
    monkeypatch.setattr(network, "_leads_to_itself", lambda name: address.startswith("127."))


def test_a_machine_whose_name_is_its_loopback_takes_the_interface_that_leads_to_the_others(addresses, monkeypatch):
    named(monkeypatch, "127.0.1.1")
    addresses["worker-0"] = "10.0.0.7"
    assert chosen() == ("ib0", "10.0.0.7")


def test_where_the_name_leads_into_a_network_gloo_takes_that(addresses, monkeypatch):
    named(monkeypatch, "192.168.0.4")
    addresses["worker-0"] = "10.0.0.7"
    assert chosen() == (None, "10.0.0.7")


def test_what_the_user_has_set_stays(addresses, monkeypatch):
    named(monkeypatch, "127.0.1.1")
    addresses["worker-0"] = "10.0.0.7"
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")
    monkeypatch.setenv("VLLM_HOST_IP", "192.168.0.4")
    assert chosen() == ("eth0", "192.168.0.4")


def test_the_node_of_torchruns_store_asks_the_next_one_for_an_address(addresses, monkeypatch):
    named(monkeypatch, "127.0.1.1")
    monkeypatch.setenv("GROUP_RANK", "0")
    addresses |= {"worker-0": "127.0.0.1", "10.0.0.8": "10.0.0.7"}
    store = dist.HashStore()
    store.set("address/1", "10.0.0.8")
    assert network._address(store) == "10.0.0.7"


def test_agents_on_one_machine_need_no_network(addresses, monkeypatch):
    named(monkeypatch, "127.0.1.1")
    addresses |= {"worker-0": "127.0.0.1", "127.0.0.1": "127.0.0.1"}
    store = dist.HashStore()
    store.set("address/0", "127.0.0.1")
    network._name_the_network(store)
    assert "GLOO_SOCKET_IFNAME" not in os.environ


@pytest.mark.parametrize("name", ["localhost", "127.0.1.1", "no-such-host.invalid"])
def test_names_that_lead_to_the_machine_itself_or_nowhere(name):
    assert network._leads_to_itself(name)


def test_packets_to_this_machine_go_out_from_its_loopback():
    assert network._towards("127.0.0.1") == "127.0.0.1"


def test_a_store_out_of_reach_ends_in_one_line(addresses, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("MASTER_PORT", "1")
    monkeypatch.setattr(network, "torchrun_store", partial(refuse, dist.DistNetworkError("timed out")))
    line = "MASTER_ADDR=worker-0: rank 2 on worker-1 does not reach torchrun there; start torchrun on every node with "
    with pytest.raises(UserError, match=line):
        network.join("gloo")


def test_an_interface_over_which_the_others_are_out_of_reach_ends_in_one_line(addresses, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")
    monkeypatch.setattr(network, "torchrun_store", dist.HashStore)
    addresses["worker-0"] = "10.0.0.7"
    monkeypatch.setattr(dist, "init_process_group", partial(refuse, RuntimeError("Gloo connectFullMesh failed with")))
    with pytest.raises(UserError, match="GLOO_SOCKET_IFNAME=eth0: rank 2 on worker-1 cannot exchange with the others"):
        network.join("gloo")


def refuse(error: Exception, *_: object) -> None:
    raise error


# --- what has to be alike ---------------------------------------------------------------------------------------------


class OfThread(Ranks):
    """Ranks that are threads of this process."""

    def meet(self, *, barrier: threading.Barrier, values: list) -> None:
        object.__setattr__(self, "barrier_", barrier)
        object.__setattr__(self, "values", values)

    def everyone(self, value):
        self.values[self.rank] = value
        self.barrier_.wait(30)
        found = list(self.values)
        self.barrier_.wait(30)
        return found

    def from_main(self, value):
        return self.everyone(value)[0]

    def barrier(self):
        self.barrier_.wait(30)


@pytest.fixture
def both(node_1, monkeypatch):
    """Have a function called as rank 0 and as rank 1, each the first of its node; returns the lines that they raise."""
    for module in (agreement, warm_start):
        monkeypatch.setattr(module, "first_of_node", lambda: True)
    monkeypatch.setattr(agreement, "whoami", lambda: threading.current_thread().name)
    monkeypatch.setattr(agreement, "PATIENCE_S", 0.0)

    def call(*of_ranks):
        barrier, values, lines = threading.Barrier(2), [None, None], [None, None]

        def run(rank: int) -> None:
            ranks = OfThread(rank=rank, num_ranks=2, data_rank=rank, num_data_ranks=2)
            ranks.meet(barrier=barrier, values=values)
            try:
                of_ranks[rank](ranks)
            except JobError as error:
                lines[rank] = str(error)

        threads = [threading.Thread(target=run, args=(rank,), name=f"rank {rank} on w{rank}") for rank in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return lines

    return call


def test_a_run_dir_that_one_node_does_not_see_is_refused_on_both(both, tmp_path):
    configs = [Config(run=RunConfig(dir=str(tmp_path / name))) for name in ("a", "b")]
    (tmp_path / "a").mkdir()
    lines = both(*(partial(agreement.check_run_dir, config) for config in configs))
    said = f"run.dir={tmp_path / 'b'}: rank 1 on w1 does not see what rank 0 writes there ({tmp_path / 'b'})"
    assert lines == [f"{said}; give a directory on a file system that all nodes share"] * 2


def test_a_run_dir_that_one_node_cannot_write_to_is_refused_on_both(both, tmp_path, monkeypatch):
    touch = type(tmp_path).touch

    def no_room_for_rank_1(path):
        if path.name.endswith("-1"):
            raise OSError(30, "Read-only file system")
        touch(path)

    monkeypatch.setattr(type(tmp_path), "touch", no_room_for_rank_1)
    lines = both(*[partial(agreement.check_run_dir, Config(run=RunConfig(dir=str(tmp_path))))] * 2)
    assert lines[0] == lines[1]
    assert lines[0].startswith(f"run.dir={tmp_path}: rank 1 on w1 cannot write there: Read-only file system (")


def test_a_shared_run_dir_is_left_as_it_was(both, tmp_path):
    (tmp_path / "metrics.jsonl").touch()
    assert both(*[partial(agreement.check_run_dir, Config(run=RunConfig(dir=str(tmp_path))))] * 2) == [None, None]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_other_settings_are_refused_and_other_paths_are_not(both):
    config = Config(train=TrainConfig(learning_rate=1e-3))
    other = replace(config, train=replace(config.train, learning_rate=1e-4))
    lines = both(*(partial(agreement.check_settings, c) for c in (config, other)))
    line = "train.learning_rate=0.001: rank 1 on w1 has 0.0001; start all nodes with the same settings"
    assert lines == [line] * 2
    elsewhere = replace(config, data=replace(config.data, path="/node-1/data.jsonl"))
    assert both(*(partial(agreement.check_settings, c) for c in (config, elsewhere))) == [None, None]


def prompts(answer: str, token: int = 5) -> PromptSets:
    prompt = Prompt(prompt_id="train/0", token_ids=torch.tensor([token]), text="2+3=", answer=answer)
    return PromptSets(train=[prompt], eval=[], num_dropped=0, num_duplicates=0)


@pytest.mark.parametrize("other", [prompts("6"), prompts("5", token=6)])
def test_other_prompts_are_refused(both, other):
    config = Config(data=DataConfig(path=["a.jsonl", "b.jsonl"]))
    lines = both(*(partial(agreement.check_prompts, config, found) for found in (prompts("5"), other)))
    line = (
        "data.path=[a.jsonl,b.jsonl]: what rank 1 on w1 finds there is not what rank 0 finds; give all nodes the same"
    )
    assert lines == [line] * 2
    assert both(*[partial(agreement.check_prompts, config, prompts("5"))] * 2) == [None, None]


def test_another_file_of_a_function_is_refused(both, tmp_path):
    for name, text in (("a", "1"), ("b", "2"), ("c", "1")):
        (tmp_path / f"{name}.py").write_text(f"def score(completion): return {text}\n")
    of = {
        name: partial(agreement.check_functions, Config(reward=RewardConfig(path=f"{tmp_path / name}.py:score")))
        for name in "abc"
    }
    ready_made = partial(agreement.check_functions, Config(environment=EnvironmentConfig(path="textwrap:dedent")))
    nothing = partial(agreement.check_functions, Config())
    assert both(of["a"], of["c"]) == both(nothing, nothing) == both(ready_made, ready_made) == [None, None]
    found = f"reward.path={tmp_path / 'b'}.py:score: what rank 1 on w1 finds there is not what rank 0 finds"
    assert both(of["a"], of["b"]) == [f"{found}; give all nodes the same"] * 2
    found = "environment.path=null: what rank 1 on w1 finds there is not what rank 0 finds"
    assert both(ready_made, nothing) == [f"{found}; give all nodes the same"] * 2


@pytest.mark.parametrize("file", ["model.safetensors", "generation_config.json", "adapter_config.json"])
def test_another_copy_of_the_model_is_refused(both, tmp_path, file):
    for name, last in (("a", b"0"), ("b", b"1"), ("c", b"0")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "model.safetensors").write_bytes(bytes(100_000))
        (tmp_path / name / file).write_bytes(bytes(100_000) + last)
    of = {name: partial(agreement.check_model, "model.path", str(tmp_path / name)) for name in "abc"}
    assert both(of["a"], of["c"]) == [None, None]
    lines = both(of["a"], of["b"])
    found = f"model.path={tmp_path / 'b'}: what rank 1 on w1 finds there is not what rank 0 finds"
    assert lines == [f"{found}; give all nodes the same"] * 2


def test_a_node_with_a_cache_of_its_own_gets_the_main_ranks_model(both, tmp_path):
    mine, other = (tmp_path / node / "warm-start-0" for node in "ab")
    mine.mkdir(parents=True)
    (mine / "config.json").write_text("{}")
    (mine / "model.safetensors").write_bytes(b"weights")
    assert both(*(partial(warm_start.hand_out, path) for path in (mine, other))) == [None, None]
    assert {file.name: file.read_bytes() for file in other.iterdir()} == {
        "config.json": b"{}",
        "model.safetensors": b"weights",
    }
    assert [path.name for path in other.parent.iterdir()] == ["warm-start-0"]


def test_in_a_job_of_one_node_nothing_is_asked(monkeypatch):
    monkeypatch.setenv("GROUP_WORLD_SIZE", "1")
    ranks = Ranks(num_ranks=2)  # without a process group, any exchange would fail
    agreement.check_settings(Config(), ranks)
    agreement.check_run_dir(Config(), ranks)
    agreement.check_prompts(Config(), prompts("5"), ranks)
    agreement.check_model("model.path", "nowhere", ranks)
