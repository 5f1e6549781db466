"use strict";

// The data of a section, and what the sections share: elements, tables as text, the clipboard, tips, pictures, files.
const report = {
  async data(section) {
    const packed = Uint8Array.from(atob(document.getElementById(`data-${section}`).textContent), (letter) => letter.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
    return JSON.parse(await new Response(stream).text());
  },

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

// What the mark under the pointer or the focus tells, beside it.
{
  const tip = document.getElementById("tip");
  let told = null;
  const place = () => {
    if (!told) return;
    const { left, top, bottom, width } = told.getBoundingClientRect();
    const across = left + width / 2 - tip.offsetWidth / 2;
    const above = top - tip.offsetHeight - 8;
    tip.style.left = `${Math.min(Math.max(8, across), document.documentElement.clientWidth - tip.offsetWidth - 8)}px`;
    tip.style.top = `${above > 8 ? above : bottom + 8}px`;
  };
  report.hideTip = () => {
    told?.classList.remove("told");
    told = null;
    tip.hidden = true;
  };
  report.showTip = (mark) => {
    if (mark === told) return;
    report.hideTip();
    told = mark;
    told.classList.add("told");
    const [name, ...lines] = mark.getAttribute("aria-label").split("\n");
    tip.replaceChildren(report.element("b", { textContent: name }), ...lines.map((line) => report.element("div", { textContent: line })));
    tip.hidden = false;
    place();
  };
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") report.hideTip(); });
  for (const event of ["scroll", "resize"]) addEventListener(event, place, { passive: true });
}

// A figure as a file: on a card with its title, in the colours it is shown in.
{
  const SPACE = "http://www.w3.org/2000/svg";
  report.drawn = (tag, attributes, text = "") => {
    const made = document.createElementNS(SPACE, tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    made.textContent = text;
    return made;
  };

  // What a drawing of the page shows, moved to x, y.
  report.copyOf = (drawing, x, y) => {
    const copy = drawing.cloneNode(true);
    const originals = drawing.querySelectorAll("*");
    [...copy.querySelectorAll("*")].forEach((element, i) => {
      const computed = getComputedStyle(originals[i]);
      for (const name of ["fill", "stroke", "stroke-width", "stroke-opacity"]) if (element.hasAttribute("stroke") || element.hasAttribute(name)) element.setAttribute(name, computed.getPropertyValue(name));
    });
    for (const element of copy.querySelectorAll(".off")) element.remove();
    const group = report.drawn("g", { transform: `translate(${x},${y})` });
    group.append(...copy.childNodes);
    return group;
  };

  function picture(figure, { parts, across, down }) {
    const style = getComputedStyle(document.body);
    const [title, note] = [figure.querySelector("figcaption").cloneNode(true), figure.querySelector("figcaption small").textContent];
    title.querySelector("small").remove();
    const name = title.textContent.trim();
    const wide = Math.ceil(Math.max(across, 6 * note.length, 8 * name.length)) + 40;
    const high = Math.ceil(down) + 76;
    const body = report.drawn("g", { transform: "translate(20,58)" });
    body.append(...parts);
    const whole = report.drawn("svg", { xmlns: SPACE, viewBox: `0 0 ${wide} ${high}`, width: wide, height: high, "font-family": style.fontFamily });
    whole.append(report.drawn("rect", { width: wide, height: high, fill: style.backgroundColor }),
      report.drawn("text", { x: 20, y: 30, fill: style.color, "font-size": 14, "font-weight": 600 }, name),
      report.drawn("text", { x: 20, y: 48, fill: style.color, "fill-opacity": 0.7, "font-size": 11 }, note), body);
    return { text: new XMLSerializer().serializeToString(whole), wide, high, name: name.replace(/[^\w]+/g, "-") };
  }

  async function png({ text, wide, high }) {
    const image = new Image();
    image.src = URL.createObjectURL(new Blob([text], { type: "image/svg+xml" }));
    await image.decode();
    const canvas = report.element("canvas", { width: 3 * wide, height: 3 * high });
    canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
    URL.revokeObjectURL(image.src);
    return new Promise((done) => canvas.toBlob(done, "image/png"));
  }

  // `draw`: of a figure, the elements below the title, and how much room they take.
  report.savable = (section, draw) => {
    for (const button of section.querySelectorAll(".save button")) {
      button.addEventListener("click", async () => {
        const figure = button.closest("figure");
        const made = picture(figure, draw(figure));
        const blob = button.dataset.as === "svg" ? new Blob([made.text], { type: "image/svg+xml" }) : await png(made);
        report.save(blob, `${made.name}.${button.dataset.as}`);
      });
    }
  };
}

// Tables as text, by name; what a cell is there may differ from what it shows.
report.copies = {};
report.plain = (cell) => {
  const text = cell.dataset.text ?? (cell.matches("th") ? cell.dataset.value : undefined);
  if (text !== undefined) return text.trim();
  const [first, ...notes] = [...cell.childNodes].map((node) => node.textContent.trim()).filter(Boolean);
  return notes.length ? `${first} (${notes.join("; ")})` : first ?? "";
};
report.markdown = (lines, left) => {
  const line = (cells) => `| ${cells.map((cell) => cell.replaceAll("|", "\\|")).join(" | ")} |\n`;
  const rule = lines[0].map((_, i) => (i < left ? "---" : "---:"));
  return [lines[0], rule, ...lines.slice(1)].map(line).join("");
};
report.csv = (lines) => {
  const quoted = (cell) => (/[",\n]/.test(cell) ? `"${cell.replaceAll('"', '""')}"` : cell);
  return lines.map((line) => `${line.map(quoted).join(",")}\r\n`).join("");
};
for (const button of document.querySelectorAll(".copy[data-table]")) {
  button.addEventListener("click", async () => report.copy(await report.copies[`${button.dataset.table} ${button.dataset.as}`](), button));
}

// On paper nothing can be unfolded.
const folded = [...document.querySelectorAll("details")];
addEventListener("beforeprint", () => { for (const one of folded) { one.dataset.open = one.open; one.open = true; } });
addEventListener("afterprint", () => { for (const one of folded) one.open = one.dataset.open === "true"; });

for (const button of document.querySelectorAll(".copy[data-from]")) {
  button.addEventListener("click", () => report.copy(document.getElementById(button.dataset.from).textContent, button));
}
