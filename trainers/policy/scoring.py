"""How the policy family scores completions: one pass per distinct prompt, and the pass over finished rollouts."""

from contextlib import ExitStack
from dataclasses import dataclass

import torch
from trl.trainer.utils import pad

from ...models.observation import Pass, backbone, last_mlp, observe
from ..shared_prefix import SharesPrompts, shared_inputs
from .objective import PolicyObjective
from .record import MULTIMODAL_KEYS, Generation, RolloutRecord


@dataclass
class OldPass:
    """
    What the pass over finished rollouts, with the weights that sampled them, gave for this rank's rows.

    Args:
        logps (`torch.Tensor` of shape `(batch, time)`):
            Log-probabilities of the completion tokens at the sampling temperature, in nats.
        entropies (`torch.Tensor` of shape `(batch, time)`, *optional*), hidden_states (`torch.Tensor` of shape
            `(batch, time, hidden)`, *optional*): at the positions that predict the completion tokens; if asked for.
        mlp_inputs (`torch.Tensor` of shape `(batch, prompt_length + time, hidden)`, *optional*):
            Input of the last layer's MLP at every position; if asked for.
    """

    logps: torch.Tensor
    entropies: torch.Tensor | None
    hidden_states: torch.Tensor | None
    mlp_inputs: torch.Tensor | None


class PolicyScoring(SharesPrompts, PolicyObjective):
    """Passes of policy and reference over completions. The log-probabilities are TRL's; the work is less."""

    def old_pass_needs(self) -> frozenset[str]:
        """
        Stage *statistics*, first half: what `collect_statistics` needs of the pass over the rollouts.

        Any of `"logps"`, `"entropy"`, `"hidden_states"`, `"mlp_inputs"`. One pass serves all methods, and TRL itself
        where it makes one; with no needs there is no extra pass.
        """
        return frozenset().union(*(component.needs() for component in self.slots))

    def _set_up_scoring(self) -> None:
        self._capture_old_pass = False
        self._swap_prompts = False
        self._sampled_prompts: tuple[torch.Tensor, torch.Tensor] | None = None
        self._old_pass: OldPass | None = None
        self._set_up_sharing(self.temperature, self.args.cast_lm_head_to_fp32, ("log_probs", "entropy"))

    def _get_per_token_logps_and_entropies(
        self, model, input_ids, attention_mask, logits_to_keep, batch_size=None, compute_entropy=False, **kwargs
    ):
        # While a capture or a swap is due, the first pass is the one over the rollouts: TRL makes it before any other
        capture, self._capture_old_pass = self._capture_old_pass, False
        if self._swap_prompts:
            self._swap_prompts = False
            ids, mask = self._sampled_prompts
            input_ids = torch.cat([ids, input_ids[:, -logits_to_keep:]], dim=1)
            attention_mask = torch.cat([mask, attention_mask[:, -logits_to_keep:]], dim=1)
        needs = self.old_pass_needs() if capture else frozenset()
        compute_entropy = compute_entropy or "entropy" in needs
        plain = kwargs.get("compute_aux_loss") or any(kwargs.get(key) is not None for key in MULTIMODAL_KEYS)
        hidden = mlp = None
        if self._shares_prompts and not plain and "mlp_inputs" not in needs:
            labels = attention_mask[:, -logits_to_keep:].bool()
            logps, entropies, hidden = self._score_shared(model, input_ids, attention_mask, labels, batch_size)
            aux_loss = None
        else:
            with ExitStack() as observers:
                if "hidden_states" in needs:
                    hidden = observers.enter_context(observe(backbone(model), Pass.OLD))
                if "mlp_inputs" in needs:
                    mlp = observers.enter_context(observe(last_mlp(self.model), Pass.OLD, inputs=True))
                logps, entropies, aux_loss = super()._get_per_token_logps_and_entropies(
                    model, input_ids, attention_mask, logits_to_keep, batch_size, compute_entropy, **kwargs
                )
            hidden, mlp = hidden and hidden.hidden_states(logits_to_keep), mlp and mlp.hidden_states()
        if capture:
            self._old_pass = OldPass(logps, entropies, hidden, mlp)
        return logps, entropies if compute_entropy else None, aux_loss

    def _loss_scores(self, model, record: RolloutRecord):
        """Log-probabilities, entropies and auxiliary loss of the gradient-carrying pass over a micro-batch."""
        input_ids = torch.cat([record.prompt_ids, record.completion_ids], dim=1)
        attention_mask = torch.cat([record.prompt_mask, record.completion_mask], dim=1)
        if self._shares_prompts and not record.multimodal and not self.aux_loss_enabled:
            logps, entropies, _ = self._score_shared(model, input_ids, attention_mask, record.loss_mask.bool())
            return logps, entropies, None
        return self._get_per_token_logps_and_entropies(
            model,
            input_ids,
            attention_mask,
            record.completion_ids.size(1),
            compute_entropy=True,
            compute_aux_loss=self.aux_loss_enabled,
            **record.multimodal,
        )

    def _score_shared(self, model, input_ids, attention_mask, labels, batch_size=None):
        """Log-probabilities, entropies `(rows, time)` and hidden states of the tokens in `labels`, a bool mask."""
        size = batch_size or input_ids.shape[0]
        outputs = []
        for start in range(0, input_ids.shape[0], size):
            rows = slice(start, start + size)
            with self.accelerator.autocast():
                outputs.append(model(**rollout_inputs(input_ids[rows], attention_mask[rows], labels[rows])))
        time = labels.shape[1]

        def collect(name=None):
            parts = [output.scores[name] if name else output.hidden_states for output in outputs]
            # Each chunk ends with its longest row
            parts = [torch.cat([p, p.new_zeros(p.shape[0], time - p.shape[1], *p.shape[2:])], dim=1) for p in parts]
            return parts[0] if len(parts) == 1 else torch.cat(parts)

        return collect("log_probs"), collect("entropy"), collect()

    def _trl_makes_old_pass(self) -> bool:
        generate_every = self.args.steps_per_generation * self.num_iterations
        return self.args.gradient_accumulation_steps % generate_every != 0 or (
            self.use_vllm and self.vllm_importance_sampling_correction
        )

    def _make_old_pass(self, record: RolloutRecord) -> OldPass:
        self._capture_old_pass = True
        self._rollout_logps(record)
        return self._old_pass

    @torch.no_grad()
    def _rollout_logps(self, record: RolloutRecord) -> torch.Tensor:
        train = self.model.training
        logps, _, _ = self._get_per_token_logps_and_entropies(
            self.model,
            torch.cat([record.prompt_ids, record.completion_ids], dim=1),
            torch.cat([record.prompt_mask, record.completion_mask], dim=1),
            record.completion_ids.size(1),
            batch_size=self.args.per_device_train_batch_size if train else self.args.per_device_eval_batch_size,
            **record.multimodal,
        )
        return logps

    def _set_sampled_prompts(self, generation: Generation) -> None:
        """
        Where rows were sampled under other prompts than they are scored under, see to it that the old
        log-probabilities, and with them TRL's correction for vLLM, are those of sampling.
        """
        self._sampled_prompts = None
        if not bool(self._scored.off_prompt.any()):
            return
        ids = [torch.tensor(row) for row in generation.sampled_prompt_ids or generation.prompt_ids]
        self._sampled_prompts = tuple(
            pad(rows, padding_value=value, padding_side="left", pad_to_multiple_of=self.pad_to_multiple_of).to(
                self.accelerator.device
            )
            for rows, value in ((ids, self._tokenizer.pad_token_id), ([torch.ones_like(row) for row in ids], 0))
        )
        self._swap_prompts = self._trl_makes_old_pass()
        # Statistics are of the distribution that is trained
        self._capture_old_pass = False

    def _account_for_sampled_prompts(self, record: RolloutRecord) -> None:
        if self._sampled_prompts is None:
            return
        record.sampled_prompt_ids, record.sampled_prompt_mask = self._sampled_prompts
        if record.old_per_token_logps is None:
            self._swap_prompts = True
            record.old_per_token_logps = self._rollout_logps(record)


def rollout_inputs(input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor) -> dict:
    """
    Shared inputs from TRL's layout of rollouts: prompts padded on the left, then completions padded on the right.

    Positions are those of this layout, as in TRL.

    Args:
        input_ids, attention_mask (`torch.Tensor` of shape `(rows, prompt_length + time)`):
            Prompts and completions.
        labels (`torch.Tensor` of shape `(rows, time)`, bool):
            Completion tokens to score.
    """
    start = input_ids.shape[1] - labels.shape[1]
    positions = torch.arange(input_ids.shape[1], device=input_ids.device).unsqueeze(0)
    parts = [
        value[:, part]
        for part in (slice(start), slice(start, None))
        for value in (input_ids, attention_mask, positions)
    ]
    return shared_inputs(*parts, labels)
