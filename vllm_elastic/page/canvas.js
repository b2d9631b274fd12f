// SPDX-License-Identifier: Apache-2.0
// A canvas as its first passes left it, and its cells on the page. Knows nothing of charts.
"use strict";

/** A pass as the record has it, its canvas's fields among its own. */
function passOf(entry) {
  const { canvas, ...own } = entry;
  return { ...own, ...canvas };
}

/** [join layer, rows] of a pass, ascending. */
function segmentsOf(pass) {
  const rows = new Map();
  for (const [start, stop, layer] of pass.spans) rows.set(layer, (rows.get(layer) || 0) + stop - start);
  return [...rows].sort(([one], [other]) => one - other);
}

/** What a pass computed, in row-layers. */
function workOf(pass, layers) {
  return segmentsOf(pass).reduce((sum, [layer, rows]) => sum + rows * (layers - layer), 0);
}

/**
 * Appends a pass to a run: `work` is what was computed by then, `none` what the same steps compute
 * without a cache. All three begin as [], [0], [0].
 */
function addPass(run, pass) {
  const begins = run.steps.at(-1)?.denoising_step !== pass.denoising_step;
  run.steps.push(pass);
  run.work.push(run.work.at(-1) + workOf(pass, run.layers));
  run.none.push(run.none.at(-1) + (begins ? pass.length * run.layers : 0));
}

/**
 * What the first `count` passes of a run made of its canvas.
 *
 * run: prompt_tokens, canvas (positions, prompt and all), tokens (of the answer) or null while it
 * is not known, given (answer positions that the request fixed, with their token), steps.
 * Returns the cells of the answer, the pass that came last (null: none yet), how many are done.
 */
function canvasAt(run, count) {
  const first = run.prompt_tokens;
  const cells = Array.from({ length: run.canvas - first }, () => ({ kind: "mask" }));
  for (const [position, token] of run.given || []) cells[position - first] = { kind: "given", token };
  for (let index = 0; index < count; index++) {
    const pass = run.steps[index];
    for (const [position, token, probability] of pass.predicted)
      cells[position - first] = { kind: "guess", token, probability, pass: index };
    for (const position of pass.committed)
      Object.assign(cells[position - first], { kind: "done", step: pass.denoising_step, pass: index });
  }
  const last = count ? run.steps[count - 1] : null;
  // The end token is committed and no part of the answer.
  const found = last && last.end < last.length ? last.end - 1 - first : cells.length;
  const end = run.tokens === null ? found : run.tokens;
  const ended = end < cells.length && cells[end].kind === "done";
  if (ended) for (const cell of cells.slice(end + 1)) if (cell.kind !== "done") cell.dropped = true;
  // An answer that grows has its later masks later.
  const there = last ? last.length - first : cells.length;
  for (const cell of cells.slice(there)) cell.dropped = true;
  const done = cells.slice(0, end).filter((cell) => cell.kind === "done").length;
  return { cells, done, last, index: count - 1 };
}

/** The cells of a prompt or of an answer; `show` changes only what differs from before. */
class CanvasView {
  constructor(parent, length, label) {
    this.box = document.createElement("div");
    this.box.className = "canvas";
    this.box.setAttribute("role", "img");
    this.label = label;
    parent.append(this.box);
    this.spans = Array.from({ length }, () => {
      const span = document.createElement("span");
      this.box.append(span);
      return span;
    });
    this.shown = [];
  }

  /** Each of `cells`: text, classes, style, title. */
  show(cells, label) {
    cells.forEach((cell, index) => {
      const before = this.shown[index] || {};
      const span = this.spans[index];
      if (cell.text !== before.text) span.textContent = cell.text;
      if (cell.classes !== before.classes) span.className = cell.classes;
      if (cell.style !== before.style) span.style.cssText = cell.style;
      if (cell.title !== before.title) span.title = cell.title;
    });
    this.shown = cells;
    this.box.setAttribute("aria-label", label);
  }
}

/** A token's text as a cell has it: line ends and spaces alone are shown. */
function cellText(word) {
  const shown = word.replaceAll("\n", "⏎").trim();
  return shown === "" ? "␣" : shown;
}

/** Where a pass computed a position: the layer at which it joined, or null. */
function joinLayers(pass, length) {
  const joined = Array(length).fill(null);
  if (pass) for (const [start, stop, layer] of pass.spans) joined.fill(layer, start, stop);
  return joined;
}

function computedClass(layer) {
  return layer === null ? "" : layer === 0 ? " computed" : " joined";
}

function computedWords(layer) {
  return layer === null ? "not computed" : `computed from layer ${layer} on`;
}

/** The cells of an answer, for CanvasView. `steps`: over how many steps the colours spread. */
function answerCells(run, state, words, steps) {
  const joined = joinLayers(state.last, run.canvas);
  return state.cells.map((cell, index) => {
    const position = run.prompt_tokens + index;
    const where = `position ${position}, ${computedWords(joined[position])}`;
    const word = cell.token === undefined ? "" : words[cell.token];
    let classes = `cell ${cell.kind}${computedClass(joined[position])}`;
    if (cell.dropped) classes += " dropped";
    if (/^\s/.test(word)) classes += " apart";
    if (cell.kind === "mask" || cell.dropped) {
      // A guess behind the end is given up.
      const mask = classes.replace("guess", "mask");
      return { text: "", classes: mask, style: "", title: `${where}, mask` };
    }
    if (cell.kind === "guess") {
      if (cell.pass !== state.index) classes += " old";
      const title = `${where}, guess ${JSON.stringify(word)}, probability ${cell.probability}`;
      return { text: cellText(word), classes, style: `--p:${cell.probability}`, title };
    }
    if (cell.kind === "given")
      return { text: cellText(word), classes, style: "", title: `${where}, given` };
    const t = steps > 1 ? cell.step / (steps - 1) : 0;
    if (t > 0.55) classes += " light";
    if (cell.pass === state.index) classes += " fresh";
    const title = `${where}, committed in step ${cell.step}, probability ${cell.probability}`;
    return { text: cellText(word), classes, style: `--t:${t.toFixed(3)}`, title };
  });
}

/** The cells of a prompt: nothing changes in it but where a pass computed it. */
function promptCells(run, state, prompt) {
  const joined = joinLayers(state.last, run.canvas);
  return prompt.map((word, position) => ({
    text: cellText(word),
    classes: `cell${computedClass(joined[position])}${/^\s/.test(word) ? " apart" : ""}`,
    style: "",
    title: `position ${position}, prompt, ${computedWords(joined[position])}`,
  }));
}
