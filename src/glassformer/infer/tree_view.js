// A tree as boxes in columns, each joined to the one that it continues; one of them is open. What the boxes are, and where they stand, a page says.

const svg = (tag, attributes = {}, ...children) => fit(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
const number = (x, digits = 4) => (x === null ? "–" : x.toFixed(digits));
const clip = (text, most) => { const c = [...text]; return c.length > most ? `${c.slice(0, most - 1).join("")}…` : text; };
const H = 26, GAP_X = 46, GAP_Y = 6, TOP = 22;

// nodes: all, each with its id and its parent's (null: none). at(n): [column, y]. box(n): { kind, dead, label, value, says, title }. width, letters: of a box.
// act(id): a box is chosen. children(n): those to the right, the best first.
function treeView(frame, nodes, { width, letters, at, box, act, children, heading, extra = () => [] }) {
  const boxes = new Map(), links = new Map(), places = new Map();
  let order = [], here = null;
  const path = (n) => { const found = [n]; while (found[0].parent !== null) found.unshift(nodes[found[0].parent]); return found; };
  function draw(shown) {
    for (const kept of [boxes, links, places]) kept.clear();
    for (const n of shown) { const [column, y] = at(n); places.set(n.id, [column * (width + GAP_X), y, column]); }
    const columns = 1 + Math.max(0, ...[...places.values()].map((p) => p[2])), wide = columns * (width + GAP_X) - GAP_X + 4;
    const high = Math.max(TOP, ...[...places.values()].map((p) => p[1])) + H + GAP_Y + 4;
    const heads = svg("g", { class: "steps", "aria-hidden": "true" }, ...extra(wide)), lines = svg("g"), marks = svg("g");
    for (let c = 0; c < columns; c++) heads.append(svg("text", { x: c * (width + GAP_X) + 2, y: 10 }, heading(c)));
    for (const n of shown) {
      const [x, y] = places.get(n.id), { kind, dead, label, value, says, title } = box(n);
      if (n.parent !== null && places.has(n.parent)) {
        const [px, py] = places.get(n.parent), x0 = px + width, y0 = py + H / 2, y1 = y + H / 2, bend = GAP_X / 2;
        const link = svg("path", { class: `link${dead ? " dead" : ""}`, d: `M${x0} ${y0}C${x0 + bend} ${y0} ${x - bend} ${y1} ${x} ${y1}` });
        links.set(n.id, link);
        lines.append(link);
      }
      const made = svg("g", { class: `node ${kind}`, tabindex: -1, role: "button", "aria-label": says }, svg("title", {}, title), svg("rect", { x, y, width, height: H }),
        svg("text", { x: x + 7, y: y + H / 2 }, clip(label, letters)), svg("text", { class: "num", x: x + width - 6, y: y + H / 2 }, value));
      made.addEventListener("click", () => act(n.id, true));
      boxes.set(n.id, made);
      marks.append(made);
    }
    frame.replaceChildren(svg("svg", { width: wide, height: high, viewBox: `-2 0 ${wide} ${high}`, role: "presentation" }, heads, lines, marks));
    order = shown.toSorted((a, b) => places.get(a.id)[2] - places.get(b.id)[2] || places.get(a.id)[1] - places.get(b.id)[1]);
  }
  function mark(id, scroll) {
    here = nodes[id];
    const on = new Set(path(here).map((n) => n.id));
    for (const [i, made] of boxes) {
      made.classList.toggle("on", on.has(i));
      made.classList.toggle("here", i === id);
      made.setAttribute("tabindex", i === id ? 0 : -1);
      made.setAttribute("aria-pressed", i === id);
    }
    for (const [i, link] of links) link.classList.toggle("on", on.has(i));
    for (const i of on) if (links.has(i)) links.get(i).parentNode.append(links.get(i));
    for (const row of document.querySelectorAll(".best tbody tr")) row.classList.toggle("here", Number(row.dataset.node) === id);
    const made = boxes.get(id);
    if (!scroll || !made) return;
    const b = made.getBoundingClientRect(), f = frame.getBoundingClientRect();
    if (b.left < f.left || b.right > f.right) frame.scrollLeft += b.left - f.left - f.width / 2 + b.width / 2;
    if (b.top < f.top || b.bottom > f.bottom) frame.scrollTop += b.top - f.top - f.height / 2 + b.height / 2;
  }
  frame.addEventListener("keydown", (event) => {
    const visible = (n) => n && boxes.has(n.id);
    const column = order.filter((n) => places.get(n.id)[2] === places.get(here.id)?.[2]), place = column.indexOf(here);
    const to = {
      ArrowLeft: () => (here.parent === null ? null : nodes[here.parent]),
      ArrowRight: () => children(here).filter(visible)[0],
      ArrowUp: () => column[place - 1],
      ArrowDown: () => column[place + 1],
    }[event.key];
    if (!to) return;
    event.preventDefault();
    const next = to();
    if (visible(next)) act(next.id, true);
  });
  return { draw, mark, path, focus: (id) => boxes.get(id)?.focus({ preventScroll: true }) };
}

// A table of texts, of which each row opens the box of its last token. names: of the columns, the text's behind the first. rows: { id, cells, text }.
function bestTable(table, [name, ...names], rows, act) {
  const th = (said, kind) => el("th", { scope: "col", class: kind }, said);
  table.replaceChildren(el("thead", {}, el("tr", {}, th("#"), th(name), th("text", "text"), ...names.map((n) => th(n)))), el("tbody", {}, ...rows.map(({ id, cells: [cell, ...cells], text }, i) => {
    const row = el("tr", { "data-node": id }, el("td", {}, el("button", { type: "button", "aria-label": `Open number ${i + 1}` }, String(i + 1))), el("td", {}, cell),
      el("td", { class: "text", title: text }, tok(text.replaceAll("\n", "⏎"))), ...cells.map((c) => el("td", {}, c)));
    row.addEventListener("click", () => act(id));
    return row;
  })));
}
// The opened box's path, a line for each token. rows: { cells, token, kind }; the token stands in the second column.
function pathTable(table, names, rows) {
  const head = el("tr", {}, ...names.map((name, i) => el("th", { scope: "col", class: i === 1 ? "text" : null }, name)));
  table.replaceChildren(el("thead", {}, head), el("tbody", {}, ...rows.map(({ cells: [at, ...cells], token, kind }) =>
    el("tr", { class: kind }, el("td", {}, at), el("th", { scope: "row", class: "text" }, tok(token)), ...cells.map((cell) => el("td", {}, cell))))));
}
function continuations(place, made) {
  place.replaceChildren(...(made.length ? [el("span", { class: "label" }, "Continued by "), ...made] : []));
}
const keyOf = (place, kinds) => place.replaceChildren(...kinds.map(([name, said]) => el("span", {}, el("i", { class: name }), said)));
