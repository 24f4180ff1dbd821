// Heads: the grid

const [LOW, HIGH] = D.row_sums;
const SOFTMAX = Math.abs(LOW - 1) < 0.005 && Math.abs(HIGH - 1) < 0.005;
$("heads-rows").textContent = SOFTMAX
  ? "No weight is negative and each row sums to 1. Soft-max has no threshold: a low score, also one below zero, makes a weight small and not zero (but for rounding); a faint cell holds little, and only a masked cell holds nothing."
  : `The rows sum to between ${number(LOW)} and ${number(HIGH)}: this model’s normaliser does not make them sum to 1.`;
$("heads-mask").textContent = D.causal && T > 1
  ? "This model is causal: a token reads itself and earlier tokens, never later ones. The upper right half is masked, and nothing that comes later changes an earlier row: " +
    "where the rest of the text settles what an ambiguous word means, this shows only at later positions."
  : T > 1 ? "Tokens read in both directions here: earlier and later ones." : "";

const FIGURES = {
  reads: ["what it mostly reads", "self, previous, first or copy is named where its weight is at least 0.5 in the mean over the queries; copy means the positions right after an earlier occurrence of the query’s token."],
  none: ["nothing", ""],
  entropy: ["entropy of its rows, bits", "Mean over the queries: 0 bits when one key takes all the weight, log₂ n when n keys share it equally."],
  distance: ["distance it reads over, tokens", "Mean of |query position − key position| under the weights."],
  itself: ["weight on the token itself", "Mean over the queries of the weight on the query’s own position."],
  previous: ["weight on the previous token", "Mean over the queries after the first."],
  first: ["weight on the first token", "Mean over the queries after the first. Many heads rest on the first token when they have nothing to read."],
  copy: ["weight after an earlier copy", "Mean weight on the positions right after an earlier occurrence of the query’s token, over the queries that have one; high in induction heads."],
};
const figure = (l, h, name) => D.figures.values[l][h][D.figures.names.indexOf(name)];
function named(l, h) {
  const names = { itself: "self", previous: "previous", first: "first", copy: "copy" };
  const found = Object.keys(names).map((n) => [figure(l, h, n) ?? 0, names[n]]).sort((a, b) => b[0] - a[0])[0];
  return T > 2 && found[0] >= 0.5 ? found[1] : "";
}
$("figure").append(...Object.entries(FIGURES).map(([key, [label]]) => el("option", { value: key }, label)));
$("figure").addEventListener("change", () => { state.figure = $("figure").value; labelHeads(); });

const MOST = Math.max(1, ...D.patterns.heads);
const thumbs = D.patterns.heads.map((n, l) => Array.from({ length: n }, (_, h) => {
  const size = Math.min(T, 128);
  const canvas = el("canvas", { width: size, height: size, "aria-hidden": "true" });
  return el("button", { type: "button", class: "head", "data-head": `${l}.${h}`, tabindex: -1 }, el("span", { class: "thumb" }, canvas), el("small"));
}));
{
  const grid = $("grid");
  grid.style.gridTemplateColumns = `max-content repeat(${MOST}, minmax(44px, 150px))`;
  grid.append(el("span", { class: "name" }), ...Array.from({ length: MOST }, (_, h) => el("span", { class: "name head" }, h === 0 && MOST > 1 ? "head 0" : `${h}`)));
  thumbs.forEach((row, l) => {
    grid.append(el("span", { class: "name layer" }, MOST > 0 && l === 0 ? "layer 0" : `${l}`), ...row);
    for (let h = row.length; h < MOST; h++) grid.append(el("span"));
  });
}
// The head with the least entropy, of those that read more than themselves and the first token if there are such.
function sharpest() {
  const all = thumbs.flatMap((row, l) => row.map((_, h) => [l, h]));
  const telling = all.filter(([l, h]) => figure(l, h, "itself") < 0.5 && figure(l, h, "first") < 0.5);
  const by = ([l, h]) => figure(l, h, "entropy") ?? Infinity;
  return (telling.length ? telling : all).reduce((best, at) => (best === null || by(at) < by(best) ? at : best), null);
}
function labelHeads() {
  $("figure-says").textContent = FIGURES[state.figure][1];
  thumbs.forEach((row, l) => row.forEach((button, h) => {
    const text = state.figure === "none" ? "" : state.figure === "reads" ? named(l, h) : number(figure(l, h, state.figure));
    button.lastChild.textContent = text;
    button.setAttribute("aria-label", `Layer ${l}, head ${h}. Entropy ${number(figure(l, h, "entropy"))} bits, distance ${number(figure(l, h, "distance"))} tokens. ${named(l, h) && `Reads mostly: ${named(l, h)}.`}`);
  }));
}
// A text longer than the square has pixels: each pixel shows the largest weight that falls on it, so that thin lines stay.
function drawThumb(l, h) {
  const canvas = thumbs[l][h].querySelector("canvas"), n = canvas.width, w = weights(l, h);
  const top = new Float32Array(n * n).fill(NaN);
  for (let q = 0; q < T; q++) {
    const y = Math.floor((q * n) / T), end = LOWER ? q + 1 : T;
    for (let k = 0; k < end; k++) {
      const at = y * n + Math.floor((k * n) / T), x = w(q, k);
      if (x === x && !(Math.abs(x) <= Math.abs(top[at]))) top[at] = x;
    }
  }
  const image = new ImageData(n, n);
  top.forEach((x, i) => { if (x === x) image.data.set([...rgb(x), 255], 4 * i); });
  canvas.getContext("2d").putImageData(image, 0, 0);
}
let drawing = 0;
function drawGrid() { // a layer a frame: a large model must not freeze the page
  const turn = ++drawing;
  const next = (l) => {
    if (l >= LAYERS || turn !== drawing) return;
    for (let h = 0; h < D.patterns.heads[l]; h++) drawThumb(l, h);
    setTimeout(next, 0, l + 1);
  };
  next(0);
}
onTheme.push(drawGrid, () => legend($("legend"), D.masks));
drawers.push(function drawGridMarks() {
  const grid = $("grid");
  grid.style.setProperty("--at", token() / T);
  grid.style.setProperty("--size", 1 / T);
  grid.classList.toggle("by-column", state.by === "column");
  const open = state.head ? state.head.join(".") : null;
  let reachable = null;
  for (const button of thumbs.flat()) {
    button.classList.toggle("open", button.dataset.head === open);
    button.setAttribute("aria-pressed", button.dataset.head === open);
    button.tabIndex = -1;
    if (button.dataset.head === open || button === document.activeElement) reachable = button;
  }
  (reachable ?? thumbs.flat()[0] ?? {}).tabIndex = 0;
});
$("grid").addEventListener("click", (event) => {
  const button = event.target.closest(".head");
  if (button) openHead(...button.dataset.head.split(".").map(Number));
});

// Heads: one, enlarged

function openHead(l, h) {
  const same = state.head && state.head[0] === l && state.head[1] === h;
  state.head = same ? null : [l, h];
  keep();
  layPanel();
  if (state.head && matchMedia("(max-width: 999px)").matches) $("panel").scrollIntoView({ block: "nearest" });
}
function walk(dl, dh) {
  const focused = document.activeElement?.dataset?.head?.split(".").map(Number);
  const [l, h] = state.head ?? focused ?? [0, 0];
  let to = l;
  do to = (to + dl + LAYERS) % LAYERS; while (dl && D.patterns.heads[to] === 0);
  const n = D.patterns.heads[to], at = [to, dh ? (h + dh + n) % n : Math.min(h, n - 1)];
  if (state.head) { state.head = at; keep(); layPanel(); }
  if (focused || !$("panel").contains(document.activeElement)) thumbs[at[0]][at[1]].focus({ preventScroll: Boolean(state.head) });
  redraw();
}
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && state.head) {
    const [l, h] = state.head;
    if ($("panel").contains(document.activeElement)) thumbs[l][h].focus({ preventScroll: true });
    openHead(l, h);
    return;
  }
  const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
  if (!step || event.altKey || event.ctrlKey || event.metaKey || !$("heads").contains(event.target)) return;
  event.preventDefault();
  walk(...step);
});

let map = null; // the drawn head: { canvas, base, cell, left, top, at }
function layPanel() {
  const panel = $("panel");
  panel.hidden = !state.head;
  $("heads").classList.toggle("has-panel", Boolean(state.head));
  $("heads").classList.toggle("long", T > 32);
  if (!state.head) { map = null; panel.replaceChildren(); redraw(); return; }
  const [l, h] = state.head;
  const control = (label, text, act) => button({ class: "plain", "aria-label": label, title: label }, act, text);
  if (!panel.firstChild) {
    panel.append(
      el("div", { class: "panel-head" }, el("h3"),
        control("Previous head", "←", () => walk(0, -1)), control("Next head", "→", () => walk(0, 1)),
        control("Layer before", "↑", () => walk(-1, 0)), control("Layer after", "↓", () => walk(1, 0)),
        control("Save this head's numbers as CSV", "CSV", saveCsv), control("Close", "✕", () => openHead(...state.head))),
      el("p", { class: "figures num" }),
      el("div", { class: "map-scroll", tabindex: 0, role: "group", "aria-label": "The pattern; queries down, keys across" }, el("canvas", { role: "img" })),
      el("p", { class: "read", "aria-live": "polite" }), el("div", { class: "bars" }));
    const canvas = panel.querySelector("canvas");
    const cellAt = (event) => {
      const box = canvas.getBoundingClientRect();
      const k = Math.floor((event.clientX - box.left - map.left) / map.cell), q = Math.floor((event.clientY - box.top - map.top) / map.cell);
      return q >= 0 && q < T && k < T ? [q, k >= 0 ? k : null] : null;
    };
    canvas.addEventListener("pointermove", (event) => {
      const at = cellAt(event);
      if (!at) hover(null);
      else if (state.by === "row") hover(at[0], at[1]);
      else if (at[1] !== null) hover(at[1], at[0]);
    });
    canvas.addEventListener("pointerleave", () => hover(null));
    canvas.addEventListener("click", (event) => { const at = cellAt(event); if (at) pin(state.by === "row" ? at[0] : at[1] ?? at[0]); });
  }
  panel.querySelector("h3").textContent = `Layer ${l}, head ${h}`;
  panel.querySelector(".figures").replaceChildren(...[
    ["entropy", "entropy", " bits"], ["distance", "distance", " tokens"], ["itself", "itself", ""], ["previous", "previous", ""], ["first", "first", ""], ["copy", "after a copy", ""],
  ].map(([name, label, unit]) => el("span", {}, `${label} `, el("b", {}, number(figure(l, h, name))), figure(l, h, name) === null ? "" : unit)));
  layMap();
  redraw();
}

function layMap() {
  const [l, h] = state.head, canvas = $("panel").querySelector("canvas");
  const font = (px) => `${px}px ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace`;
  const probe = canvas.getContext("2d");
  probe.font = font(12);
  const widest = Math.min(88, Math.max(42, ...D.pieces.map((p) => probe.measureText(p).width)) + 8);
  const left = Math.ceil(widest) + 14, top = Math.ceil(widest) + 14;
  const room = canvas.parentElement.clientWidth - left - 2;
  const tall = Math.max(300, innerHeight - $("strip").offsetHeight - top - 270); // the whole panel fits a window, where it can
  const fits = Math.floor(Math.min(room, tall) / T); // else the names stay readable and the pattern scrolls
  const cell = Math.max(T > 150 ? 2 : T > 80 ? 5 : 10, Math.min(30, fits));
  const width = left + cell * T + 1, height = top + cell * T + 1, ratio = Math.min(devicePixelRatio || 1, 3);
  Object.assign(canvas, { width: width * ratio, height: height * ratio });
  Object.assign(canvas.style, { width: `${width}px`, height: `${height}px` });
  const base = document.createElement("canvas");
  base.width = canvas.width;
  base.height = canvas.height;
  const c = base.getContext("2d");
  c.scale(ratio, ratio);
  const w = weights(l, h);
  drawCells(c, w, left, top, cell);
  drawLabels(c, font, left, top, cell);
  canvas.setAttribute("aria-label", `Attention pattern of layer ${l}, head ${h}: ${T} queries down, ${T} keys across`);
  map = { canvas, base, cell, left, top, ratio, w };
}
function drawCells(c, w, left, top, cell) {
  const gap = cell >= 8 ? 1 : 0, edge = cell * T;
  c.save(); // masked cells: hatched, whatever the palette
  c.beginPath(); c.rect(left, top, edge, edge); c.clip();
  c.strokeStyle = css("--hatch"); c.lineWidth = 2;
  c.beginPath();
  for (let x = -edge; x < edge; x += 6) { c.moveTo(left + x, top + edge); c.lineTo(left + x + edge, top); }
  c.stroke(); c.restore();
  for (let q = 0; q < T; q++) for (let k = 0; k < (LOWER ? q + 1 : T); k++) {
    const x = w(q, k);
    if (Number.isNaN(x)) continue;
    c.fillStyle = `rgb(${rgb(x)})`;
    c.fillRect(left + k * cell, top + q * cell, cell - gap, cell - gap);
  }
}
function drawLabels(c, font, left, top, cell) {
  const every = Math.ceil(10 / cell), size = Math.max(9, Math.min(12, cell * 0.8)), room = left - 18;
  const fit = (text) => { // cut to the margin, by whole characters
    const letters = [...text];
    while (letters.length > 1 && c.measureText(letters.join("") + "…").width > room) letters.pop();
    return letters.length < [...text].length ? letters.join("") + "…" : text;
  };
  c.font = font(size); c.fillStyle = css("--ink"); c.textBaseline = "middle";
  for (let i = 0; i < T; i += every) {
    const text = fit(D.pieces[i]), middle = (i + 0.5) * cell;
    c.textAlign = "right"; c.fillText(text, left - 5, top + middle);
    c.save(); c.translate(left + middle, top - 5); c.rotate(-Math.PI / 2); c.textAlign = "left"; c.fillText(text, 0, 0); c.restore();
  }
  c.fillStyle = css("--dim"); c.font = "11px system-ui, sans-serif"; c.textAlign = "right";
  c.fillText("keys →", left - 6, 8);
  c.save(); c.translate(7, top - 6); c.rotate(-Math.PI / 2); c.textAlign = "left"; c.fillText("← queries", 0, 0); c.restore();
}

onTheme.push(() => { if (state.head && map) layMap(); });
new ResizeObserver(() => { if (state.head && map) { layMap(); redraw(); } }).observe($("heads"));
drawers.push(function drawPanel() {
  if (!map || !state.head) return;
  const { canvas, base, cell, left, top, ratio, w } = map, c = canvas.getContext("2d"), t = token(), [l, h] = state.head, byRow = state.by === "row";
  c.setTransform(1, 0, 0, 1, 0, 0);
  c.clearRect(0, 0, canvas.width, canvas.height);
  c.drawImage(base, 0, 0);
  c.scale(ratio, ratio);
  c.strokeStyle = css("--mark"); c.lineWidth = 1.5;
  const edge = cell * T;
  if (byRow) c.strokeRect(left - 0.5, top + t * cell - 0.5, edge, Math.max(cell, 2));
  else c.strokeRect(left + t * cell - 0.5, top - 0.5, Math.max(cell, 2), edge);
  const [q, k] = byRow ? [t, state.key] : [state.key, t];
  if (state.key !== null) c.strokeRect(left + k * cell - 0.5, top + q * cell - 0.5, cell, cell);
  const row = line(t), best = [...row.keys()].filter((i) => !Number.isNaN(row[i])).sort((a, b) => Math.abs(row[b]) - Math.abs(row[a])).slice(0, 5);
  const read = $("panel").querySelector(".read");
  if (state.key !== null) {
    const x = w(q, k);
    const why = Number.isNaN(x) ? (D.causal && k > q ? ": a later token, masked." : ": masked.") : x === 0 ? ": not masked, but too small for the model’s floating point." : ".";
    read.replaceChildren(piece(q), ` (${q}) reads `, piece(k), ` (${k}) with weight `, el("b", { class: "num" }, weight(x || 0)), why);
  } else {
    const sum = row.reduce((a, b) => a + (b || 0), 0);
    read.replaceChildren(piece(t), ` (${t}) ${byRow ? "reads" : "is read by"}, most weight first`, byRow && !SOFTMAX ? ` (its row sums to ${number(sum)}):` : ":");
  }
  const longest = Math.max(...best.map((i) => Math.abs(row[i])), 1e-9);
  $("panel").querySelector(".bars").replaceChildren(...best.flatMap((i) => {
    const bar = el("span", { class: "bar" });
    bar.style.width = `${(100 * Math.abs(row[i])) / Math.max(1, longest)}%`;
    return [el("span", {}, piece(i), el("span", { class: "where num" }, ` ${i}`)), bar, el("span", { class: "num" }, weight(row[i]))];
  }));
});

function saveCsv() {
  const [l, h] = state.head, w = weights(l, h), quote = (s) => `"${s.replaceAll('"', '""')}"`;
  const name = (i) => quote(`${i} ${D.pieces[i]}`), all = [...D.pieces.keys()];
  const rows = [["query", ...all.map(name)], ...all.map((q) => [name(q), ...all.map((k) => w(q, k) || 0)])];
  const link = el("a", { download: `layer${l}-head${h}.csv`, href: URL.createObjectURL(new Blob([rows.map((r) => r.join(",")).join("\n")], { type: "text/csv" })) });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}
