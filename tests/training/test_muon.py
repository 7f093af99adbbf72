"""Muon where torch lacks its private function for lists of tensors."""

import pytest
import torch

from training.muon import Muon


@pytest.mark.parametrize("found_inf", [None, 0.0, 1.0])
def test_without_torchs_private_function_the_weights_are_the_same_bit_for_bit(monkeypatch, found_inf):
    def train() -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        shapes = [(8, 4, 3, 3), (8, 4, 3, 3), (6, 5)]
        weights = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
        start = [weight.detach().clone() for weight in weights]
        optimizer = Muon(weights)
        optimizer.found_inf = None if found_inf is None else torch.tensor(found_inf)
        for _ in range(3):
            for weight in weights:
                weight.grad = torch.randn(weight.shape, generator=generator)
            optimizer.step()
        unchanged = [torch.equal(weight, before) for weight, before in zip(weights, start, strict=True)]
        assert unchanged == [found_inf == 1.0] * 3
        return [weight.detach() for weight in weights]

    with_it = train()
    monkeypatch.delattr(torch, "_foreach_sub_", raising=False)
    for one, other in zip(with_it, train(), strict=True):
        assert torch.equal(one, other)
