"""The neutral base is GRPOTrainer; what its stages promise; where it refuses."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from trl import GRPOConfig, GRPOTrainer

from papertrl.core.catalogue import load_trainer
from papertrl.core.compose import compose
from papertrl.core.family import POLICY
from papertrl.trainers.policy.base import PolicyConfig, PolicyTrainer

from ..harness.table import active_config, build, dataset, digit_parity, history, settings, weights

OPTIONS = [
    {},
    *[{"loss_type": loss} for loss in ("grpo", "bnpo", "dr_grpo", "luspo", "cispo", "sapo", "vespo")],
    {"beta": 0.1},
    {"beta": 0.1, "use_bias_correction_kl": True, "num_iterations": 2},
    {"num_iterations": 2},
    {"steps_per_generation": 4},
    {"scale_rewards": "none"},
    {"scale_rewards": "batch", "top_entropy_quantile": 0.5},
    {"multi_objective_aggregation": "normalize_then_sum", "reward_weights": [1.0, 0.5]},
    {"importance_sampling_level": "sequence", "loss_type": "grpo", "num_iterations": 2, "delta": 1.5},
    {"entropy_coef": 0.1},
    {"use_adaptive_entropy": True, "entropy_target": 5.0, "entropy_coef_delta": 0.01},
    {"off_policy_mask_threshold": 0.01, "num_iterations": 2},
    {"mask_truncated_completions": True},
    {"log_completions": True, "num_completions_to_print": 1},
]


def vowels(completions, log_extra, log_metric, **kwargs):
    """A second source that does not apply to every row and logs on the side."""
    log_extra("length", [len(text) for text in completions])
    log_metric("longest", float(max(len(text) for text in completions)))
    return [float(sum(c in "aeiou" for c in text)) if i % 3 else None for i, text in enumerate(completions)]


def run(trainer_class, config_class, model, output_dir, **values):
    args = config_class(**settings("policy", output_dir, **values))
    trainer = trainer_class(model, [digit_parity, vowels], args, train_dataset=dataset("policy"))
    trainer.train()
    return trainer


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "+".join(f"{k}={v}" for k, v in o.items()) or "default")
def test_base_equals_trl(options, policy_path, tmp_path):
    theirs = run(GRPOTrainer, GRPOConfig, policy_path, tmp_path / "trl", **options)
    ours = run(
        PolicyTrainer, PolicyConfig, policy_path, tmp_path / "ours", check_records=True, **POLICY.exact, **options
    )
    expected = weights(theirs)
    for key, value in weights(ours).items():
        torch.testing.assert_close(value, expected[key], rtol=1e-6, atol=1e-8)
    for ours_entry, theirs_entry in zip(history(ours), history(theirs), strict=True):
        assert ours_entry == pytest.approx(theirs_entry, rel=1e-5, abs=1e-7)
    assert list(ours._logs["advantages"]) == pytest.approx(list(theirs._logs["advantages"]))
    assert dict(ours._logs["extra"]) == dict(theirs._logs["extra"])


def test_every_gradient_equals_trl_on_the_same_batch(policy_path, tmp_path):
    options = {"beta": 0.1, "num_iterations": 2}
    trainers = [
        run(PolicyTrainer, PolicyConfig, policy_path, tmp_path / "ours", **options),
        run(GRPOTrainer, GRPOConfig, policy_path, tmp_path / "trl", **options),
    ]
    batch = trainers[0]._buffered_inputs[0]
    # Drifted old log-probs, so that ratios, clipping and both signs of the advantage all take part
    torch.manual_seed(0)
    batch["old_per_token_logps"] = batch["old_per_token_logps"] + 0.5 * torch.randn(batch["completion_ids"].shape)
    batch["advantages"] = torch.tensor([1.0, -1.0, 0.5, -2.0])
    gradients = []
    for trainer in trainers:
        trainer.model.zero_grad()
        trainer.model.load_state_dict(trainers[0].model.state_dict())
        loss = trainer.compute_loss(trainer.model, dict(batch))
        loss.backward()
        gradients.append((loss.detach(), [p.grad for p in trainer.model.parameters()]))
    (ours, ours_grads), (theirs, theirs_grads) = gradients
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    assert any(g.abs().max() > 1e-3 for g in theirs_grads)
    for got, expected in zip(ours_grads, theirs_grads, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("values", [{"bf16": True}, {"gradient_checkpointing": True}], ids=lambda v: next(iter(v)))
def test_combination_trains_under(values, policy_path, tmp_path):
    names = ["lp_reg", "d3s", "dler", "gain_rl"]
    trainer_class = compose(*map(load_trainer, names))
    trainer = build(trainer_class, "policy", policy_path, active_config(trainer_class, names, tmp_path, **values))
    before = weights(trainer)
    trainer.train()
    assert all(value.isfinite().all() for value in weights(trainer).values())
    assert any((before[key] != value).any() for key, value in weights(trainer).items())


def test_combination_trains_an_adapter_and_evaluates(policy_path, tmp_path):
    names = ["lp_reg", "d3s", "dler", "gain_rl"]
    trainer_class = compose(*map(load_trainer, names))
    args = active_config(
        trainer_class,
        names,
        tmp_path,
        num_iterations=2,
        eval_strategy="steps",
        eval_steps=1,
        per_device_eval_batch_size=4,
        beta=0.01,
    )
    trainer = build(
        trainer_class,
        "policy",
        policy_path,
        args,
        eval_dataset=dataset("policy").select(range(4)),
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    before = weights(trainer)
    trainer.train()
    changed = {key for key, value in weights(trainer).items() if (before[key] != value).any()}
    assert changed and all("lora" in key for key in changed)
    evaluations = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(evaluations) == 3 and all(entry["eval_reward"] is not None for entry in evaluations)
    # Choice, filter and selection act in training only
    assert not any(key.startswith(("eval_groups/", "eval_d3s/", "eval_gain_rl/mu")) for key in evaluations[0])


def test_streamed_prompts_train_or_are_refused(policy_path, tmp_path):
    stream = dataset("policy").to_iterable_dataset()
    trainer_class = load_trainer("lp_reg")
    build(
        trainer_class,
        "policy",
        policy_path,
        active_config(trainer_class, ["lp_reg"], tmp_path, max_steps=1),
        data=stream,
    ).train()
    off = {"gain_rl": {"gain_sigma": None}, "dler": {"dler_dynamic_sampling": False}}
    for name, values in off.items():
        trainer_class = load_trainer(name)
        build(
            trainer_class,
            "policy",
            policy_path,
            active_config(trainer_class, [name], tmp_path, max_steps=1, **values),
            data=stream,
        ).train()
        with pytest.raises(ValueError, match=f"'{name}'.*map-style"):
            build(trainer_class, "policy", policy_path, active_config(trainer_class, [name], tmp_path), data=stream)


def test_empty_dataset_is_refused(policy_path, tmp_path):
    with pytest.raises(ValueError, match="`train_dataset` is empty"):
        build(
            PolicyTrainer,
            "policy",
            policy_path,
            PolicyConfig(**settings("policy", tmp_path)),
            data=Dataset.from_dict({"prompt": []}),
        )


def test_config_of_another_family_is_refused(policy_path):
    from trl import SFTConfig

    with pytest.raises(TypeError, match="`PolicyConfig` or a `GRPOConfig`, got `SFTConfig`"):
        build(PolicyTrainer, "policy", policy_path, SFTConfig(use_cpu=True, bf16=False))


class KeepEvenGroups(PolicyTrainer):
    """Keeps the groups whose prompt begins with an even digit, and records what was chosen."""

    rounds = 3

    def filter_groups(self, scored):
        kept = [int(self.train_dataset[int(i)]["prompt"][0]) % 2 == 0 for i in scored.prompt_indices[::4]]
        return torch.tensor(kept)

    def refill_rounds(self):
        return self.rounds

    def choose_prompts(self, count, round):
        return super().choose_prompts(count, max(round, 1))


def test_refill_keeps_passing_groups_in_order_and_moves_all_that_belongs_to_them(policy_path, tmp_path):
    records, scores = [], []

    class Recorder(KeepEvenGroups):
        def observe_batch(self, scored, record):
            scores.append(scored)
            records.append(record)

    args = PolicyConfig(**settings("policy", tmp_path, max_steps=3, log_completions=True, num_completions_to_print=1))
    trainer = Recorder(policy_path, [digit_parity, vowels], args, train_dataset=dataset("policy"))
    trainer.train()
    for scored, record in zip(scores, records, strict=True):
        assert scored.usable.all()
        prompts = [trainer.train_dataset[int(i)]["prompt"] for i in scored.prompt_indices]
        assert all(int(prompt[0]) % 2 == 0 for prompt in prompts)
        decoded = trainer.processing_class.batch_decode(record.prompt_ids, skip_special_tokens=True)
        assert decoded == prompts
        texts = trainer.processing_class.batch_decode(record.completion_ids, skip_special_tokens=True)
        assert record.rewards[:, 0].tolist() == digit_parity(texts)
        assert (record.completion_mask.sum(1) == scored.lengths).all()
        assert scored.group_ids.tolist() == [0] * 4 + [1] * 4
    assert list(trainer._logs["extra"]["length"]) == [len(text) for text in trainer._logs["completion"]]


def test_places_that_cannot_be_filled_have_no_effect(policy_path, tmp_path):
    class KeepNone(KeepEvenGroups):
        rounds = 1

        def filter_groups(self, scored):
            return torch.zeros(2, dtype=torch.bool)

    trainer = build(KeepNone, "policy", policy_path, PolicyConfig(**settings("policy", tmp_path)))
    before = weights(trainer)
    trainer.train()
    assert all(entry["groups/unfilled_fraction"] == 1.0 for entry in trainer.state.log_history if "loss" in entry)
    assert all((before[key] == value).all() for key, value in weights(trainer).items())


def test_selection_recounts_the_normalizers(policy_path, tmp_path):
    class HalfOfTheRows(PolicyTrainer):
        def select(self, record, scored):
            record.row_weight = record.row_weight * (torch.arange(record.row_weight.numel()) % 2)
            record.loss_mask = record.loss_mask * (torch.arange(record.loss_mask.shape[1]) < 1)

        def observe_batch(self, scored, record):
            assert record.num_items_in_batch == 4 and record.num_rows_in_batch == 4
            assert record.completion_mask.sum() == scored.lengths.sum()

    for loss_type in ("dapo", "grpo", "bnpo"):
        args = PolicyConfig(**settings("policy", tmp_path, loss_type=loss_type, max_steps=1))
        build(HalfOfTheRows, "policy", policy_path, args).train()


@pytest.mark.parametrize("fast", [True, False])
def test_tokens_are_counted_and_the_count_survives_a_resume(fast, policy_path, tmp_path):
    class HalfOfTheRows(PolicyTrainer):
        sampled = trained = 0

        def select(self, record, scored):
            record.row_weight = record.row_weight * (torch.arange(record.row_weight.numel()) % 2)

        def observe_batch(self, scored, record):
            self.sampled += int(record.completion_mask.sum())
            self.trained += int(record.completion_mask[1::2].sum())

    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "fast_rollouts": fast}
    args = PolicyConfig(**settings("policy", tmp_path, **options))
    trainer = build(HalfOfTheRows, "policy", policy_path, args)
    assert (trainer.sampled_tokens, trainer.trained_tokens) == (0, 0)
    trainer.train()
    assert trainer.sampled_tokens == trainer.sampled > trainer.trained == trainer.trained_tokens > 0
    resumed = build(HalfOfTheRows, "policy", policy_path, args)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert (resumed.sampled_tokens, resumed.trained_tokens) == (trainer.sampled_tokens, trainer.trained_tokens)


def test_evaluation_is_sampled_but_not_trained(policy_path, tmp_path):
    args = PolicyConfig(**settings("policy", tmp_path, per_device_eval_batch_size=8))
    trainer = build(PolicyTrainer, "policy", policy_path, args, eval_dataset=dataset("policy").select(range(4)))
    trainer.evaluate()
    assert trainer.sampled_tokens > 0 == trainer.trained_tokens


def test_a_generation_ends_even_where_a_stage_fails(policy_path, tmp_path):
    class Fails(PolicyTrainer):
        def select(self, record, scored):
            assert self.generation.scored is scored and self.generation.inputs
            raise RuntimeError("of a test")

    trainer = build(Fails, "policy", policy_path, PolicyConfig(**settings("policy", tmp_path)))
    with pytest.raises(RuntimeError, match="of a test"):
        trainer.train()
    assert trainer.generation is None


def test_feedback_arrives_before_the_next_choice(policy_path, tmp_path):
    events = []

    class Late(PolicyTrainer):
        def choose_prompts(self, count, round):
            events.append("choose")
            return list(range(count))

        def observe_batch(self, scored, record):
            events.append("observe")

    build(Late, "policy", policy_path, PolicyConfig(**settings("policy", tmp_path))).train()
    assert events == ["choose", "observe"] * 3


def test_a_stage_that_does_not_exist_is_refused():
    from papertrl.core.declaration import Method

    with pytest.raises(TypeError, match=r"'odd' names stages \['brew'\]"):
        type("Odd", (PolicyTrainer,), {"method": Method("odd", family="policy"), "extends": {"brew": {}}})


def test_record_refuses_what_breaks_its_contract(policy_path, tmp_path):
    class LossOnPadding(PolicyTrainer):
        def select(self, record, scored):
            record.loss_mask = torch.ones_like(record.loss_mask)

    class WrongShape(PolicyTrainer):
        def select(self, record, scored):
            record.row_weight = torch.ones(3)

    args = PolicyConfig(**settings("policy", tmp_path, check_records=True))
    with pytest.raises(ValueError, match="padding would enter the loss"):
        build(LossOnPadding, "policy", policy_path, args).train()
    with pytest.raises(ValueError, match=r"`row_weight` has shape \(3,\), expected \(8,\)"):
        build(WrongShape, "policy", policy_path, args).train()


@pytest.mark.parametrize(
    ("method", "inert", "off"),
    [("disco", "the constraint", {"disco_beta": 0.0}), ("hapo", "the adaptive clip ranges", {"hapo_clip_alpha": 0.0})],
)
@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({}, True),
        ({"gradient_accumulation_steps": 4, "steps_per_generation": 2}, True),
        ({"num_iterations": 2}, False),
        ({"steps_per_generation": 4}, False),
    ],
)
def test_what_has_no_effect_on_policy_is_told(method, inert, off, values, told, policy_path, tmp_path, caplog):
    trainer_class = load_trainer(method)
    for settled, expected in ((values, told), (values | off, False)):
        caplog.clear()
        args = trainer_class.config_class(**settings("policy", tmp_path, **settled))
        build(trainer_class, "policy", policy_path, args)
        found = [r.getMessage() for r in caplog.records if inert in r.getMessage()]
        assert (len(found) == 1) == expected and all("`num_iterations` above 1" in text for text in found)
