"use strict";
// One state, which hypothesis is open; everything below is drawn from it and from the data.

const D = JSON.parse(document.getElementById("data").textContent);
const nodes = D.nodes.map((row, id) => Object.fromEntries([["id", id], ...D.fields.map((name, i) => [name, row[i]])]));
const $ = (id) => document.getElementById(id);
const children = nodes.map(() => []);
for (const n of nodes) if (n.parent !== null) children[n.parent].push(n);

// Elements are made from parts and text only: nothing from the data is ever parsed as HTML.
function fit(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value === true ? "" : value);
  node.append(...children);
  return node;
}
const el = (tag, attributes = {}, ...children) => fit(document.createElement(tag), attributes, children);
const svg = (tag, attributes = {}, ...children) => fit(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
const text = (n) => D.texts[n.token];
const tok = (n) => el("bdi", { class: "tok" }, text(n));
const number = (x, digits = 4) => (x === null ? "–" : x.toFixed(digits));
function percent(logp) {
  if (logp === null) return "–";
  const p = Math.exp(logp);
  if (p >= 0.9995) return p >= 0.9999995 ? "100%" : ">99.9%";
  if (p >= 0.0995) return `${(100 * p).toFixed(1)}%`;
  if (p >= 0.00095) return `${(100 * p).toFixed(2)}%`;
  return p >= 1e-6 ? `${(100 * p).toFixed(4)}%` : "<0.0001%";
}
const short = (t, most) => { const c = [...t]; return c.length > most ? `${c.slice(0, most - 1).join("")}…` : t; };
function path(n) {
  const found = [n];
  while (found[0].parent !== null) found.unshift(nodes[found[0].parent]);
  return found;
}

const state = { node: D.best[0] ?? 0, dead: true };
function keep() {
  const parts = [];
  if (state.node !== (D.best[0] ?? 0)) parts.push(`node=${state.node}`);
  if (!state.dead) parts.push("dead=0");
  if (document.documentElement.dataset.theme) parts.push(`theme=${document.documentElement.dataset.theme}`);
  history.replaceState(null, "", parts.length ? `#${parts.join("&")}` : location.pathname + location.search);
}
function recall() {
  const asked = new URLSearchParams(location.hash.slice(1)), i = Number(asked.get("node") ?? NaN);
  if (Number.isInteger(i) && nodes[i]) state.node = i;
  state.dead = asked.get("dead") !== "0";
  $("dead").checked = state.dead;
  setTheme(["light", "dark"].includes(asked.get("theme")) ? asked.get("theme") : undefined);
}
function setTheme(name) {
  if (name) document.documentElement.dataset.theme = name;
  else delete document.documentElement.dataset.theme;
  $("theme").textContent = `Theme: ${name ?? "system"}`;
  $("theme").setAttribute("aria-label", `Theme: ${name ?? "as the system has it"}; press to change`);
}
function open(i, focus) {
  state.node = i;
  keep();
  mark(true);
  drawPanel();
  if (focus) boxes.get(i)?.focus({ preventScroll: true });
}

// The best

function drawBest() {
  const names = ["#", "score", "sum of ln p", ...(D.diversity ? ["diversity"] : []), "tokens", "divisor", ...(D.coverage ? ["coverage"] : [])];
  const head = el("tr", {}, ...names.map((n) => el("th", { scope: "col" }, n)), el("th", { scope: "col", class: "text" }, "text"));
  const rows = D.best.map((id, i) => {
    const n = nodes[id], button = el("button", { type: "button", "aria-label": `Open number ${i + 1}` }, String(i + 1));
    const row = el("tr", { "data-node": id }, el("td", {}, button), el("td", {}, number(n.score)), el("td", {}, number(n.sum)), ...(D.diversity ? [el("td", {}, number(-n.diversity))] : []),
      el("td", {}, String(n.step + 1)), el("td", {}, number(n.divisor, 3)), ...(D.coverage ? [el("td", {}, number(n.coverage))] : []), el("td", { class: "text" }, el("bdi", { class: "tok" }, D.written[i])));
    row.addEventListener("click", () => open(id));
    return row;
  });
  $("best").replaceChildren(el("thead", {}, head), el("tbody", {}, ...rows));
  $("formula").textContent = `score = ${D.diversity ? "(sum of ln p − diversity)" : "sum of ln p"} / divisor${D.coverage ? " + coverage" : ""}; the divisor is the number of new tokens to the power of length_penalty.`;
}

// The tree: one column per step, survivors above, the dead below, groups apart

const ABOVE = new Set(["kept", "barren", "stuck", "pruned", "finished", "displaced"]);
const W = 122, H = 26, GAP_X = 46, GAP_Y = 6, TOP = 22;
const boxes = new Map(), edges = new Map();
function drawTree() {
  boxes.clear();
  edges.clear();
  const shown = nodes.filter((n) => state.dead || ABOVE.has(n.fate) || n.id === state.node);
  const steps = 1 + Math.max(-1, ...nodes.map((n) => n.step));
  const columns = Array.from({ length: steps }, () => Array.from({ length: D.groups }, () => []));
  for (const n of shown) columns[n.step][n.group].push(n);
  const place = new Map(), tall = [];
  for (let g = 0; g < D.groups; g++) tall.push(Math.max(1, ...columns.map((c) => c[g].length)));
  for (let s = 0; s < steps; s++) {
    let top = TOP;
    for (let g = 0; g < D.groups; g++) {
      const order = columns[s][g].sort((a, b) => ABOVE.has(b.fate) - ABOVE.has(a.fate) || a.rank - b.rank);
      order.forEach((n, i) => place.set(n.id, [s * (W + GAP_X), top + i * (H + GAP_Y)]));
      top += tall[g] * (H + GAP_Y) + (D.groups > 1 ? 14 : 0);
    }
  }
  const width = steps * (W + GAP_X) - GAP_X + 4, height = TOP + tall.reduce((a, b) => a + b, 0) * (H + GAP_Y) + (D.groups > 1 ? 14 * D.groups : 0) + 4;
  const drawing = svg("svg", { width, height, viewBox: `-2 0 ${width} ${height}`, role: "presentation" });
  const heads = svg("g", { class: "steps", "aria-hidden": "true" }), lines = svg("g"), marks = svg("g");
  for (let s = 0; s < steps; s++) heads.append(svg("text", { x: s * (W + GAP_X) + 2, y: 10 }, `step ${s}`));
  for (let g = 1, y = TOP; g < D.groups; g++) {
    y += tall[g - 1] * (H + GAP_Y) + 14;
    heads.append(svg("line", { class: "divide", x1: 0, x2: width, y1: y - 10, y2: y - 10 }));
  }
  for (const n of shown) {
    const [x, y] = place.get(n.id);
    if (n.parent !== null && place.has(n.parent)) {
      const [px, py] = place.get(n.parent), x0 = px + W, y0 = py + H / 2, y1 = y + H / 2, bend = GAP_X / 2;
      const edge = svg("path", { class: `edge${ABOVE.has(n.fate) ? "" : " dead"}`, d: `M${x0} ${y0}C${x0 + bend} ${y0} ${x - bend} ${y1} ${x} ${y1}` });
      edges.set(n.id, edge);
      lines.append(edge);
    }
    const label = svg("text", { x: x + 7, y: y + H / 2 });
    label.textContent = short(text(n), 8);
    const value = svg("text", { class: "num", x: x + W - 6, y: y + H / 2 });
    value.textContent = number(n.score, 3);
    const box = svg("g", { class: `node ${n.fate}`, tabindex: -1, role: "button", "aria-label": `${text(n)}, step ${n.step}, score ${number(n.score, 3)}: ${n.why}` },
      svg("title", {}, `${text(n)}  ${percent(n.logprob)}\n${n.why}`), svg("rect", { x, y, width: W, height: H }), label, value);
    box.addEventListener("click", () => open(n.id, true));
    boxes.set(n.id, box);
    marks.append(box);
  }
  drawing.append(heads, lines, marks);
  $("canvas").replaceChildren(drawing);
  order = shown.toSorted((a, b) => a.step - b.step || place.get(a.id)[1] - place.get(b.id)[1]);
  mark(false);
}
let order = [];
function mark(scroll) {
  const on = new Set(path(nodes[state.node]).map((n) => n.id));
  for (const [id, box] of boxes) {
    box.classList.toggle("on", on.has(id));
    box.classList.toggle("here", id === state.node);
    box.setAttribute("tabindex", id === state.node ? 0 : -1);
    box.setAttribute("aria-pressed", id === state.node);
  }
  for (const [id, edge] of edges) edge.classList.toggle("on", on.has(id));
  for (const id of on) if (edges.has(id)) edges.get(id).parentNode.append(edges.get(id));
  for (const row of document.querySelectorAll("#best tbody tr")) row.classList.toggle("here", Number(row.dataset.node) === state.node);
  const box = boxes.get(state.node), frame = $("canvas");
  if (scroll && box) {
    const b = box.getBoundingClientRect(), f = frame.getBoundingClientRect();
    if (b.left < f.left || b.right > f.right) frame.scrollLeft += b.left - f.left - f.width / 2 + b.width / 2;
    if (b.top < f.top || b.bottom > f.bottom) frame.scrollTop += b.top - f.top - f.height / 2 + b.height / 2;
  }
}
$("canvas").addEventListener("keydown", (event) => {
  const n = nodes[state.node], visible = (m) => m && boxes.has(m.id);
  const column = order.filter((m) => m.step === n.step), at = column.indexOf(n);
  const to = {
    ArrowLeft: () => (n.parent === null ? null : nodes[n.parent]),
    ArrowRight: () => children[n.id].filter(visible).sort((a, b) => ABOVE.has(b.fate) - ABOVE.has(a.fate) || a.rank - b.rank)[0],
    ArrowUp: () => column[at - 1],
    ArrowDown: () => column[at + 1],
  }[event.key];
  if (!to) return;
  event.preventDefault();
  const next = to();
  if (visible(next)) open(next.id, true);
});

// The open hypothesis

function drawPanel() {
  const n = nodes[state.node], line = path(n);
  $("panel-title").replaceChildren(...(line.length > 24 ? ["… "] : []), ...line.slice(-24).map(tok), el("small", {}, `step ${n.step}, rank ${n.rank} of its step${D.groups > 1 ? `, group ${n.group}` : ""}`));
  $("why").textContent = `${n.why[0].toUpperCase()}${n.why.slice(1)}.`;
  const top = D.diversity ? `(${number(n.sum)} − ${number(n.diversity)})` : number(n.sum);
  $("parts").replaceChildren(el("p", { class: "sum" }, "score ", el("b", {}, number(n.score)), ` = ${top} / ${number(n.divisor, 3)}${n.coverage ? ` + ${number(n.coverage)}` : ""}`,
    ...(D.phrases.length ? [` · phrases met: ${n.met} of ${D.phrases.length}`] : [])));
  const names = ["step", "token", "probability by the model", "ln p", "ln p after the links", "score so far"];
  $("path").replaceChildren(el("thead", {}, el("tr", {}, ...names.map((name, i) => el("th", { scope: "col", class: i === 1 ? "text" : null }, name)))),
    el("tbody", {}, ...line.map((m) => el("tr", { class: m === n ? "last" : null }, el("td", {}, String(m.step)), el("th", { scope: "row", class: "text" }, tok(m)),
      el("td", {}, percent(m.logprob)), el("td", {}, number(m.logprob)), el("td", {}, number(m.gain)), el("td", {}, number(m.score))))));
  const below = children[n.id].toSorted((a, b) => a.rank - b.rank).map((m) => {
    const button = el("button", { type: "button", class: "plain", title: m.why }, tok(m), ` ${number(m.score, 3)}`);
    button.addEventListener("click", () => open(m.id));
    return button;
  });
  $("below").replaceChildren(...(below.length ? [el("span", { class: "label" }, "Continued by "), ...below] : []));
}

const KEY = [["kept", "went on"], ["barren", "went on, but no continuation did"], ["finished", "finished, among the best"], ["displaced", "finished, displaced"], ["pruned", "going when the search stopped"], ["outscored", "outscored"],
  ...(D.groups > 1 ? [["aside", "held back by the diversity penalty"]] : []), ...(D.phrases.length ? [["aside", "gave way for the phrases"]] : [])];
$("key").replaceChildren(...KEY.map(([name, said]) => el("span", {}, el("i", { class: name }), said)));
$("theme").addEventListener("click", () => {
  const themes = [undefined, "light", "dark"];
  setTheme(themes[(themes.indexOf(document.documentElement.dataset.theme) + 1) % 3]);
  keep();
});
$("dead").addEventListener("change", () => { state.dead = $("dead").checked; keep(); drawTree(); });
$("search").textContent = D.search;
$("chain").textContent = D.chain;
if (D.prompt) {
  $("prompt").hidden = false;
  $("prompt-text").textContent = D.prompt;
}
if (D.phrases.length) {
  $("phrases").hidden = false;
  $("phrases").append(el("span", { class: "label" }, "Phrases that must come "), ...D.phrases.flatMap((p, i) => [i ? ", " : "", ...p.flatMap((a, j) => [j ? " or " : "", el("bdi", { class: "tok" }, a)])]));
}
recall();
if (nodes.length) {
  drawBest();
  drawTree();
  drawPanel();
  mark(true);
} else for (const section of document.querySelectorAll("section")) section.hidden = true;
