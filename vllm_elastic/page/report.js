// SPDX-License-Identifier: Apache-2.0
// The replay of recorded runs: one panel a setting, one clock for all of them.
"use strict";

const KINDS = {
  first: ["#7a7f88", "computes everything"], full: ["#7a7f88", "computes everything"],
  window: ["#3a8fd0", "reads the rest from the cache"], refresh: ["#e08a1e", "with stale blocks"],
  replay: ["#b1457c", "a step again, with stale layers"],
};
const LINES = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00"];
const WORK_POSITIONS = 300; // of the slider, where the clock counts row-layers
const BINS = 48; // rows that the map over all passes has at most

const number = (value) => Math.round(value).toLocaleString("en");
const percent = (share) => `${(100 * share).toFixed(share < 0.1 ? 1 : 0)}%`;

/** Adds to a run what follows from its record: cumulated work and tokens, by number of passes. */
function prepare(run) {
  const passes = run.steps.map(passOf);
  Object.assign(run, { steps: [], work: [0], none: [0] });
  run.done = [0];
  const seen = new Set();
  const end = run.prompt_tokens + run.tokens;
  for (const pass of passes) {
    addPass(run, pass);
    for (const position of pass.committed) if (position < end) seen.add(position);
    run.done.push(seen.size);
  }
}

/** One setting: its canvas, what its last pass computed, and all its passes in two charts. */
class Panel {
  constructor(parent, run, request, colour, seek) {
    Object.assign(this, { run, request, seek, passes: -1 });
    const box = (this.box = element(parent, "section", "panel"));
    box.dataset.setting = run.setting;
    const head = element(box, "header");
    const title = element(head, "h2", "", run.setting);
    title.style.borderBottom = `3px solid ${colour}`;
    this.figures = element(head, "span", "figures");
    const meter = element(box, "div", "meter");
    this.meter = element(meter, "i");
    const prompt = run.prompt_tokens;
    this.prompt = new CanvasView(box, prompt, "prompt");
    this.prompt.box.classList.add("prompt");
    this.prompt.box.tabIndex = 0;
    this.answer = new CanvasView(box, run.canvas - prompt, "answer");
    this.why = element(box, "p", "why");
    const figure = element(box, "figure");
    this.map = new PassMap(figure, run);
    element(box, "p", "caption", "Row-layers of each pass, by kind; dashed: without a cache");
    this.bars = element(box, "figure");
    element(box, "p", "caption", "Where each pass computed: positions down; dark none, yellow all of their row-layers");
    this.where = element(box, "figure");
    if (this.map.hasSimilarities) {
      element(box, "p", "caption", `Similarity: layers down; the more yellow, the nearer to 1; framed: below gamma ${run.knobs.gamma}`);
      this.similar = element(box, "figure");
    }
    new ResizeObserver(() => this.drawCharts()).observe(box);
  }

  /** The state after so many passes. */
  show(passes) {
    if (passes === this.passes) return;
    this.passes = passes;
    const { run, request } = this;
    const state = canvasAt(run, passes);
    const steps = run.denoising_steps;
    const done = run.done[passes];
    this.prompt.show(promptCells(run, state, request.prompt), `prompt of ${run.prompt_tokens} tokens`);
    this.answer.show(answerCells(run, state, request.words, steps), `${done} of ${run.tokens} tokens committed`);
    this.meter.style.width = `${(100 * done) / Math.max(run.tokens, 1)}%`;
    const pass = state.last;
    const kind = pass ? `, ${pass.kind}` : "";
    const none = run.none[passes];
    const share = none ? `, <b>${percent(run.work[passes] / none)}</b> of no cache` : "";
    this.figures.innerHTML =
      `pass <b class="pass">${passes}</b> of ${run.steps.length}${kind} · <b class="done">${done}</b> of ` +
      `${run.tokens} tokens · <b class="work">${number(run.work[passes])}</b> row-layers${share}`;
    this.why.textContent = pass ? reasonOf(run, passes - 1) : "All masks. Nothing is computed yet.";
    this.map.show(pass);
    this.placeRules();
  }

  drawCharts() {
    const width = this.bars.clientWidth;
    if (width === this.width || width < 50) return;
    this.width = width;
    const { run, request } = this;
    const most = d3.max(request.runs, (other) => other.steps.length);
    const none = run.canvas * run.layers;
    const passes = run.steps.map((pass, index) => ({
      pass: index + 1, kind: pass.kind, work: workOf(pass, run.layers), rows: pass.rows,
      none: pass.length * run.layers,
      tokens: pass.committed.length,
    }));
    const shared = { width, marginTop: 6, marginBottom: 20, marginLeft: 58, marginRight: 8, style: { background: "none", fontSize: "11px" } };
    const x = { domain: [0.5, most + 0.5], label: null, ticks: Math.min(most, 8) };
    this.bars.replaceChildren(Plot.plot({
      ...shared, height: 84, x, y: { label: null, domain: [0, none * 1.04], ticks: 3, tickFormat: "~s" },
      color: { domain: Object.keys(KINDS), range: Object.values(KINDS).map(([colour]) => colour) },
      marks: [
        Plot.rectY(passes, {
          x1: (d) => d.pass - 0.5, x2: (d) => d.pass + 0.5, y: "work", fill: "kind", inset: 0.3,
          title: (d) => `pass ${d.pass}, ${d.kind}\n${number(d.work)} row-layers, ${percent(d.work / d.none)} of no ` +
            `cache\n${d.rows} rows, ${d.tokens} tokens committed`, tip: true,
        }),
        Plot.lineY(passes, {
          x: "pass", y: "none", stroke: "currentColor", strokeDasharray: "4 3", curve: "step",
        }),
        Plot.ruleY([0]),
      ],
    }));
    this.where.replaceChildren(Plot.plot({
      ...shared, height: 110, x,
      y: {
        label: null, reverse: true, domain: [0, run.canvas], ticks: [0, run.prompt_tokens],
        tickFormat: (position) => (position ? "answer" : "prompt"),
      },
      color: { scheme: "cividis", domain: [0, 1] },
      marks: [
        Plot.raster(this.shares(), {
          width: passes.length, height: this.bins, imageRendering: "pixelated",
          x1: 0.5, x2: passes.length + 0.5, y1: 0, y2: this.bins * this.bin,
        }),
        Plot.ruleY([run.prompt_tokens], { stroke: "white", strokeWidth: 1.5, x1: 0.5, x2: passes.length + 0.5 }),
      ],
    }));
    if (this.similar) this.drawSimilarities(shared, x);
    for (const figure of [this.bars, this.where, this.similar]) {
      if (!figure) continue;
      const svg = d3.select(figure).select("svg");
      const scale = Plot.plot({ ...shared, x, marks: [] }).scale("x");
      figure.rule = svg.append("line").attr("stroke", "currentColor").attr("stroke-width", 2)
        .attr("y1", 0).attr("y2", +svg.attr("height") - shared.marginBottom).attr("pointer-events", "none");
      figure.at = (pass) => scale.apply(pass);
      svg.style("cursor", "pointer").on("click", (event) => {
        const pass = Math.round(scale.invert(d3.pointer(event, svg.node())[0]));
        this.seek(run, Math.max(1, Math.min(run.steps.length, pass)));
      });
    }
    this.placeRules();
  }

  drawSimilarities(shared, x) {
    const cells = this.run.steps.flatMap((pass, index) =>
      (pass.similarities || []).map((value, layer) => ({ pass: index + 1, layer, value })));
    this.similar.replaceChildren(Plot.plot({
      ...shared, height: 96, x, y: { label: null, reverse: true, ticks: d3.range(0, this.run.layers, Math.ceil(this.run.layers / 4)), tickFormat: (layer) => `layer ${layer}` },
      color: { scheme: "cividis", domain: [d3.min(cells, (d) => d.value), 1] },
      marks: [
        Plot.rect(cells.filter((d) => d.value !== null), {
          x1: (d) => d.pass - 0.5, x2: (d) => d.pass + 0.5, y1: "layer", y2: (d) => d.layer + 1, fill: "value",
          inset: 0.4, stroke: (d) => (d.value < this.run.knobs.gamma ? "var(--joined)" : "none"),
          title: (d) => `pass ${d.pass}, layer ${d.layer}\nsimilarity ${d.value.toFixed(3)}`, tip: true,
        }),
      ],
    }));
  }

  /** Positions in a row of the map over all passes, and how many rows it has. */
  get bin() {
    return Math.max(8, Math.ceil(this.run.canvas / BINS));
  }

  get bins() {
    return Math.ceil(this.run.canvas / this.bin);
  }

  /** Share of the row-layers of each stretch of positions that each pass computed, row by row. */
  shares() {
    const { run, bin, bins } = this;
    const passes = run.steps.length;
    const sums = new Float64Array(bins * passes);
    run.steps.forEach((pass, index) => {
      for (const [first, stop, layer] of pass.spans)
        for (let position = first; position < stop; position++)
          sums[Math.floor(position / bin) * passes + index] += run.layers - layer;
    });
    return sums.map((sum, at) => {
      const start = Math.floor(at / passes) * bin;
      return sum / ((Math.min(start + bin, run.canvas) - start) * run.layers);
    });
  }

  placeRules() {
    for (const figure of [this.bars, this.where, this.similar]) {
      if (!figure || !figure.rule) continue;
      const at = figure.at(Math.max(this.passes, 0.5));
      figure.rule.attr("x1", at).attr("x2", at);
    }
  }
}

/** The page for one request: panels, charts over all of them, and the clock. */
class Replay {
  constructor(request) {
    this.request = request;
    const panels = byId("panels");
    panels.replaceChildren();
    this.colours = request.runs.map((_, index) => LINES[index % LINES.length]);
    this.panels = request.runs.map((run, index) =>
      new Panel(panels, run, request, this.colours[index], (asked, pass) => this.seek(asked, pass)));
    this.nameKinds();
    this.position = 0;
    this.setClock(byId("together").value);
    this.fillTotals();
  }

  get last() {
    return this.clock === "work" ? WORK_POSITIONS : d3.max(this.request.runs, (run) => run.steps.length);
  }

  /** `passes` or `work`: what the settings have in common at a moment. */
  setClock(clock) {
    const share = this.clock ? this.position / this.last : 0;
    this.clock = clock;
    byId("slider").max = this.last;
    this.drawProgress();
    this.go(Math.round(share * this.last));
  }

  get mostWork() {
    return d3.max(this.request.runs, (run) => run.work.at(-1));
  }

  passesAt(run, position) {
    if (this.clock === "passes") return Math.min(position, run.steps.length);
    const allowed = (this.mostWork * position) / WORK_POSITIONS;
    return d3.bisectRight(run.work, allowed + 0.5) - 1;
  }

  /** To the moment at which a run has made so many passes. */
  seek(run, passes) {
    pause();
    const position = this.clock === "passes" ? passes : Math.ceil((run.work[passes] / this.mostWork) * WORK_POSITIONS);
    this.go(position);
  }

  go(position) {
    this.position = Math.max(0, Math.min(this.last, position));
    const slider = byId("slider");
    slider.value = this.position;
    const work = (this.mostWork * this.position) / WORK_POSITIONS;
    byId("clock").textContent =
      this.clock === "passes" ? `pass ${this.position} of ${this.last}` : `${number(work)} row-layers`;
    for (const panel of this.panels) panel.show(this.passesAt(panel.run, this.position));
    if (this.rule) {
      const at = this.at(this.clock === "passes" ? this.position : work);
      this.rule.attr("x1", at).attr("x2", at);
    }
  }

  nameKinds() {
    const legend = byId("kinds");
    legend.replaceChildren();
    element(legend, "span", "", "passes:");
    for (const [kind, [colour, meaning]] of Object.entries(KINDS)) {
      if (!this.request.runs.some((run) => run.steps.some((pass) => pass.kind === kind))) continue;
      const item = element(legend, "span");
      element(item, "i", "swatch").style.background = colour;
      item.append(`${kind}: ${meaning}`);
    }
  }

  drawProgress() {
    const figure = byId("progress");
    const width = figure.clientWidth || 500;
    const counts = this.clock === "passes" ? "passes" : "row-layers";
    const points = this.request.runs.flatMap((run) =>
      run.done.map((done, passes) => ({
        setting: run.setting, done, at: this.clock === "passes" ? passes : run.work[passes],
      })));
    const settings = this.request.runs.map((run) => run.setting);
    const plot = Plot.plot({
      width, height: 240, marginLeft: 44, style: { background: "none", fontSize: "11px" },
      x: { label: `${counts} →`, tickFormat: "~s", ticks: 6 }, y: { label: "↑ tokens", grid: true },
      color: { domain: settings, range: this.colours, legend: true },
      symbol: { domain: settings },
      marks: [
        Plot.lineY(points, { x: "at", y: "done", stroke: "setting", curve: "step-after", strokeWidth: 2 }),
        Plot.dot(points, Plot.selectLast({ x: "at", y: "done", z: "setting", fill: "setting", symbol: "setting", r: 5 })),
        Plot.tip(points, Plot.pointer({ x: "at", y: "done", title: (d) => `${d.setting}\n${d.done} tokens after ${number(d.at)} ${counts}` })),
      ],
    });
    figure.replaceChildren(plot);
    const svg = d3.select([...figure.querySelectorAll("svg")].at(-1)); // after the legend's
    const scale = plot.scale("x");
    this.at = (value) => scale.apply(value);
    this.rule = svg.append("line").attr("stroke", "currentColor").attr("stroke-width", 2)
      .attr("y1", 20).attr("y2", 210);
  }

  fillTotals() {
    const table = byId("totals");
    table.replaceChildren();
    const titles = ["", "tokens", "passes", "tokens a pass", "row-layers a token", "of no cache, same steps", "seconds", "same answer"];
    const head = element(element(table, "thead"), "tr");
    for (const title of titles) element(head, "th", "", title);
    const body = element(table, "tbody");
    const requests = data.requests.length > 1 ? [[this.request], data.requests] : [[this.request]];
    for (const some of requests) {
      if (requests.length > 1) {
        const row = element(body, "tr");
        const cell = element(row, "th", "", some.length === 1 && some[0] === this.request && requests[0] === some
          ? `request ${this.request.id}` : `all ${some.length} requests`);
        cell.colSpan = titles.length;
      }
      for (const [setting, sums] of totals(some)) this.totalsRow(body, setting, sums);
    }
    element(table, "caption", "caption", `Same answer: token for token as ${this.request.runs.at(-1).setting}. Seconds: as recorded, with the recording's own time in them.`)
      .style.captionSide = "bottom";
  }

  totalsRow(body, setting, sums) {
    const row = element(body, "tr");
    row.dataset.setting = setting;
    const cells = [
      setting, number(sums.tokens), number(sums.passes), (sums.tokens / sums.passes).toFixed(2),
      number(sums.row_layers / Math.max(sums.tokens, 1)), percent(sums.row_layers / sums.full_row_layers),
      sums.seconds.toFixed(2), `${sums.same} of ${sums.requests}`,
    ];
    for (const text of cells) element(row, "td", "", text);
  }
}

/** Sums over requests, by setting. The answers are compared with the last setting's. */
function totals(requests) {
  const sums = new Map();
  for (const request of requests)
    for (const run of request.runs) {
      const names = ["tokens", "passes", "row_layers", "full_row_layers", "seconds"];
      const sum = sums.get(run.setting) || Object.fromEntries([...names, "same", "requests"].map((name) => [name, 0]));
      for (const name of names) sum[name] += run[name];
      sum.same += run.answer === request.runs.at(-1).answer;
      sum.requests += 1;
      sums.set(run.setting, sum);
    }
  return sums;
}

// The controls.

let replay = null;
let playing = null; // {frame, since, from}

function pause() {
  if (playing) cancelAnimationFrame(playing.frame);
  playing = null;
  byId("play").textContent = "▶";
  byId("play").setAttribute("aria-label", "play");
}

function play() {
  if (replay.position >= replay.last) replay.go(0);
  byId("play").textContent = "❚❚";
  byId("play").setAttribute("aria-label", "pause");
  playing = { since: null, from: replay.position };
  const step = (now) => {
    playing.since ??= now;
    const most = d3.max(replay.request.runs, (run) => run.steps.length);
    const positions = (+byId("speed").value * replay.last) / most;
    const position = playing.from + Math.floor(((now - playing.since) / 1000) * positions);
    if (position !== replay.position) replay.go(position);
    if (replay.position >= replay.last) pause();
    else playing.frame = requestAnimationFrame(step);
  };
  playing.frame = requestAnimationFrame(step);
}

function jump(position) {
  pause();
  replay.go(position);
}

function changeSpeed(by) {
  const speed = byId("speed");
  speed.selectedIndex = Math.max(0, Math.min(speed.options.length - 1, speed.selectedIndex + by));
  speed.dispatchEvent(new Event("change"));
}

const ACTIONS = {
  " ": () => (playing ? pause() : play()),
  ArrowLeft: () => jump(replay.position - 1),
  ArrowRight: () => jump(replay.position + 1),
  Home: () => jump(0),
  End: () => jump(replay.last),
  "+": () => changeSpeed(1),
  "-": () => changeSpeed(-1),
  w: () => {
    const together = byId("together");
    together.selectedIndex = 1 - together.selectedIndex;
    together.dispatchEvent(new Event("change"));
  },
};

function choose(request) {
  pause();
  for (const button of byId("requests").children)
    button.setAttribute("aria-pressed", button.dataset.id === String(request.id));
  replay = new Replay(request);
  window.replay = replay;
}

byId("play").onclick = ACTIONS[" "];
byId("back").onclick = ACTIONS.ArrowLeft;
byId("next").onclick = ACTIONS.ArrowRight;
byId("first").onclick = ACTIONS.Home;
byId("last").onclick = ACTIONS.End;
byId("slider").oninput = (event) => jump(+event.target.value);
byId("together").onchange = (event) => { pause(); replay.setClock(event.target.value); };
byId("speed").onchange = () => { if (playing) { playing.from = replay.position; playing.since = null; } };
document.addEventListener("keydown", (event) => {
  const own = event.target.closest("select, button, input[type=text]");
  if (event.ctrlKey || event.metaKey || event.altKey || !ACTIONS[event.key]) return;
  if (own && (event.key === " " || own.tagName === "SELECT")) return;
  event.preventDefault();
  ACTIONS[event.key]();
});
new ResizeObserver(() => { if (replay) { replay.drawProgress(); replay.go(replay.position); } }).observe(byId("progress"));

if (matchMedia("(max-width: 600px)").matches) byId("legend").open = false;
for (const request of data.requests) {
  for (const run of request.runs) prepare(run);
  const button = element(byId("requests"), "button", "", String(request.id));
  button.dataset.id = request.id;
  button.onclick = () => choose(request);
}
choose(data.requests[0]);
