"""Attention under a mask by torch's own operations, in the inputs' dtype."""

from __future__ import annotations

import torch


def masked_softmax(q, k, v, pattern, scale):
    scores = (q @ k.transpose(-2, -1)) * scale
    scores = scores.masked_fill(~pattern.mask(q.shape[2], q.device), -torch.inf)
    return scores.softmax(-1) @ v, scores.logsumexp(-1)
