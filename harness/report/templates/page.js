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

// The decision within a budget, from the verdicts that the report has: who fits, is best, tied or dominated.

const SIZES = { mb: 1e6, gb: 1e9, tb: 1e12, mib: 2 ** 20, gib: 2 ** 30, tib: 2 ** 40 };
const TIMES = { s: 1, m: 60, min: 60, h: 3600 };
const listed = (names) =>
  names.length > 1 ? `${names.slice(0, -1).join(", ")} and ${names.at(-1)}` : names.join("");
const either = (names) =>
  names.length > 1 ? `${names.slice(0, -1).join(", ")} or ${names.at(-1)}` : names.join("");
const count = (n, noun) => `${n} ${noun}${n === 1 ? "" : "s"}`;

// Infinity for nothing, null for what is no amount.
function limit(text, units, usual) {
  const found = /^(\d+(?:\.\d+)?|\.\d+)\s*([a-z]*)$/i.exec(text.trim());
  if (!text.trim()) return Infinity;
  const unit = found && units[found[2].toLowerCase() || usual];
  return unit && Number(found[1]) > 0 ? Number(found[1]) * unit : null;
}

// Up to three digits: who has so much has enough.
function roundedUp(amount, units) {
  const [unit, size] = units.findLast(([, size]) => amount >= size) ?? units[0],
    value = amount / size;
  const step = 10 ** (Math.floor(Math.log10(Math.max(value, 1e-9))) - 2);
  const up = Math.min(Math.ceil(value / step - 1e-6) * step, value * 1.01);
  return `${Number(up.toPrecision(6)).toLocaleString("en")} ${unit}`;
}

let binary = true;
const inBytes = (bytes) =>
  roundedUp(
    bytes,
    binary
      ? [
          ["MiB", 2 ** 20],
          ["GiB", 2 ** 30],
          ["TiB", 2 ** 40],
        ]
      : [
          ["MB", 1e6],
          ["GB", 1e9],
          ["TB", 1e12],
        ],
  );
const inTime = (seconds) =>
  roundedUp(seconds, [
    ["s", 1],
    ["min", 60],
    ["h", 3600],
  ]);

function decided(group) {
  const over = (name) => {
    const { memory, seconds } = group.needs[name];
    return [
      memory > limits.memory && `${inBytes(memory)}, ${inBytes(memory - limits.memory)} too much`,
      seconds > limits.seconds && `${inTime(seconds)}, ${inTime(seconds - limits.seconds)} too long`,
    ].filter(Boolean);
  };
  const times = ({ memory, seconds }) => Math.max(memory / limits.memory, seconds / limits.seconds);
  const fit = group.done.filter(fits),
    large = group.done
      .filter((name) => over(name).length)
      .sort((a, b) => times(group.needs[a]) - times(group.needs[b]));
  const unknown = group.done.filter((name) => !fit.includes(name) && !large.includes(name));
  const ranked = group.order.filter((name) => fit.includes(name)),
    first = ranked[0];
  const top = ranked.filter((name) => name === first || group.tied[first].includes(name));
  const best = top.filter((name) => !(group.beaten[name] ?? []).some((by) => top.includes(by))),
    others = top.length - best.length;
  const doubtful = (names) => {
    const found = names.filter((name) => group.unproven.includes(name));
    const who = found.length === names.length ? "" : `${listed(found)} ${found.length === 1 ? "is" : "are"} `;
    return found.length
      ? `, but ${who}not known to be better than the untouched model in ${group.what.split(" ").slice(2).join(" ")}`
      : "";
  };
  const within = [
    limits.memory < Infinity && inBytes(limits.memory),
    limits.seconds < Infinity && inTime(limits.seconds),
  ]
    .filter(Boolean)
    .join(" and ");
  const scope = [group.name.slice(1), `within ${within}`].filter(Boolean).join(", ");
  let lead;
  if (!group.done.length) lead = "no technique has a result, and there is nothing to choose";
  else if (!fit.length) lead = `none of ${count(group.done.length, "technique")} is known to fit`;
  else if (fit.length === 1)
    lead = `${first ?? fit[0]} alone ${group.done.length > 1 ? "fits" : "has a result, so there is no choice"}${doubtful(fit)}`;
  else if (ranked.length < 2) lead = `no choice by scores${group.silent && ` (${group.silent})`}`;
  else if (top.length === 1) lead = `${first}, with ${group.what}${doubtful(top)}`;
  else
    lead = `${either(best)}, tied for ${group.what}${others ? `; ${count(others, "other")} so tied ${others === 1 ? "is" : "are"} dominated` : ""}${doubtful(best)}`;
  const items = [`Fits: ${listed(fit) || "none"}, of ${group.done.length}.`];
  if (large.length)
    items.push(`Does not fit: ${listed(large.map((name) => `${name} (${over(name).join("; ")})`))}.`);
  if (unknown.length) items.push(`Not measured, and not known to fit: ${listed(unknown)}.`);
  return [
    made("p", { className: "lead", textContent: `${scope[0].toUpperCase()}${scope.slice(1)}: ${lead}.` }),
    made("ul", {}, ...items.map((text) => made("li", { textContent: text }))),
  ];
}

function budget() {
  const section = find("decision");
  if (!section || !needs.size) return;
  const usual = [...section.children].slice(1),
    says = made("div", { className: "within" });
  says.setAttribute("role", "status");
  const memory = made("input", { placeholder: "24GB", size: 8, autocomplete: "off" });
  const hours = made("input", { placeholder: "4h or 30min", size: 10, autocomplete: "off" });
  const wrong = made("output", { className: "says" });
  const clear = made("button", { type: "button", textContent: "Clear", hidden: true });
  const read = () => {
    const found = [limit(memory.value, SIZES, "gb"), limit(hours.value, TIMES, "h")];
    [memory, hours].forEach((input, i) => input.setAttribute("aria-invalid", found[i] === null));
    wrong.textContent = [
      found[0] === null && "Memory is such as 24GB, 24GiB or 24000MB.",
      found[1] === null && "Time is such as 4h, 30min or 0.5.",
    ]
      .filter(Boolean)
      .join(" ");
    binary = /ib\s*$/i.test(memory.value);
    [limits.memory, limits.seconds] = found.map((value) => value ?? Infinity);
    redraw();
  };
  drawers.push(() => {
    const asks = Math.min(limits.memory, limits.seconds) < Infinity;
    usual.forEach((node) => {
      node.hidden = asks;
    });
    clear.hidden = !memory.value && !hours.value;
    says.replaceChildren(
      ...(asks
        ? [
            ...data.groups.flatMap(decided),
            made("p", {
              className: "says",
              textContent: `Memory: ${data.gauge}, in its highest phase. Time: of a whole run. Of several seeds the worst counts.`,
            }),
          ]
        : []),
    );
  });
  [memory, hours].forEach((input) => input.addEventListener("input", read));
  clear.addEventListener("click", () => {
    memory.value = hours.value = "";
    read();
    memory.focus();
  });
  section
    .querySelector("h2")
    .after(
      made(
        "div",
        { className: "bar" },
        field("Memory of the card", memory),
        field("Time for a run", hours),
        clear,
        wrong,
      ),
      says,
    );
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
budget();
folds();
