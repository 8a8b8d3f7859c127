// The report: puts the figures of web/report.html in their places.

function problemName(problem, i) {
  const verdict = (record) => (record.correct ? "right" : "wrong");
  return `${i + 1}. ${problem.prompt.replace(/\s+/g, " ").slice(0, 80)} (base ${verdict(problem.base)}, trained ${verdict(problem.trained)})`;
}

function showViewer(data) {
  const select = element("select", { id: "problem", on: { change: () => viewer.load(data.problems[select.selectedIndex]) } },
    ...data.problems.map((problem, i) => element("option", { text: problemName(problem, i), value: i })));
  const threshold = (name, record) => {
    if (record.gamma === null) return "";
    return `${name === "trained" && data.viewer.learned ? "learned γ" : "γ"} = ${short(record.gamma)}`;
  };
  const viewer = makeViewer(byId("viewer"), { threshold, above: [element("label", { for: "problem", text: `one of the first ${data.problems.length} test problems` }), select] });
  const gamma = data.problems[0].base.gamma;
  if (gamma !== null) byId("viewer-note").textContent = `The base model has γ = ${short(gamma)}, at which it takes about as many calls as the trained one does on average.`;
  viewer.load(data.problems[0]);
}

function showThresholds(data) {
  const { std, parts, points } = data.thresholds;
  if (!data.viewer.learned || !std) {
    const which = points.length ? `γ = ${short(points[0][0])}` : "one threshold";
    byId("thresholds-note").textContent = data.viewer.learned ? `The network chooses ${which} for every problem.` : `This run trained no threshold network: all problems have ${which}.`;
    byId("thresholds").remove();
  } else {
    byId("thresholds-note").textContent = "The threshold network reads the prompt and chooses γ for it. A problem counts as easy if the base model is right at many of the thresholds that it was evaluated at; among equals, if it takes fewer calls.";
    thresholdPlot(byId("thresholds"), data.thresholds);
  }
  const rows = parts.map((part) => [part.name, String(part.count), short(part.gamma), short(part.nfe), percent(part.accuracy), percent(part.base)]);
  byId("thresholds-table").append(table(["problems", "number", "γ, mean", "NFE", "trained model right", "base right, of its thresholds"], rows));
}

function showRun(run) {
  const changes = Object.entries(run.changes).map(([name, [usual, here]]) => [name, JSON.stringify(here), JSON.stringify(usual)]);
  const scroll = (label, node) => element("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": label }, node);
  const folded = (summary, node) => element("details", {}, element("summary", { text: summary }), node);
  byId("run").append(
    ...(run.command ? [element("pre", { class: "wrap", text: run.command })] : []),
    element("ul", { class: "notes" }, element("li", { text: Object.entries(run.versions).map(([name, version]) => `${name} ${version}`).join(", ").replace("devices ", "") })),
    folded(`${changes.length} fields that are not as configs/default.py has them`, scroll("Changed fields", table(["field", "here", "default"], changes))),
    folded("The whole configuration", element("pre", { text: JSON.stringify(run.config, null, 2), tabindex: 0 })));
}

function main() {
  const data = pageData();
  byId("table").append(table(data.table.columns, data.table.rows, data.table.rows.length - 1));
  byId("notes").append(...data.table.notes.map((text) => element("li", { text })));
  showViewer(data);
  paretoPlot(byId("pareto"), data.pareto, data.viewer.learned);
  const rows = SERIES.flatMap(([kind, name]) => data.pareto[kind].map((point) => [name, short(point.gamma), short(point.nfe), percent(point.accuracy), `${percent(point.low)} to ${percent(point.high)}`]));
  byId("pareto-table").append(table(["", "γ", "NFE", "right", "95% interval"], rows));
  showThresholds(data);
  byId("charts").append(...data.charts.map(lineChart));
  showRun(data.run);
}

main();
