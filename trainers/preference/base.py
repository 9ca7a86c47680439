"""The preference family's base: `DPOTrainer`, opened into stages that methods override."""

from trl import DPOConfig, DPOTrainer

from ...core.configuration import MethodConfigMixin, method_config, method_field
from ...core.family import PREFERENCE
from ..slots import as_list
from .collation import CarryingCollator
from .online.judging import RewardScorer
from .online.loop import OnlineLoop
from .online.stages import OnlineStages
from .replaced import refuse_unread_settings
from .stages import PreferenceStages
from .trl import OpenedDPOTrainer


@method_config
class PreferenceConfig(MethodConfigMixin, DPOConfig):
    """Configuration of [`PreferenceTrainer`]: that of [`~trl.DPOTrainer`] and what every preference method shares."""

    share_prompts: bool = method_field(
        True,
        "Whether the prompt of a pair is computed once for both completions, and completions without their padding. "
        "Same log-probabilities and gradients as TRL's, up to rounding.",
    )
    online_iterations: int = method_field(
        0,
        "Iterations of the online loop: in each, completions of the dataset's prompts are sampled, judged and paired, "
        "and an equal share of the optimizer steps trains on them. 0 trains on the dataset's pairs.",
        ge=0,
    )
    online_num_prompts: int | None = method_field(
        None,
        "Prompts per iteration. Unset, the dataset is divided evenly among the iterations, or, with "
        "`online_reuse_prompts`, each takes all of it.",
        ge=1,
    )
    online_reuse_prompts: bool = method_field(
        False, "Whether every iteration has the same prompts, rather than other ones as long as there are."
    )
    online_num_samples: int = method_field(2, "Completions sampled per prompt.", ge=1)
    online_max_new_tokens: int = method_field(256, "Longest sampled completion, in tokens.", ge=1)
    online_temperature: float = method_field(1.0, "Temperature of sampling.", gt=0.0)
    online_top_p: float = method_field(1.0, "Nucleus of sampling: probability mass that is kept.", gt=0.0, le=1.0)
    online_top_k: int = method_field(0, "Number of most likely tokens to sample from; 0 for all.", ge=0)
    online_batch_size: int = method_field(64, "Rows per forward of sampling and of reward models, per device.", ge=1)
    online_reference: str = method_field(
        "initial",
        "Reference model of an iteration: `initial`, as given; `previous`, the policy with which the iteration "
        "begins; or `ema`, an average over such policies that each iteration updates.",
        choices=("initial", "previous", "ema"),
    )
    online_reference_decay: float = method_field(
        0.9, "With `online_reference='ema'`, weight of the reference against the policy.", ge=0.0, le=1.0
    )
    online_accumulate: bool = method_field(False, "Whether pairs of earlier iterations are trained on as well.")
    online_reward_weights: list[float] | None = method_field(
        None, "Weight of each reward function in a completion's score. Defaults to 1 each."
    )
    check_records: bool = method_field(
        False,
        "Whether to check the values of every preference record, not only its shapes. For debugging: it waits for the "
        "device once per batch.",
    )

    def validate(self) -> None:
        super().validate()
        refuse_unread_settings(self)
        if self.online_iterations == 0:
            return
        if self.sync_ref_model and self.online_reference != "initial":
            raise ValueError(
                f"`sync_ref_model` must be False with `online_reference={self.online_reference!r}`, got True: both "
                "move the reference model."
            )
        if 0 < self.max_steps < self.online_iterations:
            raise ValueError(
                f"`online_iterations` must be at most `max_steps` ({self.max_steps}), got {self.online_iterations}."
            )
        if self.precompute_ref_log_probs:
            raise ValueError(
                "`precompute_ref_log_probs` must be False with `online_iterations` > 0, got True: the pairs do not "
                "exist yet."
            )
        if self.truncation_mode != "keep_start":
            raise ValueError(
                f"`online_iterations={self.online_iterations}` samples from whole prompts and needs `truncation_mode="
                f"'keep_start'`, got {self.truncation_mode!r}, which cuts the prompt."
            )


class PreferenceTrainer(PreferenceStages, OnlineStages, OpenedDPOTrainer):
    """
    [`~trl.DPOTrainer`] whose step is a sequence of stages. By itself it trains as its parent does: to the bit with
    `share_prompts` off, up to rounding with it on, as it is by default.

    In the order in which data flows:

    | stage | method to override | input → output |
    |---|---|---|
    | prepare | `prepare` | tokenized rows of pairs → the same with further columns |
    | collate | `collate` | rows of a batch → tensors of these columns |
    | sample candidates | `sample` | batch → completions of the current policy, by method name |
    | statistics | `statistics` | batch → `PreferenceRecord` |
    | scores | `scores` | record → scores of chosen and rejected `(pairs,)` each |
    | margin | `margin` | scores → Δ `(pairs,)` |
    | pair losses | `pair_losses` | record, scores, Δ → one term per `loss_type`, values `(pairs,)` |
    | smoothing | `smoothing` | record → probabilities `(pairs,)` that the labels are wrong, or `None` for 0 |
    | pair weights | `pair_weights` | record → weights `(pairs,)` or `None` |
    | extra terms | `extra_terms` | record → named terms |
    | after backward | `after_backward` | gradient so far |

    Every value stays per pair until [`~papertrl.trainers.reduction.mean_of_terms`] takes means, weights and adds.
    `sample` and `extra_terms` act in evaluation too unless a method says otherwise.

    With `online_iterations` > 0, the pairs are made of the policy's own completions of the dataset's prompts; see
    [`~papertrl.trainers.preference.online.stages.OnlineStages`] for the stages of that loop.

    Stages stand in `stages.py` and `online/stages.py`, with the hooks that a method may override beside them
    (`as_pairs`, `carried`, `set_up_optimizer`, `check_checkpoint`, `after_training`); what they may call in
    `services.py`, and whatever of TRL's is overridden in `trl.py`.

    `sampled_tokens` and `trained_tokens` count what a run has sampled and trained on, over all ranks.

    Args:
        model, ref_model, args, ...:
            As for [`~trl.DPOTrainer`]; `args` is a [`PreferenceConfig`] or a [`~trl.DPOConfig`].
        reward_funcs (`str`, `~transformers.PreTrainedModel`, `Callable`, or a list of these, *optional*):
            Score sampled completions, as in [`~trl.GRPOTrainer`]: functions with TRL's signature, sequence
            classifiers with one label, or ids or folders of such.
        judge (`Callable`, *optional*):
            Pairwise preference model instead: (prompts, firsts, seconds) → P(first ≻ second), lists of texts or of
            messages in and a list of numbers in [0, 1] out. It is asked in both orders.
        reward_processing_classes (`~transformers.PreTrainedTokenizerBase` or a list, *optional*):
            Tokenizers of the reward models.

    Raises:
        `ValueError`: if the dataset lacks a column, or the online loop has nobody to judge, or two that do.
    """

    family = PREFERENCE
    stages = {
        "columns": ("needed_columns", "dataset_formats", "as_pairs"),
        "choose_prompts": ("choose_prompts",),
        "propose": ("propose",),
        "judge": ("judge", "needs_scores"),
        "pair": ("pair",),
        "select_pairs": ("select_pairs",),
        "prepare": ("prepare",),
        "collate": ("carried", "collate"),
        "sample": ("sample",),
        "statistics": ("statistics",),
        "scores": ("scores",),
        "margin": ("margin",),
        "pair_losses": ("pair_losses",),
        "smoothing": ("smoothing",),
        "pair_weights": ("pair_weights",),
        "extra_terms": ("extra_terms",),
        "optimizer": ("set_up_optimizer",),
        "after_backward": ("after_backward",),
        "before_update": ("before_update",),
        "run": ("check_checkpoint", "after_training"),
    }
    hooks = (*OpenedDPOTrainer.hooks, "check_online")
    config_class = PreferenceConfig
    _tag_names = ["trl", "papertrl", "dpo"]

    def __init__(
        self,
        model,
        ref_model=None,
        args=None,
        *trl_args,
        reward_funcs=None,
        judge=None,
        reward_processing_classes=None,
        stages=None,
        **trl_kwargs,
    ):
        given = self.trl_arguments(DPOTrainer, model, ref_model, args, *trl_args, stages=stages, **trl_kwargs)
        args, dataset = given["args"], given.get("train_dataset")
        if "reward_funcs" in given:
            reward_funcs = [*as_list(reward_funcs), *given.pop("reward_funcs")]
        self.check_online(dataset, reward_funcs, judge)
        # What TRL must leave as it is
        self._prompts = dataset if args.online_iterations > 0 else None
        super().__init__(**given)
        if args.online_iterations > 0:
            if self.has_images:
                raise ValueError("`online_iterations` > 0 does not support datasets with images. Set it to 0.")
            if reward_funcs is not None:
                options = (args.online_reward_weights, reward_processing_classes, self.accelerator)
                self.scorer = RewardScorer(
                    self.load_reward_models(reward_funcs, args),
                    *options,
                    args.online_batch_size,
                    args.trust_remote_code,
                )
            self.judge_func = judge
            self.online = OnlineLoop(self)
        if self.carried():
            if self.has_images:
                raise ValueError(
                    f"{[m.name for m in self.methods]} need the columns {self.carried()} of prepared rows, and "
                    "datasets with images are prepared batch by batch. Use a dataset without images."
                )
            self.data_collator = CarryingCollator(self.data_collator, self.collate)
        fields = ("log_probs", "entropy", "mean_logits", "is_top1")
        fields = (*fields, "log_sum_sq_probs") if self.use_weighting else fields
        self._set_up_sharing(1.0, False, fields, left_padded=False)
        self.attach_slots()

    def choosing_itself(self) -> bool:
        return self.args.online_iterations > 0

    def rows_of_a_step(self) -> tuple[int, str]:
        # Rounds repeat prompts and pairs
        return (1, "a round") if self.args.online_iterations > 0 else super().rows_of_a_step()
