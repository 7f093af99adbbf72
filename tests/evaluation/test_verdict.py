"""The last line of a report: what it names, what it never claims."""

import pytest

from evaluation.metrics import BETTER
from evaluation.verdict import CLEARLY, DIFFERENCES, verdict, worse_by

UNABLE = "cannot tell them from real images"
NO_COPIES = {space: dict(copies=0.0, real_copies=0.0, closer_than_99_percent=0.01) for space in ("pixels", "features")}


def figure(value, floor, half=0.01):
    return dict(value=value, low=value - half, high=value + half, floor=floor, n=5000)


def at_the_floor(**others):
    """Every figure at its floor, except for the others."""
    figures = {name: figure(0.5, 0.5) for name in BETTER if name != "bits_per_dim"}
    return figures | dict(bits_per_dim=dict(figure(3.0, 0), floor=None)) | others


def test_images_at_their_floors_have_nothing_that_gives_them_away():
    said = verdict(at_the_floor(), NO_COPIES)
    assert "nothing that is measured here. No figure is worse than its floor" in said and UNABLE in said


def test_the_line_of_the_haze():
    said = verdict(at_the_floor(levels=figure(0.47, 0.02), two_sample_pixels=figure(0.999, 0.547, 0.001),
                                two_sample_shapes=figure(0.566, 0.545)), NO_COPIES)
    assert said == ("What gives the images away: their grey levels (47 % of the pixels would have to change, real 2 "
                    "%); a network tells them from real ones in 99.9 % (floor 54.7 %), by shapes alone in 56.6 % "
                    "(floor 54.5 %).")


@pytest.mark.parametrize("name", [name for name in BETTER if name != "bits_per_dim"])
def test_each_figure_is_named_when_it_is_clearly_worse_and_only_then(name):
    signs = (-1, 1) if BETTER[name] == 0 else (-BETTER[name],)
    words = "a network tells them" if name.startswith("two_sample") else f"({name} " if name != "levels" else "levels ("
    for sign in signs:
        for amount, named in ((CLEARLY + 0.1, True), (CLEARLY - 0.1, False)):
            said = verdict(at_the_floor(**{name: figure(0.5 + sign * 0.01 * amount, 0.5)}), NO_COPIES)
            assert (words in said) == named and ("for certain" in said) != named
    if BETTER[name]:
        better = verdict(at_the_floor(**{name: figure(0.5 + 0.2 * BETTER[name], 0.5)}), NO_COPIES)
        assert "nothing that is measured here" in better


def test_the_images_whose_bits_are_counted_do_not_change_the_limit_of_copies():
    close = {space: dict(copies=0.0, real_copies=0.0, closer_than_99_percent=0.03) for space in ("pixels", "features")}
    few = {name: each | dict(n=500) for name, each in at_the_floor().items()}
    for bits in (500, 50_000):
        assert "closer to a training image" not in verdict(few | dict(
            bits_per_dim=few["bits_per_dim"] | dict(n=bits)), close)


def test_it_claims_that_images_cannot_be_told_from_real_only_where_the_network_on_pixels_fails():
    for gap, claimed in ((0.009, True), (0.011, False), (0.5, False)):
        for others in ({}, dict(recall=figure(0.485, 0.5))):  # all within their intervals, or one that is doubtful
            said = verdict(at_the_floor(two_sample_pixels=figure(0.5 + gap, 0.5), **others), NO_COPIES)
            assert (UNABLE in said) == claimed
    without = {name: f for name, f in at_the_floor().items() if not name.startswith("two_sample")}
    assert UNABLE not in verdict(without, NO_COPIES)


def test_copies_are_always_mentioned():
    one = dict(NO_COPIES, pixels=dict(NO_COPIES["pixels"], copies=1 / 5000))
    assert "0.02 % of them are copies of training images" in verdict(at_the_floor(), one)
    as_real = dict(NO_COPIES, pixels=dict(NO_COPIES["pixels"], copies=0.02, real_copies=0.02))
    assert "copies" not in verdict(at_the_floor(), as_real)
    for share, named in ((0.017, False), (0.019, True)):  # 1 %, four standard deviations of a difference: 0.8 %
        near = dict(NO_COPIES, features=dict(NO_COPIES["features"], closer_than_99_percent=share))
        said = verdict(at_the_floor(), near)
        assert ("closer to a training image than 99 % of real ones, in features" in said) == named
        assert (UNABLE in said) != named


def test_a_clipped_interval_does_not_hide_a_difference():
    """An accuracy of 1 has no room above: the half-width is that of the side on which the floor lies."""
    assert worse_by("two_sample_pixels", dict(value=0.99, low=0.97, high=1.0, floor=0.9)) == pytest.approx(4.5)
    assert worse_by("recall", dict(value=0.02, low=0.0, high=0.05, floor=0.08)) == pytest.approx(2)
    assert worse_by("two_sample_pixels", dict(value=1.0, low=1.0, high=1.0, floor=0.9)) == float("inf")
    assert worse_by("levels", dict(value=0.0, low=0.0, high=0.0, floor=0.0)) == 0


def test_every_figure_has_words_and_a_figure_without_a_row_is_named_by_itself():
    known = {name for row in DIFFERENCES.values() for name in row}
    assert known | {"two_sample_pixels", "two_sample_shapes", "bits_per_dim"} == set(BETTER)
    assert "new (new 0.9, real 0.5)" in verdict(at_the_floor(new=figure(0.9, 0.5)), NO_COPIES)
