// The beams. One state, which hypothesis is open; everything below is drawn from it and from the data.

const nodes = D.nodes.map((row, id) => Object.fromEntries([["id", id], ...D.fields.map((name, i) => [name, row[i]])]));
const children = nodes.map(() => []);
for (const n of nodes) if (n.parent !== null) children[n.parent].push(n);
const text = (n) => D.texts[n.token];
const token = (n) => tok(text(n));
const chance = (logp) => percent(logp === null ? null : logp >= -5e-7 ? 1 : Math.exp(logp));

const state = { node: D.best[0] ?? 0, dead: true };
const keep = () => address({ node: state.node === (D.best[0] ?? 0) ? null : state.node, dead: state.dead ? null : 0 });
function recall() {
  const i = Number(asked().get("node") ?? NaN);
  state.node = Number.isInteger(i) && nodes[i] ? i : (D.best[0] ?? 0);
  state.dead = asked().get("dead") !== "0";
  $("dead").checked = state.dead;
  drawTree();
  drawPanel();
  view.mark(state.node, true);
}
function open(i, focus) {
  state.node = i;
  keep();
  view.mark(i, true);
  drawPanel();
  if (focus) view.focus(i);
}

// The best

function drawBest() {
  const names = ["score", "sum of ln p", ...(D.diversity ? ["diversity"] : []), "tokens", "divisor", ...(D.coverage ? ["coverage"] : [])];
  bestTable($("best"), names, D.best.map((id, i) => {
    const n = nodes[id];
    return { id, text: D.written[i], cells: [number(n.score), number(n.sum), ...(D.diversity ? [number(-n.diversity)] : []), String(n.step + 1), number(n.divisor, 3), ...(D.coverage ? [number(n.coverage)] : [])] };
  }), open);
  $("formula").textContent = `score = ${D.diversity ? "(sum of ln p − diversity)" : "sum of ln p"} / divisor${D.coverage ? " + coverage" : ""}; the divisor is the number of new tokens to the power of length_penalty.`;
}

// The tree: one column per step, survivors above, the dead below, groups apart

const ABOVE = new Set(["kept", "barren", "stuck", "pruned", "finished", "displaced"]);
const better = (a, b) => ABOVE.has(b.fate) - ABOVE.has(a.fate) || a.rank - b.rank;
const heights = new Map(), dividers = [];
const view = treeView($("canvas"), nodes, {
  width: 122,
  letters: 8,
  at: (n) => [n.step, heights.get(n.id)],
  box: (n) => ({ kind: n.fate, dead: !ABOVE.has(n.fate), label: text(n), value: number(n.score, 3),
    says: `${text(n)}, step ${n.step}, score ${number(n.score, 3)}: ${n.why}`, title: `${text(n)}  ${chance(n.logprob)}\n${n.why}` }),
  act: open,
  children: (n) => children[n.id].toSorted(better),
  heading: (c) => `step ${c}`,
  extra: (wide) => dividers.map((y) => svg("line", { class: "divide", x1: 0, x2: wide, y1: y, y2: y })),
});
function drawTree() {
  const shown = nodes.filter((n) => state.dead || ABOVE.has(n.fate) || n.id === state.node);
  heights.clear();
  dividers.length = 0;
  for (let g = 0, top = TOP; g < D.groups; g++) {
    const columns = Map.groupBy(shown.filter((n) => n.group === g), (n) => n.step);
    for (const column of columns.values()) column.sort(better).forEach((n, i) => heights.set(n.id, top + i * (H + GAP_Y)));
    top += Math.max(1, ...[...columns.values()].map((c) => c.length)) * (H + GAP_Y) + 14;
    if (g < D.groups - 1) dividers.push(top - 10);
  }
  view.draw(shown);
}

// The open hypothesis

function drawPanel() {
  const n = nodes[state.node], line = view.path(n);
  $("panel-title").replaceChildren(...(line.length > 24 ? ["… "] : []), ...line.slice(-24).map(token), el("small", {}, `step ${n.step}, rank ${n.rank} of its step${D.groups > 1 ? `, group ${n.group}` : ""}`));
  $("why").textContent = `${n.why[0].toUpperCase()}${n.why.slice(1)}.`;
  const top = D.diversity ? `(${number(n.sum)} − ${number(n.diversity)})` : number(n.sum);
  $("parts").replaceChildren(el("p", { class: "sum num" }, "score ", el("b", {}, number(n.score)), ` = ${top} / ${number(n.divisor, 3)}${n.coverage ? ` + ${number(n.coverage)}` : ""}`,
    ...(D.phrases.length ? [` · phrases met: ${n.met} of ${D.phrases.length}`] : [])));
  pathTable($("path"), ["step", "token", "probability by the model", "ln p", "ln p after the links", "score so far"], line.map((m) => (
    { token: text(m), kind: m === n ? "last" : null, cells: [String(m.step), chance(m.logprob), number(m.logprob), number(m.gain), number(m.score)] })));
  continuations($("below"), children[n.id].toSorted((a, b) => a.rank - b.rank).map((m) =>
    button({ class: "plain", title: m.why }, () => open(m.id), token(m), ` ${number(m.score, 3)}`)));
}

keyOf($("key"), [["kept", "went on"], ["barren", "went on, but no continuation did"], ["finished", "finished, among the best"], ["displaced", "finished, displaced"],
  ["pruned", "going when the search stopped"], ["outscored", "outscored"], ...(D.groups > 1 ? [["aside", "held back by the diversity penalty"]] : []),
  ...(D.phrases.length ? [["aside", "gave way for the phrases"]] : [])]);
$("dead").addEventListener("change", () => { state.dead = $("dead").checked; keep(); drawTree(); view.mark(state.node, false); });
$("search").textContent = D.search;
$("chain").textContent = D.chain;
quoted($("prompt"), "Prompt", D.prompt);
if (D.phrases.length) {
  $("phrases").hidden = false;
  $("phrases").append(el("span", { class: "label" }, "Phrases that must come "), ...D.phrases.flatMap((p, i) => [i ? ", " : "", ...p.flatMap((a, j) => [j ? " or " : "", tok(a)])]));
}
if (nodes.length) {
  drawBest();
  recall();
  onAddress.push(recall);
} else for (const section of document.querySelectorAll("section")) section.hidden = true;
