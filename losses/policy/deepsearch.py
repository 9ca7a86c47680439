"""DeepSearch (arXiv:2509.25454): values of the nodes of a search tree, and advantages of tokens from them."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

_STD_EPSILON = 1e-6


def back_up(values: Float[Tensor, " nodes"], reward: float, floor: float) -> Float[Tensor, " nodes"]:
    """
    Values of the nodes on a path after its last one, a terminal, was rewarded (Eq. 3 and 5).

    With v the reward and w_i = max(i / l, γ) the decayed weight of node i of a path that ends at depth l: q ← q + w·v
    where q and v do not differ in sign, q ← w·v where q < 0 < v, and q stays where v < 0 < q. What led to a right
    answer once is thus never valued below 0. The released code has w = max((i + 1) / (l + 1), γ).

    Args:
        values (`torch.Tensor` of shape `(nodes,)`):
            q, from the root (i = 0) to the terminal (i = l ≥ 1).
        reward (`float`):
            v in [-1, 1].
        floor (`float`):
            γ.
    """
    depth = torch.arange(values.numel(), dtype=values.dtype)
    gain = (depth / (values.numel() - 1)).clamp(min=floor) * reward
    opposed = torch.where(values < 0, gain, values)
    return torch.where(values * reward >= 0, values + gain, opposed)


def node_advantages(
    values: Float[Tensor, "rows nodes"],
    lengths: Int[Tensor, "rows nodes"],
    temperature: float,
    maximum: float,
    normalization: str,
    penalties: Float[Tensor, " rows"] | None = None,
) -> Float[Tensor, "rows nodes"]:
    """
    Advantages of the nodes of one tree's trajectories: soft-clipped values minus the mean reward (Eq. 13 and 15).

    Intermediate values become tanh(q/ε)·q_max; that of a terminal is its reward and stays. The mean, and the standard
    deviation over the population, are those of the terminals' rewards. Where all rewards are alike, nothing is
    divided.

    Args:
        values (`torch.Tensor` of shape `(rows, nodes)`):
            q of each trajectory's nodes without the root, the terminal last, then padding.
        lengths (`torch.Tensor` of shape `(rows, nodes)`):
            Tokens of the nodes, 0 on padding; each row has at least one node.
        temperature (`float`), maximum (`float`):
            ε and q_max.
        normalization (`str`):
            `"sibling_mean"`; `"sibling_mean_std"`, which divides by the standard deviation + 1e-6; or `"none"`.
        penalties (`torch.Tensor` of shape `(rows,)`, *optional*):
            What is added to the value of every node of a trajectory, its terminal's reward included, before the mean.

    Returns:
        `torch.Tensor` of shape `(rows, nodes)`: 0 on padding.
    """
    present = lengths > 0
    last = present.sum(1, keepdim=True) - 1
    rewards = values.gather(1, last)
    terminal = torch.arange(values.shape[1], device=values.device) == last
    advantages = torch.where(terminal, values, torch.tanh(values / temperature) * maximum)
    if penalties is not None:
        advantages, rewards = advantages + penalties.unsqueeze(1), rewards + penalties.unsqueeze(1)
    if normalization != "none":
        advantages = advantages - rewards.mean()
    if normalization == "sibling_mean_std":
        std = rewards.std(correction=0)
        advantages = torch.where(std > 0, advantages / (std + _STD_EPSILON), advantages)
    return advantages * present


def overlong_penalty(lengths: Int[Tensor, " rows"], longest: int, share: float) -> Float[Tensor, " rows"]:
    """
    min((L − C − n) / C, 0) for a completion of n tokens, with L the `longest` and C = `share` · L; 0 for no share.

    Args:
        lengths (`torch.Tensor` of shape `(rows,)`):
            n.
        longest (`int`):
            L.
        share (`float`):
            Part of the longest completion in which the penalty falls from 0 to −1; the paper's is 4096 of 16384.
    """
    if share == 0:
        return torch.zeros(lengths.shape)
    return ((longest * (1 - share) - lengths) / (longest * share)).clamp(max=0.0)


def spread_nodes(
    values: Float[Tensor, "rows nodes"], lengths: Int[Tensor, "rows nodes"], time: int
) -> Float[Tensor, "rows {time}"]:
    """Give every token the value of its node; 0 behind the last node. Nodes follow each other without gaps."""
    ends = lengths.cumsum(1)
    place = torch.arange(time, device=values.device).expand(values.shape[0], time).contiguous()
    node = torch.searchsorted(ends, place, right=True)
    return values.gather(1, node.clamp(max=values.shape[1] - 1)) * (place < ends[:, -1:])
