"""The paper's claim in small: wrong demonstrations hurt plain fine-tuning most and anchored fine-tuning least."""

import copy

import pytest
import torch
from datasets import Dataset

from papertrl import AsftSFTConfig, AsftSFTTrainer
from papertrl.models.tiny import tiny_model

from ..harness.sums import make

MODULUS, FIRST_TOKEN, WRONG, ROWS = 13, 4, 0.3, 80
PAIRS = torch.cartesian_prod(torch.arange(MODULUS), torch.arange(MODULUS))
PROMPTS, ANSWERS = PAIRS + FIRST_TOKEN, PAIRS.sum(1) % MODULUS + FIRST_TOKEN


def answer_logits(model):
    with torch.no_grad():
        return model.eval()(PROMPTS).logits[:, -1]


def accuracy(model):
    return (answer_logits(model).argmax(-1) == ANSWERS).float().mean().item()


@pytest.fixture(scope="module")
def base(tokenizer):
    """A model that adds modulo 13 without error."""
    torch.manual_seed(0)
    model = tiny_model(tokenizer, num_layers=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    for _ in range(300):
        loss = torch.nn.functional.cross_entropy(model(PROMPTS).logits[:, -1], ANSWERS)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert accuracy(model) == 1.0
    return model


@pytest.fixture(scope="module")
def demonstrations():
    """Sums, three in ten of them wrong."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randperm(len(PAIRS), generator=generator)[:ROWS]
    answers = ANSWERS[rows] - FIRST_TOKEN
    shift = torch.randint(1, MODULUS, (ROWS,), generator=generator)
    answers = torch.where(torch.rand(ROWS, generator=generator) < WRONG, (answers + shift) % MODULUS, answers)
    answers = (answers + FIRST_TOKEN).tolist()
    prompts = PROMPTS[rows].tolist()
    return Dataset.from_dict(
        {
            "input_ids": [[*prompt, answer] for prompt, answer in zip(prompts, answers, strict=True)],
            "labels": [[-100, -100, answer] for answer in answers],
        }
    )


def test_anchor_keeps_what_the_model_knew(base, demonstrations, tokenizer, tmp_path):
    def fine_tune(asft_anchor_coef, asft_dft_weight_power):
        trainer = make(
            AsftSFTTrainer,
            AsftSFTConfig,
            tokenizer,
            tmp_path,
            model=copy.deepcopy(base),
            data=demonstrations,
            asft_anchor_coef=asft_anchor_coef,
            asft_dft_weight_power=asft_dft_weight_power,
            max_steps=120,
            learning_rate=5e-4,
            lr_scheduler_type="constant",
            per_device_train_batch_size=32,
            logging_strategy="no",
            dataset_kwargs={"skip_prepare_dataset": True},
        )
        trainer.train()
        log_p, log_q = (answer_logits(model).log_softmax(-1) for model in (trainer.model, base))
        return accuracy(trainer.model), (log_q.exp() * (log_q - log_p)).sum(-1).mean().item()

    sft, _ = fine_tune(0.0, 0.0)
    dft, dft_drift = fine_tune(0.0, 1.0)
    asft, asft_drift = fine_tune(0.1, 1.0)
    strong, strong_drift = fine_tune(0.5, 1.0)
    # Measured: 0.62, 0.81, 0.92, 0.99 and 0.74, 0.24, 0.01 nats
    assert dft > sft + 0.1
    assert asft > max(dft + 0.05, sft + 0.2)
    assert strong >= asft
    assert strong_drift < 0.5 * asft_drift
    assert asft_drift < 0.5 * dft_drift
