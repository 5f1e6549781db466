"use strict";

// The table: a click on a header sorts the rows of every task; a second click turns the order round; unmeasured rows stay last.
const headers = [...document.querySelectorAll("thead th")];
headers.forEach((header, column) => {
  header.querySelector("button").addEventListener("click", () => {
    const numeric = header.classList.contains("number");
    const first = numeric ? "descending" : "ascending";
    const second = numeric ? "ascending" : "descending";
    const order = header.getAttribute("aria-sort") === first ? second : first;
    headers.forEach((other) => other.removeAttribute("aria-sort"));
    header.setAttribute("aria-sort", order);
    const sign = order === "ascending" ? 1 : -1;
    for (const body of document.querySelectorAll("tbody")) {
      const rows = [...body.querySelectorAll("tr:not(.group)")];
      const value = (row) => row.children[column].dataset.value;
      rows.sort((one, other) => {
        const [a, b] = [value(one), value(other)];
        if (a === undefined || b === undefined) return (a === undefined) - (b === undefined);
        return sign * (numeric ? a - b : a.localeCompare(b, "en", { numeric: true }));
      });
      body.append(...rows);
    }
  });
});

// The charts: colours are CSS variables, so they follow the reader's light or dark setting without a redraw.
const specifications = JSON.parse(document.getElementById("charts").textContent);
const options = { mode: "vega-lite", renderer: "svg", actions: false, ast: true, tooltip: { disableDefaultStyle: true } };
const drawn = [...document.querySelectorAll(".chart")].map((place, index) => vegaEmbed(place, specifications[index], options));
Promise.all(drawn).then(
  () => { document.documentElement.dataset.charts = "drawn"; },
  (error) => { document.documentElement.dataset.charts = "failed"; console.error(error); },
);
