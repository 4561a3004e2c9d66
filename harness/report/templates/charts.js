// Charts: two quantities of the techniques against each other, and learning curves.

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
  p: "M0-6L5.7-1.9L3.5,4.9H-3.5L-5.7-1.9z",
  h: "M0-6L5.2-3V3L0,6L-5.2,3V-3z",
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
  for (let i = Math.ceil(low / step); i * step <= high; i++) found.push(i * step);
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

function scatter(box, xName, yName) {
  const shown = trained.filter(
    (t) => matches(t.label) && fits(t.label) && quantity(t, xName) && quantity(t, yName),
  );
  if (!shown.length)
    return box.replaceChildren(made("p", { textContent: "Nothing that is shown has both." }));
  const rest = trained.filter((t) => matches(t.label) && fits(t.label) && !shown.includes(t));
  const size = room(box, 0.55),
    base = data.techniques.find((t) => t.method === "base");
  const [of, unit, end] = [xName, yName]
    .map((name) => {
      const all = shown.map((t) => quantity(t, name)),
        [unit, one] = scaled(all[0].unit, Math.max(...all.map((q) => q.mean)));
      return [
        (t) => ({ mean: quantity(t, name).mean / one, sd: (quantity(t, name).sd ?? 0) / one }),
        `${all[0].label}${unit && ` (${unit})`}${better[all[0].better] ?? ""}`,
        one,
      ];
    })
    .reduce((found, each) => each.map((value, i) => [...(found[i] ?? []), value]), []);
  const ends = (which) =>
    shown.flatMap((t) => {
      const { mean, sd } = of[which](t);
      return [mean, mean + sd, Math.max(mean - sd, mean > 0 ? mean / 2 : -Infinity)];
    });
  const level = base && quantity(base, yName) ? quantity(base, yName).mean / end[1] : null;
  const x = axis(ends(0), MARGIN.left, size.width - MARGIN.right),
    y = axis(ends(1), size.height - MARGIN.bottom, MARGIN.top, { level });
  const told = shown.map((t) => `${t.label}: ${said(of[0](t).mean)}, ${said(of[1](t).mean)}`).join("; ");
  const svg = frame(box, x, y, unit[0], unit[1], size, `${unit[1]} against ${unit[0]}. ${told}`);
  if (level !== null && level >= y.low && level <= y.high) {
    svg.append(
      drawn("path", { d: `M${MARGIN.left},${y.place(level)}H${size.width - MARGIN.right}`, class: "level" }),
    );
    svg.append(
      drawn("text", { x: size.width - MARGIN.right, y: y.place(level) - 4, "text-anchor": "end" }, "before"),
    );
  }
  const taken = []; // where no label goes: markers, and labels
  for (const t of shown) {
    const [a, b] = [of[0](t), of[1](t)],
      [px, py] = [x.place(a.mean), y.place(b.mean)],
      group = drawn("g");
    const spans = [
      [x, a],
      [y, b],
    ].map(([along, { mean, sd }]) =>
      [mean - sd, mean + sd].map((value) => along.place(Math.min(Math.max(value, along.low), along.high))),
    );
    group.append(
      drawn(
        "title",
        {},
        `${t.label}\n${unit[0]}: ${said(a.mean)} ± ${said(a.sd)}\n${unit[1]}: ${said(b.mean)} ± ${said(b.sd)}`,
      ),
    );
    group.append(
      drawn("path", {
        d: `M${spans[0][0]},${py}H${spans[0][1]}M${px},${spans[1][0]}V${spans[1][1]}`,
        stroke: t.color,
        class: "bar",
      }),
    );
    group.append(marker(t, px, py));
    svg.append(group);
    taken.push([px - 6, py - 6, px + 6, py + 6]);
  }
  const crosses = (box) =>
    taken.filter((other) => box[0] < other[2] && other[0] < box[2] && box[1] < other[3] && other[1] < box[3])
      .length +
    4 * (box[0] < MARGIN.left || box[2] > size.width || box[1] < 18 || box[3] > size.height - MARGIN.bottom);
  for (const t of shown) {
    const text = short(t.label),
      wide = 6.1 * text.length,
      [px, py] = [x.place(of[0](t).mean), y.place(of[1](t).mean)];
    const spots = [8, 16, 26, 38].flatMap((away) => [
      [px + away, py - 6],
      [px - away - wide, py - 6],
      [px - wide / 2, py - away - 12],
      [px - wide / 2, py + away],
      [px + away, py - 6 - away],
      [px + away, py - 6 + away],
    ]);
    const boxes = spots.map(([left, top]) => [left, top, left + wide, top + 12]);
    const best = boxes.reduce((one, two) => (crosses(two) < crosses(one) ? two : one));
    taken.push(best);
    svg.append(drawn("text", { x: best[0], y: best[1] + 10, class: "name" }, text));
  }
  const why = rest.map((t) => (t.status === "ok" ? t.label : `${t.label} (${t.status})`));
  if (rest.length)
    box.append(
      made("p", { className: "says", textContent: `Not drawn, as both are not known: ${listed(why)}.` }),
    );
}

function scatters() {
  const found = new Map(
    trained.flatMap((t) => t.quantities.filter((q) => q.mean !== null).map((q) => [q.quantity, q.label])),
  );
  if (found.size < 2) return null;
  const names = [...found],
    leading = data.leading ?? names[0][0];
  const across = choice(names, found.has("peak_memory") ? "peak_memory" : names.at(-1)[0]),
    up = choice(names, leading);
  const box = made("div", { className: "chart" }),
    draw = () => scatter(box, across.value, up.value);
  [across, up].forEach((select) => select.addEventListener("change", draw));
  drawers.push(draw);
  return made(
    "figure",
    { id: "scatter" },
    made("div", { className: "bar" }, field("Up", up), field("Across", across)),
    box,
    made("figcaption", {
      textContent:
        "Means over seeds, lines to one sample standard deviation on either side. ↑ higher, ↓ lower is better. Dashed: the untouched model, where it is near. Hollow: with the shared hyperparameters, where a search has found better ones.",
    }),
  );
}

// Learning curves

function lines(box, curves, objective) {
  if (!curves.length) return box.replaceChildren(made("p", { textContent: "No curve is chosen." }));
  const size = room(box, 0.45),
    known = curves.flatMap((curve) => curve.losses.filter((loss) => loss !== null));
  const x = axis(
    curves.flatMap((curve) => curve.steps),
    MARGIN.left,
    size.width - MARGIN.right,
    { linear: true },
  );
  const y = axis(known, size.height - MARGIN.bottom, MARGIN.top, { linear: true });
  const last = curves.map((curve) => `${curve.label}: ${said(curve.losses.at(-1))}`).join("; ");
  const svg = frame(
    box,
    x,
    y,
    "Optimizer step",
    `Loss (${objective})`,
    size,
    `Loss at the last step. ${last}`,
  );
  for (const curve of curves) {
    const { color, hollow } = data.techniques.find((t) => t.label === curve.label);
    const d = curve.steps
      .map((step, i) => `${i ? "L" : "M"}${x.place(step).toFixed(1)},${y.place(curve.losses[i]).toFixed(1)}`)
      .join("");
    const line = drawn("path", {
      d,
      stroke: color,
      class: "line",
      "stroke-dasharray": hollow ? "5 4" : "none",
    });
    line.append(drawn("title", {}, curve.label));
    svg.append(line);
  }
}

function curves() {
  if (!data.curves.length) return null;
  const unique = (name) =>
    [...new Set(data.curves.map((curve) => curve[name]))].map((value) => [value, value]);
  const kind = choice(
    unique("kind").map(([value]) => [value, value === "training" ? "Training loss" : "Validation loss"]),
    "validation",
  );
  const objective = choice(unique("objective"), "sft"),
    off = new Set(),
    box = made("div", { className: "chart" }),
    names = made("div", { className: "bar names" });
  const chosen = () =>
    data.curves.filter(
      (curve) =>
        curve.kind === kind.value &&
        curve.objective === objective.value &&
        matches(curve.label) &&
        fits(curve.label),
    );
  const draw = () =>
    lines(
      box,
      chosen().filter((curve) => !off.has(curve.label)),
      objective.value,
    );
  const list = () => {
    names.replaceChildren(
      ...chosen().map(({ label }) => {
        const { color, hollow } = data.techniques.find((t) => t.label === label),
          tick = made("input", { type: "checkbox", checked: !off.has(label) });
        tick.addEventListener("change", () => {
          tick.checked ? off.delete(label) : off.add(label);
          draw();
        });
        const line = drawn("svg", { width: 22, height: 8, "aria-hidden": "true", class: "swatch" });
        line.append(
          drawn("path", {
            d: "M0,4H22",
            stroke: color,
            "stroke-width": 2.5,
            "stroke-dasharray": hollow ? "5 3" : "none",
          }),
        );
        return made(
          "label",
          { className: "name" },
          tick,
          line,
          made("span", { textContent: short(label, 60) }),
        );
      }),
      ...["All", "None"].map((text) => {
        const button = made("button", { type: "button", textContent: text });
        button.addEventListener("click", () => {
          chosen().forEach(({ label }) => (text === "All" ? off.delete(label) : off.add(label)));
          list();
          names.querySelectorAll("button")[text === "All" ? 0 : 1].focus();
        });
        return button;
      }),
    );
    draw();
  };
  [kind, objective].forEach((select) => select.addEventListener("change", list));
  drawers.push(list);
  const bar = made(
    "div",
    { className: "bar" },
    field("Learning curves", kind),
    ...(objective.options.length > 1 ? [field("Objective", objective)] : []),
  );
  return made(
    "figure",
    { id: "curves" },
    bar,
    names,
    box,
    made("figcaption", {
      textContent:
        "Means over the seeds, of long trainings also over neighbouring steps. Dashed: with the shared hyperparameters, where a search has found better ones.",
    }),
  );
}

const charts = [scatters(), curves()].filter(Boolean);
const place = find("plots") ?? find("results");
if (charts.length && place) {
  const title = made("h3", { textContent: "Draw your own" });
  place.querySelector(":scope > h2").parentElement.append(title, ...charts);
}
let width = innerWidth;
addEventListener("resize", () => {
  if (innerWidth !== width) {
    width = innerWidth;
    redraw();
  }
});
