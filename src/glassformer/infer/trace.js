// The trace. One state, which token is open; everything below is drawn from it and from the data.

const N = D.tokens.length, S = D.stages.length;
const LEFT = 0, BITS = 1, P = 2, RANK = 3, REMOVED = 4, MASS = 5;
const text = (id) => D.texts[id];
const token = (id) => tok(text(id));
const bits = (x) => (x === null ? "–" : x.toFixed(2));
const mean = (numbers) => { const known = numbers.filter((x) => x !== null); return known.length ? known.reduce((a, b) => a + b, 0) / known.length : null; };

// What shades the strip: a number for each token, how it is written, and how dark it is (0 to 1).
const first = (t) => t.facts[0], last = (t) => t.facts[S - 2];
const most = (of) => Math.max(1e-9, ...D.tokens.map(of));
const SHADES = {
  model: { of: (t) => first(t)[P], say: percent, shade: (x) => Math.sqrt(x) },
  picked: { of: (t) => last(t)[P], say: percent, shade: (x) => Math.sqrt(x) },
  bits: { of: (t) => first(t)[BITS], say: bits, shade: (x) => x / most((t) => first(t)[BITS]) },
  after: { of: (t) => last(t)[BITS], say: bits, shade: (x) => x / most((t) => first(t)[BITS]) },
  left: { of: (t) => last(t)[LEFT], say: count, shade: (x) => Math.log(x + 1) / Math.log(most((t) => last(t)[LEFT]) + 1) },
  rank: { of: (t) => first(t)[RANK], say: count, shade: (x) => Math.log(x) / Math.log(Math.max(2, most((t) => first(t)[RANK]))) },
};

const state = { token: 0, by: "model" };
const keep = () => address({ token: state.token || null, by: state.by === "model" ? null : state.by });
function recall() {
  const i = Number(asked().get("token") ?? 0);
  state.token = Number.isInteger(i) && i >= 0 && i < N ? i : 0;
  state.by = Object.hasOwn(SHADES, asked().get("by")) ? asked().get("by") : "model";
  $("by").value = state.by;
  draw();
}
function open(i) {
  state.token = Math.min(N - 1, Math.max(0, i));
  keep();
  draw();
}

// The strip

const chips = D.tokens.map((t, i) => el("button", { type: "button", class: "chip", tabindex: -1, title: `token ${i}, id ${t.id}` }, token(t.id), el("small")));
$("chips").append(...chips);
$("chips").addEventListener("click", (event) => { const i = chips.indexOf(event.target.closest(".chip")); if (i >= 0) open(i); });
$("chips").addEventListener("keydown", (event) => {
  const step = { ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1, Home: -N, End: N }[event.key];
  if (!step) return;
  event.preventDefault();
  open(state.token + step);
  chips[state.token].focus();
});
function drawStrip() {
  const how = SHADES[state.by], box = $("chips"), chosen = chips[state.token];
  chips.forEach((chip, i) => {
    const x = how.of(D.tokens[i]);
    paint(chip, x === null ? 0 : how.shade(x));
    chip.lastChild.textContent = x === null ? "–" : how.say(x);
    chip.classList.toggle("here", i === state.token);
    chip.tabIndex = i === state.token ? 0 : -1;
    chip.setAttribute("aria-pressed", i === state.token);
    chip.setAttribute("aria-label", `${text(D.tokens[i].id)}, token ${i}, ${chip.lastChild.textContent}`);
  });
  const above = chosen.offsetTop - box.scrollTop, below = above + chosen.offsetHeight - box.clientHeight;
  if (above < 0 || below > 0) box.scrollTop += above < 0 ? above - 3 : below + 3;
}

// The open token

const names = D.stages.map((s, i) => {
  const alike = D.stages.filter((o) => o.name === s.name).length;
  return alike === 1 ? s.name : `${s.name} ${D.stages.slice(0, i + 1).filter((o) => o.name === s.name).length}`;
});
const settings = (link) => (link.match(/^\w+\((.*)\)$/s)?.[1] ?? link);
function cell(p, before, lastStage, pick) {
  if (p === null) return el("td", before === null || lastStage ? {} : { class: "out", title: "removed by this link" }, before === null || lastStage ? "" : "×");
  if (lastStage) return el("td", { class: "done" }, "picked");
  const node = el("td", { class: "bar" }, percent(p));
  node.style.setProperty("--w", `${Math.max(100 * p, 0.5)}%`);
  return node;
}
function drawPanel() {
  const t = D.tokens[state.token], was = first(t), is = last(t);
  $("panel-title").replaceChildren(token(t.id), el("small", {}, `step ${t.step}${N > 1 ? ` (${D.tokens[0].step} to ${D.tokens[N - 1].step})` : ""}, id ${t.id}`));
  $("before").disabled = state.token === 0;
  $("after").disabled = state.token === N - 1;
  const best = t.candidates[0];
  $("says").replaceChildren(
    `The model gave it ${percent(was[P])} (rank ${count(was[RANK])} of ${count(was[LEFT])}, ${bits(was[BITS])} bits); when it was picked it had ${percent(is[P])}, `,
    `with ${count(is[LEFT])} ${is[LEFT] === 1 ? "token" : "tokens"} left and ${bits(is[BITS])} bits.`,
    ...(best[0] === t.id ? [] : [" The most probable by the model was ", token(best[0]), ` (${percent(best[1])}).`]));
  const head = el("tr", {}, el("th", { scope: "col" }, "candidate"),
    ...D.stages.map((s, i) => {
      const inner = settings(s.link);
      return el("th", { scope: "col", title: s.link }, names[i], el("small", {}, inner.length > 22 ? `${inner.slice(0, 21)}…` : inner || "\u00a0"));
    }));
  const rows = t.candidates.map(([id, ...p]) =>
    el("tr", { class: id === t.id ? "pick" : null }, el("th", { scope: "row", title: `${text(id)} (id ${id})` }, token(id)), ...p.map((x, i) => cell(x, i ? p[i - 1] : null, i === S - 1, id === t.id))));
  const line = (name, say) => el("tr", {}, el("th", { scope: "row" }, name), ...t.facts.map((f, i) => el("td", {}, i === S - 1 ? "" : say(f, i))));
  const facts = [
    line("tokens left", (f) => count(f[LEFT])),
    line("removed", (f, i) => (i ? count(f[REMOVED]) : "")),
    line("their share", (f, i) => (i && f[REMOVED] ? percent(f[MASS]) : "")),
    line("entropy, bits", (f) => bits(f[BITS])),
    line("pick's rank", (f) => count(f[RANK])),
  ];
  $("stages").replaceChildren(el("thead", {}, head), el("tbody", {}, ...rows), el("tbody", { class: "facts" }, ...facts));
  $("gone").replaceChildren(...t.gone.flatMap((gone, i) => {
    if (!gone.length) return [];
    const more = t.facts[i][REMOVED] - gone.length;
    return [el("p", { class: "lost" }, el("b", {}, names[i]), " removed ",
      ...gone.flatMap(([id, p]) => [el("span", {}, token(id), ` ${percent(p)}`), " "]), more > 0 ? `and ${count(more)} more.` : "")];
  }));
}

// All tokens

function drawLinks() {
  const rows = D.stages.slice(0, -1).map((s, i) => {
    const of = (which) => mean(D.tokens.map((t) => t.facts[i][which]));
    const removed = of(REMOVED);
    return el("tr", {}, el("th", { scope: "row", title: s.link }, i ? s.link : "model"), el("td", {}, count(Math.round(10 * of(LEFT)) / 10)),
      el("td", {}, i ? (removed ? percent(of(MASS)) : "0") : ""), el("td", {}, bits(of(BITS))), el("td", {}, percent(of(P))));
  });
  const head = ["link", "tokens left", "share removed", "entropy, bits", "probability of the pick"].map((name) => el("th", { scope: "col" }, name));
  $("links").replaceChildren(el("thead", {}, el("tr", {}, ...head)), el("tbody", {}, ...rows));
}

function draw() {
  if (!N) return;
  drawStrip();
  drawPanel();
}
onTheme.push(draw);
onAddress.push(recall);
$("by").addEventListener("change", () => { state.by = $("by").value; keep(); draw(); });
$("before").addEventListener("click", () => open(state.token - 1));
$("after").addEventListener("click", () => open(state.token + 1));
$("chain").textContent = D.chain;
quoted($("prompt"), "Prompt", D.prompt);
if (N) drawLinks();
else for (const section of document.querySelectorAll("section")) section.hidden = true;
recall();
