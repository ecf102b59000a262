"""Pictures for `--plot`, drawn by matplotlib, which is imported only then."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from textwrap import fill
from typing import Any

from core.proof.figures import SERIES, Figure, Words
from core.proof.files import write_file


@contextmanager
def picture(path: str, width: float, height: float) -> Iterator[Any]:
    """matplotlib axes of this size in inches, written to `path` as SVG at the end, its texts as text."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    with matplotlib.rc_context({"axes.prop_cycle": matplotlib.cycler(color=SERIES), "svg.fonttype": "none"}):
        figure, axes = pyplot.subplots(figsize=(width, height), layout="constrained")
        yield axes
        drawn = io.StringIO()
        figure.savefig(drawn, format="svg")
        pyplot.close(figure)
    write_file(path, drawn.getvalue())


def plot(path: str, figure: Figure) -> None:
    """Write bars or lines as SVG."""
    if figure["kind"] == "bars":
        _bars(path, figure)
    else:
        with picture(path, 8, 4) as axes:
            for name, values in figure["series"].items():
                axes.plot(values, label=name)
            axes.set(title=english(figure["title"]), xlabel=english(figure["x"]), ylabel=english(figure["y"]))
            axes.legend()


def _bars(path: str, figure: Figure) -> None:
    """Bars side by side: for each group one of each series. Long names are in lines, as wide as their bars."""
    groups, series = figure["groups"], figure["series"]
    across = 0.5 * (1 + len(series))  # inches of a group
    with picture(path, 2 + max(across * len(groups), 4), 4) as axes:
        width = 0.8 / len(series)
        for i, (name, values) in enumerate(series.items()):
            places = [place + (i - (len(series) - 1) / 2) * width for place in range(len(groups))]
            axes.bar(places, values, width, label=name)
        axes.set(title=english(figure["title"]), ylabel=english(figure["unit"]))
        letters = max(8, int(12 * max(across, 4 / len(groups))))
        axes.set_xticks(range(len(groups)), [fill(english(group), letters) for group in groups])
        axes.legend()


def english(words: Words) -> str:
    return words if isinstance(words, str) else words[0]
