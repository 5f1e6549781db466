"use strict";
report.data("depth").then((drawings) => {
  const section = document.getElementById("depth");
  section.querySelectorAll(".maps").forEach((maps, i) => { maps.innerHTML = drawings[i]; });
  const squaresOf = (map) => [...map.querySelectorAll(".square")];

  // One square of a map takes part in the tab order; the arrow keys lead to the others.
  for (const map of section.querySelectorAll(".maps .map")) {
    squaresOf(map).forEach((square, i) => square.setAttribute("tabindex", i ? -1 : 0));
  }

  function move(event) {
    const from = event.target;
    const [right, down] = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowDown: [0, 1], ArrowUp: [0, -1] }[event.key] ?? [0, 0];
    if (!from.matches(".square") || (!right && !down)) return;
    event.preventDefault();
    const { x, y, width, height } = from.getBBox();
    const ahead = (square) => {
      const to = square.getBBox();
      const [across, along] = right ? [(to.y - y) / height, (to.x - x) * right] : [(to.x - x) / width, (to.y - y) * down];
      return Math.abs(across) < 0.5 && along > 0 ? along : Infinity;
    };
    const next = squaresOf(from.closest(".map")).reduce((best, square) => (ahead(square) < ahead(best) ? square : best), from);
    from.setAttribute("tabindex", -1);
    next.setAttribute("tabindex", 0);
    next.focus();
  }

  const point = (event) => (event.target.matches(".square") ? report.showTip(event.target) : report.hideTip());
  for (const event of ["pointerover", "pointerdown", "focusin"]) section.addEventListener(event, point);
  for (const event of ["pointerleave", "focusout"]) section.addEventListener(event, report.hideTip);
  section.addEventListener("keydown", move);

  // All maps of a task side by side, below the key to their colours.
  report.savable(section, (figure) => {
    const parts = [report.copyOf(figure.querySelector(".scale"), 0, 0)];
    let [x, y, across, down] = [0, 30, 0, 0];
    for (const map of figure.querySelectorAll(".maps .map")) {
      const { width, height } = map.viewBox.baseVal;
      if (x > 0 && x + width > 1000) [x, y] = [0, y + height + 14];
      parts.push(report.copyOf(map, x, y));
      across = Math.max(across, x + width);
      down = y + height;
      x += width + 20;
    }
    return { parts, across, down };
  });

  for (const table of section.querySelectorAll("table")) {
    const lines = () => [...table.rows].map((row) => [...row.cells].map(report.plain));
    report.copies[`${table.id} markdown`] = () => report.markdown(lines(), 2);
    report.copies[`${table.id} csv`] = () => report.csv(lines());
  }
});
