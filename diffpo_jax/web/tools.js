"use strict";
// What the scripts of a page share. Text from data only ever becomes text: elements are made here, never from markup.

function element(name, options = {}, ...children) {
  const node = document.createElement(name);
  return filled(node, options, children);
}

function shape(name, options = {}, ...children) {
  return filled(document.createElementNS("http://www.w3.org/2000/svg", name), options, children);
}

// options: text, on: {event: listener}, vars: {"--name": value}; anything else is an attribute.
function filled(node, options, children) {
  for (const [name, value] of Object.entries(options)) {
    if (name === "text") node.textContent = value;
    else if (name === "on") for (const [event, listener] of Object.entries(value)) node.addEventListener(event, listener);
    else if (name === "vars") for (const [variable, given] of Object.entries(value)) node.style.setProperty(variable, given);
    else if (value !== null && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}

function byId(id) {
  return document.getElementById(id);
}

function pageData() {
  return JSON.parse(byId("data").textContent);
}

function short(value, digits = 3) {
  if (value === null || value === undefined) return "–";
  return String(Number(Number(value).toPrecision(digits)));
}

function percent(share, digits = 1) {
  return `${(100 * share).toFixed(digits)}%`;
}

function table(columns, rows, strong = -1) {
  const head = element("tr", {}, ...columns.map((text) => element("th", { text, scope: "col" })));
  const body = rows.map((row, i) =>
    element("tr", { class: i === strong ? "strong" : null }, ...row.map((text) => element("td", { text }))));
  return element("table", {}, element("thead", {}, head), element("tbody", {}, ...body));
}
