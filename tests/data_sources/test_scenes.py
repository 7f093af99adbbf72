"""Scenes: reproducible, and what is said of their objects is what can be seen in them."""

import numpy as np
import pytest
import torch

from data_sources.scenes import (
    BLOCK,
    COLOURS,
    GAP,
    KINDS,
    MARKS,
    MOST,
    RADII,
    SHADOW_EDGE,
    SHADOW_OFFSET,
    SHAPES,
    SIDE,
    draw_scenes,
    marks,
)


@pytest.fixture(scope="module")
def scenes():
    return draw_scenes(2 * BLOCK, 0)


def distance_to(x, y):
    """The distances (SIDE, SIDE) of all pixels' centres to a point."""
    axis = np.arange(SIDE) + 0.5
    return np.hypot(axis[None, :] - x, axis[:, None] - y)


def test_scenes_depend_on_seed_and_index_alone(scenes):
    for whole, part in zip(scenes, draw_scenes(BLOCK + 7, 0), strict=True):
        assert np.array_equal(whole[:BLOCK + 7], part)
    assert not np.array_equal(draw_scenes(8, 1).images, scenes.images[:8])


def test_every_number_of_objects_occurs_equally_often_and_is_the_number_of_objects(scenes):
    assert np.bincount(scenes.labels).tolist() == [2 * BLOCK // MOST] * MOST
    for part in (scenes.colours, scenes.kinds):
        assert np.array_equal((part >= 0).sum(1), scenes.labels + 1)
    assert np.array_equal((scenes.places[:, :, 2] > 0).sum(1), scenes.labels + 1)
    assert scenes.colours.max() == len(COLOURS) - 1 and scenes.kinds.max() == len(KINDS) - 1


def test_objects_lie_within_the_picture_and_apart(scenes):
    x, y, radius = np.moveaxis(scenes.places[scenes.colours >= 0], -1, 0)
    for centre in (x, y):
        assert (centre - radius > 0).all() and (centre + radius < SIDE).all()
    assert radius.max() <= RADII[1] and (radius < RADII[0]).mean() < 0.02  # a few are smaller, for lack of room
    for places in scenes.places:
        for i in range(MOST):
            for j in range(i):
                if places[i, 2] and places[j, 2]:
                    apart = np.hypot(*(places[i, :2] - places[j, :2])) - places[i, 2] - places[j, 2]
                    assert apart > GAP - 1e-3


def test_the_middle_of_a_full_shape_has_the_colour_that_is_said(scenes):
    paints, full = np.array(list(COLOURS.values())) * 255, ("circle", "square", "star", "cross")
    for n, k in np.argwhere(np.isin(scenes.kinds, [SHAPES.index(name) for name in full])):
        x, y = scenes.places[n, k, :2].astype(int)
        pixel = scenes.images[n, :, y, x]
        assert np.linalg.norm(paints - pixel, axis=1).argmin() == scenes.colours[n, k]


def test_away_from_objects_there_is_only_the_ground_which_is_a_slope(scenes):
    axis = (np.arange(SIDE) + 0.5) / SIDE - 0.5
    slope = np.stack([np.ones((SIDE, SIDE)), *np.meshgrid(axis, axis)], -1)
    for image, places in zip(scenes.images[:50], scenes.places[:50], strict=True):
        reach = places[places[:, 2] > 0] + [0, 0, SHADOW_OFFSET + SHADOW_EDGE]
        free = np.all([distance_to(x, y) > radius for x, y, radius in reach], 0)
        free &= (image < 255).all(0)  # the brightest places are clipped
        ground = image[:, free].T.astype(float)                                             # (pixels, 3)
        fit = slope[free] @ np.linalg.lstsq(slope[free], ground, rcond=None)[0]
        assert np.abs(fit - ground).max() < 1


def test_all_light_of_a_picture_comes_from_one_side(scenes):
    """The brighter side of the ground is the brighter side of every circle, and its shadow falls on the other one."""
    checked = 0
    for n, k in np.argwhere(scenes.kinds == SHAPES.index("circle")):
        image, (x, y, radius) = scenes.images[n].mean(0), scenes.places[n, k]
        corners = image[[0, 0, -1, -1], [0, -1, 0, -1]]
        light = np.array([corners[1] + corners[3] - corners[0] - corners[2],
                          corners[2] + corners[3] - corners[0] - corners[1]])
        light /= np.linalg.norm(light)

        def at(distance, image=image, x=x, y=y, light=light):
            column, row = (np.array([x, y]) + distance * light).astype(int).clip(0, SIDE - 1)
            return image[row, column]
        if scenes.colours[n, k] != list(COLOURS).index("black"):
            assert at(0.7 * radius) > at(-0.7 * radius)
        assert at(radius + 2.5) > at(-radius - 2.5)
        checked += 1
    assert checked > 30


def test_marks_are_the_colours_and_kinds_that_are_there(scenes):
    found = marks(torch.from_numpy(scenes.colours), torch.from_numpy(scenes.kinds))
    assert found.shape == (len(scenes.images), len(MARKS)) and found.dtype == torch.bool
    for row, colours, kinds in zip(found, scenes.colours, scenes.kinds, strict=True):
        said = {list(COLOURS)[i] for i in colours if i >= 0} | {KINDS[i] for i in kinds if i >= 0}
        assert {MARKS[i] for i in row.nonzero()[:, 0]} == said
