"use strict";
// All of the report is in the page without this script, which sorts, filters, draws and browses what the JSON
// beside it holds. It judges nothing, and text of strangers enters the page by textContent alone.
const data = JSON.parse(document.getElementById("data").textContent);
const find = (id) => document.getElementById(id);

function made(tag, properties = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}

function field(text, input) {
  input.id = "field-" + text.toLowerCase().replaceAll(" ", "-");
  return made("div", { className: "field" }, made("label", { textContent: text, htmlFor: input.id }), input);
}

function choice(options, chosen) {
  const nodes = options.map(([value, text]) =>
    made("option", { value, textContent: text, selected: value === chosen }),
  );
  return made("select", {}, ...nodes);
}

// Who is shown: all that match the text and fit the budget.
const labels = data.techniques.map((technique) => technique.label);
const needs = new Map(data.groups.flatMap((group) => Object.entries(group.needs)));
const limits = { memory: Infinity, seconds: Infinity };
const drawers = []; // what is drawn again when any of this changes
let query = "";
const matches = (label) => label.toLowerCase().includes(query);
const redraw = () => drawers.forEach((draw) => draw());

function fits(label) {
  const takes = needs.get(label);
  return (
    !takes ||
    Object.entries(limits).every(
      ([name, limit]) => limit === Infinity || (takes[name] !== null && takes[name] <= limit),
    )
  );
}

// Tables

// Whose a row is: `LoRA (tuned) ²` is that of LoRA (tuned), `LoRA − Base` that of both.
function owners(text) {
  const found = text
    .split(" − ")
    .map(
      (part) =>
        labels
          .filter((label) => part === label || part.startsWith(label + " "))
          .sort((a, b) => b.length - a.length)[0],
    );
  return found.filter((label) => label !== undefined);
}

function amount(text) {
  const found = /[+−-]?\d[\d,]*(?:\.\d+)?(?:e[+−-]?\d+)?/.exec(text);
  return found ? Number(found[0].replaceAll(",", "").replaceAll("−", "-")) : null;
}

// By a column: best first, then the other way round, then as it was. What is not known stays last.
function sortable(table) {
  const body = table.tBodies[0],
    rows = [...body.rows],
    heads = [...table.tHead.rows[0].cells];
  if (rows.length < 2 || rows.some((row) => !row.cells[0].textContent)) return;
  heads.forEach((head, column) => {
    const words = head.classList.contains("word"),
      text = head.textContent;
    const first = words || text.includes("↓") ? "ascending" : "descending",
      other = first === "ascending" ? "descending" : "ascending";
    const button = made("button", { type: "button", className: "sort", textContent: text });
    const value = (row) => {
      const said = row.cells[column].textContent.trim();
      return words ? said : amount(said);
    };
    const unknown = (found) => found === null || found === "–" || found === "";
    button.addEventListener("click", () => {
      const way = { [first]: other, [other]: "" }[head.getAttribute("aria-sort") ?? ""] ?? first;
      heads.forEach((each) => each.removeAttribute("aria-sort"));
      if (way) head.setAttribute("aria-sort", way);
      const sign = way === "ascending" ? 1 : -1;
      const sorted = way
        ? rows.toSorted((one, two) => {
            const [a, b] = [value(one), value(two)];
            if (unknown(a) || unknown(b)) return unknown(a) - unknown(b);
            return sign * (words ? a.localeCompare(b, "en", { numeric: true }) : a - b);
          })
        : rows;
      body.append(...sorted);
    });
    head.replaceChildren(button);
  });
}

function filterable() {
  const rows = [...document.querySelectorAll(".wide tbody tr")].map((row) => [
    row,
    owners(row.cells[0].textContent.trim()),
  ]);
  const input = made("input", { type: "search", placeholder: "such as lora", autocomplete: "off" });
  const says = made("output", { className: "says" });
  input.addEventListener("input", () => {
    query = input.value.trim().toLowerCase();
    redraw();
  });
  drawers.push(() => {
    for (const [row, whose] of rows)
      row.hidden = whose.length > 0 && !(whose.some(matches) && whose.every(fits));
    const shown = labels.filter((label) => matches(label) && fits(label)).length;
    says.textContent =
      shown < labels.length
        ? `${shown} of ${labels.length} rows are shown, in all tables and in the charts below.`
        : "";
  });
  find("results")
    ?.querySelector(".wide")
    ?.before(made("div", { className: "bar", role: "search" }, field("Show techniques with", input), says));
}

// What is folded is printed, and opened all at once when asked.
function folds() {
  const all = [...document.querySelectorAll("details")];
  let closed = [];
  addEventListener("beforeprint", () => {
    closed = all.filter((each) => !each.open);
    closed.forEach((each) => {
      each.open = true;
    });
  });
  addEventListener("afterprint", () =>
    closed.forEach((each) => {
      each.open = false;
    }),
  );
  const button = made("button", { type: "button", textContent: "Open all sections" });
  button.addEventListener("click", () => {
    const open = all.some((each) => !each.open);
    all.forEach((each) => {
      each.open = open;
    });
    button.textContent = open ? "Close all sections" : "Open all sections";
  });
  all[0]?.before(made("div", { className: "bar folds" }, button));
}

document.querySelectorAll(".wide table").forEach(sortable);
filterable();
folds();
