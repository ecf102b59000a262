// The page of the explorer: sliders, the table, the timelines, and a step through one of them.
const KNOBS = Object.fromEntries([...document.querySelectorAll(".knobs input")].map((e) => [e.id, e]));
const value = (id) => Number(KNOBS[id].value);
const chosen = new Set(DATA.shown);
let stepping = null, at = 0, critical = false;

function settings() {
  const [F, I, W] = [value("F"), value("I"), value("W")];
  return { p: value("p"), m: value("m"), v: value("v"), costs: { F, B: I + W, I, W }, message: value("message"),
    memory: value("memory") };
}

/** Every chosen schedule: [name, schedule, verdict], or [name, null, why there is none]. */
function found() {
  const { p, m, v, costs, message } = settings(), all = [];
  const own = document.getElementById("csv").value.trim();
  for (const name of [...DATA.names, ...(own ? ["yours"] : [])]) {
    if (name !== "yours" && !chosen.has(name)) continue;
    try {
      const schedule = name === "yours" ? fromCSV(own) : SCHEDULES[name](p, m, v);
      all.push([name, schedule, validate(schedule, costs, message)]);
    } catch (error) {
      if (!(error instanceof ScheduleError)) throw error;
      all.push([name, null, error.message]);
    }
  }
  return all;
}

const COLUMNS = [
  ["makespan", ["a step", "一步"]], ["bubbleOfWall", ["bubble, of wall time", "气泡，占总时间"]],
  ["bubbleOfIdeal", ["of ideal time", "占理想时间"]], ["ownBubble", ["within the step", "步内"]],
  ["activations", ["activations", "激活"]], ["parameters", ["parameters", "参数"]],
  ["messages", ["messages of a rank", "每 rank 消息"]], ["allMessages", ["of all", "消息合计"]],
];

/** As pipeline/compare.py chooses: the shortest step within the memory; of equals what needs less and sends less. */
function best(all, memory) {
  const fit = all.filter(([, schedule, v]) => schedule && v.activations <= memory);
  const order = (v) => [Number(v.makespan.toFixed(9)), v.activations, v.parameters, v.messages];
  return fit.sort(([, , a], [, , b]) => {
    const [x, y] = [order(a), order(b)], i = x.findIndex((n, k) => n !== y[k]);
    return i < 0 ? 0 : x[i] - y[i];
  })[0]?.[0];
}

function table(all) {
  const { memory } = settings(), winner = best(all, memory);
  const rows = all.map(([name, schedule, v]) => h("tr", { "data-schedule": name, class: schedule && v.activations > memory ? "no" : "" },
    h("th", { scope: "row" }, name === "yours" ? T(["yours", "你的"]) : name, name === winner ? " ★" : ""),
    ...(schedule
      ? COLUMNS.map(([what]) => h("td", { class: "number", "data-what": what, "data-value": v[what] }, num(v[what])))
      : [h("td", { class: "error", colspan: COLUMNS.length }, v)])));
  return h("div", { class: "scroll", tabindex: 0 }, h("table", { id: "numbers" },
    h("thead", {}, h("tr", {}, h("th", {}, ""), ...COLUMNS.map(([, words]) => h("th", {}, T(words))))), h("tbody", {}, ...rows)));
}

/** In the order of their starts: [time, rank, index]. */
const order = (rows) => rows.flatMap((row, r) => row.map((e, i) => [e[3], r, i])).sort((a, b) => a[0] - b[0] || a[1] - b[1]);

function stepTold(schedule, v) {
  const actions = order(v.rows), k = Math.min(at, actions.length), last = actions[k - 1];
  const done = schedule.map(() => 0), now = [];
  for (const [, r, i] of actions.slice(0, k)) {
    const kind = v.rows[r][i][1];
    done[r] += kind === "F" ? 1 : kind === "B" || kind === "W" ? -1 : 0;
  }
  if (last) {
    const [stage, kind, m, from, to, waited] = v.rows[last[1]][last[2]];
    now.push(`${k} / ${actions.length}: rank ${last[1]}, ${stage}${kind}${m}, ${T(KIND[kind])}, ${num(from)} – ${num(to)}`,
      waited ? ` · ${T(["waited for", "等待"])} ${waited[1]} (rank ${waited[0]})` : "",
      ` · ${T(["in flight", "在途"])}: ${done.join(" ")}`);
  } else now.push(T(["nothing has begun", "还没有开始"]));
  return h("p", { class: "told", id: "step-told", "aria-live": "polite" }, ...now);
}

function draw() {
  for (const input of Object.values(KNOBS)) document.getElementById(`${input.id}-said`).textContent = input.value;
  const all = found(), main = document.getElementById("drawn"), width = Math.max(300, main.clientWidth);
  const { memory } = settings(), fits = best(all, memory);
  const parts = [table(all), h("p", { class: "note", id: "winner" }, fits
    ? `★ ${fits}: ${T(["the shortest step within the memory limit", "显存上限内一步最短"])}`
    : T(["none of them fits the memory limit", "没有一个放得进显存上限"]))];
  const span = Math.max(0, ...all.map(([, schedule, v]) => (schedule ? v.makespan : 0)));  // all on one scale
  for (const [name, schedule, v] of all) {
    if (!schedule) continue;
    const steps = stepping === name, actions = steps ? order(v.rows) : [];
    if (steps) at = Math.min(at, actions.length);
    const title = name === "yours" ? T(["yours", "你的"]) : `${name}: ${T(DATA.why[name])}`;
    const button = h("button", { type: "button", "aria-pressed": steps, "data-step": name,
      onclick: () => { stepping = steps ? null : name; at = 0; draw(); } }, T(["step by step", "逐步"]));
    const shown = { width, span, critical: critical ? new Set(v.path.map((each) => each.join(":"))) : undefined };
    if (steps) shown.until = at < actions.length ? actions[at][0] + (at && actions[at - 1][0] === actions[at][0] ? 1e-9 : 0) : undefined;
    parts.push(h("section", { "data-drawn": name }, h("h3", {}, title, " ", button),
      timelineLegend(v.rows, bubbleText([v.bubbleOfWall, v.bubbleOfIdeal])),
      ...(steps ? [stepControls(actions.length), stepTold(schedule, v)] : []),
      ...timelineOf(v.rows, shown),
      h("details", {}, h("summary", {}, T(["as CSV, in torch's notation", "CSV（torch 的记法）"])),
        h("textarea", { readonly: true, "aria-label": `CSV of ${name}` }, toCSV(schedule)))));
  }
  main.replaceChildren(...parts);
}

function stepControls(count) {
  const go = (to) => () => {
    at = Math.max(0, Math.min(count, to));
    draw();
    document.getElementById("step-at")?.focus();
  };
  const slider = h("input", { type: "range", id: "step-at", min: 0, max: count, value: at,
    "aria-label": T(["actions that have begun", "已开始的动作"]) });
  slider.oninput = () => { at = Number(slider.value); draw(); document.getElementById("step-at").focus(); };
  return h("div", { class: "steps" }, h("button", { type: "button", id: "step-back", onclick: go(at - 1) }, "◀"),
    slider, h("button", { type: "button", id: "step-on", onclick: go(at + 1) }, "▶"));
}

const choices = document.getElementById("choices");
for (const name of DATA.names) {
  const box = h("input", { type: "checkbox", id: `show-${name}` });
  box.checked = chosen.has(name);
  box.onchange = () => { if (box.checked) chosen.add(name); else chosen.delete(name); draw(); };
  choices.append(h("label", {}, box, ` ${name}`));
}
let queued = false;
function soon() {
  if (queued) return;
  queued = true;
  requestAnimationFrame(() => { queued = false; draw(); });
}
for (const input of Object.values(KNOBS)) input.oninput = soon;
document.getElementById("csv").oninput = soon;
document.getElementById("critical").onchange = (event) => { critical = event.target.checked; draw(); };
redraw.push(draw);
setLanguage(language());
