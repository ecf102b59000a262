// The figures of a page, by their kind; see core/proof/figures.py.
const FIGURES = {
  bars(f, width) {
    const names = Object.keys(f.series), groups = f.groups.map(T), rows = [];
    const total = (g) => names.reduce((sum, n) => sum + f.series[n][g], 0);
    const values = f.stacked ? groups.map((_, g) => total(g)) : names.flatMap((n) => f.series[n]);
    const most = Math.max(...values, ...(f.expected || []), 1e-300);
    const left = Math.min(Math.max(...groups.map(textWidth), 30) + 16, width * 0.4);
    const right = 96, scale = Math.max(40, width - left - right) / most, thick = 16;
    const svg = s("svg", { width, role: "img", "aria-label": T(f.title) });
    let y = 4;
    groups.forEach((group, g) => {
      const lines = wrap(group, left - 10), height = (f.stacked ? 1 : names.length) * (thick + 2);
      const high = Math.max(height, lines.length * 14);
      lines.forEach((line, i) => svg.append(s("text", { x: left - 8, y: y + 12 + i * 14, "text-anchor": "end" }, line)));
      let x = left;
      names.forEach((name, i) => {
        const value = f.series[name][g], at = f.stacked ? y : y + i * (thick + 2);
        const bar = s("rect", { x: f.stacked ? x : left, y: at, width: Math.max(value * scale, 0.5), height: thick,
          fill: series(i) }, s("title", {}, `${group}, ${N(name)}: ${num(value)} ${T(f.unit)}`));
        svg.append(bar);
        if (f.stacked) x += value * scale;
        else svg.append(s("text", { x: left + value * scale + 5, y: at + 12 }, num(value)));
      });
      if (f.expected) {
        const at = left + f.expected[g] * scale;
        svg.append(s("line", { x1: at, x2: at, y1: y - 2, y2: y + height, class: "mark" },
          s("title", {}, `${T(f.formula)}: ${num(f.expected[g])}`)));
      }
      if (f.stacked) svg.append(s("text", { x: x + 6, y: y + 12, class: "halo" }, num(total(g))));
      rows.push(group);
      y += high + 8;
    });
    svg.setAttribute("height", y);
    const entries = names.map((name, i) => [series(i), N(name)]);
    if (f.expected) entries.push(["", T(f.mark || [`by the formula: ${T(f.formula)}`, `按公式：${T(f.formula)}`]), "mark"]);
    return [legend(entries), h("div", { class: "scroll" }, svg), h("p", { class: "note" }, T(f.unit))];
  },

  lines(f, width) {
    const names = Object.keys(f.series), all = names.flatMap((n) => f.series[n]).filter(Number.isFinite);
    const count = Math.max(...names.map((n) => f.series[n].length)), left = 64, high = 220, wide = width - left - 20;
    const [low, top] = range(all), x = (i) => left + (count > 1 ? (i / (count - 1)) * wide : wide / 2);
    const y = (v) => 10 + (1 - (v - low) / (top - low)) * (high - 20);
    const svg = s("svg", { width, height: high + 34, role: "img", "aria-label": T(f.title) });
    ticks(low, top, 5).forEach((v) => svg.append(
      s("line", { x1: left, x2: left + wide, y1: y(v), y2: y(v), class: "axis" }),
      s("text", { x: left - 6, y: y(v) + 4, "text-anchor": "end", class: "soft" }, num(v))));
    const every = Math.max(1, Math.ceil(count / 12));
    for (let i = 0; i < count; i += every)
      svg.append(s("text", { x: x(i), y: high + 12, "text-anchor": "middle", class: "soft" }, String(i)));
    svg.append(s("text", { x: left + wide, y: high + 28, "text-anchor": "end", class: "soft" }, T(f.x)));
    names.forEach((name, i) => {
      const points = f.series[name].map((v, k) => [x(k), y(v), v]).filter((p) => Number.isFinite(p[1]));
      // A line that another hides is still seen: wide below, thin above.
      svg.append(s("polyline", { points: points.map((p) => p.slice(0, 2).join()).join(" "), fill: "none",
        stroke: series(i), "stroke-width": names.length > 1 && i === 0 ? 6 : 2, "stroke-opacity": i === 0 ? 0.55 : 1 }));
      points.forEach(([px, py, v], k) => svg.append(
        s("circle", { cx: px, cy: py, r: 3, fill: series(i) }, s("title", {}, `${N(name)}, ${k}: ${v}`))));
    });
    return [legend(names.map((name, i) => [series(i), N(name)])), h("div", { class: "scroll" }, svg),
      h("p", { class: "note" }, T(f.y))];
  },

  scatter(f, width) {
    const kinds = [...new Set(f.points.map((p) => p[3]))], left = 64, high = 300, wide = width - left - 110;
    let [x0, x1] = range(f.points.map((p) => p[1])), [y0, y1] = range(f.points.map((p) => p[2]));
    if (f.diagonal) [x0, x1, y0, y1] = [Math.min(x0, y0), Math.max(x1, y1), Math.min(x0, y0), Math.max(x1, y1)];
    const x = (v) => left + ((v - x0) / (x1 - x0)) * wide, y = (v) => 10 + (1 - (v - y0) / (y1 - y0)) * (high - 20);
    const svg = s("svg", { width, height: high + 36, role: "img", "aria-label": T(f.title) });
    ticks(y0, y1, 5).forEach((v) => svg.append(s("line", { x1: left, x2: left + wide, y1: y(v), y2: y(v), class: "axis" }),
      s("text", { x: left - 6, y: y(v) + 4, "text-anchor": "end", class: "soft" }, num(v))));
    ticks(x0, x1, 5).forEach((v) => svg.append(
      s("text", { x: x(v), y: high + 10, "text-anchor": "middle", class: "soft" }, num(v))));
    svg.append(s("text", { x: left + wide, y: high + 28, "text-anchor": "end", class: "soft" }, T(f.x)));
    if (f.diagonal) svg.append(s("line", { x1: x(x0), y1: y(x0), x2: x(x1), y2: y(x1), class: "mark",
      "stroke-dasharray": "4 4" }));
    const taken = [];
    f.points.forEach(([label, px, py, kind]) => {
      svg.append(s("circle", { cx: x(px), cy: y(py), r: 5, fill: series(kinds.indexOf(kind)) },
        s("title", {}, `${label}: ${num(px)}, ${num(py)}`)));
      if (!label) return;
      const long = textWidth(label), right = x(px) + 9 + long < width;  // on its right, or else on its left
      const from = Math.max(left + 4, right ? x(px) + 9 : x(px) - 9 - long);
      const free = (at) => at > 10 && at < high - 8
        && taken.every(([a, b, c]) => from > b || from + long < a || Math.abs(c - at) >= 14);
      const at = [0, 14, -14, 28, -28, 42, -42, 56, -56].map((more) => y(py) + 4 + more).find(free) || y(py) + 4;
      taken.push([from, from + long, at]);
      svg.append(s("text", { x: from, y: at, class: "halo" }, label));
    });
    const named = kinds.length > 1 && kinds.length < 9 ? [legend(kinds.map((kind, i) => [series(i), N(kind)]))] : [];
    return [...named, h("div", { class: "scroll" }, svg), h("p", { class: "note" }, T(f.y))];
  },

  grid(f) {
    const cell = ([text, colour]) => {
      const solid = typeof colour === "string";
      const style = solid ? `background:${series(Number(colour))}`
        : typeof colour === "number" ? `background:rgba(var(--shade),${(0.05 + 0.5 * Math.min(1, colour)).toFixed(3)})` : null;
      return h("td", { style, class: solid ? "solid" : null }, T(text));
    };
    const head = h("tr", {}, h("th", {}, T(f.corner)), ...f.columns.map((c) => h("th", {}, T(c))));
    const body = f.rows.map(([name, cells]) => h("tr", {}, h("th", { scope: "row" }, T(name)), ...cells.map(cell)));
    const made = [h("div", { class: "scroll", tabindex: 0 },
      h("table", { class: "grid" }, h("thead", {}, head), h("tbody", {}, ...body)))];
    const entries = Object.entries(f.legend).map(([colour, text]) => [series(Number(colour)), T(text)]);
    return entries.length ? [legend(entries), ...made] : made;
  },

  shards(f, most) {
    const largest = Math.max(...f.tensors.flatMap((t) => t[1])), svg = s("svg", { role: "img", "aria-label": T(f.title) });
    const side = (n) => 26 + 134 * Math.sqrt(n / largest);
    let x = 4, y = 0, wide = 0, tall = 0;
    for (const [name, shape, dim, how] of f.tensors) {
      const [rows, columns] = shape.length > 1 ? shape : [1, shape[0]], high = side(rows), width = side(columns);
      const label = `${name}  ${shape.join(" × ")}`, room = Math.max(width, textWidth(label), textWidth(T(how))) + 22;
      if (x > 4 && x + room > most) [x, y, tall] = [4, y + tall + 16, 0];
      svg.append(s("text", { x, y: y + 14 }, label), s("text", { x, y: y + 30, class: "soft" }, T(how)));
      const bands = dim === null ? 1 : f.ranks;
      for (let r = 0; r < bands; r++) {
        const box = dim === 0 ? { x, y: y + 38 + (r * high) / bands, width, height: high / bands }
          : { x: x + (r * width) / bands, y: y + 38, width: width / bands, height: high };
        const part = dim === null ? shape : shape.map((n, i) => (i === dim ? Math.ceil(n / f.ranks) : n));
        svg.append(s("rect", { ...box, fill: dim === null ? "var(--idle)" : series(r), stroke: "var(--paper)",
          "fill-opacity": dim === null ? 0.35 : 1 },
          s("title", {}, `${dim === null ? T(["every rank", "每个 rank"]) : `rank ${r}`}: ${part.join(" × ")}`)));
        const text = dim === null ? T(["all ranks", "所有 rank"]) : String(r);
        if (Math.min(box.width, box.height * 2) > 14)
          svg.append(s("text", { x: box.x + box.width / 2, y: box.y + box.height / 2 + 4, "text-anchor": "middle",
            class: dim === null ? "" : "on" }, box.width > textWidth(text) ? text : ""));
      }
      x += room;
      wide = Math.max(wide, x);
      tall = Math.max(tall, 40 + high);
    }
    svg.setAttribute("width", wide);
    svg.setAttribute("height", y + tall + 4);
    return [h("div", { class: "scroll", tabindex: 0 }, svg)];
  },

  owners(f, width) {
    const parts = f.parts.map(T), left = 60, gap = 14, wide = (Math.max(width, 420) - left - gap * parts.length) / parts.length;
    const svg = s("svg", { width: Math.max(width, 420), role: "img", "aria-label": T(f.title) });
    const owned = (runs) => runs.reduce((sum, [a, b]) => sum + b - a, 0);
    parts.forEach((part, i) => {
      const each = [...new Set(f.ranks.map((rank) => owned(rank[i])))];
      const text = `${part}: ${each.map(num).join(T([" or ", " 或 "]))}`;
      svg.append(s("text", { x: left + i * (wide + gap), y: 14 }, textWidth(text) < wide ? text : part));
    });
    f.ranks.forEach((rank, r) => {
      const y = 22 + r * 24;
      svg.append(s("text", { x: left - 8, y: y + 14, "text-anchor": "end" }, `rank ${r}`));
      rank.forEach((runs, i) => {
        const x = left + i * (wide + gap);
        svg.append(s("rect", { x, y, width: wide, height: 18, fill: "var(--card)", stroke: "var(--line)" }));
        for (const [a, b] of runs)
          svg.append(s("rect", { x: x + (wide * a) / f.size, y, width: Math.max(0.7, (wide * (b - a)) / f.size),
            height: 18, fill: series(r) }, s("title", {}, `rank ${r}, ${parts[i]}: ${num(a)} – ${num(b)}`)));
      });
    });
    svg.setAttribute("height", 28 + f.ranks.length * 24);
    return [h("div", { class: "scroll" }, svg)];
  },

  path(f) {
    return [h("ol", { class: "stops" }, ...f.stops.map(([where, what, shape]) =>
      h("li", {}, h("b", {}, T(where)), T(what), h("code", {}, shape))))];
  },

  groups(f) {
    const out = h("div"), kinds = Object.entries(f.kinds);
    let chosen = 0;
    const show = () => {
      out.replaceChildren(h("p", { class: "note" }, T(["choose a rank", "选择一个 rank"])), buttons(-1, []),
        h("div", { class: "scroll" }, h("table", {}, h("tbody", {}, ...kinds.map(([kind, [what, groups]]) => {
          const mine = groups.find((g) => g.includes(chosen)) || [];
          return h("tr", {}, h("th", { scope: "row" }, kind), h("td", {}, T(what)), h("td", {},
            mine.length ? strip(mine) : "–"));
        })))));
    };
    const buttons = () => h("div", { class: "ranks" }, ...Array.from({ length: f.world }, (_, r) => h("button", {
      type: "button", "aria-pressed": r === chosen, onclick: () => { chosen = r; show(); } }, String(r))));
    const strip = (mine) => {
      const size = Math.max(4, Math.min(16, 480 / f.world));
      const svg = s("svg", { width: size * f.world, height: 18, role: "img", "aria-label": mine.join(" ") });
      for (let r = 0; r < f.world; r++)
        svg.append(s("rect", { x: r * size, y: 2, width: size - 1, height: 14, fill: r === chosen ? "var(--accent)"
          : mine.includes(r) ? "var(--s1)" : "var(--line)" }, s("title", {}, `rank ${r}`)));
      return h("span", {}, svg, mine.length <= 16 ? mine.join(" ") : `${mine.length} ranks`);
    };
    show();
    return [out];
  },
};

function wrap(text, width) {
  const lines = [""];
  for (const word of text.split(" ")) {
    const longer = lines.at(-1) ? `${lines.at(-1)} ${word}` : word;
    if (lines.at(-1) && textWidth(longer) > width) lines.push(word);
    else lines[lines.length - 1] = longer;
  }
  return lines;
}
function range(values) {
  const low = Math.min(...values), high = Math.max(...values), more = (high - low) * 0.06 || Math.abs(high) * 0.01 || 1;
  return [low === 0 ? 0 : low - more, high + more];
}
function ticks(low, high, about) {
  const raw = (high - low) / about, power = 10 ** Math.floor(Math.log10(raw));
  const step = power * [1, 2, 5, 10].find((n) => n * power >= raw), found = [];
  for (let v = Math.ceil(low / step) * step; v <= high; v += step) found.push(Number(v.toPrecision(10)));
  return found;
}

/** Draw a figure into its element, and again when the language or the width changes. */
function place(element, figure) {
  const draw = () => {
    const width = Math.max(300, Math.min(1040, element.clientWidth || 1040));
    element.replaceChildren(h("figcaption", {}, T(figure.title)), ...FIGURES[figure.kind](figure, width),
      ...(figure.note ? [h("p", { class: "note" }, T(figure.note))] : []));
    for (const svg of element.querySelectorAll("svg[height]"))  // so that what is wider than the paper is printed smaller
      svg.setAttribute("viewBox", `0 0 ${svg.getAttribute("width")} ${svg.getAttribute("height")}`);
  };
  redraw.push(draw);
  draw();
}

let lastWidth = innerWidth;
addEventListener("resize", () => {
  if (innerWidth !== lastWidth) redraw.forEach((draw) => draw());
  lastWidth = innerWidth;
});
