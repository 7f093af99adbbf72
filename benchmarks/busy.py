"""Measure training on the processor beside other busy processes."""

from benchmarks.context import Context
from benchmarks.tables import print_row, ratios
from checkpoint import load_checkpoint

BUSY = {"alone": 0, "beside 1": 1, "beside 2": 2}  # busy processes


def measure_busy(context: Context) -> dict:
    """Images a second with fixed numbers of threads and with the number that is chosen while training."""
    name = context.ours[0]
    config = load_checkpoint(context.checkpoint(name))["config"]
    print_row(f"{name}, images/s", "fixed threads", "chosen", "share of best")

    def measure(beside: str) -> dict:
        speeds = context.job("busy_steps", config=config, busy=BUSY[beside], **context.plan.busy)["speeds"]
        *fixed, chosen = speeds
        best = max(fixed, key=speeds.get)
        for count in fixed:
            print_row(f"{beside}, {count}", speeds[count])
        print_row(f"{beside}, best: {best}", speeds[best], speeds[chosen], f"{speeds[chosen] / speeds[best]:.1%}")
        return dict(speeds=speeds, best=best, share_of_best=speeds[chosen] / speeds[best])

    rows = context.measure_each("busy", measure, BUSY)
    return dict(contestant=name, rows=rows, ratios={
        beside: ratios(dict(reversed(row["speeds"].items())), smaller_is_better=False) for beside, row in rows.items()})
