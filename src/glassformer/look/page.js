// The inside. First the one state, then a section for each part of the page: tokens, heads, the enlarged head, lens, norms
// (in heads.js, lens.js, norms.js, which are joined to this file).

const T = D.ids.length;

// What is chosen. The token under the pointer (or focus) goes before the pinned one; so does the lens row.
const state = { head: null, pin: T - 1, hover: null, key: null, by: "row", depth: D.lens ? D.lens.rows.length - 1 : 0, hoverDepth: null, figure: "reads", shade: "top" };
const token = () => state.hover ?? state.pin;
const piece = (i) => tok(D.pieces[i]);

// Three significant digits, as many as a half float holds.
function number(x) {
  if (x === null || Number.isNaN(x)) return "–";
  if (x === 0) return "0";
  const size = Math.abs(x);
  if (size < 0.001 || size >= 1e6) return x.toExponential(2);
  return size >= 1000 ? x.toFixed(0) : x.toPrecision(3);
}

// A weight, as exactly as a half float holds it: below 2^-14 one digit, and nothing between 0 and 2^-24.
function weight(x) {
  const size = Math.abs(x);
  return size === 0 || size >= 2 ** -14 ? number(x) : size <= 2 ** -24 ? `${x < 0 ? "−" : ""}<6e-8` : x.toExponential(0);
}

// Patterns: half floats, decoded a layer at a time when first wanted.
const HALF = (() => {
  const table = new Float32Array(65536);
  for (let bits = 0; bits < 65536; bits++) {
    const e = (bits >> 10) & 31, m = bits & 1023;
    table[bits] = (bits & 32768 ? -1 : 1) * (e === 0 ? m * 2 ** -24 : e === 31 ? (m ? NaN : Infinity) : (1 + m / 1024) * 2 ** (e - 15));
  }
  return table;
})();
const decoded = [];
function half(layer) {
  if (!decoded[layer]) {
    const text = atob(D.patterns.half[layer]);
    const out = new Uint16Array(text.length / 2);
    for (let i = 0; i < out.length; i++) out[i] = text.charCodeAt(2 * i) | (text.charCodeAt(2 * i + 1) << 8);
    decoded[layer] = out;
  }
  return decoded[layer];
}
const LOWER = D.patterns.packing === "lower", PER_HEAD = LOWER ? (T * (T + 1)) / 2 : T * T;
// A function (query, key) -> weight for one head; NaN means masked (a weight of 0 without a mask is one too small for a float).
function weights(layer, head) {
  const numbers = half(layer), start = head * PER_HEAD;
  return LOWER ? (q, k) => (k > q ? NaN : HALF[numbers[start + (q * (q + 1)) / 2 + k]]) : (q, k) => HALF[numbers[start + q * T + k]];
}
const LAYERS = D.patterns.heads.length, ALL_HEADS = D.patterns.heads.reduce((a, b) => a + b, 0);

// The row (or column) of the current token: for the open head, or the mean over all heads.
const means = new Map();
function line(t) {
  const pick = (w) => (state.by === "row" ? (i) => w(t, i) : (i) => w(i, t));
  if (state.head) {
    const at = pick(weights(...state.head));
    return Float32Array.from({ length: T }, (_, i) => at(i));
  }
  const known = `${state.by} ${t}`;
  if (!means.has(known)) {
    const sum = new Float32Array(T).fill(NaN); // stays NaN where every head is masked
    for (let l = 0; l < LAYERS; l++) for (let h = 0; h < D.patterns.heads[l]; h++) {
      const at = pick(weights(l, h));
      for (let i = 0; i < T; i++) { const x = at(i); if (x === x) sum[i] = (sum[i] || 0) + x; }
    }
    means.set(known, sum.map((x) => x / Math.max(ALL_HEADS, 1)));
  }
  return means.get(known);
}

// The square root of a weight is shaded, so that small weights can be seen.
const root = (w) => (w < 0 ? -Math.sqrt(-w) : Math.sqrt(w));
const rgb = (w) => shade(root(w));
function legend(node, zero) {
  const bar = el("canvas", { width: 150, height: 1, role: "img", "aria-label": "Colour scale from 0 to 1, shaded by the square root" });
  const c = bar.getContext("2d");
  for (let x = 0; x < 150; x++) { c.fillStyle = `rgb(${rgb((x / 149) ** 2)})`; c.fillRect(x, 0, 1, 1); }
  node.replaceChildren("0", bar, "1 (shade: square root)", ...(zero ? [el("span", { class: "blank", role: "img", "aria-label": "hatched" }), "masked"] : []));
}
const css = (name) => { // the value of a light-dark() colour, as the canvas understands it
  const probe = el("i");
  probe.style.color = `var(${name})`;
  document.body.append(probe);
  const value = getComputedStyle(probe).color;
  probe.remove();
  return value;
};

// Everything that changes is drawn once per frame, however many events came.
const drawers = [];
let due = false;
function redraw() {
  if (due) return;
  due = true;
  requestAnimationFrame(() => { due = false; for (const draw of drawers) draw(); });
}
function hover(t, key = null) {
  if (state.hover === t && state.key === key) return;
  state.hover = t;
  state.key = key;
  redraw();
}
function pin(t) {
  state.pin = t;
  keep();
  redraw();
}

// The address keeps what is open.
const WIDE = matchMedia("(min-width: 1000px)");
function keep() {
  const closed = WIDE.matches ? "none" : null; // said where one is open at first
  address({ head: state.head?.join(".") ?? closed, token: state.pin === T - 1 ? null : state.pin, by: state.by === "row" ? null : state.by });
}
function recall() {
  const said = asked();
  const [l, h] = (said.get("head") ?? "").split(".").map(Number);
  state.head = Number.isInteger(l) && Number.isInteger(h) && l >= 0 && h >= 0 && h < (D.patterns.heads[l] ?? 0) ? [l, h] : null;
  const t = Number(said.get("token") ?? T - 1);
  state.pin = Number.isInteger(t) && t >= 0 && t < T ? t : T - 1;
  state.by = said.get("by") === "column" ? "column" : "row";
  for (const input of document.querySelectorAll("input[name=by]")) input.checked = input.value === state.by;
}

onTheme.push(redraw);

// Header

const DECODER = D.model.kind === "decoder";
const size = (n) => (n >= 1e9 ? `${(n / 1e9).toPrecision(3)} billion` : n >= 1e6 ? `${(n / 1e6).toPrecision(3)} million` : n.toLocaleString("en"));
$("facts").textContent = [
  `${D.model.kind}, ${D.model.layers} ${D.model.layers === 1 ? "layer" : "layers"}`, `${ALL_HEADS} ${ALL_HEADS === 1 ? "head" : "heads"}`,
  `width ${D.model.d_model}`, `vocabulary ${D.model.vocab_size.toLocaleString("en")}`, `${size(D.model.parameters)} parameters`,
].join(" · ");
quoted($("text"), "Text", D.text);
if (D.lens && DECODER) {
  const last = D.lens.rows.length - 1;
  $("answer").append(el("span", { class: "label" }, "Next token, by the model"),
    ...D.lens.ids[last][T - 1].map((id, i) => el("span", {}, tok(D.vocabulary[id]), " ", el("span", { class: "num" }, number(D.lens.p[last][T - 1][i])))));
}

// Tokens

const chips = D.pieces.map((text, i) => el("button", { type: "button", class: "chip", tabindex: i === T - 1 ? 0 : -1, title: `position ${i}, id ${D.ids[i]}` }, tok(text), el("small", { class: "num" })));
$("chips").append(...chips);
const chipAt = (event) => { const i = chips.indexOf(event.target.closest(".chip")); return i < 0 ? null : i; };
$("chips").addEventListener("pointerover", (event) => { if (event.pointerType !== "touch" && chipAt(event) !== null) hover(chipAt(event)); });
$("chips").addEventListener("pointerleave", () => hover(null));
$("chips").addEventListener("focusout", () => hover(null));
$("chips").addEventListener("click", (event) => { const i = chipAt(event); if (i !== null) { pin(i); if (event.detail === 0) hover(i); } });
$("chips").addEventListener("keydown", (event) => {
  const step = { ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1, Home: -T, End: T }[event.key];
  if (!step) return;
  event.preventDefault();
  const to = Math.max(0, Math.min(T - 1, chips.indexOf(document.activeElement) + step));
  chips[to].focus();
  hover(to);
});
for (const input of document.querySelectorAll("input[name=by]")) input.addEventListener("change", () => { state.by = input.value; keep(); redraw(); });

const brief = (w) => (Number.isNaN(w) ? "" : w === 0 ? "0" : Math.abs(w) < 0.005 ? "<.01" : w.toFixed(2));
new ResizeObserver(() => document.documentElement.style.setProperty("--strip", `${$("strip").offsetHeight}px`)).observe($("strip"));
drawers.push(function drawTokens() {
  const t = token(), row = line(t), box = $("chips"), chosen = chips[t];
  if (!box.matches(":hover")) { // a token chosen elsewhere on the page comes into view
    const above = chosen.offsetTop - box.scrollTop, below = above + chosen.offsetHeight - box.clientHeight;
    if (above < 0 || below > 0) box.scrollTop += above < 0 ? above - 3 : below + 3;
  }
  chips.forEach((chip, i) => {
    if (Number.isNaN(row[i])) unpaint(chip); else paint(chip, root(row[i]));
    chip.lastChild.textContent = brief(row[i]);
    chip.classList.toggle("here", i === t);
    chip.classList.toggle("pinned", i === state.pin);
    chip.tabIndex = i === state.pin ? 0 : -1;
    chip.setAttribute("aria-label", `${D.pieces[i]}, position ${i}, ${Number.isNaN(row[i]) ? "masked" : weight(row[i])}`);
    chip.setAttribute("aria-pressed", i === state.pin);
  });
  const where = state.head ? `layer ${state.head[0]}, head ${state.head[1]}` : `the mean of ${ALL_HEADS === 1 ? "the one head" : `all ${ALL_HEADS} heads`}`;
  const rest = [` (position ${t}, id ${D.ids[t]}) in ${where}.`];
  $("strip-says").replaceChildren(...(state.by === "row" ? ["Shade: how much each token is read by "] : ["Shade: how much each token reads from "]), piece(t), ...rest);
});
