"""Print the tables of benchmark.py and compute its ratios."""

from runtime.progress import say


def print_row(*cells) -> None:
    """Print one row of a table at once: the first cell at the left, the others at the right of their columns."""
    texts = ["unknown" if cell is None else f"{cell:,.4g}" if isinstance(cell, float) else str(cell) for cell in cells]
    say("  " + f"{texts[0]:28}" + "".join(f"{text:>16}" for text in texts[1:]))


def ratios(values: dict[str, float | None], smaller_is_better: bool) -> dict[str, float]:
    """How many times better the first contestant is than each of the others; above 1 the first one is better.

    A pair is left out if one of its values is None or not above 0.
    """
    if not values:
        return {}
    (first, mine), *others = values.items()
    pairs = [(name, (other, mine) if smaller_is_better else (mine, other)) for name, other in others]
    return {f"{first} against {name}": a / b for name, (a, b) in pairs if a and b and a > 0 and b > 0}


def print_ratios(found: dict) -> None:
    """Print a line for each ratio between two contestants."""
    for name, ratio in found.get("ratios", {}).items():
        for pair, value in ratio.items() if isinstance(ratio, dict) else [(name, ratio)]:
            if " against " in pair:
                title = f"{name}: {pair}" if isinstance(ratio, dict) else pair
                print(f"  {title}: {value:,.3g} times better")
