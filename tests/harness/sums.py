"""Small models, data and runs that the supervised tests share."""

import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

QUIET = {
    "bf16": False,
    "gradient_checkpointing": False,
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
    "save_strategy": "no",
    "logging_steps": 1,
    "max_steps": 3,
    "learning_rate": 1e-2,
    "per_device_train_batch_size": 4,
}
RUN_TIMES = ("runtime", "per_second")


def sums(rows=16):
    """Prompt-completion rows of different lengths."""
    return Dataset.from_list([{"prompt": f"{a}+{7 * a}=", "completion": f"{8 * a}"} for a in range(rows)])


def texts(rows=16):
    return Dataset.from_list([{"text": f"{a}+{7 * a}={8 * a}"} for a in range(rows)])


def _tiny(tokenizer):
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.3,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }


def tiny_llama(tokenizer, seed=0, **options):
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**_tiny(tokenizer), **options))


def tiny_mixtral(tokenizer, seed=0):
    torch.manual_seed(seed)
    routing = {"num_local_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.1}
    return MixtralForCausalLM(MixtralConfig(**_tiny(tokenizer), **routing, output_router_logits=True))


def make(trainer_class, config_class, tokenizer, folder, model=None, data=None, trainer_kwargs=None, **fields):
    """Trainer on a tiny model and quiet settings; the same arguments give the same initial weights."""
    return trainer_class(
        tiny_llama(tokenizer) if model is None else model,
        config_class(output_dir=str(folder), **(QUIET | fields)),
        train_dataset=sums() if data is None else data,
        processing_class=tokenizer,
        **(trainer_kwargs or {}),
    )


def history(trainer):
    """What was logged, without the clock."""
    return [
        {name: value for name, value in entry.items() if not any(part in name for part in RUN_TIMES)}
        for entry in trainer.state.log_history
    ]


def weights(trainer):
    return {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}


def first_batch(trainer):
    """The same batch whenever it is asked for."""
    torch.manual_seed(0)
    return trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))


def loss_and_gradients(trainer, num_items_in_batch=37):
    """Loss of the first batch and the gradient of every parameter that has one."""
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    loss = trainer.compute_loss(
        trainer.model, first_batch(trainer), num_items_in_batch=torch.tensor(num_items_in_batch)
    )
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def assert_close(found, expected, **tolerance):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, msg=lambda text, name=name: f"{name}: {text}", **tolerance)
