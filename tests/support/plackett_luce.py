"""Log-probs and entropies of ordered picks, one pick at a time: training's batched ones are held against them."""

import torch


def each_pick(scores, mask, order):
    """The categorical that each pick was drawn from, as ((row, column), its log-probs by token, the pick)."""
    for row, picks in enumerate(order.tolist()):
        left = mask[row].nonzero().flatten().tolist()
        for column, pick in enumerate(picks):
            if pick < 0:
                break
            logs = scores[row, left].float().log_softmax(0)
            yield (row, column), dict(zip(left, logs, strict=True)), pick
            left.remove(pick)


def log_prob(scores, mask, order):
    """Log-prob of each pick under Plackett-Luce: [G, K] float32, 0 where `order` is -1."""
    result = torch.zeros(order.shape)
    for place, logs, pick in each_pick(scores, mask, order):
        result[place] = logs[pick]
    return result


def entropy(scores, mask, order):
    """Entropy of the categorical that each pick was drawn from: [G, K] float32, 0 where `order` is -1."""
    result = torch.zeros(order.shape)
    for place, logs, _ in each_pick(scores, mask, order):
        result[place] = -sum(one.exp() * one for one in logs.values())
    return result
