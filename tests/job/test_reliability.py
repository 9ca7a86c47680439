"""What must not cost a model, and who may write to a folder."""

import io
import json
import os
import shutil
import subprocess
import sys
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from papertrl import cli
from papertrl.core import errors, lock
from papertrl.core.errors import JobError, UsageError
from papertrl.core.lock import LOCK_FILE, owned, refuse_if_owned
from papertrl.core.streams import Forgiving
from papertrl.job import processes, run
from papertrl.job.claim import free_folder
from papertrl.job.reporting import MetricsFile

from .conftest import SMALL

# --- One owner -------------------------------------------------------------------------------------------------------


def owner(**changes):
    return {**lock._this_process(), **changes}


def test_a_folder_has_one_owner_until_it_ends_or_dies(tmp_path):
    with owned(tmp_path):
        with pytest.raises(JobError, match=rf"process {os.getpid()} on .*or choose another folder"), owned(tmp_path):
            pass
        assert (tmp_path / LOCK_FILE).exists()
    assert not (tmp_path / LOCK_FILE).exists()
    with pytest.raises(KeyError), owned(tmp_path):
        raise KeyError
    assert not (tmp_path / LOCK_FILE).exists()


def test_a_killed_run_is_gone_at_once(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from papertrl.core.lock import owned\n"
        "with owned(Path(sys.argv[1])): print('owned', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "owned\n"
    for command in ("publish", "evaluate"):
        assert cli.main([command, str(tmp_path)]) == 1
    with pytest.raises(JobError, match=rf"process {other.pid} .* is writing to"), owned(tmp_path):
        pass
    other.kill()
    # Not even waited for: it may be nobody's child any more
    psutil.wait_procs([psutil.Process(other.pid)], timeout=0.5)
    with owned(tmp_path):
        pass
    other.wait()
    other.stdout.close()


@pytest.mark.parametrize(
    ("left", "age", "lives"),
    [
        (owner(process=2**22 + 5), 0, False),
        # The number was given again
        (owner(started=1.0), 0, False),
        ("{", 0, False),
        ("[]", 0, False),
        ({"machine": "elsewhere"}, 0, False),
        (owner(machine="elsewhere"), 5, True),
        (owner(machine="elsewhere"), 1000, False),
    ],
)
def test_a_dead_owner_is_told_from_one_that_lives(left, age, lives, tmp_path):
    file = tmp_path / LOCK_FILE
    file.write_text(left if isinstance(left, str) else json.dumps(left), encoding="utf-8")
    at = file.stat().st_mtime - age
    os.utime(file, (at, at))
    if lives:
        with pytest.raises(JobError, match=f"dead is recognized after 90 seconds; or delete '{file}'"):
            refuse_if_owned(tmp_path, "")
        return
    with owned(tmp_path):
        assert json.loads(file.read_text(encoding="utf-8")) == lock._this_process()


def test_folders_of_runs_that_begin_together_differ(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    job = SimpleNamespace(arguments=SimpleNamespace(dataset_name=None, task=None))
    assert [free_folder(job, ["dler"]).name for _ in range(2)] == ["dler-addition-1", "dler-addition-2"]


# --- Processes -------------------------------------------------------------------------------------------------------


def test_processes_that_would_train_copies_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(JobError, match="`WORLD_SIZE` is 3, but no launcher"):
        processes.join_processes()
    with pytest.raises(JobError, match=r"3 processes were started .* 1 would train .*torchrun --nproc_per_node"):
        processes.check_processes(SimpleNamespace(num_processes=1))
    processes.check_processes(SimpleNamespace(num_processes=3))
    monkeypatch.delenv("WORLD_SIZE")
    processes.check_processes(SimpleNamespace(num_processes=1))


@pytest.mark.parametrize(
    ("rank", "counts", "told"),
    [("0", [1], ""), ("2", [1], "[process 2 of 3] "), ("0", [2], None), ("2", [2], None)],
)
def test_the_first_process_that_fails_speaks(rank, counts, told, monkeypatch, capsys):
    store = SimpleNamespace(add=lambda key, amount: counts.pop())
    fake = SimpleNamespace(
        is_available=lambda: True,
        is_initialized=lambda: True,
        distributed_c10d=SimpleNamespace(_get_default_store=lambda: store),
    )
    monkeypatch.setitem(sys.modules, "torch.distributed", fake)
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", rank)
    errors.tell_failure(RuntimeError(), "it broke")
    assert capsys.readouterr().err == ("" if told is None else f"papertrl: {told}it broke\n")


def test_a_wrong_command_line_is_told_by_one_process(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.distributed", None)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        errors.tell_failure(UsageError(), f"as {rank} sees it")
    assert capsys.readouterr().err == "papertrl: as 0 sees it\n"
    # What only one machine may have
    errors.tell_failure(OSError(), "unreadable")
    assert capsys.readouterr().err == "papertrl: [process 1 of 2] unreadable\n"


# --- Streams and reports ---------------------------------------------------------------------------------------------


def test_streams_never_fail():
    ascii_only = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    Forgiving(ascii_only).write("β = 0.1 – fine")
    ascii_only.flush()
    assert ascii_only.buffer.getvalue() == b"\\u03b2 = 0.1 \\u2013 fine"
    reading, writing = os.pipe()
    os.close(reading)
    with io.StringIO() as closed:
        pass
    for stream in (None, os.fdopen(os.open("/dev/full", os.O_WRONLY), "w"), os.fdopen(writing, "w"), closed):
        forgiving = Forgiving(stream)
        for _ in range(2):
            assert forgiving.write("x" * 9000) == 9000
            forgiving.flush()
        # As at the end of the interpreter
        if stream is not None and stream is not closed:
            stream.close()


def broken(*args, **kwargs):
    raise RuntimeError("of a test")


REPORTS = {
    "draw_curves": ["training_curves.png"],
    "write_samples": ["samples.md"],
    "write_job_files": ["recipe.yaml", "completions.jsonl"],
    "create_card": ["README.md"],
}


@pytest.mark.parametrize("failing", [["draw_curves", "create_card"], ["write_samples", "write_job_files"]])
def test_no_report_costs_the_others_or_the_model(failing, small_run, tmp_path, monkeypatch, capsys):
    """The run has all of its steps, but was killed before it wrote what they led to."""
    copy = tmp_path / "run"
    shutil.copytree(small_run, copy)
    for name in ("model.safetensors", *chain.from_iterable(REPORTS.values())):
        (copy / name).unlink()
    for name in failing:
        place = "papertrl.trainers.method" if name == "create_card" else "papertrl.job.run"
        monkeypatch.setattr(f"{place}.{name}", broken)
    assert cli.main(["train", *SMALL, "--output_dir", str(copy), "--resume_from_checkpoint", "True"]) == 0
    for function, names in REPORTS.items():
        assert all((copy / name).exists() == (function not in failing) for name in names), function
    assert (copy / "model.safetensors").read_bytes() == (small_run / "model.safetensors").read_bytes()
    told = capsys.readouterr().err
    assert "could not be written, the model is saved: RuntimeError: of a test" in told
    assert "papertrl: Training in 1 process on cpu." in told


def test_a_finished_job_that_is_resumed_changes_nothing(small_run, tmp_path, monkeypatch):
    copy = tmp_path / "run"
    shutil.copytree(small_run, copy)

    def seen():
        return {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in copy.rglob("*") if p.is_file() and p.suffix}

    before = seen()
    with open("/dev/full", "w", encoding="utf-8") as full:
        # Nor does it need anybody who reads
        monkeypatch.setattr(sys, "stderr", full)
        assert cli.main(["train", *SMALL, "--output_dir", str(copy), "--resume_from_checkpoint", "True"]) == 0
    assert seen() == before
    # A later branch that came as far, and was killed before its model was written
    os.utime(copy / "checkpoint-3" / "trainer_state.json")
    trainer = SimpleNamespace(nothing_left=True, state=SimpleNamespace(global_step=3))
    assert not run.is_complete(trainer, copy) and run.is_complete(trainer, small_run)


def test_metrics_that_the_disk_does_not_take_are_said_once(tmp_path, capsys):
    metrics = MetricsFile(Path("/dev/full"))
    for step in range(3):
        metrics.write({"step": step})
    assert capsys.readouterr().err.count("No space left") == 1


def test_a_full_disk_in_training_names_the_checkpoint(small_run):
    def train(resume_from_checkpoint):
        raise OSError(28, "No space left on device")

    trainer = SimpleNamespace(train=train, state=SimpleNamespace(global_step=3))
    with pytest.raises(JobError, match=r"after step 3: .*No space left.*--resume_from_checkpoint .*checkpoint-3`"):
        run.train(trainer, None, small_run)
