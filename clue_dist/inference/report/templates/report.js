"use strict";
// Draws what lies in the page as JSON: curves as SVG, UMAPs on a canvas, labels as a matrix.

const GREY = "#cfd3d8";
const DATA = JSON.parse(document.getElementById("data").textContent);
const COLOURS = DATA.colours;
const KEPT = JSON.parse(document.getElementById("kept").textContent).sections;
const TIP = document.getElementById("tip");

function make(parent, tag, attributes = {}, text = "") {
  const drawn = ["svg", "path", "circle", "line", "rect", "text", "title", "g", "clipPath"];
  const space = drawn.includes(tag) ? "http://www.w3.org/2000/svg" : "http://www.w3.org/1999/xhtml";
  const element = document.createElementNS(space, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text !== "") element.textContent = text;
  if (parent) parent.appendChild(element);
  return element;
}

function formatNumber(value) {
  if (Math.abs(value) >= 1e5) return Math.round(value).toLocaleString("en");
  return String(Number(value.toPrecision(4)));
}

function chooseTicks(low, high, count) {
  const raw = (high - low) / count, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map(factor => factor * power).find(size => size >= raw);
  const ticks = [];
  for (let k = Math.ceil(low / step); k * step <= high * (1 + 1e-9); k++) ticks.push(k * step);
  return ticks;
}

// --- the text beside the pointer ---

function showTip(event, rows) {
  TIP.replaceChildren();
  rows.forEach(([text, colour], k) => {
    const line = make(TIP, "div");
    if (colour) make(line, "i", { style: `background:${colour}` });
    make(line, k ? "span" : "b", {}, text);
  });
  TIP.hidden = false;
  const box = TIP.getBoundingClientRect();
  const left = Math.min(event.clientX + 14, innerWidth - box.width - 6);
  const top = event.clientY + box.height + 24 > innerHeight
    ? event.clientY - box.height - 14 : event.clientY + 14;
  TIP.style.left = `${Math.max(4, left)}px`;
  TIP.style.top = `${Math.max(4, top)}px`;
}

function hideTip() { TIP.hidden = true; }

// --- curves ---

const BOX = { width: 360, height: 190, left: 52, right: 10, top: 8, bottom: 22 };

function drawPanel(parent, panel, number, keptStep) {
  const figure = make(parent, "figure");
  const caption = make(figure, "figcaption", {}, panel.title);
  make(caption, "small", {}, panel.note);
  const svg = make(figure, "svg", { viewBox: `0 0 ${BOX.width} ${BOX.height}`, role: "img" });
  make(svg, "title", {}, panel.title);
  const steps = panel.curves.flatMap(curve => curve.steps);
  const first = Math.min(...steps), last = Math.max(...steps), span = Math.max(1, last - first);
  const right = BOX.width - BOX.right, bottom = BOX.height - BOX.bottom;
  const x = step => BOX.left + (step - first) / span * (right - BOX.left);
  const y = value => bottom - (value - panel.low) / (panel.high - panel.low) * (bottom - BOX.top);
  for (const tick of chooseTicks(panel.low, panel.high, 4)) {
    make(svg, "line", { x1: BOX.left, x2: right, y1: y(tick), y2: y(tick), stroke: "#eceef1" });
    make(svg, "text", { x: BOX.left - 5, y: y(tick) + 3, "text-anchor": "end" }, formatNumber(tick));
  }
  for (const tick of chooseTicks(first, Math.max(last, first + 1), 4)) {
    make(svg, "text", { x: x(tick), y: bottom + 14, "text-anchor": "middle" }, formatNumber(tick));
  }
  const clip = make(svg, "clipPath", { id: `clip-${number}` });
  make(clip, "rect", { x: BOX.left - 4, y: BOX.top, width: right - BOX.left + 8,
    height: bottom - BOX.top });
  const inside = make(svg, "g", { "clip-path": `url(#clip-${number})`, fill: "none" });
  const dotted = { stroke: "#9aa0a8", "stroke-dasharray": "2 3" };
  if (panel.reference !== null) {
    const level = y(panel.reference);
    make(inside, "line", { x1: BOX.left, x2: right, y1: level, y2: level, ...dotted });
  }
  if (keptStep !== null && keptStep >= first && keptStep <= last) {
    const place = x(keptStep);
    make(inside, "line", { x1: place, x2: place, y1: BOX.top, y2: bottom, ...dotted });
  }
  panel.curves.forEach((curve, k) => {
    const colour = COLOURS[k % COLOURS.length];
    const points = curve.steps.map((step, n) => `${x(step).toFixed(1)} ${y(curve.values[n]).toFixed(1)}`);
    make(inside, "path", { d: `M${points.join("L")}`, stroke: colour, "stroke-width": 1.6,
      "stroke-linejoin": "round" });
    if (points.length < 40) {
      curve.steps.forEach((step, n) => make(inside, "circle",
        { cx: x(step), cy: y(curve.values[n]), r: 1.8, fill: colour }));
    }
  });
  const names = panel.curves.filter(curve => curve.name);
  if (names.length) {
    const legend = make(figure, "div", { class: "legend" });
    panel.curves.forEach((curve, k) => {
      const entry = make(legend, "span");
      make(entry, "i", { style: `background:${COLOURS[k % COLOURS.length]}` });
      entry.append(curve.name);
    });
  }
  followPointer(svg, panel, steps, { x, y, first, span, right, bottom });
}

function followPointer(svg, panel, steps, axes) {
  const every = [...new Set(steps)].sort((a, b) => a - b);
  const marks = make(svg, "g", { visibility: "hidden" });
  const rule = make(marks, "line", { y1: BOX.top, y2: axes.bottom, stroke: "#9aa0a8" });
  const dots = panel.curves.map((_, k) => make(marks, "circle",
    { r: 3.2, fill: COLOURS[k % COLOURS.length], stroke: "#fff" }));
  const follow = event => {
    const box = svg.getBoundingClientRect();
    const place = (event.clientX - box.left) / box.width * BOX.width;
    const asked = axes.first + (place - BOX.left) / (axes.right - BOX.left) * axes.span;
    const step = every.reduce((a, b) => Math.abs(b - asked) < Math.abs(a - asked) ? b : a);
    rule.setAttribute("x1", axes.x(step));
    rule.setAttribute("x2", axes.x(step));
    const rows = [[`step ${step.toLocaleString("en")}`]];
    panel.curves.forEach((curve, k) => {
      const n = curve.steps.indexOf(step);
      dots[k].setAttribute("visibility", n < 0 ? "hidden" : "inherit");
      if (n < 0) return;
      const height = Math.min(Math.max(axes.y(curve.values[n]), BOX.top), axes.bottom);
      dots[k].setAttribute("cx", axes.x(step));
      dots[k].setAttribute("cy", height);
      const name = curve.name || panel.title;
      rows.push([`${name} ${formatNumber(curve.values[n])}`, COLOURS[k % COLOURS.length]]);
    });
    marks.setAttribute("visibility", "visible");
    showTip(event, rows);
  };
  svg.addEventListener("pointermove", follow);
  svg.addEventListener("pointerdown", follow);
  svg.addEventListener("pointerleave", () => {
    marks.setAttribute("visibility", "hidden");
    hideTip();
  });
}

// --- UMAPs ---

function makeChoice(parent, names, choose) {
  const buttons = names.map((name, k) => {
    const button = make(parent, "button", { type: "button", "aria-pressed": k === 0 }, name);
    button.addEventListener("click", () => {
      buttons.forEach(other => other.setAttribute("aria-pressed", other === button));
      choose(k);
    });
    return button;
  });
}

function drawLayouts(parent, layouts) {
  const state = { layout: layouts[0], colouring: null, single: null, zoom: 1, x: 0, y: 0 };
  const kinds = make(parent, "div", { class: "controls" });
  const colours = make(parent, "div", { class: "controls" });
  const note = make(parent, "p", { class: "muted" });
  const map = make(parent, "div", { class: "map" });
  const frame = make(map, "div");
  const canvas = make(frame, "canvas", { "aria-label": "UMAP" });
  const zooming = make(frame, "div", { class: "controls" });
  const legend = make(map, "div", { class: "legend" });
  const redraw = () => paintPoints(canvas, state);
  const chooseColouring = k => {
    Object.assign(state, { colouring: state.layout.colourings[k] || null, single: null });
    fillLegend(legend, state, redraw);
    redraw();
  };
  const chooseLayout = k => {
    Object.assign(state, { layout: layouts[k], zoom: 1, x: 0, y: 0 });
    note.textContent = state.layout.note;
    colours.replaceChildren();
    const titles = state.layout.colourings.map(colouring => colouring.title);
    if (titles.length) make(colours, "span", { class: "muted" }, "coloured by");
    makeChoice(colours, titles, chooseColouring);
    chooseColouring(0);
  };
  makeChoice(kinds, layouts.map(layout => layout.title), chooseLayout);
  for (const [name, factor] of [["+", 1.6], ["−", 1 / 1.6], ["all", 0]]) {
    make(zooming, "button", { type: "button" }, name).addEventListener("click", () => {
      state.zoom = factor ? Math.max(1, state.zoom * factor) : 1;
      if (state.zoom === 1) Object.assign(state, { x: 0, y: 0 });
      redraw();
    });
  }
  movePoints(canvas, state, redraw);
  new ResizeObserver(redraw).observe(frame);
  chooseLayout(0);
}

function fillLegend(legend, state, redraw) {
  legend.replaceChildren();
  if (!state.colouring) return;
  const { names, colours, codes, rest } = state.colouring;
  const counts = new Array(names.length).fill(0);
  codes.forEach(code => { if (code >= 0) counts[code]++; });
  names.forEach((name, k) => {
    const entry = make(legend, "button", { type: "button", title: `${counts[k]} points` });
    make(entry, "i", { style: `background:${colours[k]}` });
    entry.append(name);
    entry.addEventListener("click", () => {
      state.single = state.single === k ? null : k;
      for (const other of legend.querySelectorAll("button")) {
        other.style.opacity = state.single === null || other === entry ? 1 : 0.4;
      }
      redraw();
    });
  });
  if (rest) {
    const entry = make(legend, "span");
    make(entry, "i", { style: `background:${GREY}` });
    entry.append(rest);
  }
}

// Where the points of a layout are on the canvas, in CSS pixels.
function placePoints(canvas, state) {
  const { layout, zoom } = state, size = canvas.clientWidth, margin = 14;
  const widest = layout.x.reduce((a, b) => Math.max(a, b), 1);
  const highest = layout.y.reduce((a, b) => Math.max(a, b), 1);
  const scale = (size - 2 * margin) / Math.max(widest, highest) * zoom;
  const left = size / 2 - widest * scale / 2 + state.x, top = size / 2 - highest * scale / 2 + state.y;
  return { x: k => left + layout.x[k] * scale, y: k => top + layout.y[k] * scale, size };
}

function paintPoints(canvas, state) {
  const place = placePoints(canvas, state), dots = window.devicePixelRatio || 1;
  if (!place.size) return;
  canvas.style.height = `${place.size}px`;
  canvas.width = canvas.height = Math.round(place.size * dots);
  const paint = canvas.getContext("2d"), count = state.layout.x.length;
  paint.scale(dots, dots);
  paint.globalAlpha = 0.75;
  const radius = Math.min(4, Math.max(1.1, place.size / 8 / Math.sqrt(count))) * state.zoom ** 0.4;
  const { codes, colours } = state.colouring || { codes: [], colours: [] };
  const isShown = k => codes[k] >= 0 && (state.single === null || codes[k] === state.single);
  // Grey points lie below the others. A fixed stride mixes groups, so that none hides another.
  for (const shown of [false, true]) {
    for (let n = 0; n < count; n++) {
      const k = n * 7919 % count;
      if (state.colouring && isShown(k) !== shown || !state.colouring && !shown) continue;
      paint.fillStyle = !state.colouring ? COLOURS[0] : shown ? colours[codes[k]] : GREY;
      paint.beginPath();
      paint.arc(place.x(k), place.y(k), radius, 0, 7);
      paint.fill();
    }
  }
}

function movePoints(canvas, state, redraw) {
  let from = null;
  canvas.addEventListener("pointerdown", event => { from = [event.clientX, event.clientY]; });
  canvas.addEventListener("pointerup", () => { from = null; });
  canvas.addEventListener("pointerleave", () => { from = null; hideTip(); });
  canvas.addEventListener("pointermove", event => {
    if (from && event.buttons && state.zoom > 1) {
      state.x += event.clientX - from[0];
      state.y += event.clientY - from[1];
      from = [event.clientX, event.clientY];
      redraw();
    }
    describePoint(canvas, state, event);
  });
  canvas.addEventListener("click", event => describePoint(canvas, state, event));
}

function describePoint(canvas, state, event) {
  const place = placePoints(canvas, state), box = canvas.getBoundingClientRect();
  const x = event.clientX - box.left, y = event.clientY - box.top;
  let nearest = -1, least = 12 ** 2;
  for (let k = 0; k < state.layout.x.length; k++) {
    const distance = (place.x(k) - x) ** 2 + (place.y(k) - y) ** 2;
    if (distance < least) [nearest, least] = [k, distance];
  }
  if (nearest < 0 || !state.layout.colourings.length) return hideTip();
  showTip(event, state.layout.colourings.map(({ title, names, codes, colours, rest }) => {
    const code = codes[nearest];
    return [`${title}: ${code < 0 ? rest : names[code]}`, code < 0 ? GREY : colours[code]];
  }));
}

// --- confusion of labels ---

function drawConfusions(parent, confusions) {
  const choice = make(parent, "div", { class: "controls" });
  const note = make(parent, "p", { class: "muted" });
  const frame = make(parent, "div", { class: "scroll" });
  const show = k => {
    const { queries, keys, accuracy, n_cells: cells } = confusions[k];
    note.textContent = `${cells.toLocaleString("en")} cells seen through ${queries}, labels by `
      + `neighbours seen through ${keys}: ${(100 * accuracy).toFixed(1)}% right`;
    frame.replaceChildren();
    drawMatrix(frame, confusions[k]);
  };
  makeChoice(choice, confusions.map(({ queries, keys }) => `${queries} ← ${keys}`), show);
  show(0);
}

function drawMatrix(frame, { labels, counts }) {
  const shorten = text => text.length > 18 ? `${text.slice(0, 17)}…` : text;
  const cell = Math.max(14, Math.min(30, 420 / labels.length)), side = 118;
  const width = side + cell * labels.length + 50, height = side + cell * labels.length + 4;
  const svg = make(frame, "svg", { viewBox: `0 0 ${width} ${height}`,
    style: `width:${width}px;max-width:none` });
  labels.forEach((label, k) => {
    const middle = side + cell * (k + 0.65);
    make(svg, "text", { x: side - 5, y: middle, "text-anchor": "end" }, shorten(label));
    make(svg, "text", { transform: `translate(${middle},${side - 5}) rotate(-55)` }, shorten(label));
  });
  counts.forEach((row, i) => {
    const total = row.reduce((a, b) => a + b, 0);
    row.forEach((count, j) => {
      const share = total ? count / total : 0, light = Math.round(97 - 57 * share);
      const box = make(svg, "rect", { x: side + cell * j, y: side + cell * i, width: cell - 1,
        height: cell - 1, fill: `hsl(215 55% ${light}%)` });
      const rows = [[`${labels[i]} called ${labels[j]}`],
        [`${count} of ${total} cells, ${(100 * share).toFixed(1)}%`]];
      box.addEventListener("pointermove", event => showTip(event, rows));
      box.addEventListener("pointerdown", event => showTip(event, rows));
      box.addEventListener("pointerleave", hideTip);
      if (cell >= 24 && share >= 0.005) {
        make(svg, "text", { x: side + cell * (j + 0.5) - 0.5, y: side + cell * (i + 0.62),
          "text-anchor": "middle", "pointer-events": "none",
          style: `fill:${share > 0.5 ? "#fff" : "#2b2f36"}` }, share.toFixed(2).replace(/^0/, ""));
      }
    });
  });
}

// --- imputed values against measured ones ---

function drawImputed(parent, { shown, scale }) {
  if (!shown.length) return;
  const map = make(parent, "div", { class: "map" });
  const frame = make(map, "div");
  const list = make(map, "div", { class: "legend" });
  const buttons = shown.map((feature, k) => {
    const entry = make(list, "button", { type: "button", "aria-pressed": k === 0 });
    entry.append(`${feature.name} ${feature.correlation.toFixed(2)}`);
    entry.addEventListener("click", () => {
      buttons.forEach(other => other.setAttribute("aria-pressed", other === entry));
      drawFeature(frame, feature, scale);
    });
    return entry;
  });
  drawFeature(frame, shown[0], scale);
}

function drawFeature(frame, feature, scale) {
  frame.replaceChildren();
  const side = 360, left = 46, bottom = side - 36, every = [...feature.truth, ...feature.imputed];
  const low = Math.min(0, ...every), high = Math.max(...every, low + 1e-6) * 1.03;
  const x = value => left + (value - low) / (high - low) * (side - left - 10);
  const y = value => bottom - (value - low) / (high - low) * (bottom - 10);
  const svg = make(frame, "svg", { viewBox: `0 0 ${side} ${side}`, style: "max-width:34rem" });
  for (const tick of chooseTicks(low, high, 5)) {
    make(svg, "line", { x1: left, x2: side - 10, y1: y(tick), y2: y(tick), stroke: "#eceef1" });
    make(svg, "text", { x: left - 5, y: y(tick) + 3, "text-anchor": "end" }, formatNumber(tick));
    make(svg, "text", { x: x(tick), y: bottom + 13, "text-anchor": "middle" }, formatNumber(tick));
  }
  make(svg, "line", { x1: x(low), y1: y(low), x2: x(high), y2: y(high), stroke: "#9aa0a8",
    "stroke-dasharray": "2 3" });
  feature.truth.forEach((value, k) => make(svg, "circle", { cx: x(value).toFixed(1),
    cy: y(feature.imputed[k]).toFixed(1), r: 2, fill: COLOURS[0], "fill-opacity": 0.55 }));
  make(svg, "text", { x: (left + side) / 2, y: side - 6, "text-anchor": "middle" },
    `${feature.name} measured, ${scale}`);
  make(svg, "text", { transform: `translate(10,${side / 2}) rotate(-90)`,
    "text-anchor": "middle" }, "imputed");
}

// --- the page ---

let drawn = 0;
for (const place of document.querySelectorAll("[data-panels]")) {
  const kind = place.dataset.panels;
  const keptStep = ["scores", "losses"].includes(kind) ? DATA.kept_step : null;
  for (const panel of DATA.panels[kind]) drawPanel(place, panel, drawn++, keptStep);
}
const layouts = document.getElementById("layouts");
if (layouts) drawLayouts(layouts, KEPT.embedding.layouts);
const confusions = document.getElementById("confusions");
if (confusions) drawConfusions(confusions, KEPT.embedding.confusions);
const imputed = document.getElementById("imputed");
if (imputed) drawImputed(imputed, KEPT.imputation);
document.documentElement.dataset.drawn = String(drawn);
