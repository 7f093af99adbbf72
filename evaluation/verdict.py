"""The last line of a report: what gives the images away."""

import math

from evaluation.metrics import BETTER

CLEARLY = 2.0  # a figure stands out if it is so many half-widths of its interval worse than the floor
# What a person would call the difference that these figures show.
DIFFERENCES = {
    "their grey levels": ("levels",),
    "the distribution of their features": ("frechet_distance", "kernel_distance", "autoencoder_distance"),
    "the distribution within the classes": ("class_frechet",),
    "forms that no real image has": ("precision", "autoencoder_precision"),
    "how closely they lie among real images": ("density",),
    "a lack of variety": ("recall", "coverage", "autoencoder_recall"),
    "how sure a classifier is of them": ("confident",),
    "how often each class occurs": ("class_distance",),
    "other classes than were asked for": ("asked_class",),
    "other numbers of objects than were asked for, or unclear colours": ("scene_right",),
    "how often each colour and kind of object occurs": ("mark_distance",),
    "what a classifier learns from them": ("cas",),
}


def worse_by(name: str, figure: dict) -> float:
    """How much worse a figure is than its floor, in half-widths of its interval; at most 0 if it is not worse.

    For a figure that should be as for real images, any difference is worse. Up to 1 the floor is in the interval.
    """
    gap = figure["value"] - figure["floor"]
    half = figure["value"] - figure["low"] if gap > 0 else figure["high"] - figure["value"]
    worse = abs(gap) if BETTER.get(name, 0) == 0 else -BETTER[name] * gap
    return worse / half if half else math.copysign(math.inf, worse) if worse else 0.0


def verdict(figures: dict[str, dict], memorised: dict) -> str:
    """A line that tells a person what gives the images away, from all figures and the report of `memorisation`.

    A figure is named if it is worse than its floor by more than CLEARLY half-widths of its interval: the floor is
    about as uncertain as the figure is. It says that images cannot be told from real ones only if two_sample_pixels
    has its floor in its interval, and copies of training images are always mentioned.
    """
    worse = {name: worse_by(name, figure) for name, figure in figures.items() if figure["floor"] is not None}
    signs = [f"{what} ({', '.join(_beside_floor(name, figures[name]) for name in found)})"
             for what, names in _differences(worse).items()
             if (found := [name for name in names if worse.get(name, 0) > CLEARLY])]
    signs += _told_apart(figures, worse) + _copied(memorised, max(
        figure["n"] for name, figure in figures.items() if name != "bits_per_dim"))  # whose images are real ones
    if signs:
        return f"What gives the images away: {'; '.join(signs)}."
    apart = "two_sample_pixels" in worse and worse["two_sample_pixels"] <= 1
    unable = ", and a network that is trained for it cannot tell them from real images" if apart else ""
    if max(worse.values(), default=0) <= 1:
        return (f"What gives the images away: nothing that is measured here. No figure is worse than its floor by "
                f"more than its interval{unable}.")
    return f"What gives the images away: nothing for certain. No figure is clearly worse than its floor{unable}."


def _differences(names: dict) -> dict[str, tuple[str, ...]]:
    """DIFFERENCES, and each figure without a row there under its own name; without the two-sample test."""
    known = {name for row in DIFFERENCES.values() for name in row}
    return DIFFERENCES | {name: (name,) for name in names if name not in known and not name.startswith("two_sample")}


def _beside_floor(name: str, figure: dict) -> str:
    """A figure and its floor in a few words."""
    if name == "levels":
        return f"{_percent(figure['value'])} of the pixels would have to change, real {_percent(figure['floor'])}"
    return f"{name} {figure['value']:.3g}, real {figure['floor']:.3g}"


def _told_apart(figures: dict[str, dict], worse: dict[str, float]) -> list[str]:
    """What the two-sample test says, as a list of one phrase, or none if neither figure is clearly above its floor."""
    if max(worse.get("two_sample_pixels", 0), worse.get("two_sample_shapes", 0)) <= CLEARLY:
        return []
    pixels, shapes = (f"{_percent(f['value'])} (floor {_percent(f['floor'])})" for f in (
        figures["two_sample_pixels"], figures["two_sample_shapes"]))
    return [f"a network tells them from real ones in {pixels}, by shapes alone in {shapes}"]


def _copied(memorised: dict, count: int) -> list[str]:
    """What the search for copies says: a list of a phrase or none.

    Closer to a training image than 99 % of the real images are 1 % of as many real ones, give or take a few: the limit
    is four standard deviations of the difference between two such shares of `count` images.
    """
    signs, copies = [], memorised["pixels"]["copies"]
    if copies > memorised["pixels"]["real_copies"]:
        signs.append(f"{_percent(copies)} of them are copies of training images")
    space = max(("pixels", "features"), key=lambda name: memorised[name]["closer_than_99_percent"])
    close = memorised[space]["closer_than_99_percent"]
    if close > 0.01 + 4 * math.sqrt(2 * 0.01 * 0.99 / count):
        signs.append(f"{_percent(close)} of them are closer to a training image than 99 % of real ones, in {space}")
    return signs


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"
