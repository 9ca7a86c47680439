"""What the stages of a policy method may call, beside the metrics of [`~papertrl.trainers.method.MethodTrainer`]."""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import gather_object
from transformers import PreTrainedTokenizerBase
from trl import GRPOTrainer

from ...evaluation.sampling import GREEDY
from ...losses.policy.groups import by_group, weighted_sum
from ...losses.policy.surrogate import log_importance_weights
from ...rewards.checked import guarded
from .batch import GenerationBatch, score_groups
from .draft import Draft
from .objective import PolicyStatistics, column
from .passes import score_tokens
from .record import Generation, RolloutRecord, ScoredBatch

SEQUENCE_MEAN = ("grpo", "sapo")
GLOBAL_TOKEN_MEAN = ("cispo", "dapo", "vespo")


class PolicyServices(GRPOTrainer):
    """
    Services of [`~papertrl.PolicyTrainer`]. They override nothing of TRL's, and reach it past whatever does.

    `generation` is the [`GenerationBatch`] that is being made, `None` at other times.
    """

    generation: GenerationBatch | None = None

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """That of prompts and completions, also where a processor holds it."""
        return self._tokenizer

    @property
    def has_images(self) -> bool:
        """Whether the model reads images."""
        return self._is_vlm

    @property
    def learning_rate(self) -> float:
        """Learning rate of the coming optimizer step, that of the first group."""
        return self._get_learning_rate()

    # --- Rewards ------------------------------------------------------------------------------------------------

    def combined_rewards(self, scored: ScoredBatch) -> torch.Tensor:
        """
        What the stage *combine rewards* gives for rows as they are now, `(rows,)`, NaN on rows that no source scored.

        For stages before it: a filter sees groups by the reward that they would be trained on. The stage runs once
        more afterwards, for the rows that remain.
        """
        return self.combine_rewards(scored)

    def scaled(self, scored: ScoredBatch, rewards: torch.Tensor) -> torch.Tensor:
        """Advantages `(rows,)` of one reward per row, by the stages *baseline* and *scale*."""
        return self.scale(scored, rewards, rewards - self.baseline(scored, rewards))

    def solved(self, scored: ScoredBatch) -> torch.Tensor:
        """Rows `(rows,)` whose weighted reward, after the stage *score*, is above `success_threshold`."""
        return (
            weighted_sum(scored.rewards, self.reward_weights.to(scored.rewards.device)) > self.args.success_threshold
        )

    def solved_share(self, scored: ScoredBatch) -> torch.Tensor:
        """Share of each group's completions that are solved `(groups,)`; of those that were scored, NaN for none."""
        solved = self.solved(scored).float().masked_fill(scored.rewards.isnan().all(1), torch.nan)
        return torch.nanmean(by_group(solved, scored.group_ids), dim=1)

    # --- Ranks and randomness -----------------------------------------------------------------------------------

    def gather_ragged(self, values: torch.Tensor, fill: float) -> torch.Tensor:
        """
        Concatenate one-dimensional tensors of different lengths over ranks.

        Args:
            values (`torch.Tensor` of shape `(n,)`):
                This rank's values.
            fill (`float`):
                A number that does not occur among them.
        """
        gathered = self.accelerator.gather(self.accelerator.pad_across_processes(values, dim=0, pad_index=fill))
        return gathered[gathered != fill]

    # --- Completions --------------------------------------------------------------------------------------------

    def tokenize_prompts(self, prompts: list[Any]) -> list[list[int]]:
        """Tokens of prompts, each as text or messages, as the policy sees them."""
        return super()._tokenize_prompts(prompts)[0]

    def sample(self, prompt_ids: list[list[int]], max_tokens: int) -> tuple[list[list[int]], list[list[float]] | None]:
        """
        Sample one completion of each prompt, whether a prompt of the dataset or not; nothing of it is logged.

        Must be called on every rank, with equally many rows.

        Args:
            prompt_ids (`list[list[int]]`):
                Tokens of the prompts.
            max_tokens (`int`):
                Longest completion.

        Returns:
            Tokens of the completions, the end token included, and their log-probabilities under the distribution
            sampled from, `None` where the sampler does not give them.
        """
        # TRL makes the one or the other
        if self.use_vllm:
            holder, name = self.vllm_generation, "max_completion_length"
        else:
            holder, name = self.generation_config, "max_new_tokens"
        kept = getattr(holder, name)
        setattr(holder, name, max_tokens)
        try:
            return self._generate_single_turn(prompt_ids, None, {}, 1)
        finally:
            setattr(holder, name, kept)

    def answer(self, rows: list[dict[str, Any]], max_tokens: int) -> list[list[int]]:
        """Greedy completions on the way of training: its prompts, options, decoding components and backend."""
        counted = self._sampled_tokens
        if self.use_vllm:
            holder, greedy = self.vllm_generation, {"temperature": 0.0}
        else:
            holder, greedy = self.generation_config, GREEDY
        kept = {name: getattr(holder, name) for name in greedy}
        try:
            vars(holder).update(greedy)
            return self.sample(self.tokenize_prompts([row["prompt"] for row in rows]), max_tokens)[0]
        finally:
            vars(holder).update(kept)
            self._sampled_tokens = counted

    def generate(self, inputs: list[dict[str, Any]], prompts: list[Any]) -> Generation:
        """One completion for each of this rank's rows, sampled, decoded and logged as TRL does; see [`rollout`]."""
        generation = Generation.from_trl(inputs, prompts, super()._generate(prompts))
        if self.endings.stops is not None:
            self._log_finished(generation)
        return generation

    def _log_finished(self, generation: Generation) -> None:
        """Put what is finished by a stop string into the metrics in which TRL has just counted it as cut off."""
        finished = self.endings.finished(generation.prompt_ids, generation.completion_ids)
        lengths = map(sum, generation.tool_mask) if generation.tool_mask else map(len, generation.completion_ids)
        rows = torch.tensor(list(zip(lengths, finished, strict=True)), device=self.accelerator.device)
        lengths, finished = self.accelerator.gather(rows).float().unbind(1)
        lengths = lengths[finished.bool()] if finished.any() else torch.zeros(1)
        metrics = self._metrics["train" if self.model.training else "eval"]
        metrics["completions/clipped_ratio"][-1] = 1 - finished.mean().item()
        for name in ("mean", "min", "max"):
            metrics[f"completions/{name}_terminated_length"][-1] = getattr(lengths, name)().item()

    def complete(
        self,
        inputs: list[dict[str, Any]],
        prompts: list[Any],
        prompt_ids: list[list[int]],
        completion_ids: list[list[int]],
        sampling_logps: list[list[float | None]] | None = None,
    ) -> Generation:
        """
        What [`rollout`] gives, from completions that are there already: decoded and logged as TRL does.

        Must be called on every rank, with equally many rows.

        Args:
            inputs (`list[dict]`), prompts (`list`):
                As in [`rollout`].
            prompt_ids (`list[list[int]]`), completion_ids (`list[list[int]]`):
                Tokens of prompts and completions.
            sampling_logps (`list[list[float]]`, *optional*):
                Log-probabilities under the distribution sampled from, `None` where not known.
        """
        sampled = {"prompt_ids": prompt_ids, "completion_ids": completion_ids, "logprobs": sampling_logps}
        kept, self.rollout_func = self.rollout_func, lambda prompts, trainer: sampled
        try:
            return self.generate(inputs, prompts)
        finally:
            self.rollout_func = kept

    def reroll(self, inputs: list[dict[str, Any]], prompts: list[Any], group_size: int = 1) -> Draft:
        """
        Sample and score further completions, under prompts other than the dataset's.

        The rows are shared out among the ranks and come back to all of them. Ranks sample equally many: repeated rows
        fill up and are dropped. Must be called on every rank with the same arguments.

        Args:
            inputs (`list[dict]`):
                Dataset row of each completion, for the reward functions; at least one.
            prompts (`list`):
                What to sample it under, as text or messages.
            group_size (`int`, *optional*, defaults to 1):
                Adjacent rows that count as a group in the stage *score*.

        Returns:
            [`Draft`]: its rows hold the tokens of the prompt they were sampled under, and the dataset's prompt.
        """
        rank, world, count = self.accelerator.process_index, self.accelerator.num_processes, len(inputs)
        local = -(-count // world)
        part = [min(i, count - 1) for i in range(rank * local, (rank + 1) * local)]
        inputs, prompts = [inputs[i] for i in part], [prompts[i] for i in part]
        kept, self.num_generations = self.num_generations, 1
        try:
            with self.unlogged():
                generation = Generation.from_trl(inputs, [row["prompt"] for row in inputs], super()._generate(prompts))
                scored = score_groups(self, generation, group_size)
        finally:
            self.num_generations = kept
        return Draft(gather_object(generation.rows())[:count], scored.first(count))

    def verify(
        self,
        inputs: list[dict[str, Any]],
        prompts: list[Any],
        prompt_ids: list[list[int]],
        completion_ids: list[list[int]],
    ) -> torch.Tensor:
        """
        Rewards `(rows, sources)` of completions that are not rows of the batch; nothing of it is logged.

        Must be called on every rank, with equally many rows.

        Args:
            inputs (`list[dict]`), prompts (`list`):
                As in [`rollout`].
            prompt_ids (`list[list[int]]`), completion_ids (`list[list[int]]`):
                Tokens of prompts and completions.
        """
        seen, metrics = self.state.num_input_tokens_seen, self._pending_metrics
        self._pending_metrics = defaultdict(list)
        with self.unlogged():
            rewards = self.reward(self.complete(inputs, prompts, prompt_ids, completion_ids))
            self.state.num_input_tokens_seen = seen
        self._pending_metrics = metrics
        first = self.accelerator.process_index * len(inputs)
        return rewards[first : first + len(inputs)]

    def reward(self, generation: Generation) -> torch.Tensor:
        """
        What the reward functions return, `(rows of all ranks, sources)`, NaN where a source does not apply.

        What they log of each row goes into `generation.log_extra`.
        """
        kept = self.reward_funcs
        self.reward_funcs = [func if isinstance(func, torch.nn.Module) else guarded(func) for func in kept]
        try:
            rewards = super()._calculate_rewards(
                generation.inputs, generation.prompts, generation.completions, generation.completion_ids
            )
        finally:
            self.reward_funcs = kept
        generation.log_extra = dict(self._pending_extra_logs)
        self._pending_extra_logs.clear()
        return rewards

    @contextmanager
    def unlogged(self) -> Iterator[None]:
        """Keep what is logged out of the batch's metrics, but for the number of tokens."""
        kept = self._metrics
        self._metrics = {mode: defaultdict(list) for mode in kept}
        try:
            yield
        finally:
            self._metrics = kept
            self._metrics["train"]["num_tokens"] = [self.state.num_input_tokens_seen]

    # --- Passes and loss ----------------------------------------------------------------------------------------

    def score_rows(
        self,
        prompt_ids: torch.Tensor,
        prompt_mask: torch.Tensor,
        completion_ids: torch.Tensor,
        completion_mask: torch.Tensor,
        gradient: bool = False,
    ) -> torch.Tensor:
        """
        Log-probabilities of completions under the policy, `(rows, time)`, in nats at the sampling temperature.

        Args:
            prompt_ids, prompt_mask (`torch.Tensor` of shape `(rows, prompt_length)`):
                Prompts, padded on the left.
            completion_ids, completion_mask (`torch.Tensor` of shape `(rows, time)`):
                Completions, padded on the right.
            gradient (`bool`, *optional*, defaults to `False`):
                Whether they carry gradient.
        """
        with torch.set_grad_enabled(gradient):
            scores, _ = score_tokens(
                self,
                self.model,
                torch.cat([prompt_ids, completion_ids], dim=1),
                torch.cat([prompt_mask, completion_mask], dim=1),
                completion_mask.bool(),
                self.rows_at_a_time(prompt_ids.shape[1] + completion_ids.shape[1]),
            )
        return scores.logps

    def rows_at_a_time(self, length: int) -> int:
        """How many rows of `length` tokens, padding included, a pass takes where none are cut into micro-batches."""
        limit = self.args.max_tokens_per_micro_batch
        return self.args.per_device_train_batch_size if limit is None else max(1, limit // length)

    def policy_statistics(self, model: torch.nn.Module, record: RolloutRecord) -> PolicyStatistics:
        """
        The gradient-carrying pass over a micro-batch, before the stage *trust region*.

        Args:
            model (`torch.nn.Module`):
                The policy, wrapped or not.
            record ([`RolloutRecord`]):
                The micro-batch.
        """
        scores, aux_loss = score_tokens(
            self,
            model,
            torch.cat([record.prompt_ids, record.completion_ids], dim=1),
            torch.cat([record.prompt_mask, record.completion_mask], dim=1),
            record.loss_mask.bool(),
            needs=frozenset({"entropy"}),
            compute_aux_loss=self.aux_loss_enabled,
            **record.multimodal,
        )
        entropy_mask = None
        if self.top_entropy_quantile < 1.0:
            entropy_mask = self.get_high_entropy_mask(
                scores.entropies, record.loss_mask, 1 - self.top_entropy_quantile
            )
        old_logps = scores.logps.detach() if record.old_per_token_logps is None else record.old_per_token_logps
        # Tokens outside the loss may not have been scored
        log_ratio = (scores.logps - old_logps) * record.loss_mask
        ratio = torch.exp(log_importance_weights(log_ratio, record.loss_mask, self.importance_sampling_level))
        return PolicyStatistics(
            logps=scores.logps,
            entropies=scores.entropies,
            log_ratio=log_ratio,
            ratio=ratio,
            epsilon_low=self.epsilon_low,
            epsilon_high=self.epsilon_high,
            delta=self.args.delta,
            old_logps=old_logps,
            entropy_mask=entropy_mask,
            aux_loss=aux_loss,
        )

    def aggregate(self, values: torch.Tensor, record: RolloutRecord) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Reduce per-token `(batch, time)` or per-row `(batch,)` or `(batch, 1)` values as `loss_type` does.

        Returns the value scaled for accumulation and ranks, and the detached value that TRL logs.
        """
        values = column(values) * record.row_weight.unsqueeze(1)
        mask = record.loss_mask
        steps, micro_batches = self.steps_per_update(), self.micro_batches_per_generation()
        if self.loss_type in GLOBAL_TOKEN_MEAN:
            # The token count spans the generation batch: bring it to one accumulation window of one rank
            tokens = record.num_items_in_batch.clamp(min=1.0) / micro_batches
            loss = (values * mask).sum() / (tokens * steps)
            return loss, loss.detach()
        if self.loss_type == "bnpo":
            live = mask * (record.row_weight > 0).unsqueeze(1)
            loss = (values * mask).sum() / live.sum().clamp(min=1.0)
            return loss / steps, loss.detach()
        rows = (record.num_rows_in_batch / micro_batches).clamp(min=1.0 / micro_batches)
        if self.loss_type in SEQUENCE_MEAN:
            loss = ((values * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)).sum() / rows
        elif self.loss_type == "dr_grpo":
            loss = (values * mask).sum() / (rows * self.max_completion_length)
        else:
            loss = (values * mask).sum() / rows
        return loss / steps, loss.detach()

    def steps_per_update(self) -> float:
        """Micro-batches of this rank that one optimizer step accumulates; 1 in evaluation."""
        return self.current_gradient_accumulation_steps if self.model.training else 1.0

    def micro_batches_per_generation(self) -> int:
        """Micro-batches, of all ranks, that a generation batch is cut into."""
        return self.accelerator.num_processes * (self.args.steps_per_generation if self.model.training else 1)
