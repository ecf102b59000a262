// A timeline: a row a rank, a box an action, idle time hatched. Hover, focus or arrow keys tell of an action.
const KIND = { F: ["forward", "前向"], B: ["backward", "反向"], I: ["input gradient", "输入梯度"],
  W: ["weight gradients", "权重梯度"] };
let hatches = 0;

/** Letters of a rank's stages, where it has several: a, b, … */
function letters(row) {
  const stages = [...new Set(row.map((e) => e[0]))].sort((a, b) => a - b);
  return Object.fromEntries(stages.map((stage, i) => [stage, stages.length > 1 ? String.fromCharCode(97 + i) : ""]));
}

/**
 * @param rows of each rank: [stage, kind, micro-batch, start, end, waited], waited [rank, action] or null
 * @param options unit; width; span: the time that the width is for, if more than this timeline's; critical: a set of
 *   "rank:index"; until: actions that start later are drawn pale
 */
function timelineOf(rows, options) {
  const end = Math.max(...rows.flat().map((e) => e[4])), span = Math.max(end, options.span || 0), left = 62, high = 24;
  const shortest = Math.min(...rows.flat().map((e) => e[4] - e[3]));
  const longest = Math.max(...rows.flatMap((row) => row.map((e) => textWidth(`${e[2]}${letters(row)[e[0]]}`))));
  const need = options.unit ? 0 : ((longest + 2) / shortest) * span;  // room for a number in the shortest action
  const wide = Math.min(Math.max(options.width - left - 8, need), 6000), x = (t) => left + (t / span) * wide;
  const id = `hatch${hatches++}`, height = rows.length * (high + 4) + 26;
  const svg = s("svg", { width: left + wide + 8, height, tabindex: 0, role: "application", class: "timeline",
    "aria-label": T(["timeline; arrow keys go from action to action", "时间线；用方向键逐个查看动作"]) });
  svg.append(s("defs", {}, s("pattern", { id, width: 6, height: 6, patternUnits: "userSpaceOnUse",
    patternTransform: "rotate(45)" }, s("line", { x1: 0, x2: 0, y1: 0, y2: 6, stroke: "var(--idle)", "stroke-width": 1.6,
    "stroke-opacity": 0.55 }))));
  const told = h("p", { class: "told", "aria-live": "polite" },
    T(["Hover, tap or use the arrow keys: what, when, and on what it waited.", "悬停、点按或用方向键：做什么、何时、等待了什么。"]));
  const focus = s("rect", { class: "focus", width: 0, height: 0 }), boxes = [];
  const unit = options.unit ? ` ${options.unit}` : "";
  const time = (t) => `${num(t)}${unit}`;

  const tell = (r, i) => {
    const [stage, kind, microbatch, from, to, waited] = rows[r][i], before = i ? rows[r][i - 1][4] : 0, idle = from - before;
    const what = `rank ${r}: ${stage}${kind}${microbatch}, ${T(KIND[kind])}, ${T(["stage", "阶段"])} ${stage}, `
      + `${T(["micro-batch", "微批次"])} ${microbatch} · ${time(from)} – ${time(to)}`;
    const why = waited ? ` · ${T(["waited", "等待"])} ${time(idle)} ${T(["for", "，等的是"])} ${waited[1]} (rank ${waited[0]})`
      : idle > 1e-12 ? ` · ${T(["idle before", "之前空闲"])} ${time(idle)}` : ` · ${T(["waited for nothing", "没有等待"])}`;
    told.textContent = what + why;
    const box = boxes[r][i];
    for (const key of ["x", "y", "width", "height"]) focus.setAttribute(key, box.getAttribute(key));
    svg.dataset.at = `${r}:${i}`;
  };
  const gap = (y, from, to, name) => {
    if (to - from < 1e-9) return;
    svg.append(s("rect", { x: x(from), y, width: x(to) - x(from), height: high, fill: `url(#${id})`, class: "bubble" },
      s("title", {}, `${name} ${time(to - from)}`)));
    const text = `${T(["bubble", "气泡"])} ${num(to - from)}`;
    if (x(to) - x(from) > textWidth(text) + 8)
      svg.append(s("text", { x: (x(from) + x(to)) / 2, y: y + 16, "text-anchor": "middle", class: "soft" }, text));
  };

  rows.forEach((row, r) => {
    const y = r * (high + 4) + 2, letter = letters(row);
    svg.append(s("text", { x: left - 8, y: y + 16, "text-anchor": "end" }, `rank ${r}`));
    boxes.push([]);
    let free = 0;
    row.forEach(([stage, kind, microbatch, from, to], i) => {
      const hidden = options.until !== undefined && from >= options.until;
      if (!hidden) gap(y, free, from, T(["bubble", "气泡"]));
      free = to;
      const box = s("rect", { x: x(from) + 0.5, y, width: Math.max(0.6, x(to) - x(from) - 1), height: high, rx: 2,
        fill: `var(--${kind})`, "fill-opacity": hidden ? 0.12 : 1, "data-action": `${stage}${kind}${microbatch}` });
      box.addEventListener("pointerenter", () => tell(r, i));
      box.addEventListener("click", () => tell(r, i));
      svg.append(box);
      boxes[r].push(box);
      const text = `${microbatch}${letter[stage]}`;
      if (!hidden && x(to) - x(from) > textWidth(text) + 1)
        svg.append(s("text", { x: (x(from) + x(to)) / 2, y: y + 16, "text-anchor": "middle", class: "on",
          "pointer-events": "none" }, text));
      if (options.critical?.has(`${r}:${i}`)) svg.append(s("rect", { class: "path", x: x(from) + 1.5, y: y + 1,
        width: Math.max(0.6, x(to) - x(from) - 3), height: high - 2 }));
    });
    if (options.until === undefined) gap(y, free, end, T(["bubble", "气泡"]));
  });
  ticks(0, span, Math.max(4, wide / 90)).forEach((t) => svg.append(
    s("text", { x: Math.min(x(t), left + wide + 6 - textWidth(num(t)) / 2), y: height - 6, "text-anchor": "middle",
      class: "soft" }, num(t))));
  svg.append(focus);
  svg.addEventListener("focus", () => { if (!svg.dataset.at && rows[0].length) tell(0, 0); });
  svg.addEventListener("keydown", (event) => {
    const steps = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0] }[event.key];
    if (!steps) return;
    event.preventDefault();
    let [r, i] = (svg.dataset.at || "0:0").split(":").map(Number);
    if (steps[0]) {  // to the action of the next rank at this time
      const at = rows[r][i][3], next = Math.min(rows.length - 1, Math.max(0, r + steps[0]));
      if (next !== r) i = Math.max(0, rows[next].findLastIndex((e) => e[3] <= at));
      r = next;
    } else i = Math.min(rows[r].length - 1, Math.max(0, i + steps[1]));
    tell(r, i);
    const box = boxes[r][i].getBoundingClientRect(), view = svg.parentElement.getBoundingClientRect();
    if (box.left < view.left || box.right > view.right) svg.parentElement.scrollLeft += box.left - view.left - view.width / 2;
  });
  return [h("div", { class: "scroll" }, svg), told];
}

function kindsOf(rows) { return ["F", "B", "I", "W"].filter((kind) => rows.flat().some((e) => e[1] === kind)); }

function timelineLegend(rows, bubble) {
  const entries = kindsOf(rows).map((kind) => [`var(--${kind})`, `${kind} ${T(KIND[kind])}`]);
  entries.push(["repeating-linear-gradient(45deg,var(--idle) 0 1px,transparent 1px 4px)", bubble]);
  if (rows.some((row) => Object.values(letters(row)).some((l) => l)))
    entries.push(["transparent", T(["a, b, …: which of the rank's stages", "a、b…：该 rank 的第几个阶段"])]);
  return legend(entries);
}

function bubbleText([wall, ideal]) {
  return `${T(["bubble", "气泡"])} ${num(wall)} ${T(["of wall time", "（占总时间）"])}, ${num(ideal)} ${T(["of ideal time", "（占理想时间）"])}`;
}

FIGURES.timeline = (f, width) => f.timelines.flatMap((t) => {
  const alike = f.timelines.filter((other) => other.unit === t.unit);  // on one scale
  const span = Math.max(...alike.flatMap((other) => other.rows.flat().map((e) => e[4])));
  return [h("p", { class: "note" }, h("b", {}, T(t.name))), timelineLegend(t.rows, bubbleText(t.bubble)),
    ...timelineOf(t.rows, { unit: t.unit, width, span })];
});

for (const element of document.querySelectorAll("figure[data-figure]"))
  place(element, DATA.figures[Number(element.dataset.figure)]);
setLanguage(remembered("language") || (navigator.language.startsWith("zh") ? "zh" : "en"));
