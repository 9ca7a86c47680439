"""Listwise preference loss of IRPO, and how well a list is ranked."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor


def item_scores(
    per_token_logps: Float[Tensor, "lists tokens"],
    item_index: Int[Tensor, "lists tokens"],
    items: int,
    per_token: bool = True,
) -> tuple[Float[Tensor, "lists items"], Bool[Tensor, "lists items"]]:
    """
    Score of each item of a list: the mean log-probability of its tokens, p_i = (1/|T_i|) Σ_{t∈T_i} log π(y_t|y_<t, x).

    Source: arXiv:2504.15477. The released code takes each token's probability from the position of the token itself;
    here, as everywhere, from the position before it.

    Args:
        per_token_logps (`torch.Tensor` of shape `(lists, tokens)`):
            In nats; finite everywhere.
        item_index (`torch.Tensor` of the same shape):
            Number of the item that a token belongs to, from 1 on; 0 for prompt, separators, end and padding.
        items (`int`):
            Most items of a list.
        per_token (`bool`, *optional*, defaults to `True`):
            Whether to take the mean over the item's tokens, as the paper does, or their sum.

    Returns:
        Scores in nats, with gradient, and whether the item has a token, both of shape `(lists, items)`. An item
        without tokens has score 0.
    """
    totals = per_token_logps.new_zeros(len(item_index), items + 1)
    sums = totals.scatter_add(1, item_index, per_token_logps)[:, 1:]
    counts = totals.scatter_add(1, item_index, torch.ones_like(per_token_logps))[:, 1:]
    return sums / counts.clamp(min=1.0) if per_token else sums, counts > 0


def item_weights(
    relevance: Float[Tensor, "lists items"],
    ranks: Float[Tensor, "lists items"],
    mask: Bool[Tensor, "lists items"],
    weighting: str = "dcg",
) -> Float[Tensor, "lists items"]:
    """
    How much an item's place in the list matters.

    - `dcg`: w_i = (2^rel_i − 1) / log2(1 + rank_i), the item's part of the discounted cumulative gain
    - `position`: 1 / log2(1 + rank_i), whatever the relevance
    - `inverse_rank`: (2^rel_i − 1) / rank_i

    Source: arXiv:2504.15477; the latter two are its ablations.

    Args:
        relevance (`torch.Tensor` of shape `(lists, items)`):
            rel ≥ 0, graded.
        ranks (`torch.Tensor` of the same shape):
            Place that the item should have, from 1 on: not its position in the sequence.
        mask (`torch.Tensor` of the same shape):
            Items that are there; the others weigh 0.
        weighting (`str`, *optional*, defaults to `"dcg"`):
            One of the three above.
    """
    gain = torch.ones_like(relevance) if weighting == "position" else torch.exp2(relevance) - 1
    discount = ranks if weighting == "inverse_rank" else torch.log2(1 + ranks)
    return (gain / discount).where(mask, 0.0)


def list_loss(
    scores: Float[Tensor, "lists items"],
    weights: Float[Tensor, "lists items"],
    mask: Bool[Tensor, "lists items"],
    beta: float,
    normalize: bool = True,
) -> tuple[Float[Tensor, " lists"], Float[Tensor, "lists items"]]:
    """
    Each item against all others of its list: ℓ = (1/N) Σ_i w_i · (−log σ(−z_i)), with

    z_i = log( (1/(N−1)) Σ_{j≠i} exp(β(r_j − r_i)) ).

    For two items and w = (1, 0) this is half of DPO's loss. An item of weight 0 is a competitor only.

    Source: arXiv:2504.15477. The two means are those of the released code; the objective as written has sums in place
    of both. The code leaves exp(−100β) of an item's competition with itself, here there is none.

    Args:
        scores (`torch.Tensor` of shape `(lists, items)`):
            r, the log-ratios of policy and reference, in nats; finite everywhere.
        weights (`torch.Tensor` of the same shape):
            w ≥ 0.
        mask (`torch.Tensor` of the same shape):
            Items that are there, N of them.
        beta (`float`):
            β.
        normalize (`bool`, *optional*, defaults to `True`):
            Take means, as above; otherwise sums.

    Returns:
        ℓ of shape `(lists,)`, with gradient, and z of shape `(lists, items)`. A list of fewer than two items has loss
        0, and z is 0 where nothing competes.
    """
    count = mask.sum(1, keepdim=True)
    competes = mask.unsqueeze(1) & ~torch.eye(mask.shape[1], dtype=torch.bool, device=mask.device)
    contested = mask & (count > 1)
    differences = beta * (scores.unsqueeze(1) - scores.unsqueeze(2))
    # A row without competitor would have the gradient NaN even where its value is not used
    differences = differences.masked_fill(~competes, -math.inf).where(contested.unsqueeze(2), 0.0)
    z = differences.logsumexp(2)
    if normalize:
        z = z - (count - 1).clamp(min=1).to(z.dtype).log()
    z = z.where(contested, 0.0)
    losses = (weights * -F.logsigmoid(-z)).where(contested, 0.0).sum(1)
    return losses / count.squeeze(1).clamp(min=1) if normalize else losses, z


def exchanged_weights(
    weights: Float[Tensor, "lists items"], ranks: Float[Tensor, "lists items"], mask: Bool[Tensor, "lists items"]
) -> Float[Tensor, "lists items"]:
    """
    Weights of the opposite ranking: the best item has that of the worst, the second that of the last but one, ...

    Args:
        weights, ranks, mask (`torch.Tensor` of shape `(lists, items)`):
            As in [`item_weights`].
    """
    order = ranks.masked_fill(~mask, math.inf).argsort(dim=1, stable=True)
    places = torch.arange(mask.shape[1], device=mask.device)
    opposite = (mask.sum(1, keepdim=True) - 1 - places).clamp(min=0)
    mirrored = weights.gather(1, order.gather(1, opposite))
    return torch.zeros_like(weights).scatter(1, order, mirrored).where(mask, 0.0)


@torch.no_grad()
def ndcg(
    scores: Float[Tensor, "lists items"],
    relevance: Float[Tensor, "lists items"],
    mask: Bool[Tensor, "lists items"],
    k: int,
) -> Float[Tensor, " lists"]:
    """
    NDCG@k of the items sorted by score: Σ_{place ≤ k} (2^rel − 1) / log2(1 + place), over its largest possible value.

    Args:
        scores, relevance, mask (`torch.Tensor` of shape `(lists, items)`):
            As above; of equal scores the first stands first.
        k (`int`):
            Places that count.

    Returns:
        `torch.Tensor` of shape `(lists,)`, in [0, 1]; 0 for a list without a relevant item.
    """
    gains = (torch.exp2(relevance) - 1).where(mask, 0.0)
    discounts = torch.log2(torch.arange(2, 2 + min(k, mask.shape[1]), device=mask.device).float())

    def dcg(order: Shaped[Tensor, "lists items"]) -> Float[Tensor, " lists"]:
        return (gains.gather(1, order)[:, :k] / discounts).sum(1)

    best = dcg(gains.argsort(dim=1, descending=True))
    found = dcg(_by_score(scores, mask))
    return found / best.where(best > 0, 1.0)


@torch.no_grad()
def reciprocal_rank(
    scores: Float[Tensor, "lists items"],
    relevance: Float[Tensor, "lists items"],
    mask: Bool[Tensor, "lists items"],
) -> Float[Tensor, " lists"]:
    """
    1 over the place of the first relevant item (rel > 0) of the items sorted by score.

    Args:
        scores, relevance, mask (`torch.Tensor` of shape `(lists, items)`):
            As in [`ndcg`].

    Returns:
        `torch.Tensor` of shape `(lists,)`, in [0, 1]; 0 for a list without a relevant item.
    """
    hits = ((relevance > 0) & mask).gather(1, _by_score(scores, mask)).float()
    return (hits / torch.arange(1, 1 + mask.shape[1], device=mask.device)).amax(1)


def _by_score(scores: Tensor, mask: Tensor) -> Tensor:
    return scores.masked_fill(~mask, -math.inf).argsort(dim=1, descending=True, stable=True)
