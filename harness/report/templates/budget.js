// The decision within a budget, from the verdicts that the report has: who fits, is best, tied or dominated.

const SIZES = { MB: 1e6, GB: 1e9, TB: 1e12, MiB: 2 ** 20, GiB: 2 ** 30, TiB: 2 ** 40 };
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
  if (!found || !Number(found[1])) return null;
  const name = (found[2] || usual).toLowerCase();
  const unit = Object.keys(units).find((each) => each.toLowerCase() === name);
  return unit ? Number(found[1]) * units[unit] : null;
}

// Up to three digits: who has so much has enough.
function roundedUp(amount, units) {
  const sizes = units.map((unit) => [unit, unit in SIZES ? SIZES[unit] : TIMES[unit]]);
  const [unit, size] = sizes.findLast(([, size]) => amount >= size) ?? sizes[0];
  const value = amount / size;
  const step = 10 ** (Math.floor(Math.log10(Math.max(value, 1e-9))) - 2);
  const up = Math.min(Math.ceil(value / step - 1e-6) * step, value * 1.01);
  return `${Number(up.toPrecision(6)).toLocaleString("en")} ${unit}`;
}

let binary = true; // memory is told in GiB, else in GB
const inBytes = (bytes) => roundedUp(bytes, binary ? ["MiB", "GiB", "TiB"] : ["MB", "GB", "TB"]);
const inTime = (seconds) => roundedUp(seconds, ["s", "min", "h"]);

// What a technique takes of each limit that does not hold.
function over({ memory, seconds }) {
  const found = [];
  if (memory > limits.memory) found.push(`${inBytes(memory)}, ${inBytes(memory - limits.memory)} too much`);
  if (seconds > limits.seconds)
    found.push(`${inTime(seconds)}, ${inTime(seconds - limits.seconds)} too long`);
  return found;
}

// The budget that it needs, as a multiple of this one.
function times({ memory, seconds }) {
  return Math.max(memory / limits.memory, seconds / limits.seconds);
}

// Who to take of those that fit, in the words that the report uses.
function lead(group, fit) {
  const ranked = group.order.filter((name) => fit.includes(name));
  const top = ranked.filter((name) => name === ranked[0] || group.tied[ranked[0]].includes(name));
  const free = top.filter((name) => !(group.beaten[name] ?? []).some((by) => fit.includes(by)));
  const best = free.length ? free : top;
  const is = (n) => (n === 1 ? "is" : "are");
  const caveat = (names) => {
    const worse = names.filter((name) => group.worse.includes(name));
    const found = worse.length ? worse : names.filter((name) => group.unproven.includes(name));
    const who = found.length === names.length ? "" : `${listed(found)} ${is(found.length)} `;
    const what = worse.length ? "worse" : "not known to be better";
    const text = `, but ${who}${what} than the untouched model in ${group.label}`;
    return found.length ? text + (worse.length === names.length ? ": keep that" : "") : "";
  };
  if (!group.done.length) return "no technique has a result, and there is nothing to choose";
  if (!fit.length) return `none of ${count(group.done.length, "technique")} is known to fit`;
  if (fit.length === 1) {
    const what = group.done.length > 1 ? "alone fits" : "alone has a result, so there is no choice";
    return `${fit[0]} ${what}${caveat(fit)}`;
  }
  if (ranked.length < 2) {
    const why = new Set(fit.map((name) => group.silent[name]).filter(Boolean));
    return `no choice by scores (${listed([...why])})`;
  }
  const most = `the ${group.extreme} ${group.label}`;
  if (top.length === 1) return `${top[0]}, with ${most}${caveat(top)}`;
  const others = top.length - best.length;
  const rest = others ? `; ${count(others, "other")} so tied ${is(others)} dominated` : "";
  return `${either(best)}, tied for ${most}${rest}${caveat(best)}`;
}

function decided(group) {
  const fit = group.done.filter(fits);
  const large = group.done.filter((name) => over(group.needs[name]).length);
  large.sort((a, b) => times(group.needs[a]) - times(group.needs[b]));
  const unknown = group.done.filter((name) => !fit.includes(name) && !large.includes(name));
  const told = [];
  if (limits.memory < Infinity) told.push(inBytes(limits.memory));
  if (limits.seconds < Infinity) told.push(inTime(limits.seconds));
  const text = [group.name.slice(1), `within ${told.join(" and ")}: ${lead(group, fit)}.`]
    .filter(Boolean)
    .join(", ");
  const items = [`Fits: ${listed(fit) || "none"}, of ${group.done.length}.`];
  const tooMuch = large.map((name) => `${name} (${over(group.needs[name]).join("; ")})`);
  if (large.length) items.push(`Does not fit: ${listed(tooMuch)}.`);
  if (unknown.length) items.push(`Not measured, and not known to fit: ${listed(unknown)}.`);
  const list = made("ul", {}, ...items.map((textContent) => made("li", { textContent })));
  return [made("p", { className: "lead", textContent: text[0].toUpperCase() + text.slice(1) }), list];
}

function budget() {
  const section = find("decision");
  if (!section || !needs.size) return;
  const usual = [...section.querySelectorAll(":scope > :not(h2, .notice)")];
  const within = made("div", { className: "within" });
  within.setAttribute("role", "status");
  const memory = made("input", { placeholder: "24GB", size: 8, autocomplete: "off" });
  const hours = made("input", { placeholder: "4h or 30min", size: 10, autocomplete: "off" });
  const wrong = made("output", { className: "says" });
  const clear = made("button", { type: "button", textContent: "Clear", hidden: true });
  const measured = `Memory: ${data.gauge}, in its highest phase. Time: of a whole run. Of several seeds the worst counts.`;

  function read() {
    const bytes = limit(memory.value, SIZES, "GB");
    const seconds = limit(hours.value, TIMES, "h");
    const said = [];
    if (bytes === null) said.push("Memory is such as 24GB, 24GiB or 24000MB.");
    if (seconds === null) said.push("Time is such as 4h, 30min or 0.5.");
    memory.setAttribute("aria-invalid", bytes === null);
    hours.setAttribute("aria-invalid", seconds === null);
    wrong.textContent = said.join(" ");
    binary = /ib\s*$/i.test(memory.value);
    limits.memory = bytes ?? Infinity;
    limits.seconds = seconds ?? Infinity;
    clear.hidden = !memory.value && !hours.value;
    redraw();
  }

  drawers.push(() => {
    const asks = Math.min(limits.memory, limits.seconds) < Infinity;
    for (const node of usual) node.hidden = asks;
    const told = () => [
      ...data.groups.flatMap(decided),
      made("p", { className: "says", textContent: measured }),
    ];
    within.replaceChildren(...(asks ? told() : []));
  });
  [memory, hours].forEach((input) => input.addEventListener("input", read));
  clear.addEventListener("click", () => {
    memory.value = hours.value = "";
    read();
    memory.focus();
  });
  const fields = [field("Memory of the card", memory), field("Time for a run", hours)];
  usual[0].before(made("div", { className: "bar" }, ...fields, clear, wrong), within);
}

budget();
