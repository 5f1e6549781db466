"use strict";
report.data.then((data) => {
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
  const tip = document.getElementById("tip");

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

  let told = null; // the mark that the tooltip tells about
  function show(mark) {
    if (mark === told) return;
    hide();
    told = mark;
    told.classList.add("told");
    const [name, ...lines] = mark.getAttribute("aria-label").split("\n");
    tip.replaceChildren(report.element("b", { textContent: name }), ...lines.map((line) => report.element("div", { textContent: line })));
    tip.hidden = false;
    place();
  }

  function place() {
    if (!told) return;
    const { left, top, bottom, width } = told.getBoundingClientRect();
    const across = left + width / 2 - tip.offsetWidth / 2;
    const above = top - tip.offsetHeight - 8;
    tip.style.left = `${Math.min(Math.max(8, across), document.documentElement.clientWidth - tip.offsetWidth - 8)}px`;
    tip.style.top = `${above > 8 ? above : bottom + 8}px`;
  }

  function hide() {
    told?.classList.remove("told");
    told = null;
    tip.hidden = true;
  }

  // The nearest mark to the pointer, if it is near.
  function point(event) {
    const chart = event.target.closest(".chart");
    if (!chart) return hide();
    const frame = chart.getBoundingClientRect();
    const scale = chart.viewBox.baseVal.width / frame.width;
    const [x, y] = [(event.clientX - frame.left) * scale, (event.clientY - frame.top) * scale];
    const far = (mark) => Math.hypot(places.get(mark).x - x, places.get(mark).y - y);
    const near = marksOf(chart).reduce((best, mark) => (!best || far(mark) < far(best) ? mark : best), null);
    return near && far(near) < 16 ? show(near) : hide();
  }

  for (const event of ["pointermove", "pointerdown"]) panels.addEventListener(event, point);
  panels.addEventListener("pointerleave", hide);
  panels.addEventListener("focusin", (event) => { if (event.target.matches(".mark")) show(event.target); });
  panels.addEventListener("focusout", hide);
  panels.addEventListener("keydown", move);
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") hide(); });
  for (const event of ["scroll", "resize"]) addEventListener(event, place, { passive: true });

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

  // A chart as a file: on a card with its title and its legend, in the colours it is shown in.
  const SPACE = "http://www.w3.org/2000/svg";
  const drawn = (tag, attributes, text = "") => {
    const made = document.createElementNS(SPACE, tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    made.textContent = text;
    return made;
  };

  function picture(figure) {
    const chart = [...figure.querySelectorAll(".chart")].find((one) => one.dataset.axis === panels.dataset.axis);
    const { width, height } = chart.viewBox.baseVal;
    const style = getComputedStyle(document.body);
    const copy = chart.cloneNode(true);
    const originals = chart.querySelectorAll("*");
    [...copy.querySelectorAll("*")].forEach((element, i) => {
      const computed = getComputedStyle(originals[i]);
      for (const name of ["fill", "stroke", "stroke-width", "stroke-opacity"]) if (element.hasAttribute("stroke") || element.hasAttribute(name)) element.setAttribute(name, computed.getPropertyValue(name));
    });
    for (const element of copy.querySelectorAll(".off")) element.remove();
    const [title, note] = [figure.querySelector("figcaption").cloneNode(true), figure.querySelector("figcaption small").textContent];
    title.querySelector("small").remove();
    const parts = [drawn("text", { x: 20, y: 30, fill: style.color, "font-size": 14, "font-weight": 600 }, title.textContent.trim()),
      drawn("text", { x: 20, y: 48, fill: style.color, "fill-opacity": 0.7, "font-size": 11 }, note)];
    const body = drawn("g", { transform: "translate(20,58)" });
    body.append(...copy.childNodes);
    parts.push(body);
    let [x, y] = [24, height + 76];
    for (const button of toggles) {
      const mark = body.querySelector(`.series[data-policy="${button.dataset.policy}"] .mark`);
      if (!mark) continue;
      const name = button.textContent.trim();
      const wide = 24 + 6.4 * name.length;
      if (x > 24 && x + wide > width + 20) [x, y] = [24, y + 18];
      const fill = getComputedStyle(button.querySelector(".key")).color;
      parts.push(drawn("path", { d: mark.getAttribute("d"), transform: `translate(${x},${y - 4}) scale(4.5)`, fill }),
        drawn("text", { x: x + 10, y, fill: style.color, "font-size": 11 }, name));
      x += wide;
    }
    const [across, down] = [width + 40, y + 18];
    const whole = drawn("svg", { xmlns: SPACE, viewBox: `0 0 ${across} ${down}`, width: across, height: down, "font-family": style.fontFamily });
    whole.append(drawn("rect", { width: across, height: down, fill: style.backgroundColor }), ...parts);
    return { text: new XMLSerializer().serializeToString(whole), across, down, name: title.textContent.trim().replace(/[^\w]+/g, "-") };
  }

  async function png({ text, across, down }) {
    const image = new Image();
    image.src = URL.createObjectURL(new Blob([text], { type: "image/svg+xml" }));
    await image.decode();
    const canvas = report.element("canvas", { width: 3 * across, height: 3 * down });
    canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
    URL.revokeObjectURL(image.src);
    return new Promise((done) => canvas.toBlob(done, "image/png"));
  }

  for (const button of document.querySelectorAll(".save button")) {
    button.addEventListener("click", async () => {
      const made = picture(button.closest("figure"));
      const blob = button.dataset.as === "svg" ? new Blob([made.text], { type: "image/svg+xml" }) : await png(made);
      report.save(blob, `${made.name}.${button.dataset.as}`);
    });
  }
  document.documentElement.dataset.charts = "drawn";
});
