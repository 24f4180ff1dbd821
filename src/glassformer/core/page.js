"use strict";
// What every page's script begins with: its data, its elements, its colours, its theme, and its address. A page's own script is joined to this one.

const D = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);

// Elements are made from parts and text only: nothing from the data is ever parsed as HTML.
function fit(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value === true ? "" : value);
  node.append(...children);
  return node;
}
const el = (tag, attributes = {}, ...children) => fit(document.createElement(tag), attributes, children);
const tok = (text) => el("bdi", { class: "tok" }, text);
const button = (attributes, act, ...children) => { const made = el("button", { type: "button", ...attributes }, ...children); made.addEventListener("click", act); return made; };
function quoted(place, label, text) { // a text that may be long; no text, no place
  if (text) place.replaceChildren(el("span", { class: "label" }, `${label} `), el("q", { dir: "auto", title: text }, text));
  place.hidden = !text;
}

function percent(p) {
  if (p === null || p === undefined) return "–";
  if (p === 1) return "100%";
  if (p >= 0.9995) return ">99.9%";
  if (p >= 0.0995) return `${(100 * p).toFixed(1)}%`;
  if (p >= 0.00095) return `${(100 * p).toFixed(2)}%`;
  return p >= 1e-6 ? `${(100 * p).toFixed(4)}%` : "<0.0001%";
}
const count = (n, word) => `${n.toLocaleString("en")}${word ? ` ${word}${n === 1 ? "" : "s"}` : ""}`;

// Colour: one hue, lightness alone carries the number (also for colour-blind readers); what is below 0 is orange.
const STOPS = {
  light: [[[241, 245, 250], [196, 217, 238], [116, 172, 216], [40, 110, 178], [8, 42, 94]], [[255, 243, 230], [240, 160, 80], [150, 70, 0]]],
  dark: [[[30, 36, 45], [29, 62, 104], [38, 112, 168], [92, 176, 218], [214, 241, 252]], [[44, 34, 26], [170, 92, 24], [255, 190, 120]]],
};
function ramp(stops) {
  return Array.from({ length: 256 }, (_, i) => {
    const x = (i / 255) * (stops.length - 1), a = Math.min(Math.floor(x), stops.length - 2);
    return stops[a].map((c, j) => Math.round(c + (stops[a + 1][j] - c) * (x - a)));
  });
}
const system = matchMedia("(prefers-color-scheme: dark)");
const theme = () => document.documentElement.dataset.theme ?? (system.matches ? "dark" : "light");
let ramps = STOPS[theme()].map(ramp);
const shade = (x) => ramps[x < 0 ? 1 : 0][Math.min(255, Math.round(Math.abs(x) * 255))]; // -1 to 1
function paint(node, x) {
  const colour = shade(x), luminance = colour.map((c) => ((c / 255 + 0.055) / 1.055) ** 2.4).reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  node.style.backgroundColor = `rgb(${colour.join(" ")})`;
  node.style.color = luminance > 0.179 ? "#0b1016" : "#ffffff";
}
const unpaint = (node) => { node.style.backgroundColor = ""; node.style.color = ""; };

// The address keeps what is open: address({ token: 5 }) makes it #token=5; null is left out. onAddress: who reads it again when a reader changes it.
const onAddress = [], asked = () => new URLSearchParams(location.hash.slice(1));
function address(parts) {
  const said = Object.entries({ ...parts, theme: document.documentElement.dataset.theme ?? null }).filter(([, value]) => value !== null);
  history.replaceState(null, "", said.length ? `#${said.map(([name, value]) => `${name}=${encodeURIComponent(value)}`).join("&")}` : location.pathname + location.search);
}
addEventListener("hashchange", () => { setTheme(asked().get("theme")); for (const read of onAddress) read(); });

// Theme: the system's, or the reader's own choice. onTheme: who draws anew.
const onTheme = [];
function setTheme(name) {
  if (name === "light" || name === "dark") document.documentElement.dataset.theme = name;
  else delete document.documentElement.dataset.theme;
  const said = document.documentElement.dataset.theme;
  $("theme").textContent = `Theme: ${said ?? "system"}`;
  $("theme").setAttribute("aria-label", `Theme: ${said ?? "as the system has it"}; press to change`);
  ramps = STOPS[theme()].map(ramp);
  for (const change of onTheme) change();
}
$("theme").addEventListener("click", () => {
  const order = [undefined, "light", "dark"];
  setTheme(order[(order.indexOf(document.documentElement.dataset.theme) + 1) % 3]);
  const { theme: _, ...rest } = Object.fromEntries(asked());
  address(rest);
});
system.addEventListener("change", () => setTheme(document.documentElement.dataset.theme));
setTheme(asked().get("theme"));
