"""Every method of TRL's that the policy family overrides: each hands its part of the step to the stages."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from accelerate.utils import DistributedType

from ..sharing import SharesPrompts
from .batch import GenerationBatch
from .batching import MicroBatches
from .budget import PassTokens, TokenBudget, take_passes
from .loss import policy_loss
from .passes import score_tokens
from .record import RolloutRecord
from .sampling import fast_rollouts, tokenizer_for_generate
from .services import PolicyServices

# First half of the SHA-256 of the source of what this family relies on in TRL; tests/test_pinned.py
PINNED = {
    "trl.trainer.grpo_trainer.GRPOTrainer.__init__": "18f01b7a46c9544b23d74e822bafa4cb",
    "trl.trainer.grpo_trainer.GRPOTrainer._prepare_inputs": "f824e7fb0714795697c9b4d574de1e13",
    "trl.trainer.grpo_trainer.GRPOTrainer._generate": "2a27fdf8f5e6f3562508eec3efb9e9da",
    "trl.trainer.grpo_trainer.GRPOTrainer._generate_single_turn": "e0f02e4fc094cefdb306c6f04da26a25",
    "trl.trainer.grpo_trainer.GRPOTrainer._generate_and_score_completions": "1fa48922792dcd5c72da155cfe99db47",
    "trl.trainer.grpo_trainer.GRPOTrainer._calculate_rewards": "736ae29b083840b5da2638b55ad12586",
    "trl.trainer.grpo_trainer.GRPOTrainer._tokenize_prompts": "d2d27f7c9bfda85f1c3225785fa2f094",
    "trl.trainer.grpo_trainer.GRPOTrainer._get_per_token_logps_and_entropies": "ea73c3909275851d0cd664b1e7694905",
    "trl.trainer.grpo_trainer.GRPOTrainer.get_high_entropy_mask": "ce6e86287bac23d6cc5d6c08a5f72e4b",
    "trl.trainer.grpo_trainer.GRPOTrainer.get_off_policy_mask": "8ee1e196461141a71a87b47d4d1a0d2e",
    "trl.trainer.grpo_trainer.GRPOTrainer.get_gamma_weights": "3b5fa9ea16cbd80265afa79f4af0239f",
    "trl.trainer.grpo_trainer.GRPOTrainer._compute_loss": "80295546bbdbf6f711acce7f6e69b010",
    "trl.trainer.grpo_trainer.GRPOTrainer._get_train_sampler": "36497afb4d311dc9a80d914d27893fe0",
    "trl.trainer.grpo_trainer.GRPOTrainer.log": "1e7772819cc8cf0980bc9f0b48d6c1c3",
    "trl.trainer.grpo_trainer.GRPOTrainer._save_checkpoint": "ec91bde1236491119dc68afed1d02f08",
    "trl.trainer.grpo_trainer.GRPOTrainer._load_optimizer_and_scheduler": "5c1772becdfd7fdb07894217ecdb6dd7",
    "transformers.trainer.Trainer._run_epoch": "31aff00f34c302a241b458727e59ae4b",
    "transformers.trainer.Trainer.training_step": "e9760c8ee10308d5c1b90f667725374a",
    "transformers.trainer.Trainer._get_grad_norm": "913ba6f52f074d10a4981ffcaac608e9",
    "transformers.trainer.Trainer._evaluate": "64dfb995ce2027daf172a4f807e3d8fc",
    "trl.trainer.utils.RepeatSampler": "ba139f4a43eeecd4976bc51c850039df",
    "trl.trainer.utils.add_fused_lm_head": "422d009f04b66659982f9545a90d560b",
    "trl.trainer.utils.maybe_gather_lm_head_ctx": "d4d59d01150623ce15106e71fcf519a2",
    "trl.kernels.chunked_logprob.ChunkedLogProbFunction": "3661e8975a9f64cc39d250ecf3e2ae22",
}


class OpenedGRPOTrainer(SharesPrompts, PolicyServices):
    """
    [`~trl.GRPOTrainer`] whose steps are those of [`~papertrl.PolicyTrainer`]'s stages.

    Attributes:
        batching ([`MicroBatches`], *optional*):
            Cuts generation batches; `None` where they are cut as in TRL.
        budget ([`TokenBudget`], *optional*):
            Cuts what it gives each optimizer step into passes, where `max_tokens_per_micro_batch` is set.
    """

    batching: MicroBatches | None = None
    budget: TokenBudget | None = None
    # Totals and counts of means over the passes of an optimizer step, while they run
    _pooled: dict[str, torch.Tensor] | None = None
    _reference_only = False
    _sampled_tokens = 0

    # --- Generation ---------------------------------------------------------------------------------------------

    def _prepare_inputs(self, generation_batch):
        if self.batching is None or not self.model.training:
            return super()._prepare_inputs(generation_batch)
        steps = self.args.steps_per_generation
        if self._step % (steps * self.num_iterations) == 0 or self._buffered_inputs is None:
            record = RolloutRecord.from_batch(self._generate_and_score_completions(generation_batch))
            computed = torch.ones_like(record.group_ids, dtype=torch.bool)
            if self.args.skip_zero_rows:
                computed = self.contributing_rows(record)
            if self.budget is None:
                batches = self.batching.cut(record.group_ids, computed)
                self._buffered_inputs = [record.take(rows).as_batch() for rows in batches]
            else:
                batches, _ = self.batching.share_out(record.group_ids, computed)
                self._buffered_inputs = self._cut_by_tokens(record, [rows.tolist() for rows in batches])
            skipped = torch.tensor([len(computed) - sum(map(len, batches)), len(computed)], device=computed.device)
            self.log_mean("rows/skipped_fraction", *skipped)
        return self._buffered_inputs[self._step % steps]

    def _cut_by_tokens(self, record: RolloutRecord, windows: list[list[int]]) -> list[dict[str, Any]]:
        """Micro-batches of the rows of each optimizer step, with the passes that each of them takes."""
        width = record.prompt_ids.shape[1] + record.completion_ids.shape[1]
        tokens, groups = PassTokens(record, self.shares(width), self.pad_to_multiple_of), record.group_ids.tolist()
        cut = [self.budget.cut(rows, groups, tokens) for rows in windows]
        # Every rank makes equally many, at least one for each of the loop's micro-batches
        counts = torch.tensor(
            [[max(len(passes), self.budget.slots) for passes in cut]], device=record.group_ids.device
        )
        slots = [
            slot
            for passes, count in zip(cut, self.accelerator.gather(counts).amax(0).tolist(), strict=True)
            for slot in self.budget.spread(passes, count, groups, tokens)
        ]
        # One that has no effect, if there is any
        idle = set(range(len(groups))).difference(*windows)
        spare = min(idle or range(len(groups)), key=lambda row: tokens([row]))
        return [take_passes(record, passes, spare).as_batch() for passes in slots]

    def _generate_and_score_completions(self, inputs):
        self.generation = batch = GenerationBatch(self, inputs, self._makes_old_pass())
        try:
            batch.choose()
            with self._reference_on(self), self._own_masking():
                output = super()._generate_and_score_completions(batch.inputs)
            record = batch.finish(output)
        finally:
            self.generation = None
        if batch.training:
            self._trained_tokens += record.live_tokens()
        return record.as_batch()

    def _makes_old_pass(self) -> bool:
        """Whether TRL scores finished rollouts with the weights that sampled them, before any other pass."""
        generate_every = self.args.steps_per_generation * self.num_iterations
        return self.args.gradient_accumulation_steps % generate_every != 0 or (
            self.use_vllm and self.vllm_importance_sampling_correction
        )

    @contextmanager
    def _reference_on(self, holder: Any) -> Iterator[None]:
        """Make TRL build and run its reference, which it does where `holder.beta` is not 0."""
        if self._reference_only:
            holder.beta = 1.0
        try:
            yield
        finally:
            if self._reference_only:
                holder.beta = 0.0

    @contextmanager
    def _own_masking(self) -> Iterator[None]:
        """Keep TRL from masking completions that end by a stop string as truncated; the batch masks by its record."""
        kept = self.mask_truncated_completions
        self.mask_truncated_completions = kept and self.endings.stops is None
        try:
            yield
        finally:
            self.mask_truncated_completions = kept

    def _generate(self, prompts):
        # Between TRL's preparation of prompts and its use of completions
        self.generation.sample(prompts)
        rollouts = self.generation.rollouts
        # TRL goes on to log under the list it passed, which must name the rows that remain
        prompts[:] = rollouts.prompts
        self._pending_extra_logs.update(rollouts.log_extra)
        return rollouts.as_trl()

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, has_tool_images=False):
        fast = None
        if self.args.fast_rollouts and not (self.use_vllm or self.use_transformers_continuous_batching):
            fast = fast_rollouts(self, prompt_ids)
        if fast is None:
            by_generate = self.endings.stops is not None and not self.use_vllm
            with tokenizer_for_generate(self) if by_generate else nullcontext():
                completion_ids, logprobs = super()._generate_single_turn(
                    prompt_ids, images, multimodal_fields, num_generations, has_tool_images
                )
            if by_generate:
                # `generate` goes on with padding, of which TRL knows only what follows an end token
                completion_ids = self.endings.stops.cut(prompt_ids, completion_ids)
        else:
            completion_ids, logprobs = fast.completion_ids, fast.logprobs
        self._sampled_tokens += sum(map(len, completion_ids))
        return completion_ids, logprobs

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        return self.generation.scored.rewards

    def _get_per_token_logps_and_entropies(
        self, model, input_ids, attention_mask, logits_to_keep, batch_size=None, compute_entropy=False, **kwargs
    ):
        batch, needs = self.generation, frozenset()
        if batch is not None and batch.awaits_old_pass:
            input_ids, attention_mask, needs = batch.enter_pass(input_ids, attention_mask, logits_to_keep)
        if batch_size is not None and self.budget is not None and self.model.training:
            batch_size = self.rows_at_a_time(input_ids.shape[1])
        scores, aux_loss = score_tokens(
            self,
            model,
            input_ids,
            attention_mask,
            attention_mask[:, -logits_to_keep:].bool(),
            batch_size,
            needs | {"entropy"} if compute_entropy else needs,
            **kwargs,
        )
        if needs:
            batch.old_pass = scores
        return scores.logps, scores.entropies if compute_entropy else None, aux_loss

    def log_advantages(self, advantages: torch.Tensor) -> None:
        """Put advantages of all ranks' rows, `(rows,)`, in the place of those that TRL computed, in its log."""
        logged = self._logs["advantages"]
        for _ in range(min(len(advantages), len(logged))):
            logged.pop()
        logged.extend(advantages.tolist())

    # --- Updates ------------------------------------------------------------------------------------------------

    def _compute_loss(self, model, inputs):
        *earlier, last = RolloutRecord.from_batch(inputs).passes(self.pad_to_multiple_of)
        if self.budget is None or not self.model.training:
            return policy_loss(self, model, last)
        self._pooled = self._pooled or {}
        done = torch.zeros((), device=self.accelerator.device)
        for record in earlier:
            with self._more_to_come(model) as options:
                loss = policy_loss(self, model, record)
                self.accelerator.backward(loss, **options)
                self.after_backward()
            done += loss.detach()
        # Of the last one, the loop makes the backward pass
        loss = policy_loss(self, model, last)
        if (self._step + 1) % self.budget.slots == 0:
            pooled, self._pooled = self._pooled, None
            self.log_means({name: tuple(sums) for name, sums in pooled.items()})
        return loss + done

    @contextmanager
    def _more_to_come(self, model: torch.nn.Module) -> Iterator[dict[str, Any]]:
        """
        Around a pass that is not the last of its update: its gradient stays on this rank, and no update follows.

        Gives the options of `accelerator.backward`. As in the loop of transformers, which sees to it itself for
        micro-batches that are not the last.
        """
        state = self.accelerator.gradient_state
        deepspeed = self.accelerator.distributed_type == DistributedType.DEEPSPEED
        # The loss is scaled for accumulation already
        options = {"scale_wrt_gas": False} if deepspeed else {}
        if not state.sync_gradients:
            yield options
            return
        synced = deepspeed or state.plugin_kwargs.get("sync_each_batch", False)
        state._set_sync_gradients(False)
        try:
            with nullcontext() if synced else self.accelerator.no_sync(model):
                yield options
        finally:
            state._set_sync_gradients(True)

    def _evaluate(self, *args, **kwargs):
        metrics = super()._evaluate(*args, **kwargs)
        self.observe_evaluation(metrics)
        return metrics

    def _get_train_sampler(self, dataset=None):
        # A resume brings it to where it was
        self._train_sampler = super()._get_train_sampler(dataset)
        return self._train_sampler
