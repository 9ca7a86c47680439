"""All contact with the inside of TRL's `DPOTrainer`: its methods that the family overrides, behind the stages."""

import warnings
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from trl import DPOTrainer
from trl.trainer.dpo_trainer import global_then_local_main_first

from ..answering import AnswersPrompts
from ..method import MethodTrainer
from ..reduction import mean_of_terms
from ..reference import trainable_kept
from ..sharing import SharesPrompts
from .collation import model_inputs_of
from .record import PreferenceRecord

# First half of the SHA-256 of the source of what this family relies on in TRL; tests/test_pinned.py
PINNED = {
    "trl.trainer.dpo_trainer.DPOTrainer.__init__": "632f447c71dcb04361800303be2192d8",
    "trl.trainer.dpo_trainer.DPOTrainer._prepare_dataset": "35e349e8e8266df4a098b8c0b9949729",
    "trl.trainer.dpo_trainer.DPOTrainer._set_signature_columns_if_needed": "71225a628baed4cb39147a4d594b56a5",
    "trl.trainer.dpo_trainer.DPOTrainer._compute_loss": "5e58a1699e0d76cd093095fa24cfe6ca",
    "trl.trainer.dpo_trainer.DPOTrainer.compute_loss": "c453890e84beb4cb26a59d98dc6c98d0",
    "trl.trainer.dpo_trainer.DPOTrainer.compute_ref_log_probs": "90611af9cbadb8ecfe0152f237177bea",
    "trl.trainer.dpo_trainer.DPOTrainer.log": "e80e122cfe5fd8ad2b36edb3fe106ed2",
    "trl.trainer.dpo_trainer.DataCollatorForPreference.torch_call": "0b8bb4c294bf8420e407a8ba9fa616ec",
    "trl.trainer.utils.add_fused_lm_head": "422d009f04b66659982f9545a90d560b",
    "trl.trainer.utils.use_adapter": "edd0e493f99fa68595b34e5f8e26b7b1",
    "trl.trainer.utils.flush_left": "8454fdab9ffeacb418d44f224eef1a1f",
    "trl.models.utils.disable_gradient_checkpointing": "1f3a5e7ca9cb59025b228c02d9e823f9",
    "trl.models.utils.unwrap_model_for_generation": "583d1303c5c55405c0c7b62819e64a19",
    "transformers.trainer.Trainer._load_from_checkpoint": "a2804e8d93a297e30d11e1589e707793",
    "transformers.trainer.Trainer._run_epoch": "31aff00f34c302a241b458727e59ae4b",
    "transformers.trainer.Trainer.get_batch_samples": "0b3727386f73f67053b12b91e01c6967",
    "trl.data_utils.common_prefix_length": "34e85554d52b8011c30a25cca000048c",
    "trl.trainer.utils.pad": "5b5cbf5245d686e0d2530e5130eaf2b6",
    "trl.distributed.DistributedBackend": "df5f1ebf26636f63193beaf5e23301d4",
}


class OpenedDPOTrainer(MethodTrainer, AnswersPrompts, SharesPrompts, DPOTrainer):
    """[`~trl.DPOTrainer`] that calls the stages, which [`~papertrl.PreferenceTrainer`] adds."""

    # --- Rows ---------------------------------------------------------------------------------------------------

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        if dataset is self._prompts:
            return dataset
        with global_then_local_main_first():
            dataset = self.as_pairs(dataset)
        dataset = super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        with global_then_local_main_first():
            return self.prepare(dataset, dataset_name)

    def tokenize_pairs(self, dataset: Dataset | IterableDataset, name: str) -> Dataset | IterableDataset:
        """
        Service: rows with `prompt_ids`, `chosen_ids` and `rejected_ids`, as TRL makes them; without the stage
        *prepare*. `name` stands in progress bars.
        """
        return super()._prepare_dataset(dataset, self.processing_class, self.args, name)

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        self._signature_columns += [name for name in self.carried() if name not in self._signature_columns]

    def get_train_dataloader(self):
        return super().get_train_dataloader() if self.online is None else self.online.dataloader()

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        return (batches, num_items) if self.online is None else (self.online.batches(len(batches)), None)

    def compute_ref_log_probs(self, model, inputs):
        with trainable_kept(self.accelerator.unwrap_model(self.model)):
            return super().compute_ref_log_probs(model, {k: v for k, v in inputs.items() if k != "extras"})

    # --- The step -----------------------------------------------------------------------------------------------

    def _compute_loss(self, model, inputs, return_outputs):
        samples = self.sample(inputs)
        record = self._evaluate_pairs(model, inputs, samples, [])
        # Added up in one order, whatever that of the methods
        extra_terms = sorted(self.extra_terms(model, record), key=attrgetter("name"))
        self.observe_rows(sum(term.values * term.coef for term in record.pair_losses))

        loss = pair_loss = mean_of_terms(record.pair_losses, self.accelerator)
        if record.aux_loss is not None:
            loss = loss + self.router_aux_loss_coef * record.aux_loss
        if extra_terms:
            loss = loss + mean_of_terms(extra_terms, self.accelerator)
            self.log_mean("loss/pair", pair_loss, torch.ones_like(pair_loss))
            for term in extra_terms:
                self.log_mean(f"loss/{term.name}", term.sum(), term.count())
        self._log_tokens(record)
        self._log_rewards(record)
        if not return_outputs:
            return loss
        warnings.warn(
            "`return_outputs=True` and the logits it passes to `compute_metrics` are deprecated in TRL; they cost a "
            "further forward pass.",
            FutureWarning,
            stacklevel=2,
        )
        with torch.no_grad():
            return loss, model(**model_inputs_of(inputs), use_cache=False)

    # On the device where the stage *sample* counted them, so that nothing waits for it
    _sampled_tokens: int | torch.Tensor = 0

    @property
    def sampled_tokens(self) -> int:
        """Completion tokens that the run has sampled, on all ranks: by the stage *sample*, and in rounds."""
        return int(self._sampled_tokens)

    def count_sampled(self, tokens: int) -> None:
        """Count completion tokens, of all ranks, that were sampled outside of the stage *sample*."""
        self._sampled_tokens = self._sampled_tokens + tokens

    @property
    def trained_tokens(self) -> int:
        """Tokens of pairs, prompts with them, that the run has trained on, on all ranks: TRL's `num_tokens`."""
        return int(self._total_train_tokens)

    def _log_tokens(self, record: PreferenceRecord) -> None:
        mask = record.shift_completion_mask
        chosen_mask, rejected_mask = mask.chunk(2)
        chosen_logits, rejected_logits = record.mean_logits.chunk(2)
        chosen_is_top1, _ = record.is_top1.chunk(2)
        local = {
            "processed": record.attention_mask.sum(),
            "scored": mask.sum(),
            "chosen": chosen_mask.sum(),
            "rejected": rejected_mask.sum(),
            "entropy": (record.entropy * mask).sum(),
            "logits/chosen": (chosen_logits * chosen_mask).sum(),
            "logits/rejected": (rejected_logits * rejected_mask).sum(),
            "top1": (chosen_is_top1 * chosen_mask).sum(),
        }
        if record.aux_loss is not None:
            local |= {"aux_loss": record.aux_loss.detach(), "ranks": torch.ones_like(record.aux_loss)}
        if record.samples:
            local["sampled"] = sum(samples.completion_mask.sum() for samples in record.samples.values())
        gathered = self.accelerator.gather_for_metrics(torch.stack([v.float() for v in local.values()])[None])
        total = dict(zip(local, gathered.sum(0), strict=True))

        def log_ratio(name: str, numerator: str, denominator: str) -> None:
            self.log_metric(name, total[numerator] / total[denominator].clamp(min=1))

        log_ratio("entropy", "entropy", "scored")
        log_ratio("logits/chosen", "logits/chosen", "chosen")
        log_ratio("logits/rejected", "logits/rejected", "rejected")
        log_ratio("mean_token_accuracy", "top1", "chosen")
        if record.aux_loss is not None:
            log_ratio("aux_loss", "aux_loss", "ranks")
        if record.samples:
            self._sampled_tokens = self._sampled_tokens + total["sampled"].long()
        if self.model.training:
            # Kept on the device: nothing waits for it until the log is written
            self._total_train_tokens = self._total_train_tokens + total["processed"].long() // self._tp_size
        self._metrics["train" if self.model.training else "eval"]["num_tokens"] = [self._total_train_tokens]

    def _log_rewards(self, record: PreferenceRecord) -> None:
        chosen_rewards, rejected_rewards = (self.beta * record.logratios.detach()).chunk(2)
        chosen_logps, rejected_logps = record.logps.detach().chunk(2)
        per_pair = {
            "rewards/chosen": chosen_rewards,
            "rewards/rejected": rejected_rewards,
            "rewards/accuracies": chosen_rewards > rejected_rewards,
            "rewards/margins": chosen_rewards - rejected_rewards,
            # On the scale that the losses see, which methods may have changed
            "rewards/optimized_margins": self.beta * record.margins.detach(),
            "logps/chosen": chosen_logps,
            "logps/rejected": rejected_logps,
        }
        gathered = self.accelerator.gather(torch.stack([v.float() for v in per_pair.values()], dim=1))
        for name, value in zip(per_pair, gathered.mean(0), strict=True):
            self.log_metric(name, value)

    # --- The run ------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        if self.online is not None:
            self.online.start(resume_from_checkpoint)
        result = super().train(resume_from_checkpoint, *args, **kwargs)
        self.after_training()
        return result

    def create_optimizer(self, model=None):
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if is_new:
            self.set_up_optimizer(optimizer)
        return optimizer

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        self.check_checkpoint(Path(resume_from_checkpoint))
        with trainable_kept(self.accelerator.unwrap_model(self.model)):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def method_state(self) -> dict[str, Any]:
        counts = {"num_tokens": self.trained_tokens, "sampled_tokens": self.sampled_tokens}
        moved = {} if self.online is None else self.online.reference.state()
        return {**super().method_state(), **moved, **counts}

    def load_method_state(self, state: dict[str, Any]) -> None:
        super().load_method_state(state)
        self._total_train_tokens, self._sampled_tokens = state["num_tokens"], state.get("sampled_tokens", 0)
        if self.online is not None:
            self.online.reference.load_state(state)
