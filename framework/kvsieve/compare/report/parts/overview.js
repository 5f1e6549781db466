"use strict";
{
  const pivot = document.getElementById("pivot");
  const lines = (value) => [
    ["policy", "bytes read", ...[...pivot.querySelectorAll("[data-heading]")].map((cell) => cell.dataset.heading)],
    ...[...pivot.tBodies[0].rows].map((row) => [...row.cells].map(value)),
  ];
  report.copies["pivot markdown"] = () => report.markdown(lines(report.plain), 1);
  report.copies["pivot csv"] = () => report.csv(lines((cell) => cell.dataset.value ?? report.plain(cell)));
}
