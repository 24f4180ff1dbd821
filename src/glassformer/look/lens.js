// Logit lens

const L = D.lens, DEPTHS = L ? L.rows.length : 0;
const depth = () => state.hoverDepth ?? state.depth;
const following = (t) => (DECODER ? (t + 1 < T ? D.ids[t + 1] : null) : D.ids[t]);
const lensCells = [], lensColumns = [];
const SHADES = {
  top: ["the cell’s own token", (r, t) => L.p[r][t][0]],
  choice: ["the token that the model chooses in the end", (r, t) => L.choice_p[r][t]],
  next: [DECODER ? "the token that follows in the text" : "the token that stands there", (r, t) => L.next_p[r][t]],
};
function layLens() {
  $("lens-says").textContent = DECODER
    ? "Each column is a position of the text, each row a depth; a cell shows the token that would be predicted to come next, were the stream read out there. The bottom row is the model’s own prediction."
    : "Each column is a position of the text, each row a depth; a cell shows the token predicted for that position itself, were the stream read out there. " +
      "The model sees the whole text on both sides, this token included unless it is the mask token. The bottom row is the model’s own prediction.";
  $("lens-shade").append(...Object.entries(SHADES).map(([key, [label]]) => el("option", { value: key }, `probability of ${label}`)));
  const header = el("tr", {}, el("th", { scope: "row" }, "token"), ...D.pieces.map((p, t) => { const th = el("th", { scope: "col", "data-t": t }, tok(p)); lensColumns[t] = [th]; return th; }));
  const rows = L.rows.map((name, r) => {
    lensCells[r] = D.pieces.map((_, t) => { const td = el("td", { tabindex: -1, "data-r": r, "data-t": t }, tok(D.vocabulary[L.ids[r][t][0]])); lensColumns[t].push(td); return td; });
    return el("tr", { class: r === DEPTHS - 1 ? "own" : "" }, el("th", { scope: "row" }, name), ...lensCells[r]);
  });
  const after = el("tr", { class: "after" }, el("th", { scope: "row" }, "in the text"), ...D.pieces.map((_, t) => el("td", {}, following(t) === null ? "" : tok(D.vocabulary[following(t)]))));
  $("lens").append(el("thead", {}, header), el("tbody", {}, ...rows, ...(DECODER ? [after] : [])));
}
function shadeLens() {
  const value = SHADES[state.shade][1];
  lensCells.forEach((row, r) => row.forEach((td, t) => { const p = value(r, t); if (p === null) unpaint(td); else paint(td, root(p)); }));
  legend($("lens-legend"), false);
}
function lensMove(r, t) {
  state.hoverDepth = r;
  state.hover = t;
  redraw();
}
const lensAt = (event) => { const td = event.target.closest("td[data-r]"); return td ? [Number(td.dataset.r), Number(td.dataset.t)] : null; };

// The pinned column is brought into view sideways; the page itself stays where it is.
let shownPin = null;
function showColumn() {
  if (shownPin === state.pin) return;
  shownPin = state.pin;
  const box = $("lens-scroll"), cell = lensColumns[state.pin][0], name = box.querySelector("th").offsetWidth;
  if (cell.offsetLeft < box.scrollLeft + name || cell.offsetLeft + cell.offsetWidth > box.scrollLeft + box.clientWidth) {
    box.scrollLeft = cell.offsetLeft + cell.offsetWidth - Math.max(box.clientWidth * 0.75, name + cell.offsetWidth);
  }
}
let marked = null, markedCell = null;
drawers.push(function drawLens() {
  if (!L) return;
  const t = token(), r = depth();
  showColumn();
  if (marked !== t) {
    for (const node of lensColumns[marked] ?? []) node.classList.remove("column");
    for (const node of lensColumns[t]) node.classList.add("column");
    marked = t;
  }
  markedCell?.classList.remove("here");
  markedCell?.setAttribute("tabindex", -1);
  markedCell = lensCells[r][t];
  markedCell.classList.add("here");
  markedCell.setAttribute("tabindex", 0);
  const where = r === DEPTHS - 1 ? "The model’s own output" : r === 0 ? "Lens on the embedding" : `Lens after ${L.rows[r]}`;
  const fact = (label, p, rank) => (p === null ? [] : [el("dt", {}, ...label), el("dd", { class: "num" }, `${number(p)}, rank ${rank.toLocaleString("en")}`)]);
  const next = following(t);
  $("card").replaceChildren(
    el("h3", {}, where, DECODER ? ": what follows " : ": what stands at ", piece(t), ` (${t})`),
    el("div", { class: "bars" }, ...L.ids[r][t].flatMap((id, i) => {
      const bar = el("span", { class: "bar" });
      bar.style.width = `${100 * L.p[r][t][i]}%`;
      return [el("span", { title: `id ${id}` }, tok(D.vocabulary[id])), bar, el("span", { class: "num" }, number(L.p[r][t][i]))];
    })),
    el("dl", {},
      ...fact(["final choice ", tok(D.vocabulary[L.ids[DEPTHS - 1][t][0]])], L.choice_p[r][t], L.choice_rank[r][t]),
      ...(next === null ? [] : fact([DECODER ? "in the text " : "stands there ", tok(D.vocabulary[next])], L.next_p[r][t], L.next_rank[r][t])),
      el("dt", {}, "entropy"), el("dd", { class: "num" }, `${number(L.entropy[r][t])} of at most ${number(Math.log2(D.model.vocab_size))} bits`)));
});

if (L) {
  layLens();
  onTheme.push(shadeLens);
  $("lens-shade").addEventListener("change", () => { state.shade = $("lens-shade").value; shadeLens(); });
  $("lens").addEventListener("pointerover", (event) => { const at = lensAt(event); if (at && event.pointerType !== "touch") lensMove(...at); });
  $("lens").addEventListener("pointerleave", () => lensMove(null, null));
  $("lens").addEventListener("focusout", () => lensMove(null, null));
  $("lens").addEventListener("click", (event) => { const at = lensAt(event); if (at) { state.depth = at[0]; pin(at[1]); } });
  $("lens").addEventListener("keydown", (event) => {
    const at = lensAt(event), step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
    if (!at) return;
    if (event.key === "Enter") { state.depth = at[0]; pin(at[1]); }
    if (!step) return;
    event.preventDefault();
    const [r, t] = [Math.max(0, Math.min(DEPTHS - 1, at[0] + step[0])), Math.max(0, Math.min(T - 1, at[1] + step[1]))];
    lensCells[r][t].focus();
    lensMove(r, t);
  });
} else $("lens-section").hidden = true;
