"""What the tests of the preference family share: pairs of digit strings and trainers on the tiny model."""

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

from papertrl.trainers.preference.base import PreferenceConfig

PROMPTS = ["1+1=", "22", "5+33=", "7", "40-1=", "123456", "8*8=", "9"]
CHOSEN = ["2", "4444", "38", "123", "39", "7", "64", "0123456"]
REJECTED = ["33333", "1", "9", "4567", "41", "8", "16161616", "3"]


def pairs(repeat: int = 2) -> Dataset:
    return Dataset.from_dict({"prompt": PROMPTS * repeat, "chosen": CHOSEN * repeat, "rejected": REJECTED * repeat})


def perturbed(tiny_path: str, seed: int = 1, scale: float = 0.05):
    """The tiny model with noise on its weights, so that policy and reference differ."""
    model = AutoModelForCausalLM.from_pretrained(tiny_path)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return model


def warmed(tiny_path: str, tokenizer, texts: list[str], steps: int = 80):
    """The tiny model after imitating `texts`, for tasks on which a random policy would show nothing."""
    model = perturbed(tiny_path)
    encoded = tokenizer([text + tokenizer.eos_token for text in texts], padding=True, padding_side="right")
    ids, mask = torch.tensor(encoded["input_ids"]), torch.tensor(encoded["attention_mask"])
    labels = ids.masked_fill(mask == 0, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(steps):
        model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def make_trainer(cls, tiny_path, tokenizer, output_dir, model=None, ref_model=None, dataset=None, **overrides):
    """Trainer of class `cls`, the reference being the tiny model and the policy a perturbed copy of it."""
    passed = ("peft_config", "eval_dataset", "reward_funcs", "judge", "stages")
    trainer_kwargs = {k: overrides.pop(k) for k in passed if k in overrides}
    options = {
        "output_dir": str(output_dir),
        "bf16": False,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "max_steps": 2,
        "logging_steps": 1,
        "learning_rate": 1e-3,
    }
    config_class = overrides.pop("config_class", None) or cls.config_class
    if issubclass(config_class, PreferenceConfig):
        # Equal to the bit only where the passes are TRL's; test_efficiency.py is about the others
        options["share_prompts"] = False
    return cls(
        perturbed(tiny_path) if model is None else model,
        ref_model,
        config_class(**{**options, **overrides}),
        train_dataset=pairs() if dataset is None else dataset,
        processing_class=tokenizer,
        **trainer_kwargs,
    )


def first_batch(trainer) -> dict:
    return trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))


def loss_and_gradients(trainer, batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss of one batch in training mode and the gradient of every parameter; metrics of the call stay recorded."""
    trainer.model.train()
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}
    trainer.model.zero_grad()
    return loss.detach(), gradients


def recorded(trainer, mode: str = "train") -> dict[str, float]:
    """Metrics recorded since the last log, then cleared."""
    metrics = {name: float(sum(values) / len(values)) for name, values in trainer._metrics[mode].items()}
    trainer._metrics[mode].clear()
    return metrics


def of_trl(metrics: dict) -> dict:
    """Without what the base logs beside TRL's metrics."""
    return {name: value for name, value in metrics.items() if not name.endswith("rewards/optimized_margins")}


def history(trainer, skip=("train_runtime", "train_samples_per_second", "train_steps_per_second")) -> list[dict]:
    return [{k: v for k, v in row.items() if k not in skip} for row in trainer.state.log_history]


def weights(trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def assert_same_tensors(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different, f"different: {different}"
