"""Checkpoints of many ranks, each a thread here, with files that they write themselves."""

import json
import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace

import pytest

from fastgrpo import checkpoint, manifest
from fastgrpo.checkpoint import Checkpoints
from fastgrpo.config import Config, UserError
from fastgrpo.learner.protocol import PendingSave
from fastgrpo.manifest import find_problem
from fastgrpo.ranks import Ranks
from fastgrpo.resume import find_checkpoint

NUM_RANKS = 4
SIZES = [(70_000, 10), (30_000,), (), (20_000, 20_000)]


def on_ranks(do):
    """What do(ranks) returns or raises on each of the ranks."""
    meeting, values = threading.Barrier(NUM_RANKS, timeout=20), [None] * NUM_RANKS

    class Threads(Ranks):
        def everyone(self, value):
            values[self.rank] = value
            meeting.wait()
            found = list(values)
            meeting.wait()
            return found

        def from_main(self, value):
            return self.everyone(value)[0]

        def barrier(self):
            self.everyone(None)

    def outcome(rank):
        try:
            return do(Threads(rank=rank, num_ranks=NUM_RANKS, data_rank=rank, num_data_ranks=NUM_RANKS))
        except UserError as error:
            return error

    with ThreadPoolExecutor(NUM_RANKS) as pool:
        return list(pool.map(outcome, range(NUM_RANKS)))


def begin_save(directory, *, copy, rank, held=None, full=()):
    """Files of SIZES; `held` keeps them back, and on the ranks of `full` there is no room."""

    def write(path, num_bytes):
        if held is not None:
            held.wait(20)
        if rank in full:
            raise OSError(28, "No space left on device")
        path.write_bytes(bytes(num_bytes))

    def finish():
        if rank == 0:
            (directory / "index").write_text("of all files")

    files = {directory / f"{rank}-{i}": partial(write, directory / f"{rank}-{i}", n) for i, n in enumerate(SIZES[rank])}
    return PendingSave(files=files, finish=finish)


def save(run_dir, step, ranks, **settings):
    """Save and publish at once."""
    checkpoints = Checkpoints(run_dir, keep=2, ranks=ranks)
    checkpoints.save(step, partial(begin_save, rank=ranks.rank, **settings), {"stream": "its state"})
    checkpoints.publish()
    return checkpoints


def names(run_dir):
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def test_every_file_of_every_rank_is_listed(tmp_path):
    on_ranks(lambda ranks: save(tmp_path, 3, ranks))
    files = json.loads((tmp_path / "checkpoints/step-000003/manifest.json").read_text())["files"]
    written = {f"learner/{rank}-{i}": size for rank, sizes in enumerate(SIZES) for i, size in enumerate(sizes)}
    assert {name: entry["bytes"] for name, entry in files.items() if name in written} == written
    assert files.keys() - written.keys() == {"learner/index", "run.json"}


def test_a_flipped_byte_in_any_file_is_found_by_the_one_rank_that_reads_it(tmp_path, monkeypatch):
    on_ranks(lambda ranks: save(tmp_path, 3, ranks))
    path, read = tmp_path / "checkpoints/step-000003", []
    hashed = manifest.fingerprint

    def noted(file):
        read.append((threading.get_ident(), file))
        return hashed(file)

    monkeypatch.setattr(manifest, "fingerprint", noted)
    files = [file for file in path.rglob("*") if file.is_file() and file.name != "manifest.json"]
    for file in files:
        content = file.read_bytes()
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        said = on_ranks(lambda ranks: find_problem(path, ranks))
        assert said == [f"{file.relative_to(path)} is not what was written"] * NUM_RANKS
        file.write_bytes(content)
    read.clear()
    assert on_ranks(lambda ranks: find_problem(path, ranks)) == [None] * NUM_RANKS
    assert sorted(file for _, file in read) == sorted(files)
    loads = [sum(file.stat().st_size for t, file in read if t == thread) for thread in {thread for thread, _ in read}]
    assert max(loads) == 70_000  # the largest file, and all others are elsewhere


def test_a_checkpoint_appears_once_the_last_rank_has_written(tmp_path):
    held = [threading.Event() for _ in range(NUM_RANKS)]

    def several_steps(ranks):
        checkpoints = Checkpoints(tmp_path, keep=2, ranks=ranks)
        begin = partial(begin_save, rank=ranks.rank, held=held[ranks.rank])
        checkpoints.save(3, begin, {}, background=True)
        seen = []
        for step in range(NUM_RANKS):
            checkpoints.publish()
            ranks.barrier()
            seen.append(names(tmp_path))
            held[step].set()
        checkpoints.publish(waits=True)
        ranks.barrier()
        return [*seen, names(tmp_path)]

    assert on_ranks(several_steps) == [[[".partial-step-000003"]] * NUM_RANKS + [["step-000003"]]] * NUM_RANKS


def test_the_next_save_publishes_the_one_before(tmp_path):
    def two(ranks):
        checkpoints = Checkpoints(tmp_path, keep=2, ranks=ranks)
        for step in (3, 4):
            checkpoints.save(step, partial(begin_save, rank=ranks.rank), {}, background=True)
        checkpoints.publish(waits=True)

    on_ranks(two)
    assert names(tmp_path) == ["step-000003", "step-000004"]


def test_what_a_save_takes_is_known_by_its_last_file(tmp_path, monkeypatch):
    now, held = [100.0], threading.Event()
    monkeypatch.setattr(checkpoint, "time", SimpleNamespace(monotonic=lambda: now[0]))
    checkpoints = Checkpoints(tmp_path, keep=2)
    assert checkpoints.longest_s is None
    checkpoints.save(3, partial(begin_save, rank=0, held=held), {}, background=True)
    assert checkpoints.longest_s == 0.0
    writers = [thread for thread in threading.enumerate() if thread.name == "checkpoint"]
    now[0] = 107.0
    held.set()
    for thread in writers:
        thread.join(timeout=10)
    checkpoints.save(4, partial(begin_save, rank=0), {})
    assert checkpoints.longest_s == 7.0


@pytest.mark.parametrize("keep", [1, 2])
def test_the_newest_checkpoints_are_kept(keep, tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=keep)
    for step in range(8, 12):
        checkpoints.save(step, partial(begin_save, rank=0), {})
        checkpoints.publish()
    assert names(tmp_path) == ["step-000010", "step-000011"][2 - keep :]


def test_somebodys_copy_is_left_alone_and_can_be_resumed(tmp_path):
    save(tmp_path, 3, Ranks())
    copies = [tmp_path / "checkpoints/step-000003-best", tmp_path / "best"]
    for copy in copies:
        shutil.copytree(tmp_path / "checkpoints/step-000003", copy)
    for step in (4, 5, 6):
        checkpoints = save(tmp_path, step, Ranks())
    checkpoints.remove_after(5)
    assert names(tmp_path) == ["step-000003-best", "step-000005"]
    for copy in copies:
        assert find_checkpoint(Config(resume=str(copy)), checkpoints, pytest.fail).step == 3


DAMAGE = {
    "a file cut short": (lambda path: os.truncate(path / "learner/0-0", 1000), "learner/0-0 is not what was written"),
    "a file removed": (lambda path: (path / "run.json").unlink(), "no readable manifest or file: "),
    "the manifest removed": (lambda path: (path / "manifest.json").unlink(), "no readable manifest or file: "),
    "the manifest torn": (lambda path: os.truncate(path / "manifest.json", 20), "no readable manifest or file: "),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_the_newest_whole_checkpoint_is_found(damage, tmp_path):
    spoil, problem = DAMAGE[damage]
    for step in (3, 4):
        checkpoints = save(tmp_path, step, Ranks())
    broken, said = tmp_path / "checkpoints/step-000004", []
    spoil(broken)
    assert checkpoints.newest(said.append).step == 3
    (line,) = said
    assert line.startswith(f"checkpoint {broken} is broken ({problem}")


@pytest.mark.parametrize("background", [False, True])
def test_a_rank_that_cannot_write_ends_all_of_them_with_one_line(background, tmp_path):
    def second(ranks):
        checkpoints = save(tmp_path, 3, ranks)
        begin = partial(begin_save, rank=ranks.rank, full=(1, 3))
        checkpoints.save(4, begin, {}, background=background)
        checkpoints.publish(waits=True)

    said = on_ranks(second)
    assert {str(error) for error in said} == {
        f"checkpoint of step 4 cannot be written to {tmp_path}/checkpoints: rank 1: [Errno 28] No space left on "
        "device; free space or choose another run.dir, then go on with resume=auto"
    }
    assert names(tmp_path) == ["step-000003"]
    assert Checkpoints(tmp_path, keep=2).newest(pytest.fail).step == 3


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_only_a_second_ctrl_c_leaves_a_writer_behind(tmp_path, error):
    """And then without keeping the process alive."""
    released = threading.Event()
    writers = []

    def end(directory):
        with Checkpoints(directory, keep=2) as checkpoints:
            checkpoints.save(1, partial(begin_save, rank=0, held=released), {}, background=True)
            writers.extend(thread for thread in threading.enumerate() if thread.name == "checkpoint")
            if error is ValueError:
                threading.Timer(0.2, released.set).start()
            raise error

    with pytest.raises(error):
        end(tmp_path)
    assert len(writers) == len(SIZES[0])
    assert all(thread.daemon for thread in writers)
    assert released.is_set() == (error is ValueError)  # it has waited for them
    assert all(thread.is_alive() for thread in writers) or error is ValueError
    released.set()
    for thread in writers:
        thread.join(timeout=10)
