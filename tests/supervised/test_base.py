import pytest
import torch
from peft import LoraConfig
from transformers import TrainingArguments
from trl import SFTConfig, SFTTrainer

from papertrl import AsftSFTConfig, AsftSFTTrainer, SupervisedConfig, SupervisedTrainer, compose
from papertrl.core.declaration import Method
from papertrl.losses.terms import LossTerm
from papertrl.trainers.supervised.base import LOSS_STAGES
from papertrl.trainers.supervised.record import SupervisedRecord

from ..harness.sums import (
    QUIET,
    assert_close,
    assert_equal,
    first_batch,
    history,
    loss_and_gradients,
    make,
    sums,
    texts,
    tiny_llama,
    tiny_mixtral,
    weights,
)

LIKELY = -4.5


class StagedTrainer(SupervisedTrainer):
    """Runs every stage and observes the hidden states, but changes nothing."""

    method = Method("staged", family="supervised")
    extends = {stage: {} for stage in LOSS_STAGES}
    needs = {"policy": {}}


class HalvedTrainer(SupervisedTrainer):
    """A method of these tests: halves odd examples, and adds a term on likely tokens."""

    method = Method("halved", family="supervised", summary="Halves odd examples.")
    extends = {"example_weights": {}, "extra_terms": {}}
    _tag_names = ["halved"]
    _name = "Halved"
    _paper = {"title": "Halves", "id": "0000.00000", "citation": "@misc{halves}"}

    def example_weights(self, record):
        halves = 1.0 - 0.5 * (torch.arange(record.num_examples) % 2)
        return super().example_weights(record) * halves

    def extra_terms(self, record):
        return [
            *super().extra_terms(record),
            LossTerm("likely", record.log_probs, record.log_probs > LIKELY, coef=0.25),
        ]


class RecordingTrainer(HalvedTrainer):
    records = ()

    def per_token_loss(self, record):
        values = super().per_token_loss(record)
        self.records = (*self.records, (record, values.detach()))
        return values


LORA = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
OPTIONS = {
    "nll": {},
    "completion_only": {"completion_only_loss": True},
    "whole_sequence": {"completion_only_loss": False},
    "packing": {"packing": True, "max_length": 32, "data": texts()},
    "padding_free": {"padding_free": True, "max_length": None},
    "accumulation": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    "checkpointing": {"gradient_checkpointing": True},
    "moe": {"model": tiny_mixtral},
    "lora": {"trainer_kwargs": {"peft_config": LORA}},
    "iterable": {"data": sums().to_iterable_dataset()},
    "eval": {"eval_strategy": "steps", "eval_steps": 1, "trainer_kwargs": {"eval_dataset": sums(5)}},
    "bf16": {"bf16": True},
}
UNSTAGED = {"dft": {"loss_type": "dft"}, "label_smoothing": {"label_smoothing_factor": 0.1}}


def trainers(tokenizer, folder, classes, model=tiny_llama, **options):
    for trainer_class, config_class in classes:
        yield make(trainer_class, config_class, tokenizer, folder, model=model(tokenizer), **options)


class TestEqualsTRL:
    @pytest.mark.parametrize("option", OPTIONS)
    def test_stages(self, option, tokenizer, tmp_path):
        classes = ((SFTTrainer, SFTConfig), (StagedTrainer, SupervisedConfig))
        (loss, gradients), (found_loss, found_gradients) = (
            loss_and_gradients(t) for t in trainers(tokenizer, tmp_path, classes, **OPTIONS[option])
        )
        assert torch.equal(found_loss, loss)
        assert gradients
        assert_equal(found_gradients, gradients)

    @pytest.mark.parametrize("option", OPTIONS)
    def test_trajectory_and_metrics(self, option, tokenizer, tmp_path):
        classes = ((SFTTrainer, SFTConfig), (StagedTrainer, SupervisedConfig))
        theirs, ours = trainers(tokenizer, tmp_path, classes, **OPTIONS[option])
        theirs.train()
        ours.train()
        assert_equal(weights(ours), weights(theirs))
        found = [{n: v for n, v in entry.items() if "loss/token" not in n} for entry in history(ours)]
        assert found == history(theirs)
        assert sum("loss/token" in entry for entry in history(ours)) == 3

    @pytest.mark.parametrize("option", UNSTAGED)
    def test_without_stages(self, option, tokenizer, tmp_path):
        classes = ((SFTTrainer, SFTConfig), (SupervisedTrainer, SupervisedConfig))
        theirs, ours = trainers(tokenizer, tmp_path, classes, **UNSTAGED[option])
        theirs.train()
        ours.train()
        assert_equal(weights(ours), weights(theirs))
        assert history(ours) == history(theirs)

    def test_logits_for_metrics(self, tokenizer, tmp_path):
        def compute_metrics(prediction):
            return {"logits": float(abs(prediction.predictions).sum())}

        options = {"trainer_kwargs": {"eval_dataset": sums(5), "compute_metrics": compute_metrics}}
        classes = ((SFTTrainer, SFTConfig), (StagedTrainer, SupervisedConfig))
        theirs, ours = (t.evaluate()["eval_logits"] for t in trainers(tokenizer, tmp_path, classes, **options))
        assert ours == theirs > 0


class TestStages:
    def test_sum_of_weighted_loss_and_terms(self, tokenizer, tmp_path):
        trainer = make(RecordingTrainer, SupervisedConfig, tokenizer, tmp_path)
        loss, _ = loss_and_gradients(trainer, num_items_in_batch=37)
        ((record, values),) = trainer.records
        expected, likely, chosen = 0.0, 0.0, []
        for row in range(4):
            for t in range(record.log_probs.shape[1]):
                if record.label_mask[row, t]:
                    log_prob = record.log_probs[row, t].item()
                    chosen.append(log_prob > LIKELY)
                    expected += -log_prob * (0.5 if row % 2 else 1.0) + 0.25 * log_prob * chosen[-1]
                    likely += log_prob * chosen[-1]
        assert any(chosen) and not all(chosen)
        assert loss.item() == pytest.approx(expected / 37, rel=1e-5)
        assert values.sum().item() == pytest.approx(expected, rel=1e-5)
        logged = trainer._metrics["train"]["loss/likely"][0].item()
        assert logged == pytest.approx(likely / len(chosen), rel=1e-5)

    def test_examples_are_the_same_without_padding(self, tokenizer, tmp_path):
        padded = make(RecordingTrainer, SupervisedConfig, tokenizer, tmp_path)
        flat = make(RecordingTrainer, SupervisedConfig, tokenizer, tmp_path, padding_free=True, max_length=None)
        _, gradients = loss_and_gradients(padded)
        _, found = loss_and_gradients(flat)
        ((record, values),), ((flat_record, flat_values),) = padded.records, flat.records
        assert flat_record.num_examples == record.num_examples == 4
        assert flat_record.log_probs.shape[0] == 1
        mask, flat_mask = record.label_mask, flat_record.label_mask
        assert torch.equal(flat_record.example_ids[flat_mask].long(), record.example_ids[mask])
        torch.testing.assert_close(flat_values[flat_mask], values[mask], rtol=1e-5, atol=1e-6)
        assert_close(found, gradients, rtol=1e-4, atol=1e-6)

    def test_methods_combine(self, tokenizer, tmp_path):
        both = compose(AsftSFTTrainer, HalvedTrainer)
        assert issubclass(both.config_class, AsftSFTConfig)
        trainer = make(both, both.config_class, tokenizer, tmp_path, asft_anchor_coef=0.5)
        trainer.train()
        assert {"loss/token", "loss/anchor", "loss/likely", "asft/kl_to_ref"} <= history(trainer)[0].keys()

        alone = make(AsftSFTTrainer, AsftSFTConfig, tokenizer, tmp_path, asft_anchor_coef=0.5)
        reversed_ = compose(HalvedTrainer, AsftSFTTrainer)
        again = make(reversed_, reversed_.config_class, tokenizer, tmp_path, asft_anchor_coef=0.5)
        again.train()
        alone.train()
        assert_close(weights(again), weights(trainer), rtol=1e-4, atol=1e-5)
        assert any(not torch.allclose(weights(alone)[n], w, atol=1e-4) for n, w in weights(trainer).items())

    def test_term_of_another_shape_is_refused(self, tokenizer, tmp_path):
        class PerRow(StagedTrainer):
            def extra_terms(self, record):
                return [LossTerm("rows", record.log_probs.sum(1))]

        trainer = make(PerRow, SupervisedConfig, tokenizer, tmp_path)
        with pytest.raises(ValueError, match="'rows' must have one value per token"):
            loss_and_gradients(trainer)


class TestWhoActs:
    def test_nobody_by_itself_nor_in_a_stage_of_the_step(self, tokenizer, tmp_path):
        trainer = make(
            SupervisedTrainer,
            SupervisedConfig,
            tokenizer,
            tmp_path,
            trainer_kwargs={"stages": {"after_backward": lambda: None}},
        )
        assert trainer.acting_in(*LOSS_STAGES) == []

    def test_a_function_of_the_user_and_a_class_without_a_method(self, tokenizer, tmp_path):
        class Doubled(SupervisedTrainer):
            def token_loss(self, record):
                return 2 * super().token_loss(record)

        def doubled(default):
            return 2 * default

        plain = make(SupervisedTrainer, SupervisedConfig, tokenizer, tmp_path)
        ours = make(Doubled, SupervisedConfig, tokenizer, tmp_path)
        theirs = make(
            SupervisedTrainer,
            SupervisedConfig,
            tokenizer,
            tmp_path,
            trainer_kwargs={"stages": {"token_loss": doubled}},
        )
        assert ours.acting_in(*LOSS_STAGES) == ["Doubled"] and theirs.acting_in(*LOSS_STAGES)[0].endswith("doubled")
        _, gradients = loss_and_gradients(plain)
        for trainer in (ours, theirs):
            _, found = loss_and_gradients(trainer)
            assert_equal(found, {name: 2 * gradient for name, gradient in gradients.items()})

    @pytest.mark.parametrize("coef", [0.0, 0.5])
    def test_fields_on_demand_follow_the_settings(self, coef, tokenizer, tmp_path):
        trainer = make(AsftSFTTrainer, AsftSFTConfig, tokenizer, tmp_path, asft_anchor_coef=coef)
        assert trainer.reads("policy") == trainer.reads("reference", "ref_log_probs") == (coef > 0)
        assert not trainer.reads("ref_log_probs") and trainer.acting_in(*LOSS_STAGES) == ["asft"]

    def test_unknown_field_is_refused(self):
        with pytest.raises(TypeError, match=r"`Odd.needs` names \['logits'\], but .*'policy', 'reference'"):

            class Odd(SupervisedTrainer):
                needs = {"logits": {}}

    def test_examples_of_a_step_are_counted_over_its_micro_batches(self, tokenizer, tmp_path):
        class Counting(RecordingTrainer):
            needs = {"labels_per_example": {}}

        data = sums(8)
        trainer = make(
            Counting, SupervisedConfig, tokenizer, tmp_path, data=data, max_steps=1, per_device_train_batch_size=2,
            gradient_accumulation_steps=4, trainer_kwargs={"eval_dataset": data},
        )  # fmt: skip
        trainer.train()
        trainer.evaluate()
        labels = sum(int(record.label_mask.sum()) for record, _ in trainer.records[:4])
        assert [record.labels_per_example for record, _ in trainer.records[:4]] == [pytest.approx(labels / 8)] * 4
        assert {record.labels_per_example for record, _ in trainer.records[4:]} == {None}


class TestRecord:
    def fields(self, **changes):
        shape = (2, 3)
        return {
            "label_mask": torch.ones(shape, dtype=torch.bool),
            "log_probs": torch.zeros(shape),
            "entropy": torch.zeros(shape),
            "is_top1": torch.zeros(shape, dtype=torch.bool),
            "example_ids": torch.zeros(shape, dtype=torch.long),
            "num_examples": 1,
        } | changes

    def test_accepts_what_it_states(self):
        assert SupervisedRecord(**self.fields()).policy is None

    @pytest.mark.parametrize(
        "changes",
        [
            {"log_probs": torch.zeros(2, 4)},
            {"example_ids": torch.zeros(2, dtype=torch.long)},
            {"label_mask": torch.ones(2, 3)},
            {"log_probs": torch.zeros(2, 3, dtype=torch.bfloat16)},
            {"entropy": torch.zeros(2, 3, requires_grad=True)},
        ],
        ids=["shape", "dimensions", "mask_dtype", "log_probs_dtype", "entropy_gradient"],
    )
    def test_refuses_the_rest(self, changes):
        with pytest.raises(ValueError, match=next(iter(changes))):
            SupervisedRecord(**self.fields(**changes))


class TestConstruction:
    def test_adopts_trl_config(self, tokenizer, tmp_path):
        args = SFTConfig(output_dir=str(tmp_path), **(QUIET | {"seed": 7}))
        trainer = AsftSFTTrainer(tiny_llama(tokenizer), args, None, sums(), processing_class=tokenizer)
        assert isinstance(trainer.args, AsftSFTConfig)
        assert (trainer.args.seed, trainer.args.asft_anchor_coef, trainer.args.asft_dft_weight_power) == (7, 0.1, 1.0)

    def test_adopts_training_arguments(self, tokenizer, tmp_path):
        args = TrainingArguments(output_dir=str(tmp_path), max_steps=2, use_cpu=True, report_to="none", hub_token="t")
        trainer = AsftSFTTrainer(tiny_llama(tokenizer), args, train_dataset=sums(), processing_class=tokenizer)
        assert (trainer.args.max_steps, trainer.args.hub_token, trainer.args.asft_anchor_coef) == (2, "t", 0.1)

    def test_default_config(self, tiny_path, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        # TRL's default is bf16, which transformers accepts on a CPU only with `use_cpu`
        monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
        trainer = AsftSFTTrainer(tiny_path, train_dataset=sums())
        assert trainer.args.output_dir.endswith("-AsftSFT")

    def test_empty_dataset(self, tokenizer, tmp_path):
        with pytest.raises(ValueError, match="`train_dataset` is empty"):
            make(SupervisedTrainer, SupervisedConfig, tokenizer, tmp_path, data=sums(0))

    @pytest.mark.parametrize(
        ("fields", "trainer_kwargs", "message"),
        [
            ({"label_smoothing_factor": 0.1}, {}, "label_smoothing_factor.*'asft'"),
            ({}, {"compute_loss_func": lambda outputs, labels, num_items_in_batch: 0.0}, "compute_loss_func.*'asft'"),
            ({"loss_type": "dft", "asft_dft_weight_power": 0.0}, {}, "loss_type='dft'.*'asft'"),
        ],
    )
    def test_options_outside_the_stages(self, fields, trainer_kwargs, message, tokenizer, tmp_path):
        with pytest.raises(ValueError, match=message):
            make(AsftSFTTrainer, AsftSFTConfig, tokenizer, tmp_path, trainer_kwargs=trainer_kwargs, **fields)
        neutral = fields | {"asft_anchor_coef": 0.0, "asft_dft_weight_power": 0.0}
        make(AsftSFTTrainer, AsftSFTConfig, tokenizer, tmp_path, trainer_kwargs=trainer_kwargs, **neutral)

    def test_batch_has_what_the_base_reads(self, tokenizer, tmp_path):
        trainer = make(SupervisedTrainer, SupervisedConfig, tokenizer, tmp_path, padding_free=True, max_length=None)
        assert {"seq_idx", "cu_seq_lens_q", "position_ids", "labels"} <= first_batch(trainer).keys()
