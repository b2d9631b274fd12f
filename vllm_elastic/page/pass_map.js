// SPDX-License-Identifier: Apache-2.0
// One pass over positions and layers: what was computed, what is stale, and what said so.
"use strict";

const MOST_NAMED = 6; // blocks in a sentence
let patterns = 0;

/** Draws into `parent`; `show(pass)` after each step of a replay. Positions of `run` from left. */
class PassMap {
  constructor(parent, run) {
    this.run = run;
    this.pattern = `stale-${patterns++}`;
    this.svg = d3.select(parent).append("svg").attr("class", "map").attr("role", "img");
    this.hasBlocks = run.policy === "elastic-block";
    this.hasSimilarities = run.policy === "elastic";
    this.shown = null;
    new ResizeObserver(() => this.layOut(parent.clientWidth)).observe(parent);
    this.layOut(parent.clientWidth);
  }

  layOut(width) {
    if (width === this.width || width < 50) return;
    this.width = width;
    const { run, svg } = this;
    const left = 58, column = width < 420 ? 58 : 84, columns = this.hasSimilarities ? 2 : 1;
    const right = width - columns * (column + 12);
    const lane = 22, layer = Math.max(5, Math.min(13, 120 / run.layers));
    let top = 14;
    this.lanes = {};
    for (const name of this.hasBlocks ? ["attention", "drift", "cost"] : []) {
      this.lanes[name] = { top, bottom: top + lane };
      top += lane + 5;
    }
    this.ticks = top;
    top += 9;
    this.x = d3.scaleLinear([0, run.canvas], [left, right]);
    this.y = d3.scaleLinear([0, run.layers], [top, top + layer * run.layers]);
    this.rows = d3.scaleLinear([0, run.canvas], [right + 12, right + 12 + column]);
    const bottom = this.y.range()[1];
    const gamma = run.knobs.gamma;
    this.similarity = d3.scaleLinear([0, 1], [right + 24 + column, width - 4]).clamp(true);
    svg.attr("width", width).attr("height", bottom + 18).selectAll("*").remove();
    const pattern = svg.append("defs").append("pattern");
    pattern.attr("id", this.pattern).attr("width", 5).attr("height", 5);
    pattern.attr("patternUnits", "userSpaceOnUse").attr("patternTransform", "rotate(45)");
    pattern.append("rect").attr("width", 2).attr("height", 5).attr("fill", "var(--stale)");
    svg.append("rect").attr("class", "ground").attr("x", left).attr("y", top)
      .attr("width", right - left).attr("height", bottom - top);
    this.spans = svg.append("g");
    this.stale = svg.append("g");
    const border = this.x(run.prompt_tokens);
    const edges = svg.append("g");
    const block = run.steps.length ? run.steps[0].block_size : run.canvas;
    for (const position of d3.range(block, run.canvas, block))
      edges.append("line").attr("class", "edge").attr("y1", top).attr("y2", bottom)
        .attr("x1", this.x(position)).attr("x2", this.x(position));
    edges.append("line").attr("class", "answer").attr("y1", this.ticks - 2).attr("y2", bottom + 4)
      .attr("x1", border).attr("x2", border);
    const say = (text, x, y, anchor = "end") =>
      svg.append("text").attr("x", x).attr("y", y).attr("text-anchor", anchor).text(text);
    for (const [name, { bottom: at }] of Object.entries(this.lanes)) say(name, left - 6, at - 4);
    say("layer 0", left - 6, top + 9);
    say(`${run.layers - 1}`, left - 6, bottom - 1);
    say("prompt", (left + border) / 2, bottom + 14, "middle");
    say("answer", (border + right) / 2, bottom + 14, "middle");
    say("rows", right + 12, 10, "start");
    svg.append("line").attr("class", "bound").attr("y1", top).attr("y2", bottom)
      .attr("x1", this.rows(run.canvas)).attr("x2", this.rows(run.canvas));
    say(`of ${run.canvas}`, this.rows(run.canvas), bottom + 14);
    if (this.hasSimilarities) {
      say(width < 420 ? "similar" : "similarity", right + 24 + column, 10, "start");
      svg.append("line").attr("class", "bound").attr("y1", top).attr("y2", bottom)
        .attr("x1", this.similarity(gamma)).attr("x2", this.similarity(gamma));
      say(`gamma ${gamma}`, Math.min(this.similarity(gamma) + 22, width), bottom + 14);
    }
    this.marks = svg.append("g");
    this.show(this.shown);
  }

  show(pass) {
    this.shown = pass;
    if (!this.width) return;
    const { run, x, y } = this;
    const bottom = y.range()[1];
    this.spans.selectAll("rect").data(pass ? pass.spans : []).join("rect")
      .attr("class", ([, , layer]) => (layer ? "span late" : "span"))
      .attr("x", ([start]) => x(start)).attr("width", ([start, stop]) => Math.max(x(stop) - x(start), 1))
      .attr("y", ([, , layer]) => y(layer)).attr("height", ([, , layer]) => bottom - y(layer));
    const stale = !pass ? [] : pass.stale_from
      .map((layer, block) => ({ layer, start: block * pass.block_size }))
      .filter(({ layer }) => layer < run.layers);
    this.stale.selectAll("rect").data(stale).join("rect").attr("fill", `url(#${this.pattern})`)
      .attr("x", (d) => x(d.start)).attr("y", (d) => y(d.layer))
      .attr("width", (d) => x(Math.min(d.start + pass.block_size, run.canvas)) - x(d.start))
      .attr("height", (d) => bottom - y(d.layer));
    this.marks.selectAll("*").remove();
    this.svg.attr("aria-label", pass ? `${pass.rows} of ${pass.length} rows computed` : "no pass yet");
    if (!pass) return;
    this.showTicks(pass);
    this.showRows(pass);
    this.showBlocks(pass);
    this.showSimilarities(pass);
  }

  /** Above the map: predicted positions, committed ones taller, compared ones as circles. */
  showTicks(pass) {
    const committed = new Set(pass.committed);
    const one = Math.max(1, this.x(1) - this.x(0));
    for (const [position] of pass.predicted) {
      const taken = committed.has(position);
      this.marks.append("rect").attr("class", taken ? "tick commit" : "tick")
        .attr("x", this.x(position)).attr("width", taken ? Math.max(one, 2) : one * 0.7)
        .attr("y", this.ticks + (taken ? 0 : 4)).attr("height", taken ? 8 : 4);
    }
    for (const position of pass.compared)
      this.marks.append("circle").attr("class", "compared").attr("r", 2.5)
        .attr("cx", this.x(position + 0.5)).attr("cy", this.ticks + 4);
  }

  showRows(pass) {
    let rows = 0;
    const joins = new Map(segmentsOf(pass));
    const first = this.rows(0);
    d3.range(this.run.layers).forEach((layer) => {
      rows += joins.get(layer) || 0;
      this.marks.append("rect").attr("class", "bar").attr("x", first).attr("y", this.y(layer) + 0.5)
        .attr("width", this.rows(rows) - first).attr("height", this.y(1) - this.y(0) - 1);
    });
    // In the last layer, where all rows take part.
    this.marks.append("text").attr("class", "value").attr("x", first + 32).attr("y", 10).text(rows);
  }

  showBlocks(pass) {
    const { attention, drift } = pass.judged_by;
    if (!attention) return;
    const bound = this.run.knobs.block_drift;
    const cost = attention.map((share, block) => share * drift[block]);
    const most = (name) => d3.max(this.run.steps, (other) => d3.max(other.judged_by[name] || [])) || 1;
    const lanes = [
      ["attention", attention, most("attention")], ["drift", drift, most("drift")], ["cost", cost, bound],
    ];
    for (const [name, values, whole] of lanes) {
      const { top, bottom } = this.lanes[name];
      const height = d3.scaleLinear([0, whole], [0, bottom - top]).clamp(true);
      values.forEach((value, block) => {
        const start = block * pass.block_size;
        const stop = Math.min(start + pass.block_size, this.run.canvas);
        this.marks.append("rect").attr("class", `bar ${name}`)
          .attr("x", this.x(start) + 0.5).attr("width", this.x(stop) - this.x(start) - 1)
          .attr("y", bottom - height(value)).attr("height", height(value))
          .append("title").text(`block ${block}: attention ${(100 * attention[block]).toFixed(1)}%, ` +
            `drift ${drift[block].toFixed(3)}, cost ${cost[block].toFixed(4)}`);
      });
      this.marks.append("line").attr("class", "edge").style("stroke", "var(--line)")
        .attr("x1", this.x(0)).attr("x2", this.x(this.run.canvas)).attr("y1", bottom).attr("y2", bottom);
    }
    const { bottom } = this.lanes.cost;
    this.marks.append("text").attr("class", "value").attr("x", this.rows(0)).attr("y", bottom - 12)
      .text(`${d3.sum(cost).toFixed(4)}`);
    this.marks.append("text").attr("x", this.rows(0)).attr("y", bottom).text(`of ${bound}`);
  }

  showSimilarities(pass) {
    (pass.similarities || []).forEach((value, layer) => {
      if (value === null) return;
      this.marks.append("circle").attr("r", 3).attr("cx", this.similarity(value)).attr("cy", this.y(layer + 0.5))
        .attr("fill", value < this.run.knobs.gamma ? "var(--joined)" : "var(--computed)")
        .append("title").text(`layer ${layer}: similarity ${value.toFixed(3)}`);
    });
  }
}

/** In words: what the pass did to the cache and why. */
function reasonOf(run, index) {
  const pass = run.steps[index];
  const before = index ? run.steps[index - 1] : null;
  const { policy, layers, knobs } = run;
  const words = [];
  const stale = before ? before.stale_from.map((l, b) => [l, b]).filter(([l]) => l < layers) : [];
  const named = stale.slice(0, MOST_NAMED).map(([layer, block]) => `${block} (layer ${layer})`).join(", ");
  const others = stale.length > MOST_NAMED ? ` and ${stale.length - MOST_NAMED} more` : "";
  if (pass.kind === "first") words.push("The first pass computes everything.");
  else if (policy === "none") words.push("No cache: every step computes everything.");
  else if (pass.kind === "replay") words.push(`The step again, from layer ${pass.start_layer} on.`);
  else if (policy === "elastic-block" && stale.length)
    words.push(`Refreshed blocks ${named}${others}.`);
  else if (pass.rows === pass.length)
    words.push(policy === "dual-cache" ? "A text block begins: everything." : "Everything is refreshed.");
  else words.push(`Only ${pass.rows} of ${pass.length} rows; all else is read from the cache.`);
  if (pass.similarities) {
    const layer = pass.similarities.findIndex((s) => s !== null && s < knobs.gamma);
    if (layer >= 0 && layer < layers - 1)
      words.push(`Similarity ${pass.similarities[layer].toFixed(3)} in layer ${layer} is below gamma ` +
        `${knobs.gamma}: stale from layer ${layer + 1}.`);
    else words.push(`No similarity above the last layer is below gamma ${knobs.gamma}.`);
  }
  if (pass.judged_by.attention) {
    const cost = d3.sum(pass.judged_by.attention, (share, block) => share * pass.judged_by.drift[block]);
    const left = pass.stale_from.filter((layer) => layer < layers).length;
    if (left) words.push(`Costs of ${cost.toFixed(4)} exceed ${knobs.block_drift}: ${left} ` +
      `block${left > 1 ? "s are" : " is"} stale.`);
    else words.push(`Costs of ${cost.toFixed(4)} stay within ${knobs.block_drift}.`);
  }
  return words.join(" ");
}
