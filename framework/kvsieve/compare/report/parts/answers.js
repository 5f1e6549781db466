"use strict";
report.data("answers").then((groups) => {
  const [task, sample, before, next, differ, shown] = ["task", "sample", "before", "next", "differ", "shown"].map((name) => document.getElementById(`answers-${name}`));
  const { element } = report;

  // Policies that score less than dense, the first of the group.
  const losers = (group, one) => {
    const dense = group.dense && one.rows[0];
    return one.rows.filter((row) => row && dense && (group.higher ? row[1] < dense[1] : row[1] > dense[1])).length;
  };

  function listSamples() {
    const group = groups[task.value];
    const listed = group.samples.map((one, i) => [one, i]).filter(([one]) => !differ.checked || losers(group, one));
    sample.replaceChildren(...listed.map(([one, i]) => {
      const lost = losers(group, one);
      return new Option(`${one.index}${one.facts ? `: ${one.facts}` : ""}${lost ? `, ${lost} of ${group.policies.length - 1} score less` : ""}`, i);
    }));
    show();
  }

  // The text with its first word after the part that it shares with one of `bases` marked.
  function marked(text, bases) {
    const shared = (base) => { let at = 0; while (at < text.length && text[at] === base[at]) at += 1; return at; };
    if (!bases.length || bases.includes(text)) return [text];
    let at = Math.max(...bases.map(shared));
    if (/[\uDC00-\uDFFF]/.test(text[at])) at -= 1; // not within a character
    const rest = text.slice(at);
    const word = rest.match(/^\s*\S+/)?.[0] ?? rest;
    const mark = element("mark", {}, word || "\u2420 ends here");
    if (!word) mark.className = "ends";
    return [text.slice(0, at), mark, rest.slice(word.length)];
  }

  function show() {
    const group = groups[task.value];
    const one = group.samples[sample.value];
    before.disabled = sample.selectedIndex <= 0;
    next.disabled = sample.selectedIndex >= sample.options.length - 1;
    if (!one) {
      shown.replaceChildren(element("p", { className: "lead", textContent: "There is no such sample." }));
      return;
    }
    const dense = group.dense && one.rows[0] ? one.texts[one.rows[0][0]] : null;
    const rows = group.policies.map((policy, i) => {
      const name = element("th", { scope: "row", textContent: policy.label });
      const row = one.rows[i];
      if (!row) return element("tr", {}, name, element("td", { textContent: "not measured", className: "absent" }), element("td", { textContent: "\u2013" }));
      const bases = dense === null || i === 0 ? one.expected : [dense];
      return element("tr", {}, name, element("td", { className: "text" }, ...marked(one.texts[row[0]], bases)), element("td", { textContent: String(row[1]) }));
    });
    const headings = ["Policy", "Text", group.metric].map((title) => element("th", { scope: "col", textContent: title }));
    const expected = one.expected.length > 1 ? `Expected, ${one.needs} of` : "Expected";
    const table = element("table", { className: "texts" }, element("thead", {}, element("tr", {}, ...headings)), element("tbody", {},
      ...one.expected.map((text) => element("tr", { className: "expected" }, element("th", { scope: "row", textContent: expected }), element("td", { className: "text", textContent: text }), element("td"))), ...rows));
    const scroll = element("div", { className: "scroll", tabIndex: 0 }, table);
    scroll.setAttribute("role", "region");
    scroll.setAttribute("aria-label", "Answers of this sample");
    const prompt = one.prompt ? [element("p", { className: "lead", textContent: "The prompt ends with" }), element("pre", { className: "prompt", tabIndex: 0, textContent: one.prompt })] : [];
    const left = group.samples.length < group.all ? [element("p", { className: "lead", textContent: `${group.samples.length} of ${group.all} samples are in this page, those with different answers first; samples.jsonl has all.` })] : [];
    const title = element("h3", { textContent: `${group.title}: sample ${one.index}${one.facts ? `, ${one.facts}` : ""}` });
    shown.replaceChildren(title, ...prompt, scroll, ...left);
  }

  task.append(...groups.map((group, i) => new Option(group.title, i)));
  for (const control of [task, differ]) control.addEventListener("input", listSamples);
  sample.addEventListener("input", show);
  for (const [button, step] of [[before, -1], [next, 1]]) {
    button.addEventListener("click", () => { sample.selectedIndex += step; show(); });
  }
  listSamples();
});
