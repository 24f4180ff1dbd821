// The tree of continuations. One state, which piece is open; everything below is drawn from it and from the data.

const nodes = D.nodes.map((row, id) => Object.fromEntries([["id", id], ...D.fields.map((name, i) => [name, row[i]])]));
const children = nodes.map(() => []);
for (const n of nodes) if (n.parent !== null) children[n.parent].push(n);
const plus = (a, b) => (a === null || b === null ? null : a + b);
const chance = (logp) => percent(logp === null ? null : Math.exp(logp));
let rows = 0;
for (const n of nodes) { // in the order of the drawing: a parent before its children, the best child in its row
  const parent = nodes[n.parent], siblings = parent ? children[parent.id] : [];
  n.column = parent ? parent.column + 1 : 0;
  n.row = siblings[0] === n ? parent.row : rows++;
  n.length = (parent?.length ?? 0) + n.ids.length;
  n.sum = n.logprobs.reduce(plus, parent?.sum ?? 0);
  n.whole = (parent ? parent.whole + D.joint : "") + n.text;
  n.tokens = (parent ? parent.tokens : "") + n.ids.map((id) => D.texts[id]).join("");
}
const whole = (n) => (n.whole.trim() ? n.whole : n.tokens); // what cannot be seen is written as its tokens are
const label = (n) => (n.text.trim() ? n.text.replaceAll("\n", "⏎") : n.ids.map((id) => D.texts[id]).join(""));
const paths = nodes.filter((n) => !children[n.id].length).sort((a, b) => (b.sum ?? -Infinity) - (a.sum ?? -Infinity) || a.id - b.id);

const state = { node: paths[0]?.id ?? 0 };
const keep = () => address({ node: state.node === paths[0]?.id ? null : state.node });
function recall() {
  const i = Number(asked().get("node") ?? NaN);
  state.node = Number.isInteger(i) && nodes[i] ? i : paths[0].id;
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

const view = treeView($("canvas"), nodes, {
  width: 220,
  letters: 19,
  at: (n) => [n.column, TOP + n.row * (H + GAP_Y)],
  box: (n) => ({ kind: n.ended ? "finished" : children[n.id].length ? "through" : "kept", dead: false, label: label(n), value: chance(n.logprobs[0]),
    says: `${label(n)}, ${count(n.ids.length, "token")}, its first with ${chance(n.logprobs[0])}`, title: `${label(n)}\n${count(n.ids.length, "token")}, its first with ${chance(n.logprobs[0])}` }),
  act: open,
  children: (n) => children[n.id],
  heading: (c) => (c ? `after ${count(c, "fork")}` : "behind the prompt"),
});

function drawPanel() {
  const n = nodes[state.node], line = view.path(n);
  $("panel-title").replaceChildren(tok(whole(n)));
  $("why").textContent = `${count(n.length, "token")}, ln p ${number(n.sum, 2)}, ${number(n.sum === null ? null : n.sum / n.length, 2)} a token`
    + (n.ended ? "; it came to the end of the text." : children[n.id].length ? `; here ${count(children[n.id].length, "path")} part.` : ".");
  let soFar = 0, at = 0;
  pathTable($("path"), ["", "token", "probability", "ln p", "ln p so far"], line.flatMap((m) => m.ids.map((id, i) => {
    soFar = plus(soFar, m.logprobs[i]);
    return { token: D.texts[id], kind: at && !i ? "parts" : null, cells: [String(at++), chance(m.logprobs[i]), number(m.logprobs[i]), number(soFar)] };
  })));
  continuations($("below"), children[n.id].map((m) => button({ class: "plain", title: label(m) }, () => open(m.id), tok(clip(label(m), 24)), ` ${chance(m.logprobs[0])}`)));
}

quoted($("prompt"), "Prompt", D.prompt);
$("chain").textContent = D.chain;
$("seed").textContent = D.seed;
keyOf($("key"), [["kept", "where a path stopped growing"], ["finished", "came to the end of the text"], ["through", "goes on in several ways"]]);
if (nodes.length) {
  bestTable($("best"), ["ln p", "a token", "tokens"], paths.map((n) => ({ id: n.id, text: whole(n), cells: [number(n.sum, 2), number(n.sum === null ? null : n.sum / n.length, 2), String(n.length)] })), open);
  view.draw(nodes);
  recall();
  onAddress.push(recall);
} else for (const section of document.querySelectorAll("section")) section.hidden = true;
