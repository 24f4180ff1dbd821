"use strict";
// Elements are made from parts and text only: nothing from the data is ever parsed as HTML.
const D = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);

function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

function copyButton(code, title) {
  const button = el("button", { type: "button", "aria-label": "Copy: " + title }, "Copy");
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(code);
      button.textContent = "Copied";
    } catch {
      // A page that is not from this machine or https may not write there: the text is marked instead.
      getSelection().selectAllChildren(button.closest(".example").querySelector("pre"));
      button.textContent = "Marked";
    }
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  });
  return button;
}

$("base").append("It speaks OpenAI's interface at ", el("code", {}, D.base + "/v1"), ".");
for (const [name, value] of D.facts) $("facts").append(el("div", {}, el("dt", {}, name), el("dd", {}, value)));
for (const { title, code } of D.examples) {
  const head = el("div", { class: "head" }, el("h2", {}, title), copyButton(code, title));
  $("examples").append(el("div", { class: "example" }, head, el("pre", { tabindex: "0" }, el("code", {}, code))));
}
for (const [path, meaning] of D.paths) $("paths").append(el("dt", {}, el("code", {}, path)), el("dd", {}, meaning));
