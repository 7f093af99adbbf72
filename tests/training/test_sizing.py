"""The rule for the size of a network: its values for the sizes that were measured, and networks that can be built."""

import pytest
import torch

from models import create_model
from models.unet import CHANNEL_MULTS
from training import sizing
from training.sizing import FINE_WIDTHS, WIDTHS, choose, network_stages

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def asked(images_seen):
    """A speed(width) with which a budget of 100 s sees so many images with 16 channels, fewer with more, and who asked.

    Like a convolution, twice the channels take three times as long.
    """
    widths = []

    def speed(width):
        widths.append(width)
        return images_seen / 100 * (16 / width) ** 1.585
    return speed, widths


def test_a_fast_machine_and_a_long_budget_get_a_wider_network():
    seen = [10 ** (power / 8) for power in range(24, 65)]
    chosen = [choose(50_000, 100.0, CPU, asked(images)[0]).base_channels for images in seen]
    assert chosen == sorted(chosen) and chosen[0] == WIDTHS[0][0] and chosen[-1] == WIDTHS[-1][0]
    assert len(set(chosen)) == len(WIDTHS)
    speed, _ = asked(1e5)
    assert choose(50_000, 1000.0, CPU, speed) == choose(50_000, 100.0, CPU, lambda width: 10 * speed(width))


@pytest.mark.parametrize("images", [10.0 ** (power / 4) for power in range(8, 33)])
def test_the_chosen_width_sees_enough_images_and_the_next_one_would_not(images):
    speed, widths = asked(images)
    size = choose(50_000, 100.0, CPU, speed)
    assert size.images == pytest.approx(100 * speed(size.base_channels))
    assert size.images >= dict(WIDTHS)[size.base_channels]
    wider = [width for width, least in WIDTHS if width > size.base_channels]
    assert not wider or 100 * speed(wider[0]) < dict(WIDTHS)[wider[0]]
    assert max(widths[:-2] or widths) <= (wider[0] if wider else size.base_channels)  # none that is wider was measured


@pytest.mark.parametrize("channels, patch_size, width, without_budget", [
    (1, 2, 16, 24), (3, 2, 16, 24), (1, 4, 16, 24), (3, 4, 48, 48), (3, 8, 192, 192), (3, 1, 16, 16)])
def test_a_network_is_at_least_as_wide_as_a_patch_has_values(channels, patch_size, width, without_budget):
    speed, _ = asked(1e3)  # a slow machine
    patch = dict(channels=channels, patch_size=patch_size)
    for images in (100, 50_000):
        assert choose(images, 100.0, CPU, speed, **patch).base_channels == width
        assert choose(images, None, CPU, pytest.fail, **patch).base_channels == without_budget
        assert choose(images, None, CUDA, pytest.fail, **patch).base_channels >= width
    assert choose(50_000, 100.0, CPU, asked(1e9)[0], channels=3, patch_size=4).base_channels == 64
    assert choose(50_000, 100.0, CPU, speed, width=8, channels=3, patch_size=4).base_channels == 8


def test_patches_of_a_pixel_get_a_narrower_network_for_as_many_images():
    for images in (1e4, 1e5, 1e6):
        wide, narrow = (choose(50_000, 100.0, CPU, lambda _, seen=images: seen / 100, channels=3,
                               patch_size=patch_size).base_channels for patch_size in (2, 1))
        assert narrow < wide and narrow in dict(FINE_WIDTHS)


def test_a_run_of_few_steps_gets_smaller_batches():
    sizes = [choose(50_000, 100.0, CPU, asked(images)[0]) for images in (1e4, 1e5, 1e7, 1e8)]
    assert {size.batch_size for size in sizes} == {sizing.SMALL_BATCH_SIZE, sizing.BATCH_SIZE}
    assert all((size.batch_size == sizing.SMALL_BATCH_SIZE) == (size.images < sizing.SMALL_BATCH_IMAGES)
               for size in sizes)


def test_a_width_that_is_given_is_kept_and_measured_for_the_batch_size():
    speed, widths = asked(1e5)
    size = choose(50_000, 100.0, CPU, speed, width=100)
    assert (size.base_channels, size.batch_size, widths) == (100, sizing.SMALL_BATCH_SIZE, [100])
    assert choose(50_000, 1e6, CPU, speed, width=100)[:2] == (100, sizing.BATCH_SIZE)
    assert choose(50_000, 1e6, CUDA, pytest.fail, width=100) == (100, sizing.BATCH_SIZE, None)


@pytest.mark.parametrize("device, budget, width", [(CPU, None, 24), (CUDA, None, 64), (CUDA, 1.0, 64)], ids=str)
def test_without_a_budget_or_on_a_gpu_nothing_is_measured(device, budget, width):
    assert choose(50_000, budget, device, pytest.fail) == (width, sizing.BATCH_SIZE, None)


@pytest.mark.parametrize("shape, patch_size, mults", [
    ((1, 28, 28), 2, [1, 2]), ((1, 32, 32), 2, [1, 2]), ((3, 32, 32), 1, [1, 2, 2]), ((3, 28, 28), 1, [1, 2, 2]),
    ((3, 64, 64), 2, [1, 2, 2]), ((3, 128, 128), 4, [1, 2, 2]),
    ((3, 64, 32), 2, [1, 2, 2]), ((1, 16, 16), 2, [2]), ((3, 36, 36), 2, [1, 2]), ((3, 72, 72), 4, [1, 2])], ids=str)
def test_larger_images_have_larger_patches_and_then_more_resolutions(shape, patch_size, mults):
    size = network_stages(shape)
    assert (size["patch_size"], size["channel_mults"]) == (patch_size, mults)
    model = create_model(**size, base_channels=8, image_channels=shape[0], time_emb_dim=8)
    assert model(torch.zeros(1, *shape), torch.zeros(1)).shape == (1, *shape)


@pytest.mark.parametrize("side", [28, 32])
@pytest.mark.parametrize("patch_size", CHANNEL_MULTS)
def test_a_patch_size_that_is_given_is_kept_and_has_the_resolutions_of_the_model_alone(side, patch_size):
    size = network_stages((1, side, side), patch_size)
    assert (size["patch_size"], size["channel_mults"]) == (patch_size, list(CHANNEL_MULTS[patch_size]))


def test_few_images_get_a_narrow_network():
    speed = asked(1e9)[0]
    assert [choose(images, 100.0, CPU, speed).base_channels for images in (1999, 2000)] == [32, 64]
    assert [choose(images, None, CUDA, speed).base_channels for images in (1999, 2000)] == [32, 64]
    assert choose(1999, None, CPU, speed).base_channels == 24
