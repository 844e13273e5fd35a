"""Policies that are written beside a run: whole or absent, by the main rank alone."""

import pytest

from fastgrpo.exports import Exports
from fastgrpo.ranks import Ranks


def exports_of(directory, content="policy", *, fail=None, rank=0):
    def export(path):
        if rank == 0:
            (path / "config.json").write_text(content)
        if fail is not None:
            raise fail

    return Exports(directory, export, Ranks(rank=rank, num_ranks=2))


def found(directory):
    return {str(path.relative_to(directory)): path.read_text() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize("error", [OSError("No space left on device"), KeyboardInterrupt()])
def test_an_export_that_fails_leaves_nothing_and_the_others_stay(error, tmp_path):
    exports_of(tmp_path).write(3)
    with pytest.raises(type(error)):
        exports_of(tmp_path, fail=error).write(4)
    assert [path.name for path in (tmp_path / "exports").iterdir()] == ["step-000003"]


def test_an_export_replaces_its_own_step_and_what_a_kill_has_left(tmp_path):
    (tmp_path / "exports/.partial-step-000002").mkdir(parents=True)
    for step, content in ((3, "old"), (4, "other"), (3, "new")):
        exports_of(tmp_path, content).write(step)
    assert found(tmp_path) == {"exports/step-000003/config.json": "new", "exports/step-000004/config.json": "other"}
    assert len(list((tmp_path / "exports").iterdir())) == 2


def test_the_other_ranks_take_part_and_write_nothing(tmp_path):
    with pytest.raises(OSError, match="gathered"):
        exports_of(tmp_path, fail=OSError("gathered"), rank=1).write(3)
    exports_of(tmp_path, rank=1).remove_after(0)
    assert not list(tmp_path.iterdir())
