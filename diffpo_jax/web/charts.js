// Plots as SVG, drawn at the width they have and again when it changes; every point can be read with the pointer or the keyboard.

function responsive(figure, draw) {
  let width = 0;
  const again = () => {
    const now = Math.floor(figure.clientWidth);
    if (now === width || now < 40) return;
    width = now;
    draw(width);
  };
  new ResizeObserver(again).observe(figure);
  again();
}

function linear(domain, range) {
  const span = domain[1] - domain[0] || 1;
  return (value) => range[0] + ((value - domain[0]) / span) * (range[1] - range[0]);
}

// Round numbers in [low, high], about `count` of them, at least two.
function ticks(low, high, count) {
  const rough = (high - low || Math.abs(high) || 1) / count, power = 10 ** Math.floor(Math.log10(rough));
  const sizes = [10, 5, 2, 1, 0.5].map((k) => k * power), first = sizes.findLastIndex((size) => size >= rough * 0.99);
  let found = [];
  for (let i = first; i < sizes.length && found.length < 2; i++) {
    found = [];
    for (let k = Math.ceil(low / sizes[i] - 1e-9); k * sizes[i] <= high + sizes[i] * 1e-9; k++) found.push(Number((k * sizes[i]).toPrecision(12)));
  }
  return found;
}

function logTicks(low, high) {
  if (high < 4 * low) return ticks(low, high, 6);
  const found = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++) {
    for (const digit of [1, 2, 5]) {
      const value = Number((digit * 10 ** power).toPrecision(6));
      if (value >= low * 0.999 && value <= high * 1.001) found.push(value);
    }
  }
  return found;
}

function line(x1, y1, x2, y2, kind) {
  return shape("line", { x1, y1, x2, y2, class: kind });
}

function label(x, y, text, anchor = "middle") {
  return shape("text", { x, y, "text-anchor": anchor, text });
}

function path(points) {
  return points.map(([x, y], i) => `${i ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`).join("");
}

// Marks differ in shape, not in colour alone.
function mark(kind, x, y, size = 5) {
  if (kind === "base") return shape("circle", { cx: x, cy: y, r: size, class: "hollow" });
  if (kind === "trained") return shape("rect", { x: x - size, y: y - size, width: 2 * size, height: 2 * size, class: "mark" });
  const corners = Array.from({ length: 10 }, (_, k) => {
    const radius = k % 2 ? size * 0.9 : size * 2.1, angle = (Math.PI * k) / 5 - Math.PI / 2;
    return `${(x + radius * Math.cos(angle)).toFixed(1)},${(y + radius * Math.sin(angle)).toFixed(1)}`;
  });
  return shape("polygon", { points: corners.join(" "), class: "mark" });
}

function legend(entries) {
  return element("div", { class: "legend" }, ...entries.map(([kind, text]) => element("span", {},
    shape("svg", { viewBox: "0 0 30 14", "aria-hidden": true }, shape("g", { class: kind }, kind === "learned" ? null : line(0, 7, 30, 7, "stroke"), mark(kind, 15, 7, 4))), text)));
}

// A box beside a point of a figure, inside the figure's width.
function showTip(figure, tip, x, y, text) {
  tip.textContent = text;
  tip.hidden = false;
  const left = x + tip.offsetWidth + 14 > figure.clientWidth ? x - tip.offsetWidth - 12 : x + 12;
  tip.style.left = `${Math.max(0, Math.min(left, figure.clientWidth - tip.offsetWidth))}px`;
  tip.style.top = `${Math.max(0, y - tip.offsetHeight - 8)}px`;
}

// --- accuracy against calls ---

const SERIES = [["base", "base model"], ["trained", "trained model"], ["learned", "trained model, learned thresholds"]];

function pointWords(kind, point, learned) {
  const gamma = `${kind === "learned" && learned ? "learned γ, mean" : "γ ="} ${short(point.gamma)}`;
  const name = kind === "base" ? "base model" : "trained model";
  return `${name}, ${gamma}\n${short(point.nfe)} calls a response\n${percent(point.accuracy)} right (95%: ${percent(point.low)} to ${percent(point.high)})`;
}

function paretoPlot(figure, data, learned) {
  const tip = element("div", { class: "tip", hidden: true }), canvas = element("div");
  const names = SERIES.map(([kind, text]) => [kind, kind === "learned" && !learned ? "trained model, the threshold of training" : text]);
  figure.append(legend(names), canvas, tip);
  const all = SERIES.flatMap(([kind]) => data[kind]);
  const most = Math.max(...all.map((point) => point.nfe)), low = Math.min(...all.map((point) => point.low)), high = Math.max(...all.map((point) => point.high));
  responsive(figure, (width) => {
    const height = Math.round(Math.min(430, Math.max(280, width * 0.55))), left = 44, bottom = height - 44;
    const steps = ticks(Math.max(0, low - 0.02), Math.min(1, high + 0.02), 6);
    const bounds = [Math.min(low - 0.03, steps[0]), Math.max(high + 0.02, steps[steps.length - 1])];
    const x = linear([0, most * 1.04], [left, width - 6]), y = linear(bounds, [bottom, 10]);
    const svg = shape("svg", { width, height, role: "group", "aria-label": "Accuracy against calls a response; arrow keys go from point to point" });
    for (const value of steps) svg.append(line(left, y(value), width - 6, y(value), "axis"), label(left - 8, y(value) + 4, percent(value, 0), "end"));
    for (const value of ticks(0, most, width < 500 ? 5 : 8)) svg.append(label(x(value), bottom + 18, short(value)));
    svg.append(line(left, bottom, width - 6, bottom, "axis"), label((left + width) / 2, height - 6, "calls a response (NFE), mean"), label(0, 4, "accuracy", "start"));
    for (const [kind] of SERIES) svg.append(paretoSeries(figure, tip, kind, data[kind], x, y, learned));
    canvas.replaceChildren(svg);
  });
}

function paretoSeries(figure, tip, kind, points, x, y, learned) {
  const group = shape("g", { class: kind });
  if (points.length > 1) group.append(shape("path", { d: path(points.map((point) => [x(point.nfe), y(point.accuracy)])), class: "stroke" }));
  for (const point of points) group.append(line(x(point.nfe), y(point.low), x(point.nfe), y(point.high), "error"));
  let labelled = 0;
  const nodes = points.map((point, i) => {
    const at = [x(point.nfe), y(point.accuracy)], words = pointWords(kind, point, learned);
    const show = () => showTip(figure, tip, at[0], at[1] + group.ownerSVGElement.getBoundingClientRect().top - figure.getBoundingClientRect().top, words);
    const hide = () => { tip.hidden = true; };
    if (i === 0 || Math.abs(at[0] - labelled) > 64) {
      labelled = at[0];
      if (kind !== "learned" && figure.clientWidth > 520) group.append(label(at[0], kind === "base" ? y(point.low) + 14 : y(point.high) - 5, `γ ${short(point.gamma)}`));
    }
    return shape("g", { tabindex: i ? -1 : 0, role: "img", class: "point", "aria-label": words.replaceAll("\n", ", "), on: { mouseenter: show, mouseleave: hide, focus: show, blur: hide } },
      shape("circle", { cx: at[0], cy: at[1], r: 11, class: "halo" }), mark(kind, ...at, kind === "learned" ? 5 : 4));
  });
  group.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1 }[event.key], now = nodes.indexOf(document.activeElement);
    if (!step || now < 0) return;
    event.preventDefault();
    const next = nodes[Math.max(0, Math.min(nodes.length - 1, now + step))];
    nodes.forEach((node) => node.setAttribute("tabindex", node === next ? 0 : -1));
    next.focus();
  });
  group.append(...nodes);
  return group;
}

// --- thresholds against difficulty ---

function thresholdPlot(figure, data) {
  const { edges, counts } = data.histogram, tip = element("div", { class: "tip", hidden: true }), canvas = element("div");
  figure.append(element("div", { class: "legend" },
    element("span", {}, shape("svg", { viewBox: "0 0 30 14", "aria-hidden": true }, shape("g", { class: "trained" }, shape("circle", { cx: 15, cy: 7, r: 3.2, class: "dot" }))), "trained model right"),
    element("span", {}, shape("svg", { viewBox: "0 0 30 14", "aria-hidden": true }, shape("g", { class: "trained" }, shape("circle", { cx: 15, cy: 7, r: 3, class: "ring" }))), "wrong")), canvas, tip);
  const low = edges[0], high = edges[edges.length - 1];
  responsive(figure, (width) => {
    const left = 44, top = 14, split = 110, bottom = 350, height = 396;
    const scale = linear([Math.log(low), Math.log(high)], [left + 8, width - 10]), x = (gamma) => scale(Math.log(gamma));
    const bar = linear([0, Math.max(...counts)], [split, top + 14]), y = linear([0, 1], [bottom - 8, split + 34]);
    const svg = shape("svg", { width, height, role: "img", "aria-label": `Histogram of ${counts.reduce((a, b) => a + b, 0)} learned thresholds from ${short(low)} to ${short(high)}, and below it each against the share of the base model's thresholds that are right; the table has the means` });
    counts.forEach((count, i) => {
      const from = x(edges[i]), to = x(edges[i + 1]), words = `${count} problems\nγ from ${short(edges[i])} to ${short(edges[i + 1])}`;
      svg.append(shape("rect", { x: from + 0.5, width: Math.max(1, to - from - 1), y: bar(count), height: split - bar(count), class: "bar" }, shape("title", { text: words })));
      if (to - from > 24) svg.append(label((from + to) / 2, bar(count) - 4, String(count)));
    });
    svg.append(line(left, split, width - 6, split, "axis"), label(0, top - 3, "problems", "start"), label(0, split + 22, "base model right at … of its thresholds", "start"));
    for (const share of [0, 0.25, 0.5, 0.75, 1]) svg.append(line(left, y(share), width - 6, y(share), "axis"), label(left - 8, y(share) + 4, percent(share, 0), "end"));
    for (const value of logTicks(low, high)) svg.append(label(x(value), bottom + 16, short(value)));
    svg.append(label((left + width) / 2, height - 6, "threshold γ that the network chooses for the problem"));
    const gap = (y(0) - y(1)) / Math.max(1, data.levels) * 0.7, dots = shape("g", { class: "trained" });
    data.points.forEach(([gamma, share, correct, nfe], i) => {
      const jitter = (((i * 0.618034) % 1) - 0.5) * Math.min(gap, 14);
      dots.append(shape("circle", { cx: x(gamma), cy: y(share) + jitter, r: correct > 0.5 ? 2.3 : 2.2, class: correct > 0.5 ? "dot" : "ring" }, shape("title", { text: `γ = ${short(gamma)}, ${short(nfe)} calls, ${correct > 0.5 ? "right" : "wrong"}\nbase model right at ${percent(share, 0)} of its thresholds` })));
    });
    canvas.replaceChildren(svg);
    svg.append(dots);
  });
}

// --- training ---

function lineChart(chart) {
  const value = element("span"), canvas = element("div"), points = chart.points, unit = chart.unit === "%" ? "" : chart.unit ? ` ${chart.unit}` : "";
  const words = (number) => (chart.unit === "%" ? percent(number) : short(number) + unit);
  const last = points[points.length - 1], figure = element("figure", {}, element("figcaption", {}, element("span", { text: chart.title }), value), canvas);
  const rest = () => { value.textContent = words(last[1]); };
  rest();
  responsive(figure, (width) => {
    const height = 130, left = 38, bottom = height - 20, both = [...points, ...chart.test], values = both.map((point) => point[1]);
    const low = Math.min(...values), high = Math.max(...values), pad = (high - low || Math.abs(high) || 1) * 0.06;
    const x = linear([points[0][0], last[0]], [left + 4, width - 6]), y = linear([low - pad, high + pad], [bottom - 4, 8]);
    const cursor = shape("g", { visibility: "hidden", class: "trained" }, line(0, 6, 0, bottom, "cursor"), shape("circle", { r: 4, class: "mark" }));
    let now = points.length - 1;
    const move = (i) => {
      now = Math.max(0, Math.min(points.length - 1, i));
      const [step, number] = points[now];
      cursor.setAttribute("visibility", "visible");
      cursor.children[0].setAttribute("transform", `translate(${x(step)} 0)`);
      cursor.children[1].setAttribute("transform", `translate(${x(step)} ${y(number)})`);
      value.textContent = `${words(number)} at ${step}`;
    };
    const leave = () => { cursor.setAttribute("visibility", "hidden"); rest(); };
    const svg = shape("svg", {
      width, height, tabindex: 0, role: "img", class: "chart",
      "aria-label": `${chart.title}: ${words(points[0][1])} at update ${points[0][0]}, ${words(last[1])} at update ${last[0]}; arrow keys read values`,
      on: {
        mousemove: (event) => {
          const at = event.clientX - svg.getBoundingClientRect().left;
          move(points.reduce((best, point, i) => (Math.abs(x(point[0]) - at) < Math.abs(x(points[best][0]) - at) ? i : best), 0));
        },
        mouseleave: leave, blur: leave,
        keydown: (event) => {
          const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
          if (step) { event.preventDefault(); move(now + step); }
        },
      },
    });
    svg.append(shape("rect", { x: 1, y: 1, width: width - 2, height: height - 2, rx: 3, class: "frame" }));
    for (const tick of ticks(low - pad, high + pad, 3)) svg.append(line(left, y(tick), width - 6, y(tick), "axis"), label(left - 6, y(tick) + 4, chart.unit === "%" ? percent(tick, high - low < 0.03 ? 1 : 0) : short(tick), "end"));
    svg.append(label(left + 4, height - 4, String(points[0][0]), "start"), label(width - 6, height - 4, String(last[0]), "end"));
    svg.append(shape("g", { class: "trained" }, shape("path", { d: path(points.map(([step, number]) => [x(step), y(number)])), class: "stroke" })));
    for (const [step, number] of chart.test) {
      const [cx, cy] = [x(step), y(number)];
      svg.append(shape("g", { class: "learned" }, shape("polygon", { points: `${cx},${cy - 5} ${cx + 5},${cy} ${cx},${cy + 5} ${cx - 5},${cy}`, class: "mark" }, shape("title", { text: `test problems: ${words(number)} at ${step}` }))));
    }
    svg.append(cursor);
    canvas.replaceChildren(svg);
  });
  return figure;
}
