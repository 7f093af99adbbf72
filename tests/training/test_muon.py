"""Muon is what its docstring says, for the weights that it is meant for, with and without torch's private function."""

import pytest
import torch
from torch.testing import assert_close

from models import create_model
from training.muon import Muon, orthogonalise
from training.optimizers import make_optimizers


@pytest.mark.parametrize("shape, factor", [((6, 3), 2**0.5), ((3, 6), 1.0), ((8, 2, 1, 2), 2**0.5)])
def test_a_step_is_the_orthogonalised_nesterov_momentum_times_the_root_of_the_ratio(shape, factor):
    chance = torch.Generator().manual_seed(0)
    weight, expected, buffer = torch.zeros(shape).requires_grad_(), torch.zeros(shape), torch.zeros(shape)
    optimizer = Muon([weight], lr=0.1, momentum=0.9)
    for _ in range(3):
        weight.grad = torch.randn(shape, generator=chance)
        optimizer.step()
        buffer = 0.9 * buffer + 0.1 * weight.grad
        ahead = 0.1 * weight.grad + 0.9 * buffer
        expected -= 0.1 * factor * orthogonalise(ahead.flatten(1)[None])[0].view(shape)
    assert_close(weight.detach(), expected, rtol=1e-3, atol=1e-3)


def test_muon_has_its_own_rate_and_the_matrices_that_are_neither_first_nor_last_nor_an_embedding():
    model = create_model(base_channels=8, time_emb_dim=8, channel_mults=[1], num_classes=2)
    optimizers = make_optimizers(model, "muon", 1e-3, 0.5, 0.0)
    names = {id(weight): name for name, weight in model.named_parameters()}
    taken = {part: {names[id(weight)] for group in each.param_groups for weight in group["params"]}
             for part, each in optimizers.items()}
    assert {part: each.param_groups[0]["lr"] for part, each in optimizers.items()} == dict(adamw=1e-3, muon=0.5)
    assert taken["adamw"] | taken["muon"] == set(names.values()) and not taken["adamw"] & taken["muon"]
    for name, weight in model.named_parameters():
        outer = name.split(".")[0] in ("stem", "head", "label_embedding")
        assert (name in taken["muon"]) == (weight.ndim >= 2 and not outer), name
    assert {name.split(".")[0] for name in taken["adamw"]} >= {"stem", "head", "label_embedding"}


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
