"""Held-out measuring goes the way of training: its prompts, ends, options and rewards."""

import asyncio
import functools
import json
import shutil

import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer, LogitsProcessor

from papertrl import PolicyConfig, PolicyTrainer, PreferenceTrainer, SupervisedTrainer, cli
from papertrl.core.errors import JobError
from papertrl.evaluation import complete, load_model
from papertrl.job.heldout import HeldOut
from papertrl.job.reporting import write_samples

from ..harness.rollouts import checksum
from ..harness.table import build, settings

ROWS = [{"prompt": f"{i}+{i}="} for i in range(6)]
TEMPLATE = "{% for m in messages %}{{ mood }}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}={% endif %}"


def policy(model, folder, reward=checksum, trainer_class=PolicyTrainer, **values):
    args = PolicyConfig(**settings("policy", folder, **values))
    return trainer_class(model, reward, args, train_dataset=Dataset.from_list(ROWS))


def look(trainer, judges, rows=ROWS, tokens=6):
    held_out = HeldOut(Dataset.from_list(rows), judges, "score", tokens, 0)
    held_out.trainer = trainer
    return held_out.look()


@pytest.mark.parametrize("trainer_class", [PolicyTrainer, PreferenceTrainer, SupervisedTrainer])
def test_answers_end_where_training_does_whoever_trains(trainer_class, policy_path, tmp_path):
    family = trainer_class.family
    args = trainer_class.config_class(**settings(family, tmp_path))
    path = tmp_path / "model"
    shutil.copytree(policy_path, path)
    loaded = load_model(str(path))
    # What this model writes, beside the end of the tokenizer, which the config leaves out
    loaded.model.generation_config.eos_token_id = loaded.tokenizer.convert_tokens_to_ids(["=", "7"])
    loaded.model.generation_config.save_pretrained(path)
    trainer = build(trainer_class, family, str(path), args)
    trainer.model.eval()
    answers = trainer.answer(ROWS, 12)
    ends = {*loaded.model.generation_config.eos_token_id, loaded.tokenizer.eos_token_id}
    assert all(ids[-1] in ends and not ends & set(ids[:-1]) for ids in answers)
    evaluated = complete(loaded, loaded.tokenizer([row["prompt"] for row in ROWS])["input_ids"], 1, 12, 0.0, 1.0, 0)
    assert [ids for (ids,) in evaluated] == answers


def test_policy_answers_follow_training_but_for_the_draw(policy_path, tmp_path):
    path = tmp_path / "chat"
    shutil.copytree(policy_path, path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(path)

    class Only(LogitsProcessor):
        def __call__(self, input_ids, scores):
            return torch.full_like(scores, -1e9).index_fill(1, torch.tensor([7, 9]), 0.0) + scores / 100

    class Restricted(PolicyTrainer):
        asked = None

        def logits_processors(self):
            return [*super().logits_processors(), Only()]

        def _generate_single_turn(self, prompt_ids, *args, **kwargs):
            self.asked = (prompt_ids, self.generation_config.do_sample, self.generation_config.repetition_penalty)
            return super()._generate_single_turn(prompt_ids, *args, **kwargs)

    options = {"chat_template_kwargs": {"mood": "9"}, "repetition_penalty": 1.3, "top_k": 3, "min_p": 0.2}
    trainer = policy(str(path), tmp_path / "run", trainer_class=Restricted, **options)
    messages = [{"prompt": [{"role": "user", "content": row["prompt"]}]} for row in ROWS]
    drawn = torch.get_rng_state()
    answers = look(trainer, [lambda completions, **kwargs: [float(len(c)) for c in completions]], messages)
    assert answers.mean == 1.0
    assert trainer.asked == ([tokenizer("9" + row["prompt"] + "=")["input_ids"] for row in ROWS], False, 1.3)
    assert {trainer.processing_class.convert_tokens_to_ids(c) for text in answers.texts for c in text} <= {7, 9}
    # Looking leaves no trace
    assert torch.equal(torch.get_rng_state(), drawn) and trainer._sampled_tokens == 0
    assert trainer.generation_config.do_sample and trainer.generation_config.min_p == 0.2


def test_rewards_get_all_that_training_gives(policy_path, tmp_path):
    seen = []

    def told(scale, prompts, completions, completion_ids, answer, trainer_state, log_extra, log_metric, **columns):
        seen.append((len(prompts), trainer_state.max_steps, columns, completion_ids))
        log_extra("note", ["a"] * len(prompts))
        log_metric("share", 0.5)
        return [scale if a else None for a in answer]

    class Asks:
        async def __call__(self, completions, **kwargs):
            await asyncio.sleep(0)
            return [3.0] * (len(completions) - 1) + [None]

    rows = [row | {"answer": i % 2, "completion": "not given"} for i, row in enumerate(ROWS)]
    trainer = policy(policy_path, tmp_path)

    async def in_a_notebook():
        return look(trainer, [functools.partial(told, 1.0), Asks()], rows)

    answers = asyncio.run(in_a_notebook())
    assert answers.scores == [3.0, 2.0, 3.0, 2.0, 3.0, 1.0]
    ((count, steps, columns, ids),) = seen
    assert (count, steps, columns) == (6, trainer.state.max_steps, {}) and answers.lengths == list(map(len, ids))
    partly = look(trainer, [lambda completions, **kwargs: [None, 4.0, None, None, None, 2.0]])
    assert partly.mean == 3.0 and partly.scores[0] is None
    write_samples(Dataset.from_list(rows), answers, partly, tmp_path / "samples.md")
    assert (tmp_path / "samples.md").read_text().count("After (no score)") == 4
    with pytest.raises(JobError, match="inapt returned `None` for all 6 held-out answers"):

        def inapt(completions, **kwargs):
            return [None] * len(completions)

        look(trainer, [inapt])


def test_a_run_on_own_data_is_measured_and_evaluated_by_its_own_rewards(policy_path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "own_rewards_of_heldout.py").write_text(
        "class Steps:\n"
        "    async def __call__(self, completions, trainer_state, log_metric, **kwargs):\n"
        "        log_metric('seen', len(completions))\n"
        "        return [len(c) + 10.0 * trainer_state.global_step for c in completions]\n"
        "steps = Steps()\n"
    )
    for split, rows in (("train", ROWS), ("validation", ROWS[:5])):
        Dataset.from_list(rows).to_json(tmp_path / f"data/{split}.jsonl")
    flags = {"model_name_or_path": policy_path, "dataset_name": "data", "dataset_test_split": "validation"} | {
        "reward_funcs": "own_rewards_of_heldout.steps", "held_out_prompts": 4, "max_completion_length": 7,
        "per_device_train_batch_size": 4, "num_generations": 4, "max_steps": 2, "logging_steps": 1, "bf16": False,
        "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "output_dir": "run", "use_cpu": True,
    }  # fmt: skip
    assert cli.main(["train", "--method", "grpo", *(str(t) for k, v in flags.items() for t in (f"--{k}", v))]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    points = {line["step"]: line["held_out/reward"] for line in lines if "held_out/reward" in line}
    assert set(points) == {0, 2} and any(line.get("seen") == 4 for line in lines)

    assert cli.main(["evaluate", "run"]) == 0
    assert f"The run measured reward {points[2]:.3f} on these prompts" in capsys.readouterr().out
    result = json.loads((tmp_path / "run/evaluation.json").read_text())
    assert result["dataset"] == {"id": "data", "split": "validation", "prompts": 4}
    assert result["models"]["run"]["Steps"]["value"] == pytest.approx(points[2])
    assert result["settings"]["max_new_tokens"] == 7

    # Rewards and split go with another place of the data
    (tmp_path / "data").rename(tmp_path / "moved")
    assert cli.main(["evaluate", "run"]) == 1
    assert "Give it as `--dataset_name`" in capsys.readouterr().err
    assert cli.main(["evaluate", "run", "--dataset_name", "moved", "--num_prompts", "2"]) == 0
    again = json.loads((tmp_path / "run/evaluation.json").read_text())
    assert (
        again["dataset"] == {"id": "moved", "split": "validation", "prompts": 2} and "Steps" in again["models"]["run"]
    )


def test_a_run_that_does_not_say_its_data_is_asked_about(tiny_path, tmp_path, capsys):
    (tmp_path / "run.json").write_text(json.dumps({"family": "policy", "config": {}}))
    assert cli.main(["evaluate", str(tmp_path)]) == 1
    assert "does not say what it was trained on" in capsys.readouterr().err
