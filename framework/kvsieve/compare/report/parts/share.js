"use strict";

// The data of the page, and what its parts share: elements, the clipboard, files.
const report = {
  data: (async () => {
    const packed = Uint8Array.from(atob(document.getElementById("data").textContent), (letter) => letter.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
    return JSON.parse(await new Response(stream).text());
  })(),

  element(tag, properties = {}, ...children) {
    const made = Object.assign(document.createElement(tag), properties);
    made.append(...children);
    return made;
  },

  // For those who do not see the page change.
  say(text) {
    document.getElementById("said").textContent = text;
  },

  async copy(text, button) {
    try {
      await navigator.clipboard.writeText(text);
    } catch { // no clipboard for this page: the old way
      const area = report.element("textarea", { value: text });
      document.body.append(area);
      area.select();
      document.execCommand("copy");
      area.remove();
      button.focus();
    }
    button.dataset.done = "";
    setTimeout(() => delete button.dataset.done, 1500);
    report.say("Copied.");
  },

  save(blob, name) {
    const link = report.element("a", { href: URL.createObjectURL(blob), download: name });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  },
};

// On paper nothing can be unfolded.
const folded = [...document.querySelectorAll("details")];
addEventListener("beforeprint", () => { for (const one of folded) { one.dataset.open = one.open; one.open = true; } });
addEventListener("afterprint", () => { for (const one of folded) one.open = one.dataset.open === "true"; });

for (const button of document.querySelectorAll(".copy[data-from]")) {
  button.addEventListener("click", () => report.copy(document.getElementById(button.dataset.from).textContent, button));
}
