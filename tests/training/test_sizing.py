"""The rule for the size of a network: its values for the sizes that were measured, and networks that can be built."""

import pytest
import torch

from models import create_model
from models.unet import CHANNEL_MULTS
from training.sizing import network_size

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize("budget, width", [(None, 24), (1, 32), (89.9, 32), (90, 48), (600, 48), (1199, 48),
                                           (1200, 64), (36_000, 64)])
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (3, 64, 64)], ids=str)
def test_the_width_grows_with_the_budget_of_a_cpu(shape, budget, width):
    assert network_size(shape, 2000, budget, CPU)["base_channels"] == width
    assert network_size(shape, 2000, budget, CUDA)["base_channels"] == 64


@pytest.mark.parametrize("shape, patch_size, mults", [
    ((1, 28, 28), 2, [1, 2]), ((3, 32, 32), 2, [1, 2]), ((3, 64, 64), 4, [1, 2]), ((3, 128, 128), 4, [1, 2, 2]),
    ((3, 64, 32), 4, [1, 2]), ((1, 16, 16), 2, [2]), ((3, 36, 36), 4, [2]), ((3, 48, 48), 4, [1, 2])], ids=str)
def test_larger_images_have_larger_patches_and_then_more_resolutions(shape, patch_size, mults):
    size = network_size(shape, 50_000, 600.0, CPU)
    assert (size["patch_size"], size["channel_mults"]) == (patch_size, mults)
    model = create_model(**size | dict(base_channels=8), image_channels=shape[0], time_emb_dim=8)
    assert model(torch.zeros(1, *shape), torch.zeros(1)).shape == (1, *shape)


@pytest.mark.parametrize("side", [28, 32])
@pytest.mark.parametrize("patch_size", CHANNEL_MULTS)
def test_a_patch_size_that_is_given_is_kept_and_has_the_resolutions_of_the_model_alone(side, patch_size):
    size = network_size((1, side, side), 50_000, None, CPU, patch_size)
    assert (size["patch_size"], size["channel_mults"]) == (patch_size, list(CHANNEL_MULTS[patch_size]))


def test_a_finer_grid_gets_a_narrower_network_for_the_same_time():
    assert network_size((3, 64, 64), 50_000, 300.0, CPU)["base_channels"] == 48
    assert network_size((3, 64, 64), 50_000, 300.0, CPU, patch_size=2)["base_channels"] == 32


def test_few_images_get_a_narrow_network():
    assert [network_size((3, 32, 32), images, 3600.0, CPU)["base_channels"] for images in (1999, 2000)] == [32, 64]
    assert network_size((3, 32, 32), 1999, None, CPU)["base_channels"] == 24
