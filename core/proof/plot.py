"""Pictures for `--plot`, drawn by matplotlib, which is imported only then."""

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from core.proof.files import write_file


@contextmanager
def picture(path: str, width: float, height: float) -> Iterator[Any]:
    """matplotlib axes of this size in inches, written to `path` as SVG at the end."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(width, height), layout="constrained")
    yield axes
    drawn = io.StringIO()
    figure.savefig(drawn, format="svg")
    pyplot.close(figure)
    write_file(path, drawn.getvalue())


def bars(path: str, title: str, unit: str, groups: Sequence[str], series: Mapping[str, Sequence[float]]) -> None:
    """Bars side by side: for each group one of each series."""
    with picture(path, 2 + 0.5 * len(groups) * (1 + len(series)), 4) as axes:
        width = 0.8 / len(series)
        for i, (name, values) in enumerate(series.items()):
            places = [place + (i - (len(series) - 1) / 2) * width for place in range(len(groups))]
            axes.bar(places, values, width, label=name)
        axes.set(title=title, ylabel=unit)
        axes.set_xticks(range(len(groups)), groups)
        axes.legend()
