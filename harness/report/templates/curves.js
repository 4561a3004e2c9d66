// Learning curves, each technique switched on and off.

function lines(box, curves, objective) {
  if (!curves.length) return box.replaceChildren(made("p", { textContent: "No curve is chosen." }));
  const size = room(box, 0.45);
  const [steps, losses] = ["steps", "losses"].map((of) => curves.flatMap((curve) => curve[of]));
  const x = axis(steps, MARGIN.left, size.width - MARGIN.right, { linear: true });
  const y = axis(losses, size.height - MARGIN.bottom, MARGIN.top, { linear: true });
  const last = curves.map((curve) => `${curve.label}: ${said(curve.losses.at(-1))}`).join("; ");
  const told = `Loss at the last step. ${last}`;
  const svg = frame(box, x, y, "Optimizer step", `Loss (${objective})`, size, told);
  for (const { label, steps, losses } of curves) {
    const points = steps.map((step, i) => `${x.place(step).toFixed(1)},${y.place(losses[i]).toFixed(1)}`);
    const line = drawn("path", { d: `M${points.join("L")}`, class: "line", ...dashes(label, "5 4") });
    line.append(drawn("title", {}, label));
    svg.append(line);
  }
}

function curves() {
  if (!data.curves.length) return null;
  const unique = (name) => [...new Set(data.curves.map((curve) => curve[name]))];
  const title = (kind) => (kind === "training" ? "Training loss" : "Validation loss");
  const kind = choice(
    unique("kind").map((value) => [value, title(value)]),
    "validation",
  );
  const objective = choice(
    unique("objective").map((value) => [value, value]),
    "sft",
  );
  const off = new Set();
  const box = made("div", { className: "chart" });
  const names = made("div", { className: "bar" });
  const asked = (curve) => curve.kind === kind.value && curve.objective === objective.value;
  const chosen = () =>
    data.curves.filter((curve) => asked(curve) && matches(curve.label) && fits(curve.label));
  const draw = () =>
    lines(
      box,
      chosen().filter((curve) => !off.has(curve.label)),
      objective.value,
    );

  function tick({ label }) {
    const input = made("input", { type: "checkbox", checked: !off.has(label) });
    input.addEventListener("change", () => {
      if (input.checked) off.delete(label);
      else off.add(label);
      draw();
    });
    return made(
      "label",
      { className: "name" },
      input,
      swatch(label),
      made("span", { textContent: short(label, 60) }),
    );
  }

  function all(text, change) {
    const button = made("button", { type: "button", textContent: text });
    button.addEventListener("click", () => {
      chosen().forEach((curve) => change(curve.label));
      names.querySelectorAll("input").forEach((input) => (input.checked = text === "All"));
      draw();
    });
    return button;
  }

  const buttons = [all("All", (label) => off.delete(label)), all("None", (label) => off.add(label))];
  const list = () => {
    names.replaceChildren(...chosen().map(tick), ...buttons);
    draw();
  };
  [kind, objective].forEach((select) => select.addEventListener("change", list));
  drawers.push(list);
  const fields = [field("Learning curves", kind)];
  if (objective.options.length > 1) fields.push(field("Objective", objective));
  const caption =
    "Means over the seeds, of long trainings also over neighbouring steps. Dashed: with the shared " +
    "hyperparameters, where a search has found better ones.";
  const bar = made("div", { className: "bar" }, ...fields);
  return made("figure", { id: "curves" }, bar, names, box, made("figcaption", { textContent: caption }));
}

function swatch(label) {
  const line = drawn("svg", { width: 22, height: 8, "aria-hidden": "true", class: "swatch" });
  line.append(drawn("path", { d: "M0,4H22", "stroke-width": 2.5, ...dashes(label, "5 3") }));
  return line;
}

// Of a technique's line: its colour, and dashes where a search has found better values.
function dashes(label, pattern) {
  const { color, hollow } = data.techniques.find((t) => t.label === label);
  return { stroke: color, "stroke-dasharray": hollow ? pattern : "none" };
}

const charts = [scatters(), curves()].filter(Boolean);
const place = find("plots") ?? find("results");
if (charts.length && place) {
  const title = made("h3", { textContent: "Draw your own" });
  place.append(title, ...charts);
}
let width = innerWidth;
addEventListener("resize", () => {
  if (innerWidth !== width) {
    width = innerWidth;
    redraw();
  }
});
