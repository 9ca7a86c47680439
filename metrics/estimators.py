"""The mathematics of the metrics, on numpy arrays: one value per prompt wherever there is one."""

from collections.abc import Callable, Sequence

import numpy as np

# Weight of the penalty that keeps the logistic regression finite when one side wins every comparison
RIDGE = 1e-3
NEWTON_STEPS = 50


def pass_at_k(correct: np.ndarray, samples: np.ndarray, k: int) -> np.ndarray:
    r"""
    Unbiased estimate of the probability that at least one of `k` samples is right (arXiv:2107.03374, Eq. 1):
    $1 - \binom{n-c}{k} / \binom{n}{k}$, as the product over the last `c` samples, which neither overflows nor cancels.

    Args:
        correct (`np.ndarray` of shape `(prompts,)`):
            c, right samples of each prompt.
        samples (`np.ndarray` of shape `(prompts,)`):
            n, samples of each prompt.
        k (`int`):
            Samples that one may choose from.

    Returns:
        `np.ndarray` of shape `(prompts,)`.

    Raises:
        `ValueError`: if `k` is below 1 or above the samples of a prompt, or there are more right than samples.
    """
    if k < 1 or k > samples.min():
        raise ValueError(f"`k` must be in [1, {samples.min()}], the fewest samples of a prompt, got {k}.")
    if (correct > samples).any() or (correct < 0).any():
        raise ValueError(f"`correct` must be in [0, samples], got {correct.tolist()} of {samples.tolist()}.")
    return np.array(
        [
            1.0 if n - c < k else 1.0 - np.prod(1.0 - k / np.arange(n - c + 1, n + 1))
            for n, c in zip(samples.tolist(), correct.tolist(), strict=True)
        ]
    )


def distinct_n(texts: Sequence[str], n: int) -> float:
    """
    Share of different n-grams of words among all n-grams of some texts (arXiv:1510.03055); 1 if there are none.

    Text without a space is taken character by character.
    """
    grams = []
    for text in texts:
        words = text.split() if " " in text.strip() else list(text.strip())
        grams += list(zip(*(words[i:] for i in range(n)), strict=False))
    return len(set(grams)) / len(grams) if grams else 1.0


def log_ratio_kl(logps: np.ndarray, base_logps: np.ndarray, estimator: str = "k1") -> float:
    r"""
    Estimate of KL(model ‖ base) from one sample of the model, in nats, summed over its tokens.

    With $d = \log \pi_{base} - \log \pi$: `k1` is $-d$, unbiased; `k3` is $e^d - d - 1$, unbiased, never negative, and
    heavy-tailed where the base is far likelier.

    Args:
        logps (`np.ndarray` of shape `(tokens,)`), base_logps (`np.ndarray` of shape `(tokens,)`):
            Log-probabilities of the sampled tokens under the model and under its base.
        estimator (`str`):
            `"k1"` or `"k3"`.
    """
    d = base_logps - logps
    return float((-d if estimator == "k1" else np.expm1(d) - d).sum())


def length_controlled(wins: np.ndarray, length_differences: np.ndarray) -> float:
    r"""
    Win rate at equal length.

    A logistic regression $P(\text{win}) = \sigma(\theta + \phi \tanh(\Delta / s))$ with $\Delta$ the difference of
    lengths and $s$ its root mean square; returned is $\sigma(\theta)$, the win rate predicted at $\Delta = 0$. This is
    the length term of length-controlled AlpacaEval (arXiv:2404.04475) without its terms for the difficulty of
    instructions. Ties enter as half a win. A ridge of 0.001 on both coefficients keeps them finite.

    Args:
        wins (`np.ndarray` of shape `(comparisons,)`):
            1 for a win, 0 for a loss, 0.5 for a tie.
        length_differences (`np.ndarray` of shape `(comparisons,)`):
            Length of ours minus length of theirs.
    """
    scale = np.sqrt((length_differences.astype(float) ** 2).mean())
    x = np.tanh(length_differences / scale) if scale > 0 else np.zeros(len(wins))
    features = np.stack([np.ones(len(wins)), x], axis=1)
    weights = np.zeros(2)
    for _ in range(NEWTON_STEPS):
        p = 1 / (1 + np.exp(-features @ weights))
        gradient = features.T @ (p - wins) + RIDGE * weights
        hessian = (features * (p * (1 - p))[:, None]).T @ features + RIDGE * np.eye(2)
        step = np.linalg.solve(hessian, gradient)
        # Far out the curvature vanishes; a bounded step cannot overshoot
        weights -= step / max(1.0, np.abs(step).max())
        if np.abs(step).max() < 1e-9:
            break
    return float(1 / (1 + np.exp(-weights[0])))


def bootstrap(
    rows: int, statistic: Callable[[np.ndarray], float], seed: int = 0, resamples: int = 1000
) -> dict[str, float]:
    """
    A statistic with its 95 % percentile interval over resampled rows.

    Args:
        rows (`int`):
            Rows there are.
        statistic (`Callable`):
            Indices of rows → number.
        seed (`int`):
            Seed of the resampling; the same seed draws the same rows, so that differences are paired.
        resamples (`int`):
            Resamples drawn.

    Returns:
        `dict`: `value`, `low` and `high`.
    """
    rng = np.random.default_rng(seed)
    draws = [statistic(rng.integers(rows, size=rows)) for _ in range(resamples)]
    low, high = np.percentile(draws, [2.5, 97.5])
    return {"value": float(statistic(np.arange(rows))), "low": float(low), "high": float(high)}
