// A chart of any two quantities of the techniques, and what all charts are made of.

const SVG = "http://www.w3.org/2000/svg";
const UNITS = { bytes: ["GiB", 2 ** 30], joules: ["Wh", 3600] };
const WIDE = 8; // values further apart than this share a logarithmic axis
const MARGIN = { top: 28, right: 20, bottom: 44, left: 64 };
const MARKERS = {
  // matplotlib's, around 0, 0
  o: "M-5,0a5,5 0 1,0 10,0a5,5 0 1,0 -10,0",
  s: "M-4.5-4.5h9v9h-9z",
  D: "M0-6L6,0L0,6L-6,0z",
  d: "M0-6L4,0L0,6L-4,0z",
  "^": "M0-6L5.5,4.5H-5.5z",
  v: "M0,6L5.5-4.5H-5.5z",
  "<": "M-6,0L4.5-5.5V5.5z",
  ">": "M6,0L-4.5-5.5V5.5z",
  P: "M-2-6h4v4h4v4h-4v4h-4v-4h-4v-4h4z",
  X: "M-6-3.5L-3.5-6L0-2.5L3.5-6L6-3.5L2.5,0L6,3.5L3.5,6L0,2.5L-3.5,6L-6,3.5L-2.5,0z",
  "*": "M0-7L1.8-2.2L6.7-2.2L2.8,.9L4.1,5.7L0,2.9L-4.1,5.7L-2.8,.9L-6.7-2.2L-1.8-2.2z",
};

function drawn(tag, attributes = {}, text = "") {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text) node.textContent = text;
  return node;
}

function short(text, most = 32) {
  return text.length > most ? text.slice(0, most - 1) + "…" : text;
}

// A value on an axis: its unit and what one of it is.
function scaled(unit, largest) {
  if (unit === "seconds") return largest < 100 ? ["s", 1] : largest < 6000 ? ["min", 60] : ["h", 3600];
  return UNITS[unit] ?? [unit ?? "", 1];
}

function axis(values, from, to, { level = null, linear = false } = {}) {
  let low = Math.min(...values),
    high = Math.max(...values);
  if (level !== null && Math.max(level - high, low - level) <= high - low)
    [low, high] = [Math.min(low, level), Math.max(high, level)];
  const log = !linear && low > 0 && high > WIDE * low;
  const pad = log ? 1.15 : (high - low || Math.abs(high) || 1) * (linear ? 0.03 : 0.12);
  [low, high] = log ? [low / pad, high * pad] : [low - pad, high + pad];
  const of = log ? Math.log10 : (value) => value,
    [a, b] = [of(low), of(high)];
  const place = (value) => from + ((of(value) - a) / (b - a)) * (to - from);
  return { place, low, high, ticks: log ? decades(low, high) : steps(low, high) };
}

function steps(low, high) {
  const rough = (high - low) / 6,
    power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((n) => n * power).find((n) => n >= rough),
    found = [];
  for (let i = Math.ceil(low / step); i * step <= high; i++) found.push(i * step || 0); // no -0
  return found;
}

function decades(low, high) {
  const found = [];
  for (let power = Math.floor(Math.log10(low)); 10 ** power <= high; power++) {
    for (const n of [1, 2, 5])
      if (n * 10 ** power >= low && n * 10 ** power <= high) found.push(n * 10 ** power);
  }
  return found;
}

const said = (value) =>
  Math.abs(value) >= 1e5
    ? value.toLocaleString("en", { notation: "compact", maximumSignificantDigits: 3 })
    : value.toLocaleString("en", { maximumSignificantDigits: 4 });

function frame(box, x, y, xTitle, yTitle, size, described) {
  const svg = drawn("svg", {
    viewBox: `0 0 ${size.width} ${size.height}`,
    width: size.width,
    height: size.height,
    role: "img",
    "aria-label": described,
  });
  const right = size.width - MARGIN.right,
    bottom = size.height - MARGIN.bottom;
  for (const tick of x.ticks) {
    svg.append(drawn("path", { d: `M${x.place(tick)},${MARGIN.top}V${bottom}`, class: "grid" }));
    svg.append(drawn("text", { x: x.place(tick), y: bottom + 16, "text-anchor": "middle" }, said(tick)));
  }
  for (const tick of y.ticks) {
    svg.append(drawn("path", { d: `M${MARGIN.left},${y.place(tick)}H${right}`, class: "grid" }));
    svg.append(drawn("text", { x: MARGIN.left - 8, y: y.place(tick) + 4, "text-anchor": "end" }, said(tick)));
  }
  svg.append(drawn("path", { d: `M${MARGIN.left},${MARGIN.top}V${bottom}H${right}`, class: "axes" }));
  svg.append(drawn("text", { x: right, y: bottom + 36, "text-anchor": "end", class: "title" }, xTitle));
  svg.append(drawn("text", { x: 4, y: 14, class: "title" }, yTitle));
  box.replaceChildren(svg);
  return svg;
}

function room(box, ratio) {
  const width = Math.max(280, Math.min(box.clientWidth || 900, 960));
  return { width, height: Math.round(Math.max(380, width * ratio)) };
}

function marker(technique, x, y) {
  return drawn("path", {
    d: MARKERS[technique.marker] ?? MARKERS.o,
    transform: `translate(${x},${y})`,
    stroke: technique.hollow ? technique.color : "#fff",
    fill: technique.hollow ? "#fff" : technique.color,
    "stroke-width": technique.hollow ? 1.6 : 0.8,
  });
}

// Scatter

const better = { higher: " ↑", lower: " ↓" };
const quantity = (technique, name) =>
  technique.quantities.find((each) => each.quantity === name && each.mean !== null);
const trained = data.techniques.filter((technique) => !technique.base);

// Of a quantity: its title, and mean and deviation of a technique in the unit of the axis.
function measured(shown, name) {
  const all = shown.map((t) => quantity(t, name));
  const [unit, one] = scaled(all[0].unit, Math.max(...all.map((q) => q.mean)));
  const of = (t) => ({ mean: quantity(t, name).mean / one, sd: (quantity(t, name).sd ?? 0) / one });
  const ends = shown
    .map(of)
    .flatMap(({ mean, sd }) => [mean, mean + sd, Math.max(mean - sd, Math.min(mean, mean / 2))]);
  return { of, one, ends, title: `${all[0].label}${unit && ` (${unit})`}${better[all[0].better] ?? ""}` };
}

function scatter(box, xName, yName) {
  const asked = trained.filter((t) => matches(t.label) && fits(t.label));
  const shown = asked.filter((t) => quantity(t, xName) && quantity(t, yName));
  if (!shown.length)
    return box.replaceChildren(made("p", { textContent: "Nothing that is shown has both." }));
  const [across, up] = [xName, yName].map((name) => measured(shown, name));
  const base = quantity(data.techniques.find((t) => t.method === "base") ?? { quantities: [] }, yName);
  const level = base ? base.mean / up.one : null;
  const size = room(box, 0.55);
  const right = size.width - MARGIN.right;
  const x = axis(across.ends, MARGIN.left, right);
  const y = axis(up.ends, size.height - MARGIN.bottom, MARGIN.top, { level });
  const told = shown.map((t) => `${t.label}: ${said(across.of(t).mean)}, ${said(up.of(t).mean)}`).join("; ");
  const svg = frame(box, x, y, across.title, up.title, size, `${up.title} against ${across.title}. ${told}`);
  if (level !== null && level >= y.low && level <= y.high) {
    svg.append(drawn("path", { d: `M${MARGIN.left},${y.place(level)}H${right}`, class: "level" }));
    svg.append(drawn("text", { x: right, y: y.place(level) - 4, "text-anchor": "end" }, "before"));
  }
  const places = shown.map((t) => {
    const [a, b] = [across.of(t), up.of(t)];
    const [px, py] = [x.place(a.mean), y.place(b.mean)];
    const [[left, end], [low, high]] = [span(x, a), span(y, b)];
    const group = drawn("g");
    const about = [
      [across, a],
      [up, b],
    ].map(([each, { mean, sd }]) => `${each.title}: ${said(mean)} ± ${said(sd)}`);
    group.append(drawn("title", {}, [t.label, ...about].join("\n")));
    group.append(
      drawn("path", { d: `M${left},${py}H${end}M${px},${low}V${high}`, stroke: t.color, class: "bar" }),
    );
    group.append(marker(t, px, py));
    svg.append(group);
    return [px, py, short(t.label)];
  });
  name(svg, places, size);
  const rest = asked
    .filter((t) => !shown.includes(t))
    .map((t) => (t.status === "ok" ? t.label : `${t.label} (${t.status})`));
  if (rest.length)
    box.append(
      made("p", { className: "says", textContent: `Not drawn, as both are not known: ${listed(rest)}.` }),
    );
}

function span(along, { mean, sd }) {
  return [mean - sd, mean + sd].map((value) => along.place(Math.min(Math.max(value, along.low), along.high)));
}

// Each name where it crosses least: no marker, no other name and no edge, if it can be.
function name(svg, places, size) {
  const taken = places.map(([x, y]) => [x - 6, y - 6, x + 6, y + 6]);
  const out = (b) =>
    b[0] < MARGIN.left || b[2] > size.width || b[1] < 18 || b[3] > size.height - MARGIN.bottom;
  const meets = (a, b) => a[0] < b[2] && b[0] < a[2] && a[1] < b[3] && b[1] < a[3];
  const crosses = (box) => taken.filter((other) => meets(box, other)).length + 4 * out(box);
  for (const [x, y, text] of places) {
    const wide = 6.1 * text.length;
    const spots = [8, 16, 26, 38].flatMap((away) => [
      [x + away, y - 6],
      [x - away - wide, y - 6],
      [x - wide / 2, y - away - 12],
      [x - wide / 2, y + away],
      [x + away, y - 6 - away],
      [x + away, y - 6 + away],
    ]);
    const boxes = spots.map(([left, top]) => [left, top, left + wide, top + 12]);
    const best = boxes.reduce((one, two) => (crosses(two) < crosses(one) ? two : one));
    taken.push(best);
    svg.append(drawn("text", { x: best[0], y: best[1] + 10, class: "name" }, text));
  }
}

function scatters() {
  const known = trained.flatMap((t) => t.quantities.filter((q) => q.mean !== null));
  const found = new Map(known.map((q) => [q.quantity, q.label]));
  if (found.size < 2) return null;
  const names = [...found];
  const across = choice(names, found.has("peak_memory") ? "peak_memory" : names.at(-1)[0]);
  const up = choice(names, data.leading ?? names[0][0]);
  const box = made("div", { className: "chart" });
  const draw = () => scatter(box, across.value, up.value);
  [across, up].forEach((select) => select.addEventListener("change", draw));
  drawers.push(draw);
  const caption =
    "Means over seeds, lines to one sample standard deviation on either side. ↑ higher, ↓ lower is better. " +
    "Dashed: the untouched model, where it is near. Hollow: with the shared hyperparameters, where a search " +
    "has found better ones.";
  const bar = made("div", { className: "bar" }, field("Up", up), field("Across", across));
  return made("figure", { id: "scatter" }, bar, box, made("figcaption", { textContent: caption }));
}
