"""vLLM stays TRL's: the code path up to the boundary of its client, with a client that answers from a table."""

import hashlib
import math
import re
from pathlib import Path

import pytest
import torch
from trl import GRPOConfig, GRPOTrainer

from papertrl.core.catalogue import DECLARATIONS, load_trainer
from papertrl.core.compose import compose
from papertrl.trainers.policy.base import PolicyConfig, PolicyTrainer
from papertrl.trainers.policy.record import Source

from ..harness.rollouts import distributions, recorded, sampled
from ..harness.table import (
    CASES,
    active_config,
    dataset,
    digit_parity,
    every_fourth,
    history,
    objectives_of,
    reward_of,
    settings,
    weights,
)


class FakeClient:
    """Answers as TRL's `VLLMGeneration` does: token ids, and per token the log-probs of the sampler."""

    def __init__(self):
        self.synced, self.calls, self.sizes = 0, [], []
        self.max_completion_length = 8

    def sync_weights(self):
        self.synced += 1

    def generate(self, prompts, images, num_generations, profiler):
        self.calls.append(len(prompts))
        self.sizes.append(num_generations)
        ids, logps = [], []
        for i, prompt in enumerate(prompts):
            place = i % num_generations if num_generations > 1 else i
            digest = hashlib.sha256(f"{prompt}-{place}-{len(self.calls)}".encode()).digest()
            ids.append([4 + byte % 60 for byte in digest[: 1 + digest[31] % 5]] + [2])
            logps.append([[-4.0 - byte / 256] for byte in digest[: len(ids[-1])]])
        return None, ids, logps, None


def train(trainer_class, args, model, reward=digit_parity):
    trainer = trainer_class(model, [reward], args, train_dataset=dataset("policy"))
    # As the constructor would set it with a running server, where it makes no config for `generate`
    trainer.use_vllm, trainer.vllm_generation, trainer._last_loaded_step = True, FakeClient(), -1
    del trainer.generation_config
    trainer.train()
    return trainer


def test_base_equals_trl(policy_path, tmp_path):
    values = settings("policy", tmp_path)
    theirs = train(GRPOTrainer, GRPOConfig(**values), policy_path)
    ours = train(PolicyTrainer, PolicyConfig(**values, skip_zero_rows=False), policy_path)
    assert ours.vllm_generation.synced == 3 and ours.vllm_generation.calls == theirs.vllm_generation.calls
    expected = weights(theirs)
    for key, value in weights(ours).items():
        torch.testing.assert_close(value, expected[key], rtol=1e-4, atol=1e-6)
    names = [name for name in history(theirs)[0] if name.startswith("sampling/")]
    assert names
    for found, wanted in zip(history(ours)[:3], history(theirs)[:3], strict=True):
        assert {n: found[n] for n in names} == pytest.approx({n: wanted[n] for n in names}, rel=1e-4)


def test_combination_trains_on_what_the_client_sampled(policy_path, tmp_path):
    names = ["lp_reg", "d3s", "dler", "gain_rl"]
    trainer_class = compose(*map(load_trainer, names))
    values = {"dler_truncation_length": 5, "lp_reg_kappa": 0.02, "lp_reg_rho": 0.9}
    trainer = train(trainer_class, active_config(trainer_class, names, tmp_path, **values), policy_path)
    assert all(value.isfinite().all() for value in weights(trainer).values())
    logged = set().union(*trainer.state.log_history)
    assert {DECLARATIONS[name].signal for name in names} <= logged


def test_rows_sampled_under_a_hint_are_corrected_under_it(policy_path, tmp_path):
    """The denominator and TRL's correction are of the prompt that the client was given."""
    trainer_class = recorded(load_trainer("guide_grpo"))
    values = {"guide_max_resample_batches": 0, "max_steps": 4}
    args = active_config(trainer_class, ["guide_grpo"], tmp_path, **values, **{"temperature": 1.0})
    args.vllm_importance_sampling_mode = "token_truncate"
    args.vllm_importance_sampling_clip_max = 1e6
    trainer = train(trainer_class, args, policy_path, every_fourth)
    seen = False
    for _, batch, model, _ in trainer.generations:
        guided = batch["source"] == Source.HINTED
        seen = seen or bool(guided.any())
        if "sampled_prompt_ids" not in batch:
            continue
        under = dict(batch, prompt_ids=batch["sampled_prompt_ids"], prompt_mask=batch["sampled_prompt_mask"])
        mask = batch["completion_mask"].bool()
        with torch.no_grad():
            old = sampled(distributions(model, under), batch)
        torch.testing.assert_close(batch["old_per_token_logps"][mask], old[mask], rtol=1e-4, atol=1e-5)
        ratio = (old - batch["sampling_per_token_logps"]).exp()
        torch.testing.assert_close(batch["importance_sampling_ratio"][mask], ratio[mask], rtol=1e-3, atol=1e-5)
    assert seen and {1, 4} == set(trainer.vllm_generation.sizes)


def test_hints_one_at_a_time(policy_path, tmp_path):
    args = active_config(load_trainer("scaf_grpo"), ["scaf_grpo"], tmp_path)
    trainer = train(load_trainer("scaf_grpo"), args, policy_path, every_fourth)
    assert {1, 2} == set(trainer.vllm_generation.sizes)
    assert max(entry.get("scaf/repaired_groups", 0) for entry in trainer.state.log_history) > 0


def test_the_page_tells_who_works_and_who_refuses(tmp_path):
    page = (Path(__file__).parents[2] / "docs/vllm.md").read_text(encoding="utf-8")
    told = dict(re.findall(r"^\| `(\w+)` \| (works|refuses) \|", page, re.MULTILINE))
    found = {}
    for case in CASES:
        if case.family == "policy":
            try:
                case.trainer.config_class(**settings("policy", tmp_path, use_vllm=True))
                found[case.method] = "works"
            except ValueError as error:
                found[case.method] = "refuses"
                assert str(error) in page
    assert told == found


@pytest.mark.parametrize("name", objectives_of("policy"))
def test_every_method_trains_on_what_the_client_sampled(name, policy_path, tmp_path):
    trainer_class = load_trainer(name)
    # HAPO refuses its temperature by name, and does the rest
    values = {"hapo_temperature_tau": 0.0} if name == "hapo" else {}
    args = active_config(trainer_class, [name], tmp_path, **values)
    trainer = train(trainer_class, args, policy_path, reward_of(trainer_class))
    assert trainer.vllm_generation.synced == 3 and trainer_class.method.signal in set().union(
        *trainer.state.log_history
    )
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 3 and all(math.isfinite(loss) for loss in losses)
    assert all(value.isfinite().all() for value in weights(trainer).values())
