"""The classifier two-sample test: chance for one distribution, certainty for two different ones."""

import pytest
import torch
from torch import nn

from evaluation import two_sample
from evaluation.two_sample import VIEWS, Quarters, black_and_white, new_network, two_sample_figures


def noise(count, seed, channels=1, brightest=256):
    return torch.randint(0, brightest, (count, channels, 8, 8), generator=torch.Generator().manual_seed(seed),
                         dtype=torch.uint8)


def test_two_sets_of_one_distribution_are_told_apart_by_chance_alone():
    """It could learn the training half by heart: only the other half counts. The interval has one half in it."""
    figures = two_sample_figures(noise(400, 0), noise(500, 1))
    for name in VIEWS:
        assert figures[name]["low"] < 0.5 < figures[name]["high"] and figures[name]["n"] == 400
        assert figures[name]["high"] - figures[name]["low"] == pytest.approx(2 * 2.093 * 0.5 / 400**0.5, rel=0.6)


def test_what_black_and_white_hides_is_seen_in_the_pixels_alone():
    light = noise(400, 0)
    dark = torch.where(light >= 128, noise(400, 1) // 2 + 128, noise(400, 2) // 4)  # black becomes darker
    figures = two_sample_figures(dark, noise(400, 3))
    assert figures["two_sample_pixels"]["value"] > 0.75 and figures["two_sample_shapes"]["value"] < 0.6


def test_black_and_white_splits_each_channel_at_one_half():
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    colour = torch.cat([levels, levels.flip(2, 3)], 1)
    expected = torch.where(torch.arange(256) < 128, 0, 255)
    result = black_and_white(colour)
    assert result.dtype == torch.uint8 and torch.equal(result[0, 0].flatten().long(), expected)
    assert torch.equal(result[0, 1].flatten().long(), expected.flip(0))


def test_the_result_depends_on_the_seed_and_the_images_alone_and_leaves_torchs_random_state():
    a, b = noise(201, 0, brightest=250), noise(300, 1)
    torch.manual_seed(1)
    first, state = two_sample.two_sample(a, b), torch.get_rng_state()
    torch.manual_seed(2)
    assert torch.equal(two_sample.two_sample(a, b), first) and first.dtype == torch.bool
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)
    assert len(first) == 2 * 101  # 201 of both, of which 100 train the network
    assert not torch.equal(two_sample.two_sample(a, b, seed=5), first)


def test_an_image_is_judged_or_trained_on_and_never_both(monkeypatch):
    trained, judged = [], []
    monkeypatch.setattr(two_sample, "train", lambda network, images, *_: trained.append(images))
    monkeypatch.setattr(two_sample, "judge", lambda _, images: judged.append(images) or torch.ones(len(images)) > 0)
    a, b = noise(50, 0), noise(70, 1)
    right = two_sample.two_sample(a, b)
    assert right.tolist() == [True] * 25 + [False] * 25  # all are taken for generated ones
    used = {bytes(image.flatten().tolist()) for image in torch.cat(trained)} | {
        bytes(image.flatten().tolist()) for image in torch.cat(judged)}
    assert len(trained[0]) == len(judged[0]) == 50 and len(used) == 100


@pytest.mark.parametrize("channels, size", [(1, (28, 28)), (3, (32, 32)), (3, (64, 48)), (1, (8, 9))])
def test_the_network_is_that_of_the_recipe_at_every_size(channels, size):
    network = new_network(channels)
    convolutions = [layer for layer in network if isinstance(layer, nn.Conv2d)]
    assert [c.out_channels for c in convolutions] == [24, 48, 96, 96]
    assert [c.stride[0] for c in convolutions] == [1, 2, 2, 1] and all(c.kernel_size == (3, 3) for c in convolutions)
    assert network(torch.rand(2, channels, *size)).shape == (2, 1)


@pytest.mark.parametrize("height, width", [(7, 7), (8, 8), (16, 9), (3, 2)])
def test_quarters_are_those_of_the_adaptive_mean(height, width):
    x = torch.randn(3, 5, height, width, generator=torch.Generator().manual_seed(0), requires_grad=True)
    found, expected = Quarters()(x), nn.AdaptiveAvgPool2d(2)(x)
    torch.testing.assert_close(found, expected)
    grads = [torch.autograd.grad(each.square().sum(), x)[0] for each in (found, expected)]
    torch.testing.assert_close(*grads)
