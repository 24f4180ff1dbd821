// Norms: how long is what is added, next to the stream that it is added to

$("norms-says").textContent = (D.norms.adds
  ? "In every layer attention and feed-forward each add a vector to the stream of the chosen token; the bars are the lengths (Euclidean norms) of these vectors, the line is the length of the stream. "
  : "The bars are the lengths (Euclidean norms) of what attention and feed-forward return, the line is the length of the stream; in this model a norm or a factor stands between the two, so the stream does not grow by just these vectors. ") +
  "Lengths do not add up: two vectors can point against each other. The scale follows the token.";

const svg = (tag, attributes = {}, ...children) => fit(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
// A round number at or above x.
function above(x) {
  const power = 10 ** Math.floor(Math.log10(Math.max(x, 1e-12)));
  return [1, 1.2, 1.6, 2, 3, 4, 5, 6, 8, 10].find((m) => m * power >= x * 0.9999) * power;
}
drawers.push(function drawNorms() {
  const t = token(), n = D.norms.attn.length, width = Math.max(300, Math.min(900, $("norms").clientWidth)), left = 46, right = 8, high = 120, gap = 58, top = 24;
  const at = (list) => list.map((row) => row[t]), attn = at(D.norms.attn), ffn = at(D.norms.ffn), stream = at(D.norms.stream);
  // Each token has its own scale: the first token's stream is often many times as long as all others.
  const most = above(Math.max(...attn, ...ffn, 1e-9)), long = above(Math.max(...stream, 1e-9));
  const step = (width - left - right) / (n + 0.5), x = (l) => left + (l + 0.75) * step;
  const root = svg("svg", { viewBox: `0 0 ${width} ${top + high + gap + high + 24}`, role: "img", "aria-label": `Norms by layer for ${D.pieces[t]}; the same numbers are in the table below` });
  const frame = (y0, max) => [0, 0.5, 1].flatMap((f) => [
    svg("line", { class: "axis", x1: left, x2: width - right, y1: y0 + high * (1 - f), y2: y0 + high * (1 - f) }),
    svg("text", { x: left - 6, y: y0 + high * (1 - f) + 4, "text-anchor": "end" }, number(max * f)),
  ]);
  const names = (y, list) => list.flatMap(([label, place], i) => (i % Math.ceil(list.length / (width / 32)) ? [] : [svg("text", { x: place, y, "text-anchor": "middle" }, label)]));
  const bar = (kind, l, value, offset) => svg("rect", { class: kind, x: x(l) + offset, y: top + high * (1 - value / most), width: Math.max(1, step * 0.32), height: (high * value) / most },
    svg("title", {}, `layer ${l}, ${kind === "attn" ? "attention" : "feed-forward"}: ${number(value)}`));
  const off = D.norms.adds ? 64 : 82;
  root.append(
    svg("text", { class: "title", x: left, y: 12 }, D.norms.adds ? "added by" : "returned by"),
    svg("rect", { class: "attn", x: left + off, y: 3, width: 11, height: 11 }), svg("text", { x: left + off + 15, y: 12 }, "attention"),
    svg("rect", { class: "ffn", x: left + off + 79, y: 3, width: 11, height: 11 }), svg("text", { x: left + off + 94, y: 12 }, "feed-forward"),
    ...frame(top, most),
    ...attn.map((v, l) => bar("attn", l, v, -step * 0.34)), ...ffn.map((v, l) => bar("ffn", l, v, step * 0.02)),
    ...names(top + high + 16, attn.map((_, l) => [l ? `${l}` : "layer 0", x(l)])));
  const y0 = top + high + gap, point = (l) => [x(l - 0.5), y0 + high * (1 - stream[l] / long)];
  root.append(
    svg("text", { class: "title", x: left, y: y0 - 8 }, "the stream, before the first layer and after each"),
    ...frame(y0, long),
    svg("polyline", { class: "stream", points: stream.map((_, l) => point(l).join(",")).join(" ") }),
    ...stream.map((v, l) => svg("circle", { cx: point(l)[0], cy: point(l)[1], r: 3 }, svg("title", {}, `${l ? `after layer ${l - 1}` : "before layer 0"}: ${number(v)}`))));
  $("norms").replaceChildren(root);
  const cells = (...list) => list.map((v, i) => el(i ? "td" : "th", i ? {} : { scope: "row" }, typeof v === "string" ? v : number(v)));
  $("norms-table").replaceChildren(el("table", { class: "numbers" },
    el("caption", { class: "hidden" }, `Norms for token ${t}`),
    el("thead", {}, el("tr", {}, ...["layer", "stream before", "attention", "feed-forward", "stream after"].map((h) => el("th", { scope: "col" }, h)))),
    el("tbody", {}, ...attn.map((v, l) => el("tr", {}, ...cells(`${l}`, stream[l], v, ffn[l], stream[l + 1]))))));
});
addEventListener("resize", redraw);

// Begin

labelHeads();
recall();
if (WIDE.matches && !asked().has("head")) state.head = sharpest(); // there is room beside the grid, and a reader sees what a click does
layPanel();
for (const change of onTheme) change();
onAddress.push(() => { recall(); layPanel(); redraw(); });
