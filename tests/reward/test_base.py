import math
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification
from trl import DPOConfig, RewardConfig, RewardTrainer

from papertrl import RewardModelConfig, RewardModelTrainer
from papertrl.core.declaration import Method, Paper
from papertrl.losses.terms import LossTerm
from papertrl.trainers.reduction import mean_of_terms
from papertrl.trainers.reward.base import LOSS_STAGES
from papertrl.trainers.reward.record import RewardRecord

from ..harness.table import REWARD_LORA, history, settings, weights

LOW = -3.0


class NeutralTrainer(RewardModelTrainer):
    """A method of these tests: acts in every stage, and changes nothing."""

    method = Method("neutral", family="reward")
    extends = {stage: {} for stage in LOSS_STAGES}

    def scores(self, record):
        return super().scores(record)

    def margin(self, record, chosen_scores, rejected_scores):
        return super().margin(record, chosen_scores, rejected_scores)

    def pair_losses(self, record, chosen_scores, rejected_scores, margin):
        return super().pair_losses(record, chosen_scores, rejected_scores, margin)

    def pair_weights(self, record):
        return super().pair_weights(record)

    def extra_terms(self, record):
        return super().extra_terms(record)


class ActingTrainer(RewardModelTrainer):
    """A method of these tests: halves scores, weighs pairs by the chosen length, and bounds low rewards."""

    method = Method("acting", family="reward", paper=Paper("Acting", "0000.00000", 2025, "acting", ("A. Author",)))
    extends = {"scores": {}, "pair_weights": {}, "extra_terms": {}}

    def scores(self, record):
        chosen, rejected = super().scores(record)
        return chosen / 2, rejected / 2

    def pair_weights(self, record):
        assert super().pair_weights(record) is None
        return 1 / record.attention_mask.sum(1).chunk(2)[0]

    def extra_terms(self, record):
        rewards = record.rewards
        return [*super().extra_terms(record), LossTerm("bound", rewards**2, mask=rewards < LOW, coef=0.3)]


def pairs(rows=16, **columns):
    """Pairs of different lengths."""
    content = {
        "prompt": [f"{i}+{i + 1}=" for i in range(rows)],
        "chosen": ["1" * (1 + i % 4) for i in range(rows)],
        "rejected": [f"{3 * i}" for i in range(rows)],
    }
    return Dataset.from_dict(content | columns)


def margins(rows=16):
    return pairs(rows, margin=[0.1 * (i % 5) for i in range(rows)])


def make(trainer_class, tiny_path, folder, data=None, trainer_kwargs=None, **fields):
    config = getattr(trainer_class, "config_class", RewardConfig)
    return trainer_class(
        tiny_path,
        config(**settings("reward", folder, **({"gradient_accumulation_steps": 1} | fields))),
        train_dataset=pairs() if data is None else data,
        **(trainer_kwargs or {}),
    )


def spread(trainer):
    """Give the head weights under which rewards differ."""
    with torch.no_grad():
        next(p for n, p in trainer.model.named_parameters() if "score" in n).mul_(50)
    return trainer


def first_batch(trainer):
    torch.manual_seed(0)
    return trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))


def loss_and_gradients(trainer, batch=None):
    trainer.model.train()
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, dict(first_batch(trainer) if batch is None else batch))
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}


def assert_equal(found, expected):
    assert found.keys() == expected.keys() and expected
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


OPTIONS = {
    "plain": {},
    "centered": {"center_rewards_coefficient": 0.1},
    "margins": {"data": margins(), "center_rewards_coefficient": 0.1},
    "accumulation": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "checkpointing": {"gradient_checkpointing": True},
    "evaluation": {"eval_strategy": "steps", "eval_steps": 1, "trainer_kwargs": {"eval_dataset": pairs(5)}},
    "lora": {"trainer_kwargs": {"peft_config": REWARD_LORA}},
    "iterable": {"data": pairs().to_iterable_dataset()},
    "bf16": {"bf16": True},
}
over_options = pytest.mark.parametrize("option", OPTIONS)
over_trainers = pytest.mark.parametrize(
    "trainer_class", [RewardModelTrainer, NeutralTrainer], ids=["by_itself", "through_stages"]
)


class TestEqualsTRL:
    @over_options
    def test_loss_and_gradients(self, option, tiny_path, tmp_path):
        classes = (RewardTrainer, RewardModelTrainer, NeutralTrainer)
        theirs, *ours = (spread(make(c, tiny_path, tmp_path, **OPTIONS[option])) for c in classes)
        loss, gradients = loss_and_gradients(theirs)
        assert abs(loss.item() - math.log(2)) > 1e-3
        for trainer in ours:
            found_loss, found = loss_and_gradients(trainer)
            assert torch.equal(found_loss, loss)
            assert_equal(found, gradients)

    @over_options
    @over_trainers
    def test_trajectory_and_logs(self, trainer_class, option, tiny_path, tmp_path):
        theirs, ours = (make(c, tiny_path, tmp_path, **OPTIONS[option]) for c in (RewardTrainer, trainer_class))
        theirs.train()
        ours.train()
        assert_equal(weights(ours), weights(theirs))
        own = [{k: v for k, v in entry.items() if "loss/" in k} for entry in history(ours)]
        assert [{k: v for k, v in entry.items() if "loss/" not in k} for entry in history(ours)] == history(theirs)
        if trainer_class is NeutralTrainer:
            names = {"loss/pair", *(["loss/center"] if ours.args.center_rewards_coefficient else [])}
            assert all(entry.keys() == names for entry, full in zip(own, history(ours), strict=True) if "loss" in full)
        else:
            assert not any(own)

    @over_trainers
    def test_outputs_for_metrics(self, trainer_class, tiny_path, tmp_path):
        def compute_metrics(prediction):
            return {"rewards": float(abs(prediction.predictions).sum())}

        options = {"trainer_kwargs": {"eval_dataset": pairs(5), "compute_metrics": compute_metrics}}
        theirs, ours = (make(c, tiny_path, tmp_path, **options) for c in (RewardTrainer, trainer_class))
        assert ours.evaluate()["eval_rewards"] == theirs.evaluate()["eval_rewards"] > 0


class TestStages:
    def test_loss_is_the_one_of_plain_loops(self, tiny_path, tmp_path):
        trainer = spread(make(ActingTrainer, tiny_path, tmp_path, data=margins(), center_rewards_coefficient=0.2))
        batch = first_batch(trainer)
        loss, _ = loss_and_gradients(trainer, batch)
        model = trainer.model.eval()
        rewards = []
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            rewards.append(model(input_ids=ids[mask.bool()][None]).logits.item())
        count = len(rewards) // 2
        pair, center = [], []
        for i in range(count):
            chosen, rejected = rewards[i], rewards[i + count]
            delta = chosen / 2 - rejected / 2 - batch["margin"][i].item()
            pair.append(math.log1p(math.exp(-delta)) / int(batch["attention_mask"][i].sum()))
            center.append((chosen + rejected) ** 2)
        bound = [reward**2 for reward in rewards if reward < LOW]
        assert 0 < len(bound) < len(rewards) and batch["margin"].any()
        parts = {"pair": pair, "center": center, "bound": bound}
        means = {name: sum(values) / len(values) for name, values in parts.items()}
        expected = means["pair"] + 0.2 * means["center"] + 0.3 * means["bound"]
        assert loss.item() == pytest.approx(expected, rel=1e-4)
        logged = trainer._metrics["train"]
        for name, value in means.items():
            assert float(logged[f"loss/{name}"][0]) == pytest.approx(value, rel=1e-4)
        # TRL's metrics are on the rewards themselves
        leads = [rewards[i] - rewards[i + count] for i in range(count)]
        assert logged["margin"] == [pytest.approx(sum(leads) / count, rel=1e-4)]

    def test_padding_and_other_pairs_cannot_leak(self, tiny_path, tmp_path):
        trainer = spread(make(NeutralTrainer, tiny_path, tmp_path))
        batch = first_batch(trainer)
        assert (batch["attention_mask"] == 0).any()
        loss, gradients = loss_and_gradients(trainer, batch)
        pad = trainer.processing_class.pad_token_id
        wider = {
            "input_ids": torch.nn.functional.pad(batch["input_ids"], (0, 5), value=pad),
            "attention_mask": torch.nn.functional.pad(batch["attention_mask"], (0, 5)),
        }
        found_loss, found = loss_and_gradients(trainer, wider)
        torch.testing.assert_close(found_loss, loss, rtol=1e-5, atol=1e-7)
        for name, gradient in gradients.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)
        count = len(batch["input_ids"]) // 2
        alone = [
            loss_and_gradients(trainer, {k: v[[i, i + count]] for k, v in batch.items()})[0].item()
            for i in range(count)
        ]
        assert loss.item() == pytest.approx(sum(alone) / count, rel=1e-5) and max(alone) - min(alone) > 1e-3

    def test_function_of_the_user_acts(self, tiny_path, tmp_path):
        def hinge(margin):
            return (1 - margin).clamp(min=0)

        plain = spread(make(RewardModelTrainer, tiny_path, tmp_path))
        ours = spread(make(RewardModelTrainer, tiny_path, tmp_path, trainer_kwargs={"stages": {"pair_losses": hinge}}))
        batch = first_batch(plain)
        rewards = plain.model.train()(**batch).logits.squeeze(-1).tolist()
        expected = [max(0.0, 1 - chosen + rejected) for chosen, rejected in zip(rewards[:4], rewards[4:], strict=True)]
        assert loss_and_gradients(ours, batch)[0].item() == pytest.approx(sum(expected) / 4, rel=1e-5)
        assert plain.acting_in(*LOSS_STAGES) == [] and ours.acting_in(*LOSS_STAGES)[0].endswith("hinge")

    def test_a_masked_term_is_the_mean_over_all_ranks(self):
        generator = torch.Generator().manual_seed(0)
        values = torch.randn(2, 6, generator=generator)
        masks = torch.tensor([[1, 0, 0, 0, 0, 0], [1, 1, 1, 0, 1, 0]])
        accelerator = SimpleNamespace(num_processes=2, reduce=lambda counts, reduction: torch.tensor([5.0]))
        ranks = [
            mean_of_terms([LossTerm("all", v, coef=2.0), LossTerm("some", v, mask=m, coef=0.5)], accelerator).item()
            for v, m in zip(values, masks, strict=True)
        ]
        some = [values[r, i].item() for r in range(2) for i in range(6) if masks[r, i]]
        expected = 2 * values.mean().item() + 0.5 * sum(some) / len(some)
        assert sum(ranks) / 2 == pytest.approx(expected, rel=1e-5)


class TestRun:
    @pytest.mark.parametrize("peft_config", [None, REWARD_LORA], ids=["full", "lora"])
    def test_resumes_to_the_bit(self, peft_config, tiny_path, tmp_path):
        def run():
            return make(
                ActingTrainer,
                tiny_path,
                tmp_path,
                data=margins(),
                max_steps=5,
                save_strategy="steps",
                save_steps=3,
                trainer_kwargs={"peft_config": peft_config},
            )

        whole = run()
        whole.train()
        # Like a fresh process
        torch.manual_seed(5)
        resumed = run()
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
        assert_equal(weights(resumed), weights(whole))
        assert history(resumed)[:5] == history(whole)[:5]
        tokens = [entry["num_tokens"] for entry in history(whole)[:5]]
        assert tokens == sorted(tokens) and len(set(tokens)) == 5

    def test_an_adapter_and_the_head_alone_are_trained(self, tiny_path, tmp_path):
        trainer = make(ActingTrainer, tiny_path, tmp_path, trainer_kwargs={"peft_config": REWARD_LORA})
        before = weights(trainer)
        trainer.train()
        changed = {name for name, value in weights(trainer).items() if not torch.equal(value, before[name])}
        assert changed and all("lora_" in name or "modules_to_save" in name for name in changed)
        assert any("score" in name for name in changed) and any("lora_B" in name for name in changed)

    def test_takes_trl_s_config_or_none(self, tiny_path, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        args = RewardConfig(**settings("reward", tmp_path, seed=7))
        trainer = RewardModelTrainer(tiny_path, args, train_dataset=pairs())
        assert type(trainer.args) is RewardModelConfig and trainer.args.seed == 7 and type(args) is RewardConfig
        assert trainer.dataset_formats(trainer.args) == ("pairs",) and not trainer.needs_scores(trainer.args)
        # TRL's default is bf16, which transformers accepts on a CPU only with `use_cpu`
        monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
        assert RewardModelTrainer(tiny_path, train_dataset=pairs()).args.output_dir.endswith("-RewardModel")


class TestRefusals:
    def test_empty_dataset(self, tiny_path, tmp_path):
        with pytest.raises(ValueError, match="`train_dataset` is empty"):
            make(RewardModelTrainer, tiny_path, tmp_path, data=pairs().select([]))

    def test_config_of_another_family(self, tiny_path, tmp_path):
        args = DPOConfig(str(tmp_path), use_cpu=True, bf16=False)
        with pytest.raises(
            TypeError, match="`args` must be a `RewardModelConfig` or a `RewardConfig`, got `DPOConfig`"
        ):
            RewardModelTrainer(tiny_path, args, train_dataset=pairs())

    def test_model_with_several_labels(self, tiny_path, tokenizer, tmp_path):
        model = AutoModelForSequenceClassification.from_pretrained(tiny_path, num_labels=2)
        with pytest.raises(ValueError, match="num_labels=2"):
            make(RewardModelTrainer, model, tmp_path, trainer_kwargs={"processing_class": tokenizer})

    def test_losses_that_are_not_per_pair(self, tiny_path, tmp_path):
        stages = {"pair_losses": lambda margin: margin.mean()}
        trainer = make(RewardModelTrainer, tiny_path, tmp_path, trainer_kwargs={"stages": stages})
        with pytest.raises(ValueError, match=r"must be of shape \(4,\), got \(\)"):
            loss_and_gradients(trainer)

    @pytest.mark.parametrize(
        "changes",
        [
            {"rewards": torch.zeros(4, 1)},
            {"attention_mask": torch.ones(4, 2)},
            {"least_margins": torch.zeros(4)},
            {"input_ids": torch.ones(3, 3)},
        ],
        ids=lambda changes: next(iter(changes)),
    )
    def test_records_of_other_shapes(self, changes):
        fields = {"input_ids": torch.ones(4, 3), "attention_mask": torch.ones(4, 3), "rewards": torch.zeros(4)}
        assert RewardRecord(**fields).least_margins is None
        with pytest.raises(ValueError, match=f"`{next(iter(changes))}` must"):
            RewardRecord(**fields | changes)
