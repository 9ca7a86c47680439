"""Runs of a policy trainer that keep what passed through them, for comparison with computations by hand."""

import torch

from .table import dataset, settings


def recorded(trainer_class):
    """
    Subclass that keeps, in order, every generation batch and every micro-batch.

    `generations` holds `(scored, batch, model at that time, rows of the dataset)`, `micro_batches` holds `(batch,
    model at that time, loss)`.
    """

    class Recorded(trainer_class):
        def __init__(self, *args, **kwargs):
            self.generations, self.micro_batches = [], []
            super().__init__(*args, **kwargs)

        def _generate_and_score_completions(self, inputs):
            model = frozen(self.model)
            batch = super()._generate_and_score_completions(inputs)
            self.generations.append((self.finished.scored, dict(batch), model, list(self.finished.inputs)))
            return batch

        def prepare_objective(self, record):
            super().prepare_objective(record)
            self.finished = self.generation

        def _compute_loss(self, model, inputs):
            before = frozen(self.model)
            loss = super()._compute_loss(model, inputs)
            self.micro_batches.append((inputs, before, loss.detach()))
            return loss

    return Recorded


def checksum(completions, **kwargs):
    """Reward 1 for about half of all texts, whatever they are."""
    return [float(sum(map(ord, text)) % 2) for text in completions]


def make(trainer_class, model, output_dir, reward=checksum, data=None, eval_data=None, **values):
    """A recorded `trainer_class` on quiet settings; `reward` is one reward function or a list of them."""
    args = trainer_class.config_class(**settings("policy", output_dir, **({"check_records": True} | values)))
    data = dataset("policy") if data is None else data
    rewards = reward if isinstance(reward, list) else [reward]
    return recorded(trainer_class)(model, rewards, args, train_dataset=data, eval_dataset=eval_data)


def run(*args, **kwargs):
    """[`make`], trained."""
    trainer = make(*args, **kwargs)
    trainer.train()
    return trainer


def frozen(model):
    """Plain model with the present weights: a deep copy would share the forward that TRL puts on the original."""
    copy = type(model)(model.config)
    copy.load_state_dict(model.state_dict())
    return copy.eval()


def distributions(model, batch, temperature=1.0):
    """Log-probabilities `(batch, time, vocab)` that predict the completion tokens, from a plain forward pass."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    time = batch["completion_ids"].shape[1]
    logits = model(input_ids=ids, attention_mask=mask).logits[:, -time - 1 : -1]
    return torch.log_softmax(logits.float() / temperature, dim=-1)


def sampled(logps, batch):
    """Of `distributions`, those of the tokens that were sampled."""
    return logps.gather(2, batch["completion_ids"].unsqueeze(2)).squeeze(2)


def metric(trainer, name):
    """Logged values of one metric, step by step."""
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def gradients(loss, model):
    """Gradient of a loss with respect to every parameter of `model`."""
    named = dict(model.named_parameters())
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {name: g for name, g in zip(named, found, strict=True) if g is not None}
