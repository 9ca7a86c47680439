"""The objective in plain loops over full logits, written from the paper."""

import math


def softmax(logits):
    shifted = [math.exp(x - max(logits)) for x in logits]
    return [x / sum(shifted) for x in shifted]


def kl(p, q):
    return sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True) if a > 0)


def asft_oracle(policy, reference, labels, asft_anchor_coef, reverse, power):
    """Sum of the objective over label tokens, their number, and the sum of the divergence."""
    total, count, divergence = 0.0, 0, 0.0
    for row in range(labels.shape[0]):
        for t in range(labels.shape[1] - 1):
            label = labels[row, t + 1].item()
            if label == -100:
                continue
            p, q = softmax(policy[row, t].tolist()), softmax(reference[row, t].tolist())
            k = kl(p, q) if reverse else kl(q, p)
            total += -(p[label] ** power) * math.log(p[label]) + asft_anchor_coef * k
            count, divergence = count + 1, divergence + k
    return total, count, divergence
