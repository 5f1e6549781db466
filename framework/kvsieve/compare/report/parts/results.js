"use strict";
{
  const table = document.getElementById("all-results");
  const bodies = [...table.tBodies];
  const rowsOf = (body) => [...body.querySelectorAll("tr[data-row]")];

  // A click on a header sorts the rows of every task; a second click turns the order round; unmeasured rows stay last.
  const headers = [...table.querySelectorAll("thead th")];
  headers.forEach((header, column) => {
    header.querySelector("button").addEventListener("click", () => {
      const numeric = header.classList.contains("number");
      const [first, second] = numeric ? ["descending", "ascending"] : ["ascending", "descending"];
      const order = header.getAttribute("aria-sort") === first ? second : first;
      headers.forEach((other) => other.removeAttribute("aria-sort"));
      header.setAttribute("aria-sort", order);
      const sign = order === "ascending" ? 1 : -1;
      const value = (row) => row.children[column].dataset.value;
      for (const body of bodies) {
        body.append(...rowsOf(body).sort((one, other) => {
          const [a, b] = [value(one), value(other)];
          if (a === undefined || b === undefined) return (a === undefined) - (b === undefined);
          return sign * (numeric ? a - b : a.localeCompare(b, "en", { numeric: true }));
        }));
      }
    });
  });

  // Filters: words of the policy and its parameters, a task, a mark.
  const [find, task, mark, count] = ["find", "task", "mark", "count"].map((id) => document.getElementById(id));
  function filter() {
    const words = find.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    bodies.forEach((body, i) => {
      let here = 0;
      for (const row of rowsOf(body)) {
        const text = row.cells[0].textContent.toLowerCase();
        row.hidden = (task.value !== "" && task.value !== String(i)) || (mark.value !== "" && mark.value !== row.dataset.mark) || !words.every((word) => text.includes(word));
        here += !row.hidden;
      }
      body.hidden = here === 0;
      shown += here;
    });
    const total = table.querySelectorAll("tr[data-row]").length;
    count.textContent = shown === total ? `${total} rows` : `${shown} of ${total} rows`;
  }
  for (const control of [find, task, mark]) control.addEventListener("input", filter);
  filter();

  // CSV of what is shown: the lines of summary.csv, with every number.
  report.copies["all markdown"] = () => {
    const lines = [["task", ...headers.map((header) => header.textContent.trim().toLowerCase())]];
    for (const body of bodies) {
      const group = body.querySelector(".group span").firstChild.textContent.trim();
      for (const row of rowsOf(body)) if (!row.hidden) lines.push([group, ...[...row.cells].map(report.plain)]);
    }
    return report.markdown(lines, 2);
  };
  report.copies["all csv"] = async () => {
    const csv = await report.data("results");
    return csv[0] + bodies.flatMap(rowsOf).filter((row) => !row.hidden).map((row) => csv[1 + Number(row.dataset.row)]).join("");
  };
}
