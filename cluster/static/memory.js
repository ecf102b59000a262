// Bytes of a rank, from what the planner has counted of it without data parallelism; see cluster/planner/memory.py.
const PARTS = ["weights", "gradients", "optimizer", "activations", "gathered", "working"];

/** @param x model, tp, cp, pp, dp, ep, zero, recompute, microbatch; @returns of each rank [rank, bytes by part], or why not */
function memoryOf(x) {
  const { experts } = DATA.models[x.model], inside = x.tp * x.cp * x.dp;
  if (x.ep > 1 && !experts) return `--ep ${x.ep}: ${x.model} has no experts`;
  if (x.ep > 1 && experts % x.ep) return `--ep ${x.ep}: must divide the ${experts} experts`;
  if (inside % x.ep) return `--ep ${x.ep}: must divide tp x cp x dp = ${inside}`;
  const saved = DATA.saved[[x.model, x.tp, x.cp, x.pp, x.recompute, x.microbatch].join("/")];
  if (typeof saved === "number") return DATA.reasons[saved];
  const [weight, gradient, optimizer] = DATA.sizes, data = x.dp * x.cp, edp = inside / x.ep;
  return DATA.shards[[x.model, x.tp, x.pp].join("/")].map(([rank, ofExperts, others, gathered, gatheredExperts, biases], i) => {
    const [activations, comes] = saved[i];
    const here = ofExperts / x.ep, full = here + others, shard = others / data + here / edp;
    return [rank, {
      weights: weight * (x.zero === 3 ? shard : full) + biases,
      gradients: gradient * (x.zero >= 2 ? shard : full),
      optimizer: optimizer * (x.zero >= 1 ? shard : full),
      activations,
      gathered: x.zero === 3 ? gathered - gatheredExperts + gatheredExperts / x.ep : 0,
      working: comes + (x.zero >= 2 ? 2 * Math.min(DATA.bucket, full) * gradient : 0),
    }];
  });
}
const totalOf = (held) => PARTS.reduce((sum, part) => sum + held[part], 0);

const FIELDS = Object.fromEntries([...document.querySelectorAll(".knobs select")].map((e) => [e.id, e]));
function asked() {
  const x = Object.fromEntries(Object.entries(FIELDS).map(([id, e]) => [id, e.value]));
  for (const id of ["tp", "cp", "pp", "dp", "ep", "zero", "microbatch"]) x[id] = Number(x[id]);
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
  const others = (key, values) => values.map((value) => [`${key} ${value}`, memoryOf({ ...x, [key]: value })])
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
      others("recompute", ["none", "selective", "full"]), limit, width));
}
const WORDS = { weights: ["weights", "权重"], gradients: ["gradients", "梯度"], optimizer: ["optimizer", "优化器"],
  activations: ["activations", "激活"], gathered: ["gathered (ZeRO-3)", "收集（ZeRO-3）"], working: ["comes and goes", "临时"] };
for (const field of Object.values(FIELDS)) field.onchange = draw;
redraw.push(draw);
setLanguage(language());
