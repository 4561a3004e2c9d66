// The decision within a budget. Who fits is a comparison of numbers; what is then to be said of these was
// written when the report was, for all who can fit together.

const SIZES = { MB: 1e6, GB: 1e9, TB: 1e12, MiB: 2 ** 20, GiB: 2 ** 30, TiB: 2 ** 40 };
const TIMES = { s: 1, m: 60, min: 60, h: 3600 };
const listed = (names) =>
  names.length > 1 ? `${names.slice(0, -1).join(", ")} and ${names.at(-1)}` : names.join("");

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

// In the words of the report's own decision, which knows the limits that are asked for.
function decided(group) {
  const fit = group.done.filter(fits);
  const said = group.within[group.done.flatMap((name, i) => (fits(name) ? [i] : [])).join()];
  const large = group.done.filter((name) => over(group.needs[name]).length);
  large.sort((a, b) => times(group.needs[a]) - times(group.needs[b]));
  const unknown = group.done.filter((name) => !fit.includes(name) && !large.includes(name));
  const told = (memory, seconds) =>
    [
      ...(limits.memory < Infinity && memory !== null ? [inBytes(memory)] : []),
      ...(limits.seconds < Infinity && seconds !== null ? [inTime(seconds)] : []),
    ].join(" and ");
  const asked = told(limits.memory, limits.seconds);
  const scope = [group.name.slice(1), asked && `within ${asked}`].filter(Boolean).join(", ");
  const text = scope ? `${scope}: ${said.first}.` : `${said.first}.`;
  const named = !scope && fit.some((name) => text.startsWith(name));
  const tooMuch = large.map((name) => `${name} (${over(group.needs[name]).join("; ")})`);
  const notKnown = unknown.map((name) => {
    const { memory, seconds } = group.needs[name];
    const what = [
      ...(memory === null && limits.memory < Infinity ? ["its memory"] : []),
      ...(seconds === null && limits.seconds < Infinity ? ["its time"] : []),
    ];
    return `${name} (${what.join(" and ")})`;
  });
  const reasons = [
    asked && group.done.length ? `Fits: ${listed(fit) || "none"}, of ${group.done.length}.` : "",
    ...said.merits,
    large.length ? `Does not fit: ${listed(tooMuch)}.` : "",
    unknown.length ? `Not measured, and not known to fit: ${listed(notKnown)}.` : "",
    group.broken,
  ];
  const takes = (name) => told(group.needs[name].memory, group.needs[name].seconds);
  const next = large.find((name) => name in said.gains);
  const least = !fit.length && large.length ? `The budget: ${large[0]} needs least, ${takes(large[0])}.` : "";
  const changes = [next ? `${said.gains[next]} ${takes(next)}.` : least || said.none, ...said.changes];
  const list = (items) =>
    made("ul", {}, ...items.filter(Boolean).map((textContent) => made("li", { textContent })));
  const found = [
    made("p", { className: "lead", textContent: named ? text : text[0].toUpperCase() + text.slice(1) }),
    list(reasons),
  ];
  if (changes.some(Boolean))
    found.push(made("p", { textContent: "What would change this:" }), list(changes));
  return found;
}

function budget() {
  const section = find("decision");
  const all = data.groups.every((group) => Object.keys(group.within).length);
  if (!section || !needs.size || !all) return;
  const usual = [...section.querySelectorAll(":scope > :not(h2, .notice)")];
  const within = made("div", { className: "within" });
  within.setAttribute("role", "status");
  const memory = made("input", { placeholder: "24GB", size: 8, autocomplete: "off" });
  const hours = made("input", { placeholder: "4h or 30min", size: 10, autocomplete: "off" });
  const wrong = made("output", { className: "says" });
  const clear = made("button", { type: "button", textContent: "Clear", hidden: true });
  const begins = data.budget.memory || data.budget.seconds;

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
    for (const node of usual) node.hidden = asks || begins; // which speaks of what it began with
    const measured = asks ? [made("p", { className: "says", textContent: data.measured })] : [];
    within.replaceChildren(...(asks || begins ? [...data.groups.flatMap(decided), ...measured] : []));
  });
  [memory, hours].forEach((input) => input.addEventListener("input", read));
  clear.addEventListener("click", () => {
    memory.value = hours.value = "";
    read();
    memory.focus();
  });
  const fields = [field("Memory of the card", memory), field("Time for a run", hours)];
  usual[0].before(made("div", { className: "bar" }, ...fields, clear, wrong), within);
  if (begins) {
    memory.value = data.budget.memory;
    hours.value = data.budget.seconds;
    read();
  }
}

budget();
