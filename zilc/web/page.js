"use strict";
/* Draws the page's data: a levelled graph whose columns and lanes are given, and the energies of traces. D3 does the
   zooming, scales, axes and joins. */
(() => {
  const began = performance.now();
  const data = JSON.parse(document.getElementById("data").textContent);
  const N = data.nodes, COUNT = N.kind.length, BLOCKS = data.blocks, CHAINS = data.chains;
  const [VERTEX, IDENTITY, PARAMETER, INPUT, OUTPUT] = [0, 1, 2, 3, 4];
  const HEAVY = new Set(["Conv", "ConvTranspose", "MatMul", "Gemm", "LSTM", "GRU", "RNN", "Einsum", "Gather", "Attention"]);
  const COLUMN = 112, ROW = 50, BOX = 172, TALL = 132, FOOT = 28, GAP = 34, WIDE = 92, HIGH = 30;
  const $ = id => document.getElementById(id);
  const number = d3.format(",");
  const edges = d3.range(0, data.edges.length, 2).map(k => [data.edges[k], data.edges[k + 1]]);
  const readers = Array.from({ length: COUNT }, () => []), operands = Array.from({ length: COUNT }, () => []);
  edges.forEach(([a, b]) => { readers[a].push(b); operands[b].push(a); });
  const delayed = new Set(data.delayed);
  const learnsAt = d3.rollup(d3.range(COUNT).filter(i => N.t[i] !== null), v => v.length, i => N.t[i]);
  const byName = new Map(N.name.map((name, i) => [name, i]));
  const plural = (n, one, many) => `${number(n)} ${n === 1 ? one : many || one + "s"}`;
  const tail = (text, most) => text.length <= most ? text : "…" + text.slice(-(most - 1));

  // ------------------------------------------------------------------ facts
  $("model").textContent = data.model.split(/[\\/]/).pop();
  $("model").title = data.model;
  const facts = [
    ["", data.levels, "levels (K)"], ["", data.counts.vertices, "vertices"],
    ["identity", data.counts.identities, `identity vertices (${data.placement})`],
    ["identity", data.counts.delayed, data.counts.delayed === 1 ? "delayed edge" : "delayed edges"],
    ["parameter", data.counts.parameters, "trained parameters"],
  ];
  for (const [kind, value, name] of facts) {
    const row = d3.select("#facts").append("div").attr("class", kind);
    row.append("dt").text(name);
    row.append("dd").attr("data-fact", name.split(" (")[0]).text(number(value));
  }

  // ------------------------------------------------------------------ what is visible, and where
  const inBlock = BLOCKS.map(() => ({ vertices: 0, identities: 0, parameters: [], ops: new Map() }));
  for (let i = 0; i < COUNT; i++) {
    const b = inBlock[N.block[i]];
    if (N.kind[i] === IDENTITY) b.identities++;
    else if (N.kind[i] === PARAMETER) { if (N.t[i] !== null) b.parameters.push(i); }
    else if (N.kind[i] !== INPUT) { b.vertices++; b.ops.set(N.op[i], (b.ops.get(N.op[i]) || 0) + 1); }
  }
  // A chain lies inside a block if the vertices at both of its ends do.
  const inside = CHAINS.map(c => {
    const home = N.block[c.origin];
    return c.waiting.every(([w]) => N.block[w] === home) ? home : -1;
  });
  const open = new Set(COUNT <= 160 ? BLOCKS.keys() : []);
  let elements = [], links = [], at = new Map(), columnX = new Map(), blockX = new Map(), extent = null;

  function key(i) {
    const b = N.block[i];
    if (open.has(b)) return "n" + i;
    const c = N.chain[i];
    if (c !== null && inside[c] !== b) return `c${c}.${b}`;
    return "b" + b;
  }

  function arrange() {
    columnX = new Map(); blockX = new Map();
    let x = 0;
    for (let b = BLOCKS.length - 1; b >= 0; b--) {
      const from = x;
      if (open.has(b)) {
        for (let c = BLOCKS[b].high; c >= BLOCKS[b].low; c--) { columnX.set(c, x + COLUMN / 2); x += COLUMN; }
      } else {
        const width = BLOCKS[b].high - BLOCKS[b].low + 1;
        for (let c = BLOCKS[b].high; c >= BLOCKS[b].low; c--)
          columnX.set(c, x + (BLOCKS[b].high - c + .5) / width * BOX);
        x += BOX;
      }
      blockX.set(b, [from, x]);
      x += GAP;
    }
    const found = new Map();
    for (let i = 0; i < COUNT; i++) {
      const k = key(i);
      if (found.has(k)) { found.get(k).nodes.push(i); continue; }
      const b = N.block[i], [low, high] = blockX.get(b);
      if (k[0] === "n") found.set(k, { key: k, kind: "node", i, block: b, nodes: [i], lane: N.lane[i], x: columnX.get(N.column[i]), half: N.kind[i] === IDENTITY ? 7 : WIDE / 2 });
      else if (k[0] === "c") found.set(k, { key: k, kind: "run", i, block: b, nodes: [i], lane: N.lane[i], x: (low + high) / 2, half: 22 });
      else found.set(k, { key: k, kind: "block", i, block: b, nodes: [i], lane: 0, x: (low + high) / 2, half: BOX / 2 });
    }
    elements = [...found.values()];
    // Lanes in which nothing is visible take no room.
    const lanes = [...new Set([0, ...elements.map(e => e.lane)])].sort(d3.ascending), zero = lanes.indexOf(0);
    const row = new Map(lanes.map((lane, k) => [lane, k - zero]));
    const closed = elements.some(e => e.kind === "block");
    for (const e of elements) {
      const r = row.get(e.lane);
      e.y = r * ROW + (closed && r ? Math.sign(r) * (TALL / 2 - 18) : 0);
    }
    at = found;
    const seen = new Map();
    edges.forEach(([a, b], k) => {
      const ka = key(a), kb = key(b);
      if (ka === kb) return;
      const id = ka + ">" + kb;
      const green = N.kind[a] === IDENTITY || N.kind[b] === IDENTITY || delayed.has(k);
      const parameter = N.kind[a] === PARAMETER && !green;
      const known = seen.get(id);
      if (known) { known.green ||= green; known.parameter &&= parameter; known.pairs.push([a, b]); }
      else seen.set(id, { id, from: found.get(ka), to: found.get(kb), green, parameter, pairs: [[a, b]] });
    });
    links = [...seen.values()];
    // Of identity vertices in a closed block: is there a vertex in it that waits for them, or do they pass by?
    for (const { from, to } of links)
      if (from.kind === "run" && to.kind !== "run" && from.block === to.block) from.waited = true;
    const half = e => e.kind === "block" ? TALL / 2 : HIGH / 2;
    extent = { left: -20, right: x - GAP + 20, top: d3.min(elements, e => e.y - half(e)) - 64, bottom: d3.max(elements, e => e.y + half(e)) + 52 };
  }

  function path({ from, to }) {
    if (Math.abs(from.x - to.x) < 2) return `M${from.x},${from.y}L${to.x},${to.y}`;
    if (from.kind === "block" && to.kind === "run" && from.block === to.block || from.kind === "run" && to.kind === "block" && from.block === to.block)
      return `M${from.x},${from.y}L${to.x},${to.y}`;
    const a = from.x + from.half, b = to.x - to.half, bend = Math.min(Math.max((b - a) / 2, 12), 70);
    const ya = end(from, to), yb = end(to, from);
    return `M${a},${ya}C${a + bend},${ya} ${b - bend},${yb} ${b},${yb}`;
  }

  /** Where a line meets a closed block: nearer to the corner that it comes from or goes to. */
  function end(e, other) {
    return e.kind === "block" && other.kind !== "block" ? e.y + Math.sign(other.y - e.y) * (TALL / 2 - 16) : e.y;
  }

  // ------------------------------------------------------------------ drawing
  const svg = d3.select("#picture"), scene = svg.append("g");
  const layers = Object.fromEntries(["now", "frames", "edges", "nodes", "ticks"].map(n => [n, scene.append("g").attr("class", "layer-" + n)]));
  const zoom = d3.zoom().scaleExtent([.02, 4]).on("zoom", ({ transform }) => {
    scene.attr("transform", transform);
    svg.attr("data-zoom", transform.k < .34 ? "far" : transform.k < .6 ? "mid" : "near");
    showWindow(transform);
  });
  svg.call(zoom).on("dblclick.zoom", null);
  const size = () => svg.node().getBoundingClientRect();

  function kindOf(e) {
    if (e.kind !== "node") return e.kind + (e.waited ? " waited" : "");
    const k = N.kind[e.i];
    return data.kinds[k] + (k === PARAMETER && N.t[e.i] === null ? " untrained" : "") + (k === VERTEX && HEAVY.has(N.op[e.i]) ? " heavy" : "");
  }

  function blockName(b) {
    const { label, low, high } = BLOCKS[b];
    return label || (low === high ? `level ${low}` : `levels ${high}–${low}`);
  }

  function when(ts) {
    const [a, b] = d3.extent(ts);
    return a === b ? `t = ${a}` : `t = ${a}–${b}`;
  }

  function fill(g, e) {
    g.selectAll("*").remove();
    const add = (cls, y, text) => g.append("text").attr("class", cls).attr("y", y).text(text);
    // As large as asked for, or as the room allows: an em of this face is about 0.64 em wide a letter in bold.
    const fitted = (made, text, room, most) => made.style("--near", `${Math.min(most, room / (.64 * text.length)).toFixed(1)}px`);
    const middle = (made, text) => made.style("--mid", `${Math.min(15.5, (WIDE - 6) / (.66 * text.length)).toFixed(1)}px`);
    if (e.kind === "block") {
      const b = inBlock[e.block], hidden = e.nodes.filter(i => N.kind[i] === IDENTITY).length;
      g.append("rect").attr("x", -BOX / 2).attr("y", -TALL / 2).attr("width", BOX).attr("height", TALL);
      const name = tail(blockName(e.block), 20);
      const lines = [["", name], ["sub", plural(b.vertices, "vertex", "vertices")]];
      if (b.parameters.length) lines.push(["when", `${when(b.parameters.map(i => N.t[i]))}`]);
      if (hidden) lines.push(["delay", plural(hidden, "identity", "identities")]);
      lines.forEach(([cls, text], k) => fitted(add(cls, (k - (lines.length - 1) / 2) * 29 + 8, text), text, BOX - 14, k ? 20 : 25));
    } else if (e.kind === "run") {
      g.append("rect").attr("x", -22).attr("y", -11).attr("width", 44).attr("height", 22);
      add("", 4, `×${e.nodes.length}`);
    } else if (N.kind[e.i] === IDENTITY) {
      g.append("circle").attr("r", 7);
    } else {
      g.append("rect").attr("x", -WIDE / 2).attr("y", -HIGH / 2).attr("width", WIDE).attr("height", HIGH);
      if (N.kind[e.i] === PARAMETER || N.kind[e.i] === INPUT) {
        const t = N.t[e.i];
        fitted(add("sub", -2, tail(N.name[e.i], 17)), tail(N.name[e.i], 17), WIDE - 6, 8.6);
        if (t !== null) {
          const when = fitted(add("when", 9, ""), `learns at t = ${t}`, WIDE - 8, 9);
          when.append("tspan").attr("class", "long").text("learns at ");
          when.append("tspan").text(`t = ${t}`);
        } else {
          add("sub", 9, N.kind[e.i] === INPUT ? N.shape[e.i].replace(/^[a-z]+\d*/, "") : "not trained");
          // What is left of it when zoomed out.
          const brief = N.kind[e.i] === INPUT ? tail(N.name[e.i], 8) : "fixed";
          middle(add("brief", 0, brief), brief);
        }
      } else {
        const op = N.op[e.i].length > 12 ? N.op[e.i].slice(0, 11) + "…" : N.op[e.i];
        if (op.length <= 9) middle(add("", -1, op), op);
        else {
          const brief = op.slice(0, 8) + "…";
          fitted(add("long", -1, op), op, WIDE - 8, 12);
          middle(add("brief", 0, brief), brief);
        }
        fitted(add("sub", 10, tail(N.name[e.i], 18)), tail(N.name[e.i], 18), WIDE - 2, 8.6);
      }
    }
  }

  function draw() {
    arrange();
    svg.attr("data-elements", elements.length).attr("data-open", open.size);
    layers.edges.selectAll("path").data(links, l => l.id).join("path")
      .attr("class", l => "edge" + (l.green ? " delayed" : "") + (l.from.block === l.to.block && l.from.kind !== l.to.kind && l.from.kind !== "node" && l.to.kind !== "node" ? " tap" : "") + (l.parameter ? " parameter" : "")).attr("d", path);
    layers.nodes.selectAll("g.node").data(elements, e => e.key).join(
      enter => enter.append("g").attr("tabindex", 0).attr("role", "button")
        .on("pointerenter", (event, e) => { tell(event, e); light(e); })
        .on("pointermove", move)
        .on("pointerleave", () => { hush(); light(null); })
        .on("focus", (event, e) => light(e)).on("blur", () => light(null))
        .on("keydown", (event, e) => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); pressed(e); } })
        .on("click", (event, e) => pressed(e)))
      .attr("class", e => `node ${kindOf(e)}`)
      .attr("data-name", e => e.kind === "node" ? N.name[e.i] : null)
      .attr("data-block", e => e.block)
      .attr("aria-label", e => e.kind === "block" ? `Block ${blockName(e.block)}, closed` : e.kind === "run" ? plural(e.nodes.length, "identity vertex", "identity vertices") : `${N.name[e.i]}, level ${N.level[e.i]}`)
      .attr("transform", e => `translate(${e.x},${e.y})`)
      .each(function (e) { fill(d3.select(this), e); });
    const frames = BLOCKS.length > 1 ? [...open] : [];
    layers.frames.selectAll("rect").data(frames).join("rect").attr("class", "frame")
      .attr("x", b => blockX.get(b)[0]).attr("width", b => blockX.get(b)[1] - blockX.get(b)[0])
      .attr("y", extent.top + 44).attr("height", extent.bottom - extent.top - 74);
    layers.frames.selectAll("text").data(frames).join("text").attr("class", "frame-name")
      .attr("x", b => blockX.get(b)[0] + 10).attr("y", extent.top + 62).text(b => `${blockName(b)}  ▸ close`)
      .attr("data-block", b => b).attr("tabindex", 0).attr("role", "button")
      .on("click", (event, b) => toggle(b)).on("keydown", (event, b) => { if (event.key === "Enter") toggle(b); });
    const ticks = [];
    for (let b = 0; b < BLOCKS.length; b++) {
      if (open.has(b)) for (let c = BLOCKS[b].low; c <= BLOCKS[b].high; c++) ticks.push({ c, x: columnX.get(c), text: c });
      else ticks.push({ c: `b${b}`, x: d3.mean(blockX.get(b)), text: `${BLOCKS[b].high} … ${BLOCKS[b].low}` });
    }
    layers.ticks.selectAll("text.number").data(ticks, t => t.c).join("text").attr("class", "tick number")
      .attr("x", t => t.x).attr("y", extent.bottom - 12).text(t => t.text);
    layers.ticks.selectAll("text.name").data(["level l: its errors arrive at step t = l, and the parameters that it reads learn"]).join("text").attr("class", "tick name")
      .attr("x", 4).attr("y", extent.bottom + 14).text(d => d);
    showStep();
  }

  /** All of it; where that would be too small to see, the end at which the wave begins. */
  function fit(duration = 250) {
    const { width, height } = size(), w = extent.right - extent.left, h = extent.bottom + FOOT - extent.top;
    const closed = elements.some(e => e.kind === "block");
    const k = Math.min(Math.max(width / w, .36), height / h, closed ? 1 : 1.6);
    const x = k * w > width + 1 ? extent.right - width / k / 2 : extent.left + w / 2;
    go(d3.zoomIdentity.translate(width / 2, height / 2).scale(k).translate(-x, -(extent.top + h / 2)), duration);
  }

  // ------------------------------------------------------------------ overview: a profile over all levels
  const overview = d3.select("#overview"), OVER = 60, HEAD = 17;
  let along = null;
  function drawOverview() {
    const width = overview.node().clientWidth, top = data.levels;
    along = d3.scaleLinear([top + .5, -.5], [8, width - 8]);
    const counts = new Array(top + 1).fill(0);
    for (let i = 0; i < COUNT; i++) if (N.kind[i] === IDENTITY) counts[N.column[i]]++;
    const y = d3.scaleLinear([0, Math.max(d3.max(counts), 1)], [OVER - 14, HEAD + 3]);
    overview.selectAll("*").remove();
    overview.append("path").attr("class", "area").attr("d", d3.area().curve(d3.curveStep).x((_, l) => along(l)).y0(OVER - 14).y1(y)(counts));
    overview.selectAll("line.learn").data([...learnsAt.keys()]).join("line").attr("class", "learn")
      .attr("x1", t => along(t)).attr("x2", t => along(t)).attr("y1", OVER - 13).attr("y2", OVER - 4);
    overview.append("text").attr("x", 10).attr("y", 11).text(`All levels, ${top} to 0. Green: identity vertices on the level (at most ${d3.max(counts)}). Orange ticks: parameters learn. Frame: what is shown above.`);
    overview.append("rect").attr("class", "window").attr("y", HEAD).attr("height", OVER - HEAD - 1);
    overview.append("line").attr("class", "step").attr("y1", HEAD).attr("y2", OVER - 1).attr("visibility", "hidden");
    showWindow(d3.zoomTransform(svg.node()));
  }
  /** The level at a place of the scene, as a fraction. */
  function levelAt(x) {
    for (let b = BLOCKS.length - 1; b >= 0; b--) {
      const [from, to] = blockX.get(b), { low, high } = BLOCKS[b];
      if (x <= to) return high + .5 - Math.max(0, (x - from) / (to - from)) * (high - low + 1);
    }
    return -.5;
  }
  function placeOf(level) {
    const b = Math.max(0, BLOCKS.findIndex(({ high }) => level <= high + .5)), [from, to] = blockX.get(b), { low, high } = BLOCKS[b];
    return from + (high + .5 - level) / (high - low + 1) * (to - from);
  }
  function showWindow(transform) {
    if (!along || !extent) return;
    const { width } = size(), a = along(levelAt(transform.invertX(0))), b = along(levelAt(transform.invertX(width)));
    overview.select(".window").attr("x", a).attr("width", Math.max(b - a, 3));
  }
  function panTo(event) {
    const transform = d3.zoomTransform(svg.node()), { width } = size();
    const x = placeOf(along.invert(d3.pointer(event, overview.node())[0]));
    svg.call(zoom.transform, d3.zoomIdentity.translate(width / 2 - transform.k * x, transform.y).scale(transform.k));
  }
  overview.on("pointerdown", event => { overview.node().setPointerCapture(event.pointerId); panTo(event); })
    .on("pointermove", event => { if (event.buttons) panTo(event); });

  function go(transform, duration) {
    if (duration && !matchMedia("(prefers-reduced-motion: reduce)").matches) svg.transition().duration(duration).call(zoom.transform, transform);
    else svg.call(zoom.transform, transform);
  }

  function toggle(b) {
    open.has(b) ? open.delete(b) : open.add(b);
    hush();
    draw();
    const [low, high] = blockX.get(b), { width, height } = size();
    if (open.has(b)) go(d3.zoomIdentity.translate(width / 2, height / 2).scale(Math.max(Math.min(width / (high - low + 120), height / (extent.bottom - extent.top), 1.2), .35)).translate(-(low + high) / 2, -(extent.top + extent.bottom) / 2), 250);
    else fit();
  }

  function pressed(e) {
    if (e.kind !== "node") toggle(e.block);
    else focusOn(e.i);
  }

  /** A vertex that waits, with the chain that it waits for above it. */
  function showDelay(i, origin) {
    focusOn(i);
    const e = at.get("n" + i), chain = CHAINS.find(c => c.origin === origin && c.waiting.some(([w]) => w === i));
    const high = chain ? d3.min(chain.identities, j => at.get(key(j)).y) : e.y, low = chain ? d3.max(chain.identities, j => at.get(key(j)).y) : e.y;
    const top = Math.min(high, e.y) - 50, bottom = Math.max(low, e.y) + 70, { width, height } = size();
    const k = Math.min(.9, Math.max(.36, height / (bottom - top)));
    go(d3.zoomIdentity.translate(width / 2, height / 2).scale(k).translate(-e.x, -(top + bottom) / 2), 250);
    light(e);
  }

  function focusOn(i) {
    if (!open.has(N.block[i])) { open.add(N.block[i]); draw(); }
    const e = at.get("n" + i), { width, height } = size(), k = Math.max(d3.zoomTransform(svg.node()).k, .9);
    go(d3.zoomIdentity.translate(width / 2, height / 2).scale(k).translate(-e.x, -e.y), 250);
    layers.nodes.selectAll("g.node").classed("focus", d => d === e);
    svg.attr("data-focus", N.name[i]);
  }

  // ------------------------------------------------------------------ what belongs together
  function related(e) {
    const nodes = new Set(e.nodes);
    if (e.kind === "block") return null;
    const chains = new Set();
    for (const i of e.nodes) {
      if (N.chain[i] !== null) chains.add(N.chain[i]);
      else { operands[i].forEach(j => nodes.add(j)); readers[i].forEach(j => nodes.add(j)); }
    }
    for (const j of [...nodes]) if (N.chain[j] !== null) chains.add(N.chain[j]);
    for (const c of chains) {
      nodes.add(CHAINS[c].origin);
      CHAINS[c].identities.forEach(j => nodes.add(j));
      CHAINS[c].waiting.forEach(([j]) => nodes.add(j));
    }
    return nodes;
  }

  function light(e) {
    const nodes = e && related(e);
    scene.classed("dim", !!nodes);
    layers.nodes.selectAll("g.node").classed("lit", d => !!nodes && d.nodes.some(i => nodes.has(i)));
    layers.edges.selectAll("path").classed("lit", l => !!nodes && l.pairs.some(([a, b]) => nodes.has(a) && nodes.has(b)));
  }

  const tip = $("tip");
  function line(text, tag = "div") { const made = document.createElement(tag); made.textContent = text; tip.append(made); }
  const bytes = b => typeof b === "number" ? `${number(b)} bytes` : `${b} bytes`;

  function chainText(c) {
    const chain = CHAINS[c];
    const waits = chain.waiting.map(([w, n]) => `${N.name[w]} (${plural(n, "step")})`);
    return `delays ${N.name[chain.origin]} for ${waits.slice(0, 4).join(", ")}${waits.length > 4 ? ` and ${waits.length - 4} more` : ""}`;
  }

  function tell(event, e) {
    tip.replaceChildren();
    if (e.kind === "block") {
      const b = inBlock[e.block];
      line(blockName(e.block), "b");
      line([...b.ops].sort((p, q) => q[1] - p[1]).slice(0, 8).map(([op, n]) => `${op} ×${n}`).join(", "));
      if (b.identities) line(`${plural(b.identities, "identity vertex", "identity vertices")} on these levels`);
      if (b.parameters.length) line(`${plural(b.parameters.length, "parameter")}, ${when(b.parameters.map(i => N.t[i]))}`);
      line("click to open", "em");
    } else if (e.kind === "run") {
      line(plural(e.nodes.length, "identity vertex", "identity vertices"), "b");
      line(chainText(N.chain[e.i]));
      line(e.waited ? "a vertex in this block waits for it" : "passes this block by");
      line(`${N.shape[e.i]}, ${bytes(N.bytes[e.i])} each`);
    } else {
      const i = e.i, kind = N.kind[i];
      line(N.name[i], "b");
      line(`${kind === PARAMETER ? "parameter" : kind === INPUT ? "input" : kind === OUTPUT ? `${N.op[i]}, clamped output` : kind === IDENTITY ? "identity vertex" : N.op[i]}, level ${N.level[i]}`);
      line(`${N.shape[i]}, ${bytes(N.bytes[i])}`);
      if (kind === IDENTITY) line(chainText(N.chain[i]));
      if (N.t[i] !== null) line(`learns at t = ${N.t[i]}, from the errors of level ${N.t[i]}`);
      else if (N.why[i]) line(`not trained: ${N.why[i]}`);
      const waits = operands[i].filter(j => N.chain[j] !== null).map(j => N.name[CHAINS[N.chain[j]].origin]);
      if (kind !== IDENTITY && waits.length) line(`waits for ${[...new Set(waits)].join(", ")}`);
    }
    tip.hidden = false;
    move(event);
  }
  function move(event) {
    const { offsetWidth: w, offsetHeight: h } = tip, x = event.clientX + 14, y = event.clientY + 14;
    tip.style.left = Math.max(4, x + w > innerWidth ? event.clientX - w - 10 : x) + "px";
    tip.style.top = Math.max(4, y + h > innerHeight ? event.clientY - h - 10 : y) + "px";
  }
  function hush() { tip.hidden = true; }

  // ------------------------------------------------------------------ the wave, step by step
  const slider = $("step"), zil = data.traces.find(t => t.algorithm === "zil" && t.update_at === "level");
  slider.max = Math.max(data.levels - 1, 0);
  let timer = null;
  function showStep() {
    const t = +slider.value;
    $("step-name").textContent = t < 0 ? "step t: not begun" : `t = ${t}: the errors of level ${t} arrive` + (learnsAt.get(t) ? `, ${plural(learnsAt.get(t), "parameter")} learn${learnsAt.get(t) === 1 ? "s" : ""}` : "");
    const b = BLOCKS.findIndex(({ low, high }) => low <= t && t <= high), x = columnX.get(t);
    const width = b < 0 ? 0 : open.has(b) ? COLUMN : Math.max(BOX / (BLOCKS[b].high - BLOCKS[b].low + 1), 6);
    layers.now.selectAll("rect").data(b < 0 ? [] : [0]).join("rect").attr("class", "now")
      .attr("x", x - width / 2).attr("width", width).attr("y", extent.top + 36).attr("height", extent.bottom - extent.top - 60);
    layers.nodes.selectAll("g.node.parameter").classed("learns", e => N.t[e.i] !== null && N.t[e.i] === t);
    drawHere(t);
    overview.select(".step").attr("visibility", t < 0 ? "hidden" : "visible").attr("x1", along ? along(t) : 0).attr("x2", along ? along(t) : 0);
  }
  slider.addEventListener("input", showStep);
  $("play").addEventListener("click", () => {
    if (timer) return stop();
    if (+slider.value >= +slider.max) slider.value = -1;
    $("play").textContent = "Pause";
    $("play").setAttribute("aria-pressed", "true");
    timer = setInterval(() => {
      slider.value = +slider.value + 1;
      showStep();
      if (+slider.value >= +slider.max) stop();
    }, Math.max(60, Math.min(700, 9000 / Math.max(data.levels, 1))));
  });
  function stop() {
    clearInterval(timer);
    timer = null;
    $("play").textContent = "Play the wave";
    $("play").setAttribute("aria-pressed", "false");
  }

  // ------------------------------------------------------------------ search
  const search = $("search"), hits = $("hits");
  let found = [], picked = 0;
  function lookUp() {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    found = words.length ? d3.range(COUNT).filter(i => words.every(w => N.name[i].toLowerCase().includes(w) || N.op[i].toLowerCase() === w)) : [];
    found.sort((a, b) => (N.kind[a] === IDENTITY) - (N.kind[b] === IDENTITY) || N.name[a].length - N.name[b].length || a - b);
    picked = 0;
    list();
  }
  function list() {
    hits.replaceChildren();
    found.slice(0, 60).forEach((i, k) => {
      const item = document.createElement("li"), small = document.createElement("small");
      item.setAttribute("role", "option");
      item.setAttribute("aria-selected", k === picked);
      item.textContent = N.name[i];
      small.textContent = `${N.op[i] || data.kinds[N.kind[i]]}, level ${N.level[i]}`;
      item.append(small);
      item.addEventListener("mousedown", event => { event.preventDefault(); choose(k); });
      hits.append(item);
    });
    hits.hidden = !found.length;
    search.setAttribute("aria-expanded", String(!hits.hidden));
    hits.children[picked]?.scrollIntoView({ block: "nearest" });
  }
  function choose(k) {
    if (found[k] === undefined) return;
    focusOn(found[k]);
    hits.hidden = true;
    search.setAttribute("aria-expanded", "false");
  }
  search.addEventListener("input", lookUp);
  search.addEventListener("blur", () => { hits.hidden = true; });
  search.addEventListener("keydown", event => {
    if (event.key === "ArrowDown" || event.key === "ArrowUp") {
      event.preventDefault();
      picked = Math.min(Math.max(picked + (event.key === "ArrowDown" ? 1 : -1), 0), Math.min(found.length, 60) - 1);
      list();
    } else if (event.key === "Enter") choose(picked);
    else if (event.key === "Escape") { search.value = ""; lookUp(); search.blur(); }
  });
  document.addEventListener("keydown", event => {
    if (event.key === "/" && !/^(INPUT|SELECT|TEXTAREA)$/.test(document.activeElement.tagName)) { event.preventDefault(); search.focus(); search.select(); }
  });

  // ------------------------------------------------------------------ buttons, legend, lists
  $("open-all").addEventListener("click", () => { BLOCKS.forEach((_, b) => open.add(b)); draw(); fit(0); });
  $("close-all").addEventListener("click", () => { open.clear(); draw(); fit(0); });
  $("fit").addEventListener("click", () => fit());
  $("zoom-in").addEventListener("click", () => svg.transition().duration(150).call(zoom.scaleBy, 1.5));
  $("zoom-out").addEventListener("click", () => svg.transition().duration(150).call(zoom.scaleBy, 1 / 1.5));
  if (BLOCKS.length < 2) { $("open-all").hidden = true; $("close-all").hidden = true; }

  for (const [style, cls, text] of [
    ["background:var(--vertex);border-color:var(--vertex-rim)", "", "vertex"],
    ["background:var(--heavy);border-color:var(--heavy-rim)", "", "Conv, MatMul, Gemm, RNN, …"],
    ["", "dot", "identity vertex: holds a value for one step"], ["", "line", "delayed edge"],
    ["background:var(--parameter);border-color:var(--parameter-rim);border-radius:7px", "", "parameter, below the vertex that reads it"],
    ["background:var(--surface);border-color:var(--faint);border-style:dashed;border-radius:7px", "", "not trained"],
    ["background:var(--parameter-on);border-color:var(--parameter-rim);border-radius:7px", "", "learns at the step shown"],
    ["background:var(--input);border-color:var(--input-rim);border-radius:7px", "", "input"],
    ["background:var(--output);border-color:var(--output)", "", "trained output, clamped"],
    ...BLOCKS.length < 2 ? [] : [
      ["background:var(--page);border-color:var(--vertex-rim)", "", "block of levels, click to open; t: when its parameters learn"],
      ["background:var(--identity-soft);border-color:var(--identity)", "", "×n: identity vertices passing a closed block"],
      ["background:var(--identity-fill);border-color:var(--identity)", "", "the same, and a vertex in it waits for them"],
    ],
  ]) {
    const item = d3.select("#legend").append("span");
    item.append("i").attr("class", cls).attr("style", style);
    item.append("span").text(text);
  }

  const opOf = name => { const i = byName.get(name); return i === undefined ? "" : N.op[i] || data.kinds[N.kind[i]]; };
  function entry(list, lead, text, act, aside = "") {
    const item = d3.select(list).append("li").attr("tabindex", act ? 0 : null).classed("empty", !act);
    if (lead) item.append("b").text(lead);
    item.append("span").text(text);
    if (aside) item.append("small").text(aside);
    if (act) item.on("click", act).on("keydown", event => { if (event.key === "Enter") act(); });
  }
  const MANY = 400;
  $("delayed-count").textContent = `${number(data.skips.length)}, the longest first`;
  for (const skip of data.skips.slice(0, MANY))
    entry("#delayed", `${plural(skip.identities, "step")}`, `${skip.from} → ${skip.to}`, () => {
      const i = byName.get(skip.to);
      if (i === undefined) return;
      showDelay(i, byName.get(skip.from));
    }, opOf(skip.to));
  if (!data.skips.length) entry("#delayed", "", "None: every edge spans one level already.", null);
  else if (data.skips.length > MANY) entry("#delayed", "", `and ${number(data.skips.length - MANY)} shorter ones`, null);
  const learning = d3.sort(d3.range(COUNT).filter(i => N.t[i] !== null), i => N.t[i], i => i);
  $("learning-count").textContent = learning.length ? `${plural(learning.length, "leaf", "leaves")}, K = ${data.levels} steps` : "";
  for (const i of learning) entry("#learning", `t = ${N.t[i]}`, N.name[i], () => focusOn(i), N.shape[i]);
  if (!learning.length) entry("#learning", "", "Nothing is trained.", null);

  // ------------------------------------------------------------------ the maps
  const NAMES = { zil: "Z-IL", il: "Inference learning" }, LEFT = 46, BOTTOM = 40, TOP = 6;
  const panels = [];
  let colours = d3.interpolateViridis;

  function columnsOf(trace) { return trace.algorithm === "il" ? trace.steps + 1 : trace.steps; }
  /** On a levelled graph nothing reads a level after its step: t > level. */
  function passed(trace, t, level) { return trace.algorithm === "zil" && trace.update_at === "level" && t > level; }

  function cellsOf(trace, quantity) {
    const rows = trace[quantity], cells = [];
    for (let t = 0; t < columnsOf(trace); t++) for (let l = 0; l < trace.energy[0].length; l++) cells.push({ t, l, v: rows[t] ? rows[t][l] : 0 });
    return cells;
  }

  /** Colours span what Z-IL's front has, and of the others what lies near it: inference learning
      that diverges would leave the front one colour.  Beyond the ends, the ends' colours. */
  function scaleOf(quantity) {
    const live = trace => cellsOf(trace, quantity).filter(c => c.v > 0 && !passed(trace, c.t, c.l)).map(c => c.v);
    const first = data.traces.filter(t => t.algorithm === "zil").flatMap(live), all = data.traces.flatMap(live);
    const top = d3.max(first) || d3.max(all) || 1, base = d3.min(first) || top;
    const near = all.filter(v => v >= base * 1e-6 && v <= top * 10);
    const high = d3.max(near) || top, low = Math.max(d3.min(near) || high / 10, high * 1e-10);
    const made = d3.scaleLog().domain([Math.min(low, high / 10), high]).range([0, 1]).clamp(true);
    return Object.assign(made, { over: d3.max(all) > high, under: d3.min(all) < low });
  }

  function mapsOf(quantity) {
    const scale = scaleOf(quantity), css = getComputedStyle(document.documentElement);
    const zero = d3.rgb(css.getPropertyValue("--zero").trim()), lost = d3.rgb(css.getPropertyValue("--lost").trim());
    // All panels first: each takes its width from those beside it.
    const figures = d3.select("#panels").selectAll("figure").data(data.traces).join("figure").attr("class", "panel").attr("data-algorithm", t => t.algorithm);
    figures.selectAll("*").remove();
    panels.length = 0;
    for (const [k, trace] of data.traces.entries()) {
      const rows = trace.energy[0].length, columns = columnsOf(trace), cells = cellsOf(trace, quantity);
      const figure = d3.select(figures.nodes()[k]);
      const caption = figure.append("figcaption");
      caption.append("b").text(`${NAMES[trace.algorithm]}, γ = ${trace.gamma}, ${plural(trace.steps, "step")}`);
      caption.append("small").text(trace.algorithm === "il" ? "errors spread and settle; all parameters learn after the last step" :
        trace.update_at === "level" ? "one front: level l has backpropagation's error at t = l, when the parameters that it reads learn (dots)" : "all parameters learn at the last step");
      const width = Math.max(figure.node().clientWidth - LEFT - 12, 120), height = Math.max(150, Math.min(rows * 22, 420, width));
      const plot = figure.append("div").attr("class", "plot").style("height", `${height + BOTTOM + TOP}px`);
      const canvas = plot.append("canvas").attr("width", columns).attr("height", rows)
        .attr("data-levels", rows).attr("data-steps", columns).attr("role", "img")
        .attr("aria-label", `${quantity} of ${rows} levels in ${columns} steps`)
        .style("left", `${LEFT}px`).style("top", `${TOP}px`).style("width", `${width}px`).style("height", `${height}px`);
      const context = canvas.node().getContext("2d"), image = context.createImageData(columns, rows);
      for (const { t, l, v } of cells) {
        let colour = v === 0 ? zero : v === null ? lost : d3.rgb(colours(scale(v)));
        if (passed(trace, t, l) && v !== 0) colour = d3.rgb(d3.interpolateRgb(zero, colour)(.28));
        image.data.set([colour.r, colour.g, colour.b, 255], 4 * ((rows - 1 - l) * columns + t));
      }
      context.putImageData(image, 0, 0);
      const x = d3.scaleLinear([0, columns], [LEFT, LEFT + width]), y = d3.scaleLinear([0, rows], [TOP + height, TOP]);
      const over = plot.append("svg").attr("width", "100%").attr("height", "100%");
      const ticks = (n, room) => d3.ticks(0, n - 1, Math.max(1, Math.min(n, room))).filter(Number.isInteger);
      const axis = (g, side, scale, values) => g.call(side(scale).tickValues(values.map(v => v + .5)).tickFormat(v => v - .5).tickSize(4));
      over.append("g").attr("transform", `translate(0,${TOP + height})`).call(axis, d3.axisBottom, x, ticks(columns, width / 45));
      over.append("g").attr("transform", `translate(${LEFT},0)`).call(axis, d3.axisLeft, y, ticks(rows, height / 24));
      over.append("text").attr("x", LEFT + width / 2).attr("y", TOP + height + 34).attr("text-anchor", "middle").text("inference step t");
      over.append("text").attr("transform", `translate(11,${TOP + height / 2}) rotate(-90)`).attr("text-anchor", "middle").text("level");
      const r = Math.max(1.6, Math.min(5, width / columns / 4, height / rows / 3));
      if (trace.algorithm === "zil" && trace.update_at === "level")
        over.selectAll("circle").data(trace.learning.filter(([t]) => t < columns)).join("circle").attr("class", "learn")
          .attr("cx", ([t]) => x(t + .5)).attr("cy", ([t]) => y(t + .5)).attr("r", r);
      else for (const [t] of trace.learning)
        over.append("line").attr("class", "learn-at").attr("x1", x(Math.min(t + .5, columns - .5))).attr("x2", x(Math.min(t + .5, columns - .5))).attr("y1", TOP).attr("y2", TOP + height);
      const here = over.append("rect").attr("class", "here").attr("y", TOP).attr("height", height).attr("visibility", "hidden");
      panels.push({ trace, here, x, columns });
      const names = d3.group(Object.entries(trace.parameters), ([, t]) => t);
      canvas.on("pointermove", event => {
        const box = canvas.node().getBoundingClientRect();
        const t = Math.min(columns - 1, Math.max(0, Math.floor((event.clientX - box.left) / box.width * columns)));
        const l = rows - 1 - Math.min(rows - 1, Math.max(0, Math.floor((event.clientY - box.top) / box.height * rows)));
        const v = trace[quantity][t] ? trace[quantity][t][l] : 0;
        tip.replaceChildren();
        line(`level ${l}, step ${t}`, "b");
        line(`${quantity} ${v === null ? "overflowed" : v === 0 ? "0" : d3.format(".3~e")(v)}`);
        if (passed(trace, t, l)) line("the wave has passed: nothing reads it", "em");
        if (trace.algorithm === "zil" && t === l && names.get(t)) line(`learn here: ${names.get(t).slice(0, 6).map(n => n[0]).join(", ")}${names.get(t).length > 6 ? " …" : ""}`);
        tip.hidden = false;
        move(event);
      }).on("pointerleave", hush);
    }
    const key = d3.select("#scale");
    key.selectAll("*").remove();
    const [low, high] = scale.domain(), e = d3.format(".1~e");
    key.append("span").text((scale.under ? "≤ " : "") + e(low));
    const bar = key.append("canvas").attr("width", 150).attr("height", 1), ink = bar.node().getContext("2d");
    for (let k = 0; k < 150; k++) { ink.fillStyle = colours(k / 149); ink.fillRect(k, 0, 1, 1); }
    key.append("span").text((scale.over ? "≥ " : "") + e(high));
    const swatch = (colour, text) => { key.append("i").style("background", colour); key.append("span").text(text); };
    swatch("var(--zero)", "exactly 0");
    const faded = v => d3.interpolateRgb(zero, d3.rgb(colours(v)))(.28);
    swatch(`linear-gradient(90deg, ${[0, .33, .67, 1].map(faded).join(", ")})`, "paler: the wave has passed, nothing reads it");
    if (data.traces.some(t => cellsOf(t, quantity).some(c => c.v === null))) swatch("var(--lost)", "overflowed");
    swatch("var(--parameter-on)", "parameters learn");
    drawHere(+slider.value);
  }

  function drawHere(t) {
    for (const { trace, here, x, columns } of panels) {
      const shown = trace === zil && t >= 0 && t < columns;
      here.attr("visibility", shown ? "visible" : "hidden");
      if (shown) here.attr("x", x(t)).attr("width", Math.max(x(t + 1) - x(t), 1.5));
    }
  }

  draw();
  /** A flat graph takes no more of the window than it fills. */
  function room() {
    const { width } = size(), w = extent.right - extent.left, h = extent.bottom + FOOT - extent.top;
    svg.style("height", `${Math.round(Math.max(360, Math.min(Math.min(width / w, elements.some(e => e.kind === "block") ? 1 : 1.6) * h + 30, innerHeight * .58)))}px`);
  }
  drawOverview();
  room();
  fit(0);
  if (data.traces.length) {
    $("maps").hidden = false;
    mapsOf("energy");
    $("quantity").addEventListener("change", () => mapsOf($("quantity").value));
    let last = innerWidth;
    addEventListener("resize", () => { if (innerWidth !== last) { last = innerWidth; mapsOf($("quantity").value); } });
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => mapsOf($("quantity").value));
  }
  addEventListener("resize", () => { drawOverview(); room(); fit(0); });
  document.documentElement.setAttribute("data-ready", Math.round(performance.now() - began));
})();
