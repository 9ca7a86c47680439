import math
from importlib import resources

import numpy as np
import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from trl import SFTConfig, SFTTrainer

from papertrl import AsftSFTConfig, AsftSFTTrainer
from papertrl.models.observation import backbone
from papertrl.trainers.reference import as_reference

from ..harness.oracles import asft_oracle, softmax
from ..harness.sums import (
    assert_close,
    assert_equal,
    first_batch,
    history,
    loss_and_gradients,
    make,
    sums,
    tiny_llama,
    tiny_mixtral,
    weights,
)

LORA = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
NEUTRAL = {"asft_anchor_coef": 0.0, "asft_dft_weight_power": 0.0}


def asft(tokenizer, folder, trainer_class=AsftSFTTrainer, **options):
    return make(trainer_class, AsftSFTConfig, tokenizer, folder, **options)


def drift(trainer, scale=0.3):
    """Move the trained weights away from the initial ones, as training would."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in trainer.model.parameters():
            if weight.requires_grad:
                weight.add_(scale * torch.randn(weight.shape, generator=generator) * weight.std().clamp(min=0.02))


def all_logits(model, batch):
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids") if name in batch}
    return model.eval()(**inputs).logits


class TestObjective:
    @pytest.mark.parametrize("asft_anchor_coef", [0.0, 0.3])
    @pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
    @pytest.mark.parametrize("direction", ["forward", "reverse"])
    def test_oracle(self, asft_anchor_coef, power, direction, tokenizer, tmp_path):
        fields = {
            "asft_anchor_coef": asft_anchor_coef,
            "asft_dft_weight_power": power,
            "asft_anchor_direction": direction,
        }
        trainer = asft(tokenizer, tmp_path, **fields)
        drift(trainer)
        batch = first_batch(trainer)
        policy = all_logits(trainer.model, batch).detach()
        reference = all_logits(tiny_llama(tokenizer), batch).detach()
        reverse = direction == "reverse"
        total, count, divergence = asft_oracle(policy, reference, batch["labels"], asft_anchor_coef, reverse, power)
        loss, _ = loss_and_gradients(trainer, num_items_in_batch=29)
        assert loss.item() == pytest.approx(total / 29, rel=1e-4)
        if asft_anchor_coef:
            assert divergence / count > 0.05
            logged = trainer._metrics["train"]["asft/kl_to_ref"][0].item()
            assert logged == pytest.approx(divergence / count, rel=1e-3)

    @pytest.mark.parametrize("direction", ["forward", "reverse"])
    def test_gradient(self, direction, tokenizer, tmp_path):
        trainer = asft(tokenizer, tmp_path, asft_anchor_coef=0.3, asft_anchor_direction=direction)
        drift(trainer)
        batch = first_batch(trainer)
        _, found = loss_and_gradients(trainer, num_items_in_batch=29)

        trainer.model.zero_grad()
        log_p = all_logits(trainer.model, batch)[:, :-1].log_softmax(-1)
        log_q = all_logits(tiny_llama(tokenizer), batch)[:, :-1].log_softmax(-1).detach()
        labels = batch["labels"][:, 1:]
        mask = labels != -100
        probs = log_p.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1).exp()
        anchor = (log_p.exp() * (log_p - log_q) if direction == "reverse" else log_q.exp() * (log_q - log_p)).sum(-1)
        # −p has the gradient of −sg(p) log p
        ((-probs + 0.3 * anchor) * mask).sum().div(29).backward()
        expected = {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}
        assert_close(found, expected, rtol=1e-3, atol=1e-6)

    def test_is_dft_without_anchor(self, tokenizer, tmp_path):
        ours = asft(tokenizer, tmp_path, asft_anchor_coef=0.0)
        theirs = make(SFTTrainer, SFTConfig, tokenizer, tmp_path, loss_type="dft")
        ours.train()
        theirs.train()
        assert_equal(weights(ours), weights(theirs))

    def test_metrics(self, tokenizer, tmp_path):
        trainer = asft(tokenizer, tmp_path)
        drift(trainer, scale=2.0)
        batch = first_batch(trainer)
        logits = all_logits(trainer.model, batch).detach()
        probs = [
            softmax(logits[row, t].tolist())[batch["labels"][row, t + 1]]
            for row in range(logits.shape[0])
            for t in range(logits.shape[1] - 1)
            if batch["labels"][row, t + 1] != -100
        ]
        loss_and_gradients(trainer)
        logged = {name: float(values[0]) for name, values in trainer._metrics["train"].items()}
        assert logged["asft/label_prob"] == pytest.approx(np.mean(probs), rel=1e-3)
        assert logged["asft/ignored_fraction"] == pytest.approx(np.mean([p < 0.01 for p in probs]), rel=1e-5)
        assert 0 < logged["asft/ignored_fraction"] < 1
        assert logged["loss/token"] == pytest.approx(np.mean([-p * math.log(p) for p in probs]), rel=1e-3)
        assert logged["loss/anchor"] == logged["asft/kl_to_ref"] > 0

    def test_padding_cannot_leak(self, tokenizer, tmp_path):
        trainer = asft(tokenizer, tmp_path)
        drift(trainer)
        batch = first_batch(trainer)
        padded = batch["attention_mask"] == 0
        assert padded.any()
        clean = trainer.compute_loss(trainer.model, dict(batch))
        spoiled = batch | {"input_ids": batch["input_ids"].masked_fill(padded, 17)}
        assert torch.equal(trainer.compute_loss(trainer.model, spoiled), clean)

    def test_batch_without_labels(self, tokenizer, tmp_path):
        trainer = asft(tokenizer, tmp_path)
        batch = first_batch(trainer)
        loss = trainer.compute_loss(trainer.model, batch | {"labels": torch.full_like(batch["labels"], -100)})
        loss.backward()
        assert loss.item() == 0.0
        assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in trainer.model.parameters())


class Recording(AsftSFTTrainer):
    values = None

    def per_token_loss(self, record):
        values = super().per_token_loss(record)
        self.values = values.detach()[record.label_mask]
        return values


class TestReference:
    def passes(self, trainer):
        """Forward passes during training: of which model, whether with gradient, whether in training mode."""
        seen = []
        models = [trainer.model] if trainer.ref_model is None else [trainer.model, trainer.ref_model]
        for model in models:
            backbone(model).register_forward_hook(
                lambda module, *_, model=model: seen.append((model, torch.is_grad_enabled(), module.training))
            )
        trainer.train()
        return seen

    def test_passes(self, tokenizer, tmp_path):
        trainer = asft(tokenizer, tmp_path, max_steps=2)
        assert self.passes(trainer) == 2 * [(trainer.ref_model, False, False), (trainer.model, True, True)]

    @pytest.mark.parametrize("power", [0.0, 1.0])
    def test_none_without_anchor(self, power, tokenizer, tmp_path):
        trainer = asft(tokenizer, tmp_path, max_steps=2, asft_anchor_coef=0.0, asft_dft_weight_power=power)
        assert trainer.ref_model is None
        assert self.passes(trainer) == 2 * [(trainer.model, True, True)]
        assert "asft/kl_to_ref" not in history(trainer)[0]

    def test_lora_switches_the_adapter_off(self, tokenizer, tmp_path):
        trainer = asft(tokenizer, tmp_path, max_steps=2, trainer_kwargs={"peft_config": LORA})
        assert trainer.ref_model is None
        assert self.passes(trainer) == 2 * [(trainer.model, False, False), (trainer.model, True, True)]

    def test_stays_the_initial_model(self, tokenizer, tmp_path):
        trainer = asft(tokenizer, tmp_path)
        trainer.train()
        initial = dict(tiny_llama(tokenizer).named_parameters())
        assert_equal({n: p.detach() for n, p in trainer.ref_model.named_parameters()}, initial)
        assert not any(p.requires_grad for p in trainer.ref_model.parameters())
        batch = first_batch(trainer)
        assert torch.equal(all_logits(trainer.ref_model, batch), all_logits(tiny_llama(tokenizer), batch))
        assert any(not torch.equal(p, initial[n]) for n, p in weights(trainer).items())
        logged = [entry["asft/kl_to_ref"] for entry in history(trainer) if "asft/kl_to_ref" in entry]
        assert logged[0] == 0.0 and min(logged[1:]) > 0

    def test_lora_oracle_with_dropout(self, tokenizer, tmp_path):
        model = tiny_llama(tokenizer, attention_dropout=0.5)
        trainer = asft(tokenizer, tmp_path, model=model, trainer_kwargs={"peft_config": LORA})
        trainable = [n for n, p in trainer.model.named_parameters() if p.requires_grad]
        drift(trainer, scale=3.0)
        batch = first_batch(trainer)
        trainer.model.train()
        trainer.compute_loss(trainer.model, dict(batch)).backward()
        assert [n for n, p in trainer.model.named_parameters() if p.requires_grad] == trainable
        assert all(p.grad is not None for p in trainer.model.parameters() if p.requires_grad)
        assert trainer.model.training and all(module.training for module in trainer.model.modules())
        with as_reference(trainer.model, trainer.model) as reference:
            found = reference(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        assert torch.equal(found, all_logits(tiny_llama(tokenizer), batch))

    def test_given_adapter_is_the_reference(self, tokenizer, tmp_path):
        torch.manual_seed(0)
        model = get_peft_model(tiny_llama(tokenizer), LORA)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "lora_B" in name:
                    weight.normal_()
        trainer = asft(tokenizer, tmp_path, model=model)
        assert {n.split(".")[-2] for n, p in trainer.model.named_parameters() if p.requires_grad} == {"default"}
        trainer.train()
        logged = [entry["asft/kl_to_ref"] for entry in history(trainer) if "asft/kl_to_ref" in entry]
        assert logged[0] == 0.0 and min(logged[1:]) > 0
        frozen = {n: p for n, p in trainer.model.named_parameters() if ".ref." in n}
        trained = weights(trainer)
        assert frozen and all(not p.requires_grad for p in frozen.values())
        assert any(not torch.equal(p, trained[n.replace(".ref.", ".default.")]) for n, p in frozen.items())

    def test_prompt_learning_is_refused(self, tokenizer, tmp_path):
        from peft import PromptTuningConfig

        config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
        with pytest.raises(ValueError, match=r"PromptTuningConfig.*'asft'"):
            asft(tokenizer, tmp_path, trainer_kwargs={"peft_config": config})
        asft(tokenizer, tmp_path, asft_anchor_coef=0.0, trainer_kwargs={"peft_config": config}).train()


class TestOptions:
    @pytest.mark.parametrize("direction", ["forward", "reverse"])
    def test_padding_free_equals_padded(self, direction, tokenizer, tmp_path):
        padded = asft(tokenizer, tmp_path, Recording, asft_anchor_coef=0.5, asft_anchor_direction=direction)
        flat_options = {"padding_free": True, "max_length": None}
        flat = asft(
            tokenizer, tmp_path, Recording, asft_anchor_coef=0.5, asft_anchor_direction=direction, **flat_options
        )
        for trainer in (padded, flat):
            drift(trainer)
        loss, gradients = loss_and_gradients(padded)
        flat_loss, flat_gradients = loss_and_gradients(flat)
        torch.testing.assert_close(flat.values, padded.values, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(flat_loss, loss, rtol=1e-5, atol=1e-6)
        assert_close(flat_gradients, gradients, rtol=1e-3, atol=1e-6)

    def test_packing_equals_unpacked(self, tokenizer, tmp_path):
        unpacked = asft(tokenizer, tmp_path, Recording, data=sums(4), asft_anchor_coef=0.5)
        packed = asft(tokenizer, tmp_path, Recording, data=sums(4), asft_anchor_coef=0.5, packing=True, max_length=64)
        for trainer in (unpacked, packed):
            drift(trainer)
        assert len(packed.train_dataset) == 1
        _, gradients = loss_and_gradients(unpacked)
        _, found = loss_and_gradients(packed)
        torch.testing.assert_close(packed.values.sort()[0], unpacked.values.sort()[0], rtol=1e-4, atol=1e-6)
        assert_close(found, gradients, rtol=1e-3, atol=1e-6)

    def test_accumulation_equals_one_batch(self, tokenizer, tmp_path):
        options = {"optim": "sgd", "learning_rate": 0.5, "asft_anchor_coef": 0.5}
        whole = asft(tokenizer, tmp_path, per_device_train_batch_size=8, **options)
        split = asft(tokenizer, tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4, **options)
        whole.train()
        split.train()
        assert_close(weights(split), weights(whole), rtol=1e-4, atol=1e-6)

    def test_bf16(self, tokenizer, tmp_path):
        trainer = asft(tokenizer, tmp_path, bf16=True)
        trainer.train()
        logged = [entry for entry in history(trainer) if "asft/kl_to_ref" in entry]
        assert logged[0]["asft/kl_to_ref"] == 0.0 and logged[2]["asft/kl_to_ref"] > 0
        assert all(math.isfinite(value) for entry in logged for value in entry.values())

    @pytest.mark.parametrize("peft_config", [None, LORA], ids=["full", "lora"])
    def test_gradient_checkpointing(self, peft_config, tokenizer, tmp_path):
        options = {"asft_anchor_coef": 0.5, "trainer_kwargs": {"peft_config": peft_config}}
        plain = asft(tokenizer, tmp_path, **options)
        checkpointed = asft(tokenizer, tmp_path, gradient_checkpointing=True, **options)
        plain.train()
        checkpointed.train()
        assert_close(weights(checkpointed), weights(plain))

    def test_moe(self, tokenizer, tmp_path):
        trainer = asft(tokenizer, tmp_path, model=tiny_mixtral(tokenizer))
        trainer.train()
        logged = history(trainer)[1]
        total = logged["loss/token"] + 0.1 * logged["loss/anchor"] + 0.1 * logged["aux_loss"]
        assert logged["loss"] == pytest.approx(total, rel=1e-3)
        assert logged["aux_loss"] > 0 and logged["loss/anchor"] > 0

    def test_iterable_dataset(self, tokenizer, tmp_path):
        listed = asft(tokenizer, tmp_path, dataloader_num_workers=0, train_sampling_strategy="sequential")
        streamed = asft(tokenizer, tmp_path, data=sums().to_iterable_dataset())
        listed.train()
        streamed.train()
        assert_equal(weights(streamed), weights(listed))

    def test_evaluation(self, tokenizer, tmp_path):
        options = {"eval_strategy": "steps", "eval_steps": 1, "trainer_kwargs": {"eval_dataset": sums(5)}}
        plain, evaluated = asft(tokenizer, tmp_path), asft(tokenizer, tmp_path, **options)
        plain.train()
        evaluated.train()
        assert_equal(weights(evaluated), weights(plain))
        logged = [entry for entry in history(evaluated) if "eval_loss" in entry]
        assert len(logged) == 3
        for entry in logged:
            total = entry["eval_loss/token"] + 0.1 * entry["eval_loss/anchor"]
            assert entry["eval_loss"] == pytest.approx(total, rel=1e-4)
        assert logged[-1]["eval_asft/kl_to_ref"] > 0

    @pytest.mark.parametrize("model", ["full", "lora", "given_adapter"])
    def test_resume(self, model, tokenizer, tmp_path):
        def trainer():
            options = {"max_steps": 5, "save_strategy": "steps", "save_steps": 3, "asft_anchor_coef": 0.5}
            if model == "given_adapter":
                options["model"] = get_peft_model(tiny_llama(tokenizer), LORA)
            elif model == "lora":
                options["trainer_kwargs"] = {"peft_config": LORA}
            return asft(tokenizer, tmp_path, **options)

        whole, resumed = trainer(), trainer()
        whole.train()
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
        assert_equal(weights(resumed), weights(whole))
        assert history(resumed)[:5] == history(whole)[:5]
        assert history(resumed)[4]["asft/kl_to_ref"] > 0

    @pytest.mark.parametrize("option", [{}, {"loss_type": "dft"}, {"gradient_accumulation_steps": 2}])
    def test_neutral_equals_trl(self, option, tokenizer, tmp_path):
        ours = asft(tokenizer, tmp_path, **NEUTRAL, **option)
        theirs = make(SFTTrainer, SFTConfig, tokenizer, tmp_path, **option)
        (loss, gradients), (found_loss, found) = loss_and_gradients(theirs), loss_and_gradients(ours)
        assert torch.equal(found_loss, loss)
        assert_equal(found, gradients)
        ours, theirs = (
            asft(tokenizer, tmp_path, **NEUTRAL, **option),
            make(SFTTrainer, SFTConfig, tokenizer, tmp_path, **option),
        )
        ours.train()
        theirs.train()
        assert_equal(weights(ours), weights(theirs))
        assert history(ours) == history(theirs)


class TestConfig:
    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("asft_anchor_coef", -0.1),
            ("asft_anchor_coef", math.inf),
            ("asft_anchor_coef", math.nan),
            ("asft_anchor_direction", "both"),
            ("asft_dft_weight_power", -1.0),
            ("asft_dft_weight_power", None),
        ],
    )
    def test_bad_value(self, field, value, tmp_path):
        with pytest.raises(ValueError, match=f"`{field}` must be .*got {value!r}"):
            AsftSFTConfig(output_dir=str(tmp_path), use_cpu=True, **{field: value})

    def test_double_weight(self, tmp_path):
        with pytest.raises(ValueError, match=r"`loss_type='dft'` and `asft_dft_weight_power=1\.0`"):
            AsftSFTConfig(output_dir=str(tmp_path), use_cpu=True, loss_type="dft")

    def test_defaults_are_the_authors(self, tmp_path):
        args = AsftSFTConfig(output_dir=str(tmp_path), use_cpu=True)
        assert (args.asft_anchor_coef, args.asft_anchor_direction, args.asft_dft_weight_power) == (0.1, "forward", 1.0)
        assert args.learning_rate == 2e-5

    def test_recipe(self, tmp_path):
        recipe = yaml.safe_load((resources.files("papertrl.recipes") / "asft.yaml").read_text())
        assert recipe.pop("method") == "asft"
        args = AsftSFTConfig(**(recipe | {"output_dir": str(tmp_path), "use_cpu": True}))
        assert (args.asft_anchor_coef, args.asft_anchor_direction, args.asft_dft_weight_power) == (0.1, "forward", 1.0)
