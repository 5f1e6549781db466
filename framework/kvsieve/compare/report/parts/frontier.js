"use strict";
report.data("frontier").then((data) => {
  const panels = document.querySelector(".panels");
  for (const [name, label, drawings] of data.axes) {
    [...panels.children].forEach((figure, i) => {
      const first = figure.querySelector(".chart");
      const other = first.cloneNode(false);
      other.dataset.axis = name;
      other.setAttribute("aria-label", first.getAttribute("aria-label").replace(panels.dataset.label, label));
      other.innerHTML = drawings[i];
      figure.insertBefore(other, figure.querySelector(".save"));
    });
  }
  const charts = [...panels.querySelectorAll(".chart")];
  const toggles = [...document.querySelectorAll(".policy[data-policy]")];

  // What a mark tells, and where it stands in its chart.
  const places = new Map();
  for (const mark of panels.querySelectorAll(".mark")) {
    mark.setAttribute("role", "img");
    mark.setAttribute("aria-label", data.labels[mark.dataset.row]);
    const { e: x, f: y } = mark.transform.baseVal.getItem(0).matrix;
    places.set(mark, { x, y, share: Number(mark.dataset.share) });
  }

  // The marks that are shown, from left to right.
  const marksOf = (chart) => [...chart.querySelectorAll(".series:not(.off) .mark")].sort((one, other) => places.get(one).x - places.get(other).x);

  // The steps through the marks that no other shown mark beats in both score and price. Noisy speeds beat nothing.
  function drawFrontier(chart) {
    const sign = chart.dataset.lower === "1" ? -1 : 1;
    const marks = marksOf(chart).filter((mark) => !mark.classList.contains("noisy"));
    const found = marks.map((mark) => places.get(mark)).sort((one, other) => one.share - other.share || sign * (one.y - other.y));
    let path = "", best = Infinity;
    for (const { x, y } of found) {
      if (sign * y >= best) continue;
      path += path ? `H${x}V${y}` : `M${x},${y}`;
      best = sign * y;
    }
    chart.querySelector(".frontier").setAttribute("d", path ? `${path}H${chart.viewBox.baseVal.width - 10}` : "");
  }

  // One mark of a chart takes part in the tab order; the arrow keys lead to the others.
  function refresh(chart) {
    drawFrontier(chart);
    const marks = marksOf(chart);
    for (const mark of marks) mark.setAttribute("tabindex", -1);
    marks[0]?.setAttribute("tabindex", 0);
  }

  function move(event) {
    const mark = event.target;
    if (!mark.matches(".mark")) return;
    const marks = marksOf(mark.closest(".chart"));
    const at = marks.indexOf(mark);
    const to = { ArrowRight: at + 1, ArrowDown: at + 1, ArrowLeft: at - 1, ArrowUp: at - 1, Home: 0, End: marks.length - 1 }[event.key];
    if (to === undefined || !marks[to]) return;
    event.preventDefault();
    mark.setAttribute("tabindex", -1);
    marks[to].setAttribute("tabindex", 0);
    marks[to].focus();
  }

  // The nearest mark to the pointer, if it is near.
  function point(event) {
    const chart = event.target.closest(".chart");
    if (!chart) return report.hideTip();
    const frame = chart.getBoundingClientRect();
    const scale = chart.viewBox.baseVal.width / frame.width;
    const [x, y] = [(event.clientX - frame.left) * scale, (event.clientY - frame.top) * scale];
    const far = (mark) => Math.hypot(places.get(mark).x - x, places.get(mark).y - y);
    const near = marksOf(chart).reduce((best, mark) => (!best || far(mark) < far(best) ? mark : best), null);
    return near && far(near) < 16 ? report.showTip(near) : report.hideTip();
  }

  for (const event of ["pointermove", "pointerdown"]) panels.addEventListener(event, point);
  panels.addEventListener("pointerleave", report.hideTip);
  panels.addEventListener("focusin", (event) => { if (event.target.matches(".mark")) report.showTip(event.target); });
  panels.addEventListener("focusout", report.hideTip);
  panels.addEventListener("keydown", move);

  // Which price, and which policies.
  for (const choice of document.querySelectorAll("input[name=axis]")) {
    choice.addEventListener("change", () => { panels.dataset.axis = choice.value; document.getElementById("frontier").dataset.axis = choice.value; });
  }

  function toggle(button, shown) {
    button.setAttribute("aria-pressed", shown);
    for (const series of panels.querySelectorAll(`.series[data-policy="${button.dataset.policy}"]`)) series.classList.toggle("off", !shown);
  }

  const all = document.getElementById("all");
  const isShown = (button) => button.getAttribute("aria-pressed") === "true";
  function changed() {
    all.textContent = toggles.some(isShown) ? "Hide all" : "Show all";
    charts.forEach(refresh);
  }
  all.hidden = toggles.length < 3;
  all.addEventListener("click", () => { const shown = !toggles.some(isShown); for (const button of toggles) toggle(button, shown); changed(); });
  for (const button of toggles) {
    button.addEventListener("click", () => { toggle(button, !isShown(button)); changed(); });
    // Pointing at a policy makes the others step back.
    const light = (lit) => {
      panels.classList.toggle("dim", lit && isShown(button));
      for (const series of panels.querySelectorAll(`.series[data-policy="${button.dataset.policy}"]`)) series.classList.toggle("lit", lit);
    };
    for (const event of ["pointerenter", "focus"]) button.addEventListener(event, () => light(true));
    for (const event of ["pointerleave", "blur"]) button.addEventListener(event, () => light(false));
  }
  changed();

  // The chart with the price that is shown, and its legend.
  report.savable(panels, (figure) => {
    const chart = [...figure.querySelectorAll(".chart")].find((one) => one.dataset.axis === panels.dataset.axis);
    const { width, height } = chart.viewBox.baseVal;
    const ink = getComputedStyle(document.body).color;
    const body = report.copyOf(chart, 0, 0);
    const parts = [body];
    let [x, y] = [4, height + 18];
    for (const button of toggles) {
      const mark = body.querySelector(`.series[data-policy="${button.dataset.policy}"] .mark`);
      if (!mark) continue;
      const name = button.textContent.trim();
      const wide = 24 + 6.4 * name.length;
      if (x > 4 && x + wide > width) [x, y] = [4, y + 18];
      const fill = getComputedStyle(button.querySelector(".key")).color;
      parts.push(report.drawn("path", { d: mark.getAttribute("d"), transform: `translate(${x},${y - 4}) scale(4.5)`, fill }),
        report.drawn("text", { x: x + 10, y, fill: ink, "font-size": 11 }, name));
      x += wide;
    }
    return { parts, across: width, down: y };
  });
  document.documentElement.dataset.charts = "drawn";
});
