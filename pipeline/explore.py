"""An explorer of schedules: one offline page to change ranks, micro-batches, times and a memory limit on. Lecture 08.

    python -m pipeline.explore --out schedules.html

Any schedules side by side, with their bubble, activations, parameters, messages and critical path, to go through action
by action; and one of your own, pasted in torch's CSV. The page makes and validates schedules itself, in JavaScript
(`static/schedules.js`): its numbers equal those of `engine/validator.py`, which a test holds in a browser.

read: schedules.py:30-55; then engine/validator.py, and the same for the page in static/schedules.js
"""

import sys
from importlib.resources import files

from core.proof.page.page import assemble, write_page
from pipeline.schedules import SCHEDULES

SHOWN = ("gpipe", "1f1b", "interleaved", "zb-h1", "zb-v")  # at first
WHY = {
    "naive": ("one micro-batch at a time", "一次只走一个微批次"),
    "gpipe": ("all forwards, then all backwards", "先做完所有前向，再做所有反向"),
    "1f1b": ("GPipe's bubble, at most p in flight", "气泡同 GPipe，在途至多 p 个"),
    "interleaved": ("small stages fill the pipeline v times faster", "小阶段使流水线快 v 倍填满"),
    "zb-h1": ("weight gradients fill 1F1B's bubble, in its memory", "权重梯度填补 1F1B 的气泡，显存不变"),
    "zb-h2": ("a longer warm-up leaves no gap, for twice the memory", "更长的预热不留空隙，显存近两倍"),
    "zb-v": ("first and last stage on one rank, no gap at equal times", "首末阶段在同一 rank，代价相等时无气泡"),
    "dualpipe": ("from both ends at once, two copies of the model", "两端同时进入，模型有两份"),
    "dualpipev": ("DualPipe folded in the middle, one copy", "DualPipe 对折，模型只有一份"),
}


def page() -> str:
    """The explorer, self-contained."""
    static = files("pipeline") / "static"
    scripts = [(static / name).read_text("utf-8") for name in ("schedules.js", "explore.js")]
    data = {"figures": [], "names": [*SCHEDULES], "shown": SHOWN, "why": WHY}
    return assemble("schedules.html", data, scripts, "pipeline")


def main() -> int:
    return write_page("pipeline.explore", "Write the explorer of schedules.", page)


if __name__ == "__main__":
    sys.exit(main())
