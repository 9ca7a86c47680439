"""What ends a completion: stop strings and end tokens of any source, in the rollout loop and in `generate`."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from papertrl.trainers.policy.base import PolicyConfig, PolicyTrainer
from papertrl.trainers.policy.deepsearch import DeepsearchGRPOTrainer

from ..harness.rollouts import checksum, make, run
from ..harness.table import dataset, settings

STOPS = ["3", "7", "+"]


def model_of(path, **options):
    """The model on disk with other options for generation; only the tokenizer's end token ends a completion."""
    model = AutoModelForCausalLM.from_pretrained(path)
    model.generation_config.update(eos_token_id=None, **options)
    return model


@pytest.mark.parametrize("fast", [True, False], ids=["loop", "generate"])
@pytest.mark.parametrize("given", [True, False], ids=["kwargs", "model"])
def test_completions_that_end_by_a_stop_string_are_finished(fast, given, policy_path, tokenizer, tmp_path):
    model = model_of(policy_path, **({} if given else {"stop_strings": STOPS}))
    kwargs = {"generation_kwargs": {"stop_strings": STOPS}} if given else {}
    trainer = run(
        PolicyTrainer, model, tmp_path, max_steps=1, max_completion_length=12, fast_rollouts=fast,
        skip_zero_rows=False, mask_truncated_completions=True, **kwargs,
    )  # fmt: skip
    scored, batch, *_ = trainer.generations[0]
    log = trainer.state.log_history[0]
    finished = 0
    for i, ids in enumerate(batch["completion_ids"].tolist()):
        ids = ids[: int(scored.lengths[i])]
        text = tokenizer.decode(ids)
        stopped = any(text.endswith(stop) for stop in STOPS)
        assert not any(stop in text[:-1] for stop in STOPS) and (stopped or len(ids) == 12 or ids[-1] == 2)
        ended = stopped or ids[-1] == 2
        finished += ended
        assert bool(scored.truncated[i]) != ended
        assert int(batch["completion_mask"][i].sum()) == (len(ids) if ended else 0)
    rows = len(scored.lengths)
    assert 0 < finished < rows
    assert log["completions/clipped_ratio"] == pytest.approx(1 - finished / rows)
    lengths = scored.lengths[~scored.truncated].float()
    for name, value in (("mean", lengths.mean()), ("min", lengths.min()), ("max", lengths.max())):
        assert log[f"completions/{name}_terminated_length"] == pytest.approx(value.item())


@pytest.mark.parametrize("fast", [True, False], ids=["loop", "generate"])
def test_end_tokens_of_generation_kwargs_end_a_completion(fast, policy_path, tokenizer, tmp_path):
    ends = tokenizer.convert_tokens_to_ids(STOPS)
    trainer = run(
        PolicyTrainer, model_of(policy_path), tmp_path, max_steps=1, max_completion_length=12, fast_rollouts=fast,
        generation_kwargs={"eos_token_id": ends},
    )  # fmt: skip
    scored, batch, *_ = trainer.generations[0]
    assert trainer.eos_token_ids == ends
    is_end = torch.isin(batch["completion_ids"], torch.tensor(ends)) & batch["completion_mask"].bool()
    last = batch["completion_mask"].sum(1) - 1
    assert (scored.truncated == ~is_end.gather(1, last.unsqueeze(1)).squeeze(1)).all()
    assert (is_end.sum(1) == (~scored.truncated).long()).all() and 0 < scored.truncated.float().mean() < 1


@pytest.mark.parametrize("backend", ["use_vllm", "use_transformers_continuous_batching"])
def test_stop_strings_that_a_backend_does_not_know_are_refused(backend, tmp_path):
    with pytest.raises(ValueError, match=rf"`stop_strings`.*{'vLLM' if 'vllm' in backend else backend}"):
        PolicyConfig(
            **settings("policy", tmp_path, **{backend: True}), generation_kwargs={"stop_strings": ["</answer>"]}
        )


def test_stop_strings_of_the_model_that_do_not_reach_the_backend_are_refused(policy_path, tmp_path):
    model = model_of(policy_path, stop_strings=["."])
    with pytest.raises(ValueError, match=r"`stop_strings` of the model's generation config, \['.'\]"):
        make(PolicyTrainer, model, tmp_path, use_transformers_continuous_batching=True)
    with pytest.raises(ValueError, match=r"`stop_strings`.*tree_width=None"):
        make(DeepsearchGRPOTrainer, model, tmp_path)


def test_a_replaced_generate_is_respected(policy_path, tmp_path, caplog):
    args = PolicyConfig(**settings("policy", tmp_path, max_steps=2))
    trainer = PolicyTrainer(policy_path, checksum, args, train_dataset=dataset("policy"))
    calls = []

    def generate(input_ids, **kwargs):
        calls.append(len(input_ids))
        return torch.cat([input_ids, torch.full_like(input_ids[:, :1], 2)], dim=1)

    trainer.model.generate = generate
    trainer.train()
    assert len(calls) == 2
    assert {log["completions/max_length"] for log in trainer.state.log_history if "loss" in log} == {1.0}
    assert caplog.text.count("has its own `generate`") == 1


def test_options_that_generate_does_not_know_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"`generation_kwargs` .*'stop_string'.*Did you mean `stop_strings`"):
        PolicyConfig(**settings("policy", tmp_path), generation_kwargs={"stop_string": ["."]})
