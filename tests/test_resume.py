"""What a run goes on from: which checkpoint, under which layout, with what missing, and when nothing is left."""

import json
import shutil

import pytest
import torch

from papertrl.core.compose import compose
from papertrl.core.errors import JobError
from papertrl.trainers import checkpoints
from papertrl.trainers.checkpoints import begin_branch, last_complete_checkpoint
from papertrl.trainers.preference.online.files import RoundFiles

from .harness.distributed_policy import keyed_completions
from .harness.table import active_config, build, history, model_path, weights

SAVING = {"save_strategy": "steps", "save_steps": 1, "optim": "sgd", "learning_rate": 0.1}
METHODS = {"policy": ["gain_rl", "dler"], "preference": ["rpo"], "supervised": ["asft"], "reward": ["reward"]}


@pytest.fixture
def make(request):
    """Makes a trainer of a family that writes to a folder."""

    def make(family, folder, **values):
        trainer_class = compose(*METHODS[family])
        if family == "policy":
            trainer_class = type("Keyed", (trainer_class,), {"_generate_single_turn": keyed_completions})
            values = {"num_iterations": 2, "dler_truncation_length": 6, "skip_zero_rows": True} | values
        kwargs = {"data": values.pop("data")} if "data" in values else {}
        names = [name for name in METHODS[family] if name != "reward"]
        args = active_config(trainer_class, names, folder, **SAVING | values)
        return build(trainer_class, family, model_path(family, request), args, **kwargs)

    return make


def files(folder):
    return {p.relative_to(folder): p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize(("family", "batch", "accumulation"), [("policy", 2, 4), ("policy", 8, 1), ("reward", 1, 8)])
def test_another_split_of_the_same_rows_goes_on_alike(family, batch, accumulation, make, tmp_path):
    whole = make(family, tmp_path, max_steps=3)
    whole.train()
    # Of the policy, one that ends between two passes over the same completions
    split = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
    if batch == 8:
        split["max_tokens_per_micro_batch"] = 25
    again = make(family, tmp_path / "again", max_steps=3, **split)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    for name, value in weights(whole).items():
        torch.testing.assert_close(weights(again)[name], value, rtol=1e-3, atol=1e-5)
    if family == "policy":
        assert again._step == 3 * accumulation
        assert (again.sampled_tokens, again.trained_tokens) == (whole.sampled_tokens, whole.trained_tokens)


@pytest.mark.parametrize("batching", [True, False])
def test_micro_batches_are_cut_anew_within_an_optimizer_step(batching):
    from papertrl.trainers.policy.batching import MicroBatches, recut

    def micro(*rows):
        ids = torch.tensor(rows)
        mask = torch.ones(len(rows), 3, dtype=torch.long)
        return {
            "completion_ids": ids[:, None].expand(-1, 3), "group_ids": ids // 10, "loss_mask": mask,
            "row_weight": torch.ones(len(rows)), "num_items_in_batch": torch.tensor(9),
        }  # fmt: skip

    # Two optimizer steps of two micro-batches; rows without effect were left out of the second
    batches = [micro(10, 11), micro(20, 21), micro(30, 31), micro(32)]
    cut = recut(batches, 2, 4, MicroBatches(8, 2, 1) if batching else None)
    assert [b["completion_ids"][:, 0].tolist() for b in cut[:4]] == [[10], [11], [20], [21]]
    assert [b["completion_ids"][b["loss_mask"].any(1), 0].tolist() for b in cut[4:7]] == [[30], [31], [32]]
    assert len(cut) == 8 and not cut[7]["loss_mask"].any()
    assert [b["completion_ids"][:, 0].tolist() for b in recut(batches, 2, 1, None)] == [[10, 11, 20, 21], [30, 31, 32]]


@pytest.fixture(scope="module")
def policy_run(tmp_path_factory, policy_path):
    folder = tmp_path_factory.mktemp("policy_run")
    trainer_class = compose("grpo")
    args = active_config(trainer_class, [], folder, num_iterations=2, max_steps=3, **SAVING)
    build(trainer_class, "policy", policy_path, args).train()
    return folder


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"gradient_accumulation_steps": 4}, r"4 \(per_device.*2 \(grad.*= 8 rows.*this run has 4 .* 4 .*= 16 rows"),
        ({"num_generations": 2}, "`num_generations` = 4, but this run has 2"),
        ({"steps_per_generation": 4}, "`generation_batch_size` = 8, but this run has 16"),
        ({"num_iterations": 1}, "`num_iterations` = 2, but this run has 1"),
        ({"seed": 11}, "`seed` = 3, but this run has 11"),
        ({"rows": 12}, "rows of `train_dataset` = 16, but this run has 12"),
    ],
)
def test_what_would_go_on_elsewhere_is_refused_by_name(changed, named, policy_run, policy_path, tmp_path):
    from .harness.table import dataset

    rows = dataset("policy").select(range(changed.pop("rows", 16)))
    values = {"num_iterations": 2, "max_steps": 4} | changed
    args = active_config(compose("grpo"), [], tmp_path, **SAVING | values)
    trainer = build(compose("grpo"), "policy", policy_path, args, data=rows)
    with pytest.raises(ValueError, match=named):
        trainer.train(resume_from_checkpoint=str(policy_run / "checkpoint-2"))


def test_rollouts_of_another_number_of_processes(policy_run, policy_path, tmp_path):
    """Those of two processes in one: between two passes there is no way, after them there is."""
    for step in (1, 2):
        folder = tmp_path / f"checkpoint-{step}"
        shutil.copytree(policy_run / folder.name, folder)
        state = json.loads((folder / "papertrl.json").read_text(encoding="utf-8"))
        state["ranks"], state["layout"]["processes"], state["layout"]["gradient_accumulation_steps"] = 2, 2, 1
        (folder / "papertrl.json").write_text(json.dumps(state), encoding="utf-8")
        for end in ("json", "safetensors"):
            shutil.copy(folder / f"papertrl_rank0.{end}", folder / f"papertrl_rank1.{end}")
    args = active_config(compose("grpo"), [], tmp_path, num_iterations=2, max_steps=3, **SAVING)
    trainer = build(compose("grpo"), "policy", policy_path, args)
    with pytest.raises(ValueError, match=r"2 \(processes\) = 8 rows.*1 \(processes\) = 8 rows.*multiple of 2"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    trainer = build(compose("grpo"), "policy", policy_path, args)
    one = json.loads((tmp_path / "checkpoint-2" / "papertrl_rank0.json").read_text(encoding="utf-8"))["tokens"]
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert trainer.state.global_step == 3 and trainer._step == 6
    assert trainer.sampled_tokens > 2 * one[0] > 0


@pytest.mark.parametrize(
    ("family", "length"),
    [*((family, {"max_steps": 1}) for family in METHODS), ("reward", {"max_steps": -1, "num_train_epochs": 1})],
)
def test_a_finished_run_trains_and_writes_nothing_more(family, length, make, tmp_path):
    values = {"num_iterations": 1} if family == "policy" else {}
    whole = make(family, tmp_path, **length, **values)
    whole.train()
    before = files(tmp_path)
    again = make(family, tmp_path, **length, **values)
    again.train(resume_from_checkpoint=True)
    assert again.nothing_left and again.state.global_step == whole.state.global_step >= 1
    assert all(torch.equal(value, weights(whole)[name]) for name, value in weights(again).items())
    assert history(again) == history(whole)[: len(history(again))]
    assert files(tmp_path) == before


def test_fewer_steps_than_there_are_train_nothing(policy_run, policy_path, tmp_path):
    args = active_config(compose("grpo"), [], tmp_path, num_iterations=2, max_steps=2, **SAVING)
    trainer = build(compose("grpo"), "policy", policy_path, args)
    trainer.train(resume_from_checkpoint=str(policy_run / "checkpoint-3"))
    assert trainer.nothing_left and trainer.state.global_step == 3
    assert not list(tmp_path.glob("checkpoint-*"))


# --- Which checkpoint ------------------------------------------------------------------------------------------------


@pytest.fixture
def run(policy_run, tmp_path):
    """A copy of a run with three checkpoints."""
    shutil.copytree(policy_run, tmp_path / "run")
    return tmp_path / "run"


def test_going_back_leaves_the_later_ones_behind(run, policy_path):
    assert last_complete_checkpoint(run).name == "checkpoint-3"
    args = active_config(compose("grpo"), [], run, num_iterations=2, max_steps=2, **SAVING)
    build(compose("grpo"), "policy", policy_path, args).train(resume_from_checkpoint=str(run / "checkpoint-1"))
    # Whatever the times of the files say
    (run / "checkpoint-3" / "trainer_state.json").touch()
    assert last_complete_checkpoint(run).name == "checkpoint-2"
    begin_branch(run, run / "checkpoint-1")
    assert last_complete_checkpoint(run).name == "checkpoint-1"
    # A new run in the folder has none yet
    begin_branch(run, None)
    with pytest.raises(ValueError, match=r"earlier run can be named: checkpoint-1, checkpoint-2, checkpoint-3"):
        last_complete_checkpoint(run)


def test_going_on_from_another_folder_is_remembered(run, tmp_path):
    (tmp_path / "new").mkdir()
    begin_branch(tmp_path / "new", run / "checkpoint-2")
    assert last_complete_checkpoint(tmp_path / "new") == run / "checkpoint-2"


@pytest.mark.parametrize(
    "name",
    ["trainer_state.json", "model.safetensors", "papertrl.safetensors", "papertrl.json", "optimizer.pt",
     "rng_state.pth", "papertrl_rank0.json", "papertrl_rank0.safetensors"],
)  # fmt: skip
@pytest.mark.parametrize("kept", [0, 0.5])
def test_a_damaged_checkpoint_is_passed_over(name, kept, run, caplog):
    file = run / "checkpoint-3" / name
    file.write_bytes(file.read_bytes()[: int(kept * file.stat().st_size)])
    assert last_complete_checkpoint(run).name == "checkpoint-2"
    assert "checkpoint-3' is damaged" in caplog.text and "checkpoint before it is taken" in caplog.text


@pytest.mark.parametrize(
    "name", ["model.safetensors", "papertrl.json", "papertrl.safetensors", "papertrl_rank0.json", "trainer_state.json"]
)
def test_a_checkpoint_that_lacks_what_it_needs_is_refused(name, run):
    (run / "checkpoint-3" / name).unlink()
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        checkpoints.read_checkpoint(run / "checkpoint-3")
    assert last_complete_checkpoint(run).name == "checkpoint-2"


@pytest.mark.parametrize(
    ("name", "meaning"),
    [("optimizer.pt", "moments"), ("scheduler.pt", "warmup"), ("rng_state.pth", "random numbers")],
)
def test_what_a_checkpoint_lacks_is_said(name, meaning, run, policy_path, caplog):
    (run / "checkpoint-3" / name).unlink()
    args = active_config(compose("grpo"), [], run, num_iterations=2, max_steps=3, **SAVING)
    build(compose("grpo"), "policy", policy_path, args).train(resume_from_checkpoint=True)
    assert name in caplog.text and meaning in caplog.text


# --- Saving ----------------------------------------------------------------------------------------------------------


def test_a_full_disk_names_the_checkpoint_to_go_on_from(policy_path, tmp_path, monkeypatch):
    args = active_config(compose("grpo"), [], tmp_path, max_steps=3, **SAVING)
    trainer = build(compose("grpo"), "policy", policy_path, args)
    save = trainer._save_optimizer_and_scheduler

    def full(folder):
        save(folder)
        if folder.endswith("-2"):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(trainer, "_save_optimizer_and_scheduler", full)
    with pytest.raises(JobError, match=r"checkpoint-2' could not be saved.*No space.*_checkpoint .*checkpoint-1"):
        trainer.train()
    assert (tmp_path / "checkpoint-2").exists()
    # The next run removes what was not completed, and only that
    (tmp_path / "checkpoint-1" / "papertrl.tmp").write_bytes(b"")
    (tmp_path / "checkpoint-7").mkdir()
    (tmp_path / "checkpoint-7" / "theirs.txt").touch()
    begin_branch(tmp_path, tmp_path / "checkpoint-1")
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-7"]
    assert not list(tmp_path.rglob("*.tmp"))


def test_rounds_of_steps_that_are_left_behind_are_sampled_anew(tmp_path):
    for iteration, step in enumerate((0, 3, 6)):
        folder = tmp_path / "rounds" / f"round_{iteration}"
        folder.mkdir(parents=True)
        (folder / "provenance.json").write_text(json.dumps({"step": step}), encoding="utf-8")
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-3" / "trainer_state.json").write_text('{"global_step": 3}', encoding="utf-8")
    rounds = RoundFiles(str(tmp_path))
    rounds.take_over(tmp_path / "checkpoint-3")
    assert [rounds.written(i) for i in range(3)] == [True, True, False]
    # Those of a run elsewhere as well, which keeps them
    elsewhere = RoundFiles(str(tmp_path / "new"))
    (tmp_path / "checkpoint-3" / "trainer_state.json").write_text('{"global_step": 1}', encoding="utf-8")
    elsewhere.take_over(tmp_path / "checkpoint-3")
    assert [elsewhere.written(i) for i in range(3)] == [True, False, False] and rounds.written(1)
