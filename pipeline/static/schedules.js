// The schedules of lectures 07 and 08 and the validator, as pipeline/*.py and pipeline/engine/validator.py have them.
// An action is [stage, kind, micro-batch]; a schedule is a row of actions for each rank. Nothing here knows of a page.

class ScheduleError extends Error {}
const said = ([stage, kind, microbatch]) => `${stage}${kind}${microbatch}`;
const times = (n, f) => { for (let i = 0; i < n; i++) f(i); };

/** A rank's actions under construction, where it has several stages; stages: [stage, first micro-batch] of each. */
class Row {
  constructor(...stages) {
    this.actions = [];
    this.stages = stages.map(([stage]) => stage);
    this.nextForward = stages.map(([, first]) => first);
    this.nextBackward = stages.map(([, first]) => first);
    this.pending = [];
  }
  forward(which) { this.actions.push([this.stages[which], "F", this.nextForward[which]++]); }
  backward(which, split = false) {
    const [stage, microbatch] = [this.stages[which], this.nextBackward[which]++];
    this.actions.push([stage, split ? "I" : "B", microbatch]);
    if (split) this.pending.push([stage, "W", microbatch]);
  }
  together(forward, backward) { this.forward(forward); this.backward(backward); }
  weights(which) {
    const at = this.pending.findIndex((a) => which === undefined || a[0] === this.stages[which]);
    this.actions.push(...this.pending.splice(at, 1));
  }
  allWeights(which) { times(this.pending.filter((a) => a[0] === this.stages[which]).length, () => this.weights(which)); }
}

function oneRankOf1F1B(rank, p, m) {
  const row = [], warm = Math.min(p - rank - 1, m);
  let f = 0, b = 0;
  times(warm, () => row.push([rank, "F", f++]));
  times(m - warm, () => row.push([rank, "F", f++], [rank, "B", b++]));
  times(warm, () => row.push([rank, "B", b++]));
  return row;
}

function groupsOf(p, m) {
  const count = Math.max(1, Math.floor(m / p)), size = Math.floor(m / count), larger = m % count, groups = [];
  let first = 0;
  times(count, (g) => {
    const end = (g + 1) * size + Math.min(g + 1, larger);
    groups.push(Array.from({ length: end - first }, (_, i) => first + i));
    first = end;
  });
  return groups;
}

function oneRankInterleaved(rank, p, v, order, group) {
  const forwards = order.map(([chunk, i]) => [chunk * p + rank, "F", i]);
  const backwards = order.map(([chunk, i]) => [(v - 1 - chunk) * p + rank, "B", i]);
  const warm = Math.min(2 * (p - rank - 1) + (v - 1) * group, order.length), actions = forwards.slice(0, warm);
  forwards.slice(warm).forEach((forward, i) => actions.push(forward, backwards[i]));
  return [...actions, ...backwards.slice(order.length - warm)];
}

function oneRankOfZB(rank, warm, delay, m) {
  const row = [];
  times(Math.min(warm, m), (i) => row.push([rank, "F", i]));
  times(m, (i) => {
    row.push([rank, "I", i]);
    if (i >= delay) row.push([rank, "W", i - delay]);
    if (i + warm < m) row.push([rank, "F", i + warm]);
  });
  for (let i = Math.max(0, m - delay); i < m; i++) row.push([rank, "W", i]);
  return row;
}

function oneRankOfZBV(rank, p, m) {
  const row = new Row([rank, 0], [2 * p - 1 - rank, 0]), down = 0, up = 1;
  times(2 * (p - rank) - 1, () => row.forward(down));
  times(rank, () => { row.forward(up); row.forward(down); });
  times(p - rank, () => { row.forward(up); row.backward(up, true); row.weights(up); });
  while (row.nextForward[up] < m) {
    if (row.nextForward[down] < m) row.forward(down);
    row.backward(down, true);
    row.weights(down);
    row.forward(up);
    row.backward(up, true);
    row.weights(up);
  }
  times(rank, () => { row.backward(down, true); row.backward(up, true); });
  times(p - rank, () => { row.backward(down, true); row.weights(down); });
  row.allWeights(up);
  row.allWeights(down);
  return row.actions;
}

/** DualPipe: rank number `rank` of `p` between the end where a stream enters and the middle; m of each stream. */
function oneRankOfDualPipe(row, rank, p, m) {
  const near = 0, far = 1, toMiddle = p - rank - 1;
  times(2 * toMiddle, () => row.forward(near));
  times(rank + 1, () => { row.forward(near); row.forward(far); });
  times(toMiddle, () => { row.backward(far, true); row.weights(); row.forward(far); });
  times(m - 2 * p + rank + 1, (i) => {
    if (i === 0 && toMiddle === 0) { row.forward(near); row.backward(far); } else row.together(near, far);
    row.together(far, near);
  });
  times(toMiddle, () => { row.backward(far); row.together(far, near); });
  times(2 * (rank + 1), (i) => row.backward(i % 2 ? near : far, i >= rank + 1));
  times(toMiddle, () => { row.weights(); row.backward(near, true); });
  times(rank + 1, () => row.weights());
  return row.actions;
}

const eachRank = (p, f) => Array.from({ length: p }, (_, rank) => f(rank));
const range_ = (n) => Array.from({ length: n }, (_, i) => i);

const SCHEDULES = {
  naive: (p, m) => eachRank(p, (r) => range_(m).flatMap((i) => [[r, "F", i], [r, "B", i]])),
  gpipe: (p, m) => eachRank(p, (r) => ["F", "B"].flatMap((kind) => range_(m).map((i) => [r, kind, i]))),
  "1f1b": (p, m) => eachRank(p, (r) => oneRankOf1F1B(r, p, m)),
  interleaved: (p, m, v) => {
    const groups = groupsOf(p, m), order = groups.flatMap((g) => range_(v).flatMap((c) => g.map((i) => [c, i])));
    return eachRank(p, (r) => oneRankInterleaved(r, p, v, order, groups[0].length));
  },
  "zb-h1": (p, m) => eachRank(p, (r) => oneRankOfZB(r, p - r, r, m)),
  "zb-h2": (p, m) => eachRank(p, (r) => oneRankOfZB(r, 2 * (p - r) - 1, 2 * r, m)),
  "zb-v": (p, m) => eachRank(p, (r) => oneRankOfZBV(r, p, Math.max(m, 2 * p - 1)).filter((a) => a[2] < m)),
  dualpipe: (p, m) => {
    if (p % 2) throw new ScheduleError(`${p} ranks: dualpipe pairs rank r with rank p-1-r, and needs an even number`);
    if (m % 2 || m < 2 * p)
      throw new ScheduleError(`${m} microbatches: dualpipe needs an even number, 2p = ${2 * p} or more`);
    return eachRank(p, (r) => {
      const down = [r, 0], up = [p - 1 - r, m / 2], [near, far] = r < p / 2 ? [down, up] : [up, down];
      return oneRankOfDualPipe(new Row(near, far), Math.min(r, p - 1 - r), p / 2, m / 2);
    });
  },
  dualpipev: (p, m) => {
    if (m < 2 * p) throw new ScheduleError(`${m} microbatches: dualpipev needs 2p = ${2 * p} or more`);
    return eachRank(p, (r) => oneRankOfDualPipe(new Row([r, 0], [2 * p - 1 - r, 0]), r, p, m));
  },
};

// ---- torch's notation ------------------------------------------------------------------------------------------------

function fromCSV(text) {
  const lines = text.replace(/\r/g, "").split("\n");
  while (lines.length && !lines.at(-1).trim()) lines.pop();
  return lines.map((line, rank) => line.split(",").flatMap((cell, position) => {
    const read = (word) => {
      if (!word) return [];
      const pair = word.match(/^\((.*);(.*)\)OVERLAP_F_B$/), single = word.match(/^(\d+)([FBIW])(\d+)$/);
      if (pair) return [...read(pair[1]), ...read(pair[2])];
      if (single) return [[Number(single[1]), single[2], Number(single[3])]];
      throw new ScheduleError(`rank ${rank}, position ${position}: '${cell.trim()}' is no action like 0F0 or 0B0`);
    };
    return read(cell.trim().replace(/^"(.*)"$/, "$1"));
  }));
}
const toCSV = (schedule) => schedule.map((row) => row.map(said).join(",")).join("\n");

// ---- What a schedule is ----------------------------------------------------------------------------------------------

const key = (stage, what, microbatch) => `${stage}${what}${microbatch}`;
function placement(schedule) {
  return new Map(schedule.flatMap((row, rank) => row.map(([stage, , m]) => [key(stage, "@", m), rank])));
}
function sizeOf(schedule) {
  let stages = 0, microbatches = 0;
  for (const row of schedule) for (const [stage, , m] of row) {
    stages = Math.max(stages, stage + 1);
    microbatches = Math.max(microbatches, m + 1);
  }
  return [stages, microbatches];
}
const stagesOfRanks = (schedule) => schedule.map((row) => [...new Set(row.map((a) => a[0]))].sort((a, b) => a - b));

function mostInFlight(row) {
  let now = 0, most = 0;
  for (const [, kind] of row) {
    now += kind === "F" ? 1 : kind === "B" || kind === "W" ? -1 : 0;
    most = Math.max(most, now);
  }
  return most;
}
function messagesByRule(schedule) {
  const rankOf = placement(schedule), sent = schedule.map(() => 0), seen = new Set();
  schedule.forEach((row, rank) => row.forEach(([stage, , m]) => {
    if (seen.has(key(stage, "@", m))) return;
    seen.add(key(stage, "@", m));
    for (const neighbour of [stage - 1, stage + 1])
      if ((rankOf.get(key(neighbour, "@", m)) ?? rank) !== rank) sent[rank] += 1;
  }));
  return sent;
}

/** What comes from a neighbouring stage: [stage, "F" or "B", micro-batch], or null. */
function needed([stage, kind, microbatch], stages) {
  if (kind === "F") return stage > 0 ? [stage - 1, "F", microbatch] : null;
  return kind !== "W" && stage < stages - 1 ? [stage + 1, "B", microbatch] : null;
}

const BEFORE = { B: "F", I: "F", W: "I" };
const SAME_WORK = { F: "F", B: "BIW", I: "IB", W: "WB" };

function checkComplete(schedule) {
  if (!schedule.some((row) => row.length)) throw new ScheduleError("the schedule has no action");
  const done = new Map(), rankOf = new Map(), where = (rank, at, a) => `rank ${rank}, position ${at}, ${said(a)}`;
  schedule.forEach((row, rank) => {
    if (!row.length) throw new ScheduleError(`rank ${rank} has no action`);
    row.forEach((action, position) => {
      const [stage, kind, m] = action, place = key(stage, "@", m), here = where(rank, position, action);
      if (!rankOf.has(place)) rankOf.set(place, rank);
      if (rankOf.get(place) !== rank)
        throw new ScheduleError(`${here}: stage ${stage} of microbatch ${m} is already on rank ${rankOf.get(place)}`);
      for (const other of SAME_WORK[kind]) {
        const same = [stage, other, m];
        if (done.has(said(same)))
          throw new ScheduleError(`${here}: done twice, first as ${where(...done.get(said(same)), same)}`);
      }
      if (BEFORE[kind] && !done.has(said([stage, BEFORE[kind], m])))
        throw new ScheduleError(`${here}: before its ${BEFORE[kind]}`);
      done.set(said(action), [rank, position]);
    });
  });
  const [most, microbatches] = sizeOf(schedule), stages = Math.min(most, 1 + rankOf.size), ofRanks = stagesOfRanks(schedule);
  for (let stage = 0; stage < stages; stage++) {
    const ranks = ofRanks.flatMap((mine, rank) => (mine.includes(stage) ? [rank] : []));
    if (ranks.length > 2)
      throw new ScheduleError(`stage ${stage} is on ranks ${ranks.join(", ")}; at most two have a copy`);
    for (let m = 0; m < microbatches; m++) {
      const kinds = done.has(said([stage, "I", m])) ? "FIW" : "FB";
      const missing = [...kinds].find((kind) => !done.has(said([stage, kind, m])));
      if (missing) {
        const there = rankOf.get(key(stage, "@", m)) ?? ranks[0];
        throw new ScheduleError(`${there === undefined ? "every rank" : `rank ${there}`}: ${stage}${missing}${m} is missing`);
      }
    }
  }
}

/**
 * Check a schedule and run it on virtual devices.
 * @param costs of F, B, I and W, on 1/p of the model
 * @returns rows of [stage, kind, micro-batch, start, end, waited], and what the schedule costs
 */
function validate(schedule, costs, message = 0) {
  checkComplete(schedule);
  const [stages, microbatches] = sizeOf(schedule), share = schedule.length / stages, rankOf = placement(schedule);
  const each = Object.fromEntries(Object.entries(costs).map(([kind, cost]) => [kind, cost * share]));
  const done = new Map(), rows = schedule.map(() => []), now = schedule.map(() => 0), by = schedule.map(() => []);
  let waiting = schedule.map((_, rank) => rank), moved = true;
  while (waiting.length && moved) {
    moved = false;
    for (const rank of waiting) {
      while (rows[rank].length < schedule[rank].length) {
        const action = schedule[rank][rows[rank].length], [stage, kind, m] = action;
        if (kind !== "F" && !done.has(key(stage, kind === "W" ? "B" : "F", m))) break;
        const result = needed(action, stages);
        let start = now[rank], waited = null, from = rows[rank].length ? [rank, rows[rank].length - 1] : null;
        if (result) {
          const there = done.get(key(...result));
          if (!there) break;
          const owner = rankOf.get(key(result[0], "@", m)), at = owner !== rank ? there.at + message : there.at;
          if (at > start)  // so it is another rank's: what this one has made is there
            [start, from, waited] = [at, there.by, [owner, said(schedule[there.by[0]][there.by[1]])]];
        }
        const end = start + each[kind];
        rows[rank].push([stage, kind, m, start, end, waited]);
        by[rank].push(from);
        done.set(key(stage, kind === "I" ? "B" : kind, m), { at: end, by: [rank, rows[rank].length - 1] });
        now[rank] = end;
        moved = true;
      }
    }
    waiting = waiting.filter((rank) => rows[rank].length < schedule[rank].length);
  }
  const reasons = waiting.map((rank) => {
    const rest = schedule[rank].slice(rows[rank].length), result = rest.map((a) => needed(a, stages)).find(Boolean);
    return `rank ${rank}, position ${rows[rank].length}, ${said(rest[0])} waits for ${said(result)}`;
  });
  if (reasons.length) throw new ScheduleError(`deadlock: ${reasons.join("; ")}`);

  const makespan = Math.max(...rows.map((row) => row.at(-1)[4]));
  let busy = 0;
  for (const row of rows) for (const e of row) busy += e[4] - e[3];
  const wall = rows.length * makespan, inFlight = schedule.map(mostInFlight);
  const within = rows.map((row) => row.at(-1)[4] - row[0][3] - row.reduce((sum, e) => sum + e[4] - e[3], 0));
  return {
    rows, inFlight, makespan, microbatches, stages, path: criticalPath(rows, by),
    bubbleOfWall: 1 - busy / wall, bubbleOfIdeal: wall / busy - 1, ownBubble: Math.max(...within),
    activations: Math.max(...inFlight) * share, parameters: Math.max(...stagesOfRanks(schedule).map((s) => s.length)) * share,
    messages: Math.max(...messagesByRule(schedule)), allMessages: messagesByRule(schedule).reduce((a, b) => a + b, 0),
  };
}

/** From an action that ends last back to one that nothing held up: [rank, index] of each, the first one first. */
function criticalPath(rows, by) {
  let at = null;
  rows.forEach((row, rank) => { if (!at || row.at(-1)[4] > rows[at[0]][at[1]][4]) at = [rank, row.length - 1]; });
  const path = [];
  for (; at; at = by[at[0]][at[1]]) path.unshift(at);
  return path;
}
