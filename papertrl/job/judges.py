"""Who judges the completions that a job samples: rewards, a reward model, a pairwise judge, the task's verifier."""

from collections.abc import Callable
from typing import Any

from transformers import AutoConfig

from ..core.errors import JobError
from ..rewards import checked, load_reward
from ..rewards.registry import load_judge
from .arguments import Job
from .data import JobData


def named_judges(job: Job) -> tuple[list[Callable], Callable | None]:
    """
    Reward functions and pairwise judge that the flags name.

    Raises:
        [`JobError`]: naming the flag, if there is no such thing, or nobody to judge what must be judged.
    """
    arguments = job.arguments
    check_judges(job)
    length = job.trainer_class.family.completion_length(job.training)
    rewards = [checked(load_reward(name, length)) for name in arguments.reward_funcs or []]
    if (
        arguments.dataset_name
        and is_judged(job)
        and job.trainer_class.needs_scores(job.training)
        and not (rewards or arguments.reward_model or arguments.judge)
    ):
        raise JobError(
            f"`dataset_name` needs `--reward_funcs` with {', '.join(job.methods)}: one or more of exact_match, "
            "last_number_match (both read the column `answer`), a TRL reward, or a dotted path."
        )
    loaded = {}
    # The trainer loads the reward model
    for flag, load in {"reward_model": AutoConfig.from_pretrained, "judge": load_judge}.items():
        name = getattr(arguments, flag)
        try:
            loaded[flag] = load(name, trust_remote_code=job.training.trust_remote_code) if name else None
        except (OSError, ValueError) as error:
            cause = " ".join(str(error).split())[:200]
            raise JobError(f"`{flag}` '{name}' cannot be loaded: {cause}") from error
    return rewards, loaded["judge"]


def check_judges(job: Job) -> None:
    """
    Check that somebody is asked to judge only where there is something to judge, and not two kinds of judges.

    Raises:
        [`JobError`]: naming the flag.
    """
    arguments, switch = job.arguments, job.trainer_class.family.judged
    samples_nothing = f"{', '.join(job.methods)} samples nothing to judge" + (
        f" unless `--{switch}` is set" if isinstance(switch, str) else ""
    )
    for flag in ("reward_funcs", "reward_model"):
        if getattr(arguments, flag) and not is_judged(job):
            raise JobError(
                f"`{flag}` is for policy methods and the online loop of preference methods; {samples_nothing}. Drop "
                "the flag."
            )
    if arguments.judge and not pairs_online(job):
        raise JobError(f"`judge` is for the online loop of preference methods; {samples_nothing}. Drop the flag.")
    if arguments.judge and (arguments.reward_funcs or arguments.reward_model):
        raise JobError("`judge` and rewards are both set, and either scores completions; drop one.")


def pairs_online(job: Job) -> bool:
    """Whether preference pairs are made in training, of completions of the dataset's prompts."""
    family = job.trainer_class.family
    return isinstance(family.judged, str) and family.is_judged(job.training)


def is_judged(job: Job) -> bool:
    """Whether completions are sampled in training, which reward functions may judge."""
    return job.trainer_class.family.is_judged(job.training)


def judges_of(job: Job, data: JobData, rewards: list[Callable], judge: Callable | None) -> dict[str, Any]:
    """Who judges what is sampled in training, as arguments of the trainer: without a name, the task's verifier."""
    if not is_judged(job):
        return {}
    if judge is not None:
        return {"judge": judge}
    model = job.arguments.reward_model
    if model is None and not rewards:
        rewards = list(map(checked, data.judges))
    return {"reward_funcs": [*([model] if model else []), *rewards] or None}
