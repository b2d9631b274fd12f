// SPDX-License-Identifier: Apache-2.0
// A running server, asked the same under two settings; every pass is shown as it arrives.
"use strict";

const COLOURS = ["#0072b2", "#e69f00"];

/** The events of a stream, as they arrive. Throws what a server says that refuses the request. */
async function* eventsOf(body, signal) {
  const answer = await fetch("/v1/chat/completions", {
    method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body), signal,
  });
  if (!answer.ok) {
    const said = await answer.json().catch(() => ({}));
    throw new Error(said.error?.message || `HTTP ${answer.status}`);
  }
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    text += value;
    const lines = text.split("\n");
    text = lines.pop();
    for (const line of lines) if (line.startsWith("data: {")) yield JSON.parse(line.slice(6));
  }
}

/** One setting: what it is, and its answer as far as it has come and has been shown. */
class Panel {
  constructor(parent, index) {
    this.colour = COLOURS[index];
    const box = (this.box = element(parent, "section", "panel"));
    const head = element(box, "header");
    const title = element(head, "h2");
    title.style.borderBottom = `3px solid ${this.colour}`;
    this.preset = element(title, "select");
    this.preset.setAttribute("aria-label", "preset");
    for (const [name, meaning] of Object.entries(data.presets)) {
      const option = element(this.preset, "option", "", name);
      option.value = name;
      option.title = meaning;
    }
    this.preset.value = data.chosen[index];
    this.knobs = element(head, "input", "knobs");
    this.knobs.type = "text";
    this.knobs.placeholder = "knobs: window=64 threshold=0.8";
    this.knobs.setAttribute("aria-label", "knobs");
    this.figures = element(box, "p", "figures", "not asked yet");
    const meter = element(box, "div", "meter");
    this.meter = element(meter, "i");
    this.content = element(box, "div");
    this.clear();
  }

  get setting() {
    return [this.preset.value, this.knobs.value.trim()].filter(Boolean).join(", ");
  }

  /** The request's xargs: the preset and the knobs beside it. Numbers are sent as numbers. */
  get xargs() {
    const xargs = { elastic_watch: 1, elastic_preset: this.preset.value };
    for (const word of this.knobs.value.split(/[\s,]+/).filter(Boolean)) {
      const [name, value] = word.split("=");
      if (value === undefined || value === "") throw new Error(`knobs: "${word}" is no name=value`);
      xargs[`elastic_${name.replace(/^elastic_/, "")}`] = Number.isNaN(+value) ? value : +value;
    }
    return xargs;
  }

  clear() {
    Object.assign(this, {
      run: null, words: {}, points: [], usage: null, finished: false, shown: 0, text: "", drawnAt: 0, took: null,
    });
    this.content.replaceChildren();
    this.meter.style.width = "0";
  }

  async ask(question, canvas, signal) {
    this.clear();
    this.figures.textContent = "asked; no pass yet";
    const body = {
      model: model, messages: [{ role: "user", content: question }], max_tokens: canvas, stream: true,
      stream_options: { include_usage: true }, vllm_xargs: this.xargs,
    };
    const began = performance.now();
    for await (const event of eventsOf(body, signal)) {
      const seconds = (performance.now() - began) / 1000;
      if (event.error) throw new Error(event.error.message);
      if (event.elastic) this.take(event.elastic, seconds);
      else if (event.usage) this.usage = event.usage;
      for (const choice of event.choices || []) this.text += choice.delta?.content || "";
    }
    if (!this.run) throw new Error("the server sent no passes: does it run vllm_elastic of this version?");
    this.took = this.points.at(-1).seconds;
    this.finished = true;
    this.run.tokens = this.usage ? this.usage.completion_tokens : null;
  }

  /** A pass has arrived. */
  take(entry, seconds) {
    if (entry.request) {
      this.run = { ...entry.request, tokens: null, steps: [], work: [0], none: [0] };
      this.points = [{ seconds: 0, done: 0 }];
    }
    Object.assign(this.words, entry.words);
    addPass(this.run, passOf(entry));
    this.points.push({ seconds, done: canvasAt(this.run, this.run.steps.length).done });
  }

  /** Shows as many passes more as the pace allows by now. Returns whether all are shown. */
  draw(now, pace) {
    if (!this.run) return false;
    if (!this.answer) this.layOut();
    const due = pace ? Math.floor(((now - this.drawnAt) / 1000) * pace) : Infinity;
    const all = this.run.steps.length;
    const next = Math.min(all, this.shown + Math.max(0, due));
    if (next > this.shown || (this.finished && next === all && !this.complete)) {
      this.drawnAt = now;
      this.shown = next;
      this.complete = this.finished && next === all;
      this.show();
    }
    return this.finished && this.shown === all;
  }

  layOut() {
    this.content.replaceChildren();
    this.answer = new CanvasView(this.content, this.run.canvas - this.run.prompt_tokens, "answer");
    this.why = element(this.content, "p", "why");
    this.map = new PassMap(element(this.content, "figure"), this.run);
  }

  again() {
    this.shown = 0;
    this.complete = false;
    this.drawnAt = performance.now();
  }

  show() {
    const { run, shown } = this;
    const state = canvasAt(run, shown);
    const seconds = this.points[shown].seconds;
    const whole = run.tokens ?? run.canvas - run.prompt_tokens;
    const steps = this.finished ? run.steps.at(-1).denoising_step + 1 : state.last.denoising_step + 1;
    this.answer.show(answerCells(run, state, this.words, steps), `${state.done} tokens committed`);
    this.meter.style.width = `${(100 * state.done) / Math.max(whole, 1)}%`;
    const share = ((100 * run.work[shown]) / run.none[shown]).toFixed(0);
    this.figures.innerHTML =
      `<b class="done">${state.done}</b> tokens in <b>${seconds.toFixed(2)}</b> s: ` +
      `<b class="speed">${(state.done / seconds).toFixed(0)}</b> a second · pass <b class="pass">${shown}</b>, ` +
      `${state.last.kind} · <b class="work">${share}%</b> of the work without a cache`;
    this.why.textContent = reasonOf(run, shown - 1);
    this.map.show(state.last);
  }
}

const panels = COLOURS.map((_, index) => new Panel(byId("panels"), index));
let model = null;
let asking = null; // an AbortController

function complain(error) {
  byId("problem").hidden = !error;
  byId("problem").textContent = error ? error.message : "";
}

function drawSpeeds() {
  const figure = byId("speeds");
  const points = panels.flatMap((panel, index) =>
    panel.points.map((point) => ({ ...point, setting: `${"AB"[index]}: ${panel.setting}` })));
  if (!points.length) return figure.replaceChildren();
  const settings = panels.map((panel, index) => `${"AB"[index]}: ${panel.setting}`);
  figure.replaceChildren(Plot.plot({
    width: figure.clientWidth || 600, height: 220, marginLeft: 44, style: { background: "none", fontSize: "11px" },
    x: { label: "seconds →" }, y: { label: "↑ tokens", grid: true },
    color: { domain: settings, range: COLOURS, legend: true }, symbol: { domain: settings },
    marks: [
      Plot.lineY(points, { x: "seconds", y: "done", stroke: "setting", curve: "step-after", strokeWidth: 2 }),
      Plot.dot(points, Plot.selectLast({ x: "seconds", y: "done", z: "setting", fill: "setting", symbol: "setting", r: 5 })),
    ],
  }));
}

function drawAll() {
  const pace = +byId("pace").value;
  let drawing = false;
  const step = (now) => {
    let complete = true;
    for (const panel of panels) complete = panel.draw(now, pace) && complete;
    drawing = !complete || asking !== null;
    if (drawing) requestAnimationFrame(step);
  };
  requestAnimationFrame(step);
}

async function ask() {
  asking?.abort();
  const control = (asking = new AbortController());
  complain(null);
  byId("again").disabled = true;
  for (const panel of panels) {
    panel.clear();
    panel.answer = null;
  }
  drawAll();
  const question = byId("question").value;
  const canvas = +byId("canvas").value;
  try {
    const one = (panel) => panel.ask(question, canvas, control.signal).then(drawSpeeds);
    if (byId("order").value === "at once") await Promise.all(panels.map(one));
    else for (const panel of panels) await one(panel);
    byId("again").disabled = false;
  } catch (error) {
    if (!control.signal.aborted) complain(error);
    control.abort();
  } finally {
    if (asking === control) asking = null;
  }
}

byId("form").onsubmit = (event) => {
  event.preventDefault();
  ask();
};
byId("again").onclick = () => {
  for (const panel of panels) panel.again();
  drawAll();
};
byId("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) byId("form").requestSubmit();
});
byId("server").textContent = data.server;
if (data.questions.length) {
  byId("questions").hidden = false;
  for (const question of data.questions) element(byId("questions"), "option", "", question);
  byId("questions").onchange = (event) => { byId("question").value = event.target.value; };
  byId("question").value = data.questions[0];
}
if (matchMedia("(max-width: 600px)").matches) byId("legend").open = false;
new ResizeObserver(drawSpeeds).observe(byId("speeds"));

fetch("/v1/models").then(async (answer) => {
  const said = await answer.json();
  if (!answer.ok) throw new Error(said.error?.message || `HTTP ${answer.status}`);
  model = said.data[0].id;
  byId("model").textContent = model;
}).catch(complain);
