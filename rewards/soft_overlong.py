"""DAPO's soft overlong punishment, for the slot *reward*."""

from typing import Any

from trl.rewards import get_soft_overlong_punishment

from ..core.configuration import ComponentConfig, method_config, method_field
from ..core.declaration import declared
from ..core.slots import Component


@method_config
class SoftOverlongConfig(ComponentConfig):
    """Configuration of [`SoftOverlong`]."""

    soft_overlong_share: float = method_field(
        0.2,
        "Part of the longest completion in which reward is taken away, from 0 where it begins to 1 at its end. The "
        "paper has 4096 of 20480 tokens. 0 takes nothing away.",
        ge=0,
        le=1,
    )
    soft_overlong_max_length: int | None = method_field(
        None, "Longest completion, in tokens. `None` takes `max_completion_length`.", ge=1
    )


class SoftOverlong(Component):
    r"""
    A second reward, at most 0, that warns of the length limit before a completion is cut.

    With L the longest completion and C the part of it that warns, a completion of n tokens gets (arXiv:2503.14476,
    Eq. 13)

    $$ R(n) = \begin{cases} 0 & n \le L - C \\ (L - C - n) / C & L - C < n \le L \\ -1 & n > L. \end{cases} $$

    The reward function is TRL's. It enters like any other: give it a weight by `reward_weights`.

    In a bare TRL trainer: `reward_funcs=[reward, *SoftOverlong(soft_overlong_max_length=256).reward_funcs()]`.

    Relations:
        DLER counts no reward at all beyond its limit, and refuses additive penalties beside it.

    Paper: [DAPO: An Open-Source LLM Reinforcement Learning System at
    Scale](https://huggingface.co/papers/2503.14476).

    Raises:
        `ValueError`: if the longest completion is not known.

    Example:

    ```python
    >>> from papertrl import SoftOverlong
    >>> (reward,) = SoftOverlong(soft_overlong_max_length=10, soft_overlong_share=0.5).reward_funcs()
    >>> reward(completion_ids=[[1] * 4, [1] * 8, [1] * 11])
    [0.0, -0.6, -1.0]

    ```
    """

    method = declared("soft_overlong")
    config_class = SoftOverlongConfig

    def reward_funcs(self) -> list[Any]:
        longest = self.config.soft_overlong_max_length or getattr(self.config, "max_completion_length", None)
        if longest is None:
            raise ValueError(
                "`soft_overlong_max_length` must be set where there is no `max_completion_length`, got None."
            )
        part = max(1, round(longest * self.config.soft_overlong_share))
        reward = get_soft_overlong_punishment(max_completion_len=longest, soft_punish_cache=part)

        def soft_overlong(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
            return reward(completion_ids=completion_ids)

        return [soft_overlong]
