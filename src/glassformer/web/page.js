// The server's page: the examples, and a button to copy each.

function copyButton(code, title) {
  return button({ class: "plain", "aria-label": "Copy: " + title }, async ({ currentTarget: pressed }) => {
    try {
      await navigator.clipboard.writeText(code);
      pressed.textContent = "Copied";
    } catch {
      // A page that is not from this machine or https may not write there: the text is marked instead.
      getSelection().selectAllChildren(pressed.closest(".example").querySelector("pre"));
      pressed.textContent = "Marked";
    }
    setTimeout(() => { pressed.textContent = "Copy"; }, 1500);
  }, "Copy");
}

$("base").append("It speaks OpenAI's interface at ", el("code", {}, D.base + "/v1"), ".");
for (const [name, value] of D.facts) $("facts").append(el("div", {}, el("dt", {}, name), el("dd", {}, value)));
for (const { title, code } of D.examples) {
  const head = el("div", { class: "strip-head" }, el("h2", {}, title), copyButton(code, title));
  $("examples").append(el("div", { class: "example" }, head, el("pre", { tabindex: "0" }, el("code", {}, code))));
}
for (const [path, meaning] of D.paths) $("paths").append(el("dt", {}, el("code", {}, path)), el("dd", {}, meaning));
