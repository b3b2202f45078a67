import multiprocessing

import pytest

from ra3_megatron.config.errors import UserError
from ra3_megatron.stages import run_folder
from ra3_megatron.stages.run_folder import RunFolder


def hold(path, entered, leave):
    with RunFolder(path).locked():
        entered.set()
        leave.wait(60)


def test_a_second_job_is_kept_out_and_a_dead_one_is_not_in_the_way(tmp_path, monkeypatch):
    """Two jobs in one folder delete each other's half-written checkpoints; a killed one must leave no lock behind."""
    monkeypatch.setattr(run_folder, "LOCK_PATIENCE_S", 0.3)
    spawn = multiprocessing.get_context("spawn")
    entered, leave = spawn.Event(), spawn.Event()
    other = spawn.Process(target=hold, args=(tmp_path, entered, leave))
    other.start()
    assert entered.wait(60)
    with pytest.raises(UserError, match=f"in use by process {other.pid}"), RunFolder(tmp_path).locked():
        pass
    other.kill()
    other.join(10)
    with RunFolder(tmp_path).locked():
        assert str(other.pid) not in (tmp_path / ".lock").read_text()


def test_folder_that_cannot_be_made(tmp_path):
    """A file where the run folder should be gives one line, not a traceback."""
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"), RunFolder(tmp_path / "file" / "run").locked():
        pass


def test_pieces_of_a_run_go_on_side_by_side(tmp_path, monkeypatch):
    """Jobs of a chain that do not need one another, such as two arms, or the elements of an array, were kept out."""
    monkeypatch.setattr(run_folder, "LOCK_PATIENCE_S", 0.2)
    run = RunFolder(tmp_path)
    with run.locked("05-ntp"):
        with run.locked("03-ra3-generate-1-0"), run.locked("03-ra3-generate-1-1"):
            pass
        with pytest.raises(UserError, match="in use"), run.locked("05-ntp"):
            pass
        with pytest.raises(UserError, match="in use"), run.locked():
            pass
    with run.locked(), pytest.raises(UserError, match="in use"), run.locked("05-ntp"):
        pass
