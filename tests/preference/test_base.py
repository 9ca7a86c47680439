"""`PreferenceTrainer` is `DPOTrainer`: same loss, gradients, metrics and trajectory, whatever the options."""

import pytest
import torch
from datasets import IterableDataset
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM
from trl import DPOConfig, DPOTrainer, SFTConfig

from papertrl.core.catalogue import load
from papertrl.core.declaration import Method
from papertrl.losses.preference.pair_losses import PAIR_LOSSES
from papertrl.trainers.preference.base import PreferenceConfig, PreferenceTrainer
from papertrl.trainers.preference.record import PreferenceRecord

from ..harness.pairs import (
    assert_same_tensors,
    first_batch,
    history,
    loss_and_gradients,
    make_trainer,
    of_trl,
    pairs,
    perturbed,
    recorded,
    weights,
)
from ..harness.table import objectives_of

CONFIGS = {DPOTrainer: DPOConfig, PreferenceTrainer: PreferenceConfig}
LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}

OPTIONS = {
    **{name: {"loss_type": [name]} for name in PAIR_LOSSES if name not in ("exo_pair", "robust")},
    "exo_pair": {"loss_type": ["exo_pair"], "label_smoothing": 1e-3},
    "robust": {"loss_type": ["robust"], "label_smoothing": 0.1},
    "aot_smoothed": {"loss_type": ["aot"], "label_smoothing": 0.2},
    "several_losses": {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    "ld_alpha": {"ld_alpha": 0.3},
    "ld_alpha_zero": {"ld_alpha": 0.0, "loss_type": ["ipo"]},
    "forward_kl": {"f_divergence_type": "forward_kl"},
    "js_divergence": {"f_divergence_type": "js_divergence", "loss_type": ["sigmoid_norm"]},
    "alpha_divergence": {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3},
    "alpha_divergence_one": {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.0},
    "weighting": {"use_weighting": True},
    "weighting_several": {"use_weighting": True, "loss_type": ["sigmoid", "apo_zero"], "loss_weights": [0.5, 2.0]},
    "precomputed": {"precompute_ref_log_probs": True, "ld_alpha": 0.5},
    "accumulation": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "truncation": {"max_length": 6},
    "sync_ref_model": {"sync_ref_model": True, "ref_model_sync_steps": 1},
    "checkpointing": {"gradient_checkpointing": True},
    "bf16": {"bf16": True},
}


def both(tiny_path, tokenizer, tmp_path, model=None, **options):
    """Parent and base with the same options; `model` makes a policy."""
    return [
        make_trainer(
            cls,
            tiny_path,
            tokenizer,
            tmp_path / cls.__name__,
            model=None if model is None else model(),
            config_class=config_class,
            **options,
        )
        for cls, config_class in ((DPOTrainer, DPOConfig), (PreferenceTrainer, PreferenceConfig))
    ]


def assert_equal_step(parent, base):
    batch = first_batch(parent)
    (parent_loss, parent_gradients), (base_loss, base_gradients) = (
        loss_and_gradients(t, batch) for t in (parent, base)
    )
    assert parent_loss.isfinite()
    assert any(g.abs().max() > 0 for g in parent_gradients.values())
    assert torch.equal(parent_loss, base_loss)
    assert_same_tensors(parent_gradients, base_gradients)
    parent_metrics, base_metrics = recorded(parent), recorded(base)
    assert of_trl(base_metrics) == pytest.approx(parent_metrics, rel=1e-5, abs=1e-7)
    # Both counted the batch's tokens
    parent._total_train_tokens = base._total_train_tokens = 0


def assert_equal_run(parent, base):
    for trainer in (parent, base):
        trainer.train()
    assert_same_tensors(weights(parent), weights(base))
    for parent_row, base_row in zip(history(parent), history(base), strict=True):
        assert of_trl(base_row) == pytest.approx(parent_row, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("option", OPTIONS)
def test_equals_trl(option, tiny_path, tokenizer, tmp_path):
    parent, base = both(tiny_path, tokenizer, tmp_path, ref_model=None, **OPTIONS[option])
    if option != "precomputed":
        # The policy starts away from the reference, which TRL loads from the tiny model's folder
        assert not torch.equal(next(base.model.parameters()), next(base.ref_model.parameters()))
    assert_equal_step(parent, base)
    assert_equal_run(parent, base)


@pytest.mark.parametrize("kind", ["new_adapter", "retrained_adapter", "prompt_tuning"])
def test_equals_trl_with_peft(kind, tiny_path, tokenizer, tmp_path):
    options, model = {}, None
    if kind == "retrained_adapter":
        # The frozen copy under the name "ref" is the reference
        def model():
            torch.manual_seed(0)
            return get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_path), LoraConfig(**LORA))
    elif kind == "new_adapter":
        options["peft_config"] = LoraConfig(**LORA)
    else:
        options["peft_config"] = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    parent, base = both(tiny_path, tokenizer, tmp_path, model=model, **options)
    assert ("ref" in base.model.peft_config) == (kind == "retrained_adapter")
    assert_equal_step(parent, base)
    assert_equal_run(parent, base)


def test_equals_trl_with_mixture_of_experts(tiny_path, tokenizer, tmp_path):
    def model(seed):
        torch.manual_seed(seed)
        return MixtralForCausalLM(
            MixtralConfig(
                vocab_size=len(tokenizer),
                hidden_size=16,
                intermediate_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                num_key_value_heads=2,
                num_local_experts=4,
                output_router_logits=True,
            )
        )

    parent, base = (
        make_trainer(
            cls,
            tiny_path,
            tokenizer,
            tmp_path / cls.__name__,
            model(0),
            model(1),
            config_class=DPOConfig,
            router_aux_loss_coef=0.5,
        )
        for cls in (DPOTrainer, PreferenceTrainer)
    )
    assert base.aux_loss_enabled
    assert_equal_step(parent, base)
    assert_equal_run(parent, base)


def test_evaluation_and_outputs_equal_trl(tiny_path, tokenizer, tmp_path):
    parent, base = both(tiny_path, tokenizer, tmp_path, eval_dataset=pairs(1).select(range(6)))
    parent_metrics, base_metrics = (
        {k: v for k, v in t.evaluate().items() if "runtime" not in k and "per_second" not in k} for t in (parent, base)
    )
    assert "eval_rewards/margins" in base_metrics
    assert of_trl(base_metrics) == pytest.approx(parent_metrics, rel=1e-5, abs=1e-7)
    batch = first_batch(parent)
    (parent_loss, parent_outputs), (base_loss, base_outputs) = (
        t.compute_loss(t.model, batch, return_outputs=True) for t in (parent, base)
    )
    assert torch.equal(parent_loss, base_loss)
    assert torch.equal(parent_outputs.logits, base_outputs.logits)


def test_further_model_inputs_reach_policy_and_reference(tiny_path, tokenizer, tmp_path):
    # As pixel values do for vision-language models
    parent, base = both(tiny_path, tokenizer, tmp_path)
    batch = first_batch(parent)
    plain, _ = loss_and_gradients(base, batch)
    batch["position_ids"] = 3 * torch.arange(batch["input_ids"].shape[1]).expand_as(batch["input_ids"])
    parent_loss, _ = loss_and_gradients(parent, batch)
    base_loss, _ = loss_and_gradients(base, batch)
    assert torch.equal(parent_loss, base_loss)
    assert not torch.equal(plain, base_loss)


def test_padding_does_not_leak(tiny_path, tokenizer, tmp_path):
    base = make_trainer(PreferenceTrainer, tiny_path, tokenizer, tmp_path, loss_type=["sigmoid", "sft"], ld_alpha=0.5)
    batch = first_batch(base)
    loss, gradients = loss_and_gradients(base, batch)
    metrics = recorded(base)
    wider = {name: torch.nn.functional.pad(rows, (0, 5)) for name, rows in batch.items()}
    wider["input_ids"][wider["attention_mask"] == 0] = 7
    wider_loss, wider_gradients = loss_and_gradients(base, wider)
    torch.testing.assert_close(wider_loss, loss)
    torch.testing.assert_close(wider_gradients, gradients)
    assert recorded(base)["rewards/margins"] == pytest.approx(metrics["rewards/margins"], rel=1e-4)


@pytest.mark.parametrize("lora", [False, True])
def test_score_sequences_agrees_with_the_record(lora, tiny_path, tokenizer, tmp_path):
    options = {"peft_config": LoraConfig(**LORA)} if lora else {}
    base = make_trainer(PreferenceTrainer, tiny_path, tokenizer, tmp_path, **options)
    batch = first_batch(base)
    record = base.statistics(base.model, batch)
    sequences = [batch[name] for name in ("input_ids", "attention_mask", "completion_mask")]
    policy = base.score_sequences(base.model, *sequences)
    reference = base.score_sequences(base.model, *sequences, role="reference")
    assert torch.equal(policy, record.per_token_logps)
    assert torch.equal(reference, record.ref_per_token_logps)
    assert policy.requires_grad
    assert not reference.requires_grad
    assert not torch.allclose(policy, reference)
    with pytest.raises(ValueError, match="`role` must be 'policy' or 'reference', got 'teacher'"):
        base.score_sequences(base.model, *sequences, role="teacher")


def test_record_refuses_what_breaks_its_contract(tiny_path, tokenizer, tmp_path):
    base = make_trainer(PreferenceTrainer, tiny_path, tokenizer, tmp_path)
    record = base.statistics(base.model, first_batch(base))
    record.check_values()

    def changed(**fields):
        return PreferenceRecord(**{**record.__dict__, **fields})

    with pytest.raises(ValueError, match="logps` must be of shape"):
        changed(logps=record.logps[:-1])
    with pytest.raises(ValueError, match="even number of rows"):
        changed(input_ids=record.input_ids[:-1])
    with pytest.raises(ValueError, match="ref_logps` must be without gradient"):
        changed(ref_logps=record.logps)
    with pytest.raises(ValueError, match="marks padding as completion"):
        changed(completion_mask=torch.ones_like(record.completion_mask)).check_values()
    with pytest.raises(ValueError, match="not finite"):
        changed(per_token_logps=record.per_token_logps / 0).check_values()
    with pytest.raises(ValueError, match="not 0 outside the completion"):
        changed(per_token_logps=record.per_token_logps - 1).check_values()


def test_record_lengths_count_scored_tokens(tiny_path, tokenizer, tmp_path):
    base = make_trainer(PreferenceTrainer, tiny_path, tokenizer, tmp_path, check_records=True)
    batch = first_batch(base)
    base.compute_loss(base.model, batch)
    record = base.statistics(base.model, batch)
    expected = [sum(row[1:]) for row in batch["completion_mask"].tolist()]
    assert record.lengths.tolist() == expected
    torch.testing.assert_close(record.logratios, record.per_token_logps.sum(1) - record.ref_per_token_logps.sum(1))


def test_takes_trl_config_iterable_data_and_positional_arguments(tiny_path, tokenizer, tmp_path):
    args = DPOConfig(
        str(tmp_path), max_steps=2, bf16=False, use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True
    )
    stream = IterableDataset.from_generator(lambda: iter(pairs(4)))
    base = PreferenceTrainer(perturbed(tiny_path), None, args, None, stream, processing_class=tokenizer)
    assert type(base.args) is PreferenceConfig
    assert type(args) is DPOConfig
    assert base.train().global_step == 2


def test_refuses_bad_input(tiny_path, tokenizer, tmp_path):
    with pytest.raises(TypeError, match=r"`args` must be a `PreferenceConfig` or a `DPOConfig`, got `SFTConfig`"):
        PreferenceTrainer(tiny_path, args=SFTConfig(str(tmp_path), bf16=False, use_cpu=True), train_dataset=pairs())
    with pytest.raises(ValueError, match="`train_dataset` is empty"):
        make_trainer(PreferenceTrainer, tiny_path, tokenizer, tmp_path, dataset=pairs().select([]))
    base = make_trainer(PreferenceTrainer, tiny_path, tokenizer, tmp_path, loss_type=["sigmoyd"])
    with pytest.raises(ValueError, match=r"`loss_type` must be among .*'sigmoid'.* got 'sigmoyd'"):
        base.compute_loss(base.model, first_batch(base))


def test_weighting_works_with_every_pair_loss(tiny_path, tokenizer, tmp_path):
    # TRL multiplies in place, which breaks the backward pass of 'hinge' and 'sft'
    options = {"loss_type": ["hinge", "sft"], "beta": 0.5}
    weighted = make_trainer(PreferenceTrainer, tiny_path, tokenizer, tmp_path, use_weighting=True, **options)
    batch = first_batch(weighted)
    loss, gradients = loss_and_gradients(weighted, batch)
    record = weighted.statistics(weighted.model, batch)
    mask = record.shift_completion_mask
    hinge = (1 - 0.5 * (record.logratios[:4] - record.logratios[4:])).clamp(min=0)
    nll = -record.per_token_logps[:4].sum() / mask[:4].sum()
    aligned = ((record.per_token_logps - record.log_sum_sq_probs) * mask).sum(1) / mask.sum(1)
    weight = aligned.exp()[:4] * aligned.exp()[4:]
    torch.testing.assert_close(loss, (weight * hinge).mean() + nll * weight.mean())
    assert all(g.isfinite().all() for g in gradients.values())


class Columned(PreferenceTrainer):
    """Weighs a pair by a column, which is made from another, and says how likely its label is wrong."""

    method = Method("columned", family="preference")
    extends = {stage: {} for stage in ("prepare", "collate", "smoothing", "pair_weights")}
    config_class = PreferenceConfig
    _name, _tag_names, _paper = "C", ["trl"], {"title": "", "id": "", "citation": ""}

    def carried(self):
        return [*super().carried(), "doubled", "doubt"]

    def prepare(self, dataset, name):
        return super().prepare(dataset, name).map(lambda row: {"doubled": 2 * row["weight"]})

    def collate(self, examples):
        extras = {name: torch.tensor([row[name] for row in examples]) for name in ("doubled", "doubt")}
        return super().collate(examples) | extras

    def smoothing(self, record):
        return record.extras["doubt"]

    def pair_weights(self, record):
        return record.extras["doubled"]


@pytest.mark.parametrize("loss_type", [["sigmoid"], ["hinge", "ipo"], ["robust"], ["apo_zero"], ["sft"]])
def test_columns_reach_the_loss_and_smooth_every_one(loss_type, tiny_path, tokenizer, tmp_path):
    weights = [0.5 + 0.25 * i for i in range(16)]
    doubts = [(i % 5) / 4 for i in range(16)]
    dataset = pairs().add_column("weight", weights).add_column("doubt", doubts)
    flipped = dataset.rename_columns({"chosen": "rejected", "rejected": "chosen"})

    options = {"loss_type": loss_type, "label_smoothing": 0.1 if "robust" in loss_type else 0.0}

    def losses(data, cls=PreferenceTrainer):
        trainer = make_trainer(cls, tiny_path, tokenizer, tmp_path, dataset=data, **options)
        trainer.model.train()
        return [
            trainer.compute_loss(trainer.model, trainer._prepare_inputs(trainer.data_collator([row]))).item()
            for row in trainer.train_dataset
        ]

    expected = [
        2 * w * ((1 - a) * right + a * wrong)
        for w, a, right, wrong in zip(weights, doubts, losses(dataset), losses(flipped), strict=True)
    ]
    assert losses(dataset, Columned) == pytest.approx(expected, rel=1e-4, abs=1e-6)
    # Through the data loader, which drops columns that nobody declares
    trainer = make_trainer(Columned, tiny_path, tokenizer, tmp_path, dataset=dataset, loss_type=loss_type)
    batch = first_batch(trainer)
    assert batch["extras"].keys() == {"doubled", "doubt"} and len(batch["extras"]["doubt"]) == 4
    trainer.train()


def test_two_passes_of_precomputed_references_do_not_see_columns(tiny_path, tokenizer, tmp_path):
    dataset = pairs().add_column("weight", [1.0] * 16).add_column("doubt", [0.0] * 16)
    trainer = make_trainer(
        Columned, tiny_path, tokenizer, tmp_path, dataset=dataset, eval_dataset=dataset, precompute_ref_log_probs=True
    )
    assert trainer.evaluate()["eval_loss"] > 0


@pytest.mark.parametrize(
    ("unread", "read"),
    [
        ({"label_smoothing": 0.2}, {"loss_type": ["aot_unpaired"]}),
        ({"label_smoothing": 0.2}, {"loss_type": ["sft", "robust"]}),
        ({"discopop_tau": 0.3}, {"loss_type": ["discopop"]}),
        ({"loss_type": ["nca_pair"], "f_divergence_type": "js_divergence"}, {"loss_type": ["ipo"]}),
        ({"f_alpha_divergence_coef": 0.3}, {"f_divergence_type": "alpha_divergence"}),
    ],
)
def test_settings_of_losses_that_no_loss_reads_are_refused(unread, read, tiny_path, tokenizer, tmp_path):
    """TRL takes them and goes on without; a method's losses are those of the base, or refuse by themselves."""
    name = list(unread)[-1]
    for config_class in {load(method).config_class for method in objectives_of("preference")} | {PreferenceConfig}:
        with pytest.raises(ValueError, match="|".join(f"`{setting}" for setting in unread)):
            config_class(str(tmp_path), bf16=False, use_cpu=True, **unread)
    # With what reads it, it changes the loss as in TRL
    plain = {k: v for k, v in (unread | read).items() if k != name}
    for cls in (DPOTrainer, PreferenceTrainer):
        found = [
            loss_and_gradients(trainer, first_batch(trainer))[0].item()
            for options in (unread | read, plain)
            for trainer in [make_trainer(cls, tiny_path, tokenizer, tmp_path, config_class=CONFIGS[cls], **options)]
        ]
        assert found[0] != pytest.approx(found[1], rel=1e-6)


def test_two_that_move_the_reference_are_refused(tmp_path):
    moving = {"online_iterations": 2, "online_reference": "ema", "sync_ref_model": True}
    with pytest.raises(ValueError, match="`sync_ref_model` must be False with `online_reference='ema'`"):
        PreferenceConfig(str(tmp_path), bf16=False, use_cpu=True, **moving)
