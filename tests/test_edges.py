"""Masked vocabularies and rewards that are tied but for rounding."""
import math

import pytest
import torch

import eval as ev
from model import kl_exact
from rl import group_advantage, has_spread

INF = math.inf


def test_kl_of_a_masked_vocabulary_by_hand():
    """softmax(2, 1) = (.731059, .268941) against softmax(1, 2): .731059 - .268941 = .462117."""
    logits = torch.tensor([2.0, 1.0, -INF], requires_grad=True)
    kl = kl_exact(logits, torch.tensor([1.0, 2.0, -INF]))
    assert kl.item() == pytest.approx(0.4621172)
    kl.backward()
    # d KL / d z_v = pi(v) (log pi(v) / ref(v) - KL)
    assert logits.grad.tolist() == pytest.approx([0.3932239, -0.3932239, 0], abs=1e-6)


def test_kl_where_only_the_reference_masks_is_infinite():
    assert kl_exact(torch.zeros(2), torch.tensor([0.0, -INF])) == INF


def test_entropy_of_a_masked_vocabulary_by_hand(tiny, monkeypatch):
    """Two words of equal probability: log 2."""
    monkeypatch.setattr(ev, "respond", lambda *args: (None, None, None))
    monkeypatch.setattr(ev, "response_logits", lambda *args: torch.tensor([[1.0, 1.0, -INF]]))
    assert ev.entropy(tiny, []) == pytest.approx(math.log(2))


def test_rewards_tied_but_for_rounding_have_no_advantage():
    rewards = torch.full((1, 8), 0.7)
    rewards[0, 0] += 6e-8
    assert not has_spread(rewards).any()
    assert not group_advantage(rewards).any()
