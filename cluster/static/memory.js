// Bytes of a rank, from what the planner has counted of it without data parallelism; see cluster/planner/memory.py.
const PARTS = ["weights", "gradients", "optimizer", "activations", "gathered", "working"];

const KEEPS_NO_NORM = ["pointwise", "operators"];  // kinds of recomputation that make what norms and activations make again

/** Why there is no such layout, in words; or nothing. */
function refusedOf(x, model, inside) {
  const why = model.why[`${x.tp}/${x.cp}`] || model.why[x.pp > 1 ? `${x.schedule}/${x.pp}` : "1f1b/1"];
  if (why) return why;
  for (const axis of ["ep", "etp"])
    if (x[axis] > 1 && !model.experts) return `--${axis} ${x[axis]}: ${x.model} has no experts`;
  if (inside % (x.ep * x.etp)) return `--ep ${x.ep} --etp ${x.etp}: ep x etp must divide tp x cp x dp = ${inside}`;
  if (x.etp > 1 && model.expertSize % x.etp) return `--etp ${x.etp}: must divide the ${model.expertSize} features of an expert`;
  if (x.ep > 1 && model.experts % x.ep) return `--ep ${x.ep}: must divide the ${model.experts} experts`;
  return "";
}

/** @param x what is chosen; @returns of each rank [rank, bytes by part], or why there is no such layout */
function memoryOf(x) {
  const model = DATA.models[x.model], inside = x.tp * x.cp * x.dp, why = refusedOf(x, model, inside);
  if (why) return why;
  const name = x.pp > 1 ? x.schedule : "1f1b", plan = DATA.schedules[`${name}/${x.pp}`];
  const [weight, gradient, optimizer] = DATA.sizes, data = x.dp * x.cp, edp = inside / (x.ep * x.etp), w = 2;
  const tokens = x.microbatch * model.tokens / x.cp, etp = model.experts ? x.etp : 1;
  const layer = (kind) => model.layer[[x.tp, x.cp > 1 ? 2 : 1, etp, kind].join("/")].map(([a, b]) => a * tokens + b);
  const saved = layer(x.recompute), wgrad = model.wgrad[`${x.tp}/${etp}`].map((each) => each * tokens);
  const [first, last, keptByLast, comesInLast] = model.ends[[x.tp, x.cp, x.microbatch].join("/")];
  const [dense, moe, firstEnd, lastEnd, shared] = model.tp[x.tp];
  const expert = model.experts ? Math.floor(model.experts / x.ep) * model.expert[etp] : 0;
  const count = x.pp > 1 ? plan.stages[0].length * x.pp / (name === "dualpipe" ? 2 : 1) : 1, layers = model.layers[count];
  const of = ([a, b], each) => a * each[0] + (b ? b * each[1] : 0);
  const again = layer("none"), which = model.moe > 0 ? 1 : 0;
  const comes = again[which] - saved[which] + tokens * model.features / x.tp * w;
  const ranks = model.ranks[[x.tp, name, x.pp].join("/")];

  return Object.entries(ranks).map(([rank, [gathered, gatheredLayers, biases]]) => {
    const stages = x.pp > 1 ? plan.stages[rank] : [0], isFirst = stages.includes(0), isLast = stages.includes(count - 1);
    const here = stages.reduce((sum, s) => sum + layers[s][1], 0) * expert;
    const others = stages.reduce((sum, s) => sum + layers[s][0] * dense + layers[s][1] * moe, 0)
      + (isFirst ? firstEnd : 0) + (isLast ? lastEnd : 0) - (isFirst && isLast ? shared : 0);
    const full = here + others, shard = others / data + here / edp;
    const any = stages.some((s) => layers[s][0] + layers[s][1] > 0);
    const angles = any && x.recompute !== "full" && !(x.recompute === "operators" && model.qkNorm)
      ? 4 * model.tokens / x.cp * model.rotary : 0;
    const sizes = stages.map((s) => of(layers[s], saved) + (s === 0 ? first : 0) + (s === count - 1 ? last : 0));
    let activations = sizes[0];
    if (x.pp > 1) {
      sizes.push(...stages.map((s) => of(layers[s], wgrad) + (s === count - 1 ? keptByLast : 0)));
      const shards = x.cp * x.tp;  // sequence parallelism
      sizes.push(any || isLast ? (KEEPS_NO_NORM.includes(x.recompute) ? 0 : x.microbatch * model.tokens * model.hidden / shards * w) : 0);
      sizes.push((any || isLast) && !model.moe ? tokens * model.hidden * w : 0);
      activations = Math.max(...plan.peaks[rank].map((counts) => counts.reduce((sum, n, i) => sum + n * sizes[i], 0)));
    }
    return [Number(rank), {
      weights: weight * (x.zero === 3 ? shard : full) + biases,
      gradients: gradient * (x.zero >= 2 ? shard : full),
      optimizer: optimizer * (x.zero >= 1 ? shard : full),
      activations: activations + angles,
      gathered: x.zero === 3 ? weight * (gathered + gatheredLayers * expert) : 0,
      working: Math.max(comes, isLast ? comesInLast : 0) + (x.zero >= 2 ? 2 * Math.min(DATA.bucket, full) * gradient : 0),
    }];
  });
}
const totalOf = (held) => PARTS.reduce((sum, part) => sum + held[part], 0);

const FIELDS = Object.fromEntries([...document.querySelectorAll(".knobs select")].map((e) => [e.id, e]));
function asked() {
  const x = Object.fromEntries(Object.entries(FIELDS).map(([id, e]) => [id, e.value]));
  for (const id of ["tp", "cp", "pp", "dp", "ep", "etp", "zero", "microbatch"]) x[id] = Number(x[id]);
  return x;
}

/** A bar for each [name, bytes by part], against the GPU's memory. */
function barsOf(title, rows, limit, width) {
  const series = Object.fromEntries(PARTS.map((part) => [part, rows.map(([, held]) => held[part] / 1e9)]));
  const figure = { title, unit: "GB", groups: rows.map(([name]) => name), stacked: true, series,
    expected: rows.map(() => limit / 1e9), formula: "", mark: ["what of the GPU may be used", "GPU 可用的显存"] };
  return h("figure", {}, h("figcaption", {}, T(title)), ...FIGURES.bars(figure, width));
}

function draw() {
  const x = asked(), found = memoryOf(x), out = document.getElementById("drawn"), width = Math.max(300, out.clientWidth);
  const memory = DATA.gpus[x.gpu], limit = memory * DATA.usable, world = x.tp * x.cp * x.pp * x.dp;
  if (typeof found === "string") {
    out.replaceChildren(h("p", { class: "error", id: "why" }, found));
    return;
  }
  const most = found.reduce((a, b) => (totalOf(b[1]) > totalOf(a[1]) ? b : a)), total = totalOf(most[1]);
  const verdict = total <= limit
    ? T([`fits: ${num(total / 1e9)} of ${num(memory / 1e9)} GB`, `放得下：${num(memory / 1e9)} GB 中用 ${num(total / 1e9)} GB`])
    : T([`does not fit: ${num(total / 1e9)} GB, ${num((total - limit) / 1e9)} too many`, `放不下：${num(total / 1e9)} GB，多出 ${num((total - limit) / 1e9)}`]);
  const table = h("table", { id: "numbers" },
    h("thead", {}, h("tr", {}, h("th", {}, "GB"), ...PARTS.map((p) => h("th", {}, T(WORDS[p]))), h("th", {}, T(["all", "合计"])))),
    h("tbody", {}, ...found.map(([rank, held]) => h("tr", {}, h("th", {}, `pp ${rank}`), ...[...PARTS, "all"].map((part) => {
      const value = part === "all" ? totalOf(held) : held[part];
      return h("td", { class: "number", "data-rank": rank, "data-what": part, "data-value": value }, num(value / 1e9));
    })))));
  const others = (key, values) => values.map((value) => [key === "schedule" ? value : `${key} ${value}`, memoryOf({ ...x, [key]: value })])
    .filter(([, ranks]) => typeof ranks !== "string").map(([name, ranks]) => {
      const top = ranks.reduce((a, b) => (totalOf(b[1]) > totalOf(a[1]) ? b : a));
      return [name, top[1]];
    });
  out.replaceChildren(
    h("p", { class: `verdict ${total <= limit ? "yes" : "no"}`, id: "fits" }, verdict),
    h("p", { class: "note" }, `${num(world)} GPUs = tp ${x.tp} × cp ${x.cp} × pp ${x.pp} × dp ${x.dp}`),
    barsOf(["By rank of the pipeline: of those with equal stages, the first and the last",
      "按流水线 rank：阶段相同者取首、末"], found.map(([rank, held]) => [`pp ${rank}`, held]), limit, width),
    h("div", { class: "scroll", tabindex: 0 }, table),
    barsOf(["By stage of ZeRO, the rank that holds most", "按 ZeRO 级别，取最多的 rank"], others("zero", [0, 1, 2, 3]), limit, width),
    barsOf(["By recomputation, the rank that holds most", "按重计算方式，取最多的 rank"],
      others("recompute", [...FIELDS.recompute.options].map((o) => o.value)), limit, width),
    ...(x.pp > 1 ? [barsOf(["By schedule, the rank that holds most", "按调度，取最多的 rank"],
      others("schedule", [...FIELDS.schedule.options].map((o) => o.value)), limit, width)] : []));
}
const WORDS = { weights: ["weights", "权重"], gradients: ["gradients", "梯度"], optimizer: ["optimizer", "优化器"],
  activations: ["activations", "激活"], gathered: ["gathered (ZeRO-3)", "收集（ZeRO-3）"], working: ["comes and goes", "临时"] };
for (const field of Object.values(FIELDS)) field.onchange = draw;
redraw.push(draw);
setLanguage(language());
