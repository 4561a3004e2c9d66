// Test rows with their answers: pages of them, a search, and the words in which two answers differ.

const PAGE = 10;

// Words with the space behind them. -> for each side, pieces [text, whether the other side has it].
function difference(one, two) {
  const [a, b] = [one, two].map((text) => text.match(/\S+\s*|\s+/g) ?? []);
  const same = (i, j) => a[i].trim() === b[j].trim(),
    wide = b.length + 1;
  const common = new Uint16Array((a.length + 1) * wide); // words that the rests from i and j share, in order
  for (let i = a.length - 1; i >= 0; i--) {
    for (let j = b.length - 1; j >= 0; j--) {
      common[i * wide + j] = same(i, j)
        ? common[(i + 1) * wide + j + 1] + 1
        : Math.max(common[(i + 1) * wide + j], common[i * wide + j + 1]);
    }
  }
  const found = [[], []];
  const add = (side, text, shared) => {
    const last = found[side].at(-1);
    if (last && last[1] === shared) last[0] += text;
    else found[side].push([text, shared]);
  };
  let i = 0,
    j = 0;
  while (i < a.length || j < b.length) {
    if (i < a.length && j < b.length && same(i, j)) {
      add(0, a[i++], true);
      add(1, b[j++], true);
    } else if (j >= b.length || (i < a.length && common[(i + 1) * wide + j] >= common[i * wide + j + 1]))
      add(0, a[i++], false);
    else add(1, b[j++], false);
  }
  return found;
}

function text(pieces, kind = "") {
  const nodes = pieces.map(([words, shared]) => (shared ? words : made("mark", { textContent: words })));
  return made(
    "p",
    { className: `said ${kind}` },
    ...(nodes.length ? nodes : [made("i", { textContent: "(empty)" })]),
  );
}

// The control elements, by name; `sides`: whose answers there are, the reference last.
function controls(sides, parts) {
  const whose = sides.map((name, i) => [String(i), name]);
  const bases = sides.filter((name) => data.techniques.find((t) => t.label === name)?.base).length;
  const orders = [
    ["", "of the data"],
    ["1", "left ahead in ROUGE-L"],
    ["-1", "right ahead in ROUGE-L"],
  ];
  const button = (text) => made("button", { type: "button", textContent: text });
  const placeholder = "in prompt, reference, answers";
  return {
    left: choice(whose, "0"),
    right: choice(whose, String(bases)),
    search: made("input", { type: "search", placeholder, size: 28, autocomplete: "off" }),
    part: choice([["", "all"], ...parts.map((name) => [name, name])], ""),
    order: choice(orders, ""),
    differing: made("input", { type: "checkbox" }),
    raw: made("input", { type: "checkbox" }),
    back: button("Previous"),
    next: button("Next"),
    says: made("output", { className: "says" }),
  };
}

function browser({ labels: names, total, rows }) {
  const sides = [...names, "Reference"];
  const parts = [...new Set(rows.map((row) => row.part))];
  const of = controls(sides, parts);
  const list = made("div", { id: "rows" });
  let page = 0;

  const answer = (row, side) => row.answers[side] ?? [row.reference, null, true];
  const rouge = (row, side) => answer(row, side)[1] ?? 1;
  const ahead = (row) => rouge(row, of.left.value) - rouge(row, of.right.value);
  const whole = (said) => (said ? [[said, true]] : []);

  function chosen() {
    const wanted = of.search.value.trim().toLowerCase();
    const has = (said) => said.toLowerCase().includes(wanted);
    const found = rows.filter(
      (row) =>
        (!of.part.value || row.part === of.part.value) &&
        (!of.differing.checked || answer(row, of.left.value)[0] !== answer(row, of.right.value)[0]) &&
        [row.id, row.prompt, row.reference, ...row.answers.map(([said]) => said)].some(has),
    );
    return of.order.value ? found.sort((a, b) => Number(of.order.value) * (ahead(b) - ahead(a))) : found;
  }

  function card(head, remark, body) {
    const title = made("h4", {}, head + " ", made("span", { className: "remark", textContent: remark }));
    return made("div", { className: "answer" }, title, body);
  }

  function shown(row) {
    const prompt = of.raw.checked ? (row.raw ?? row.prompt) : row.prompt;
    const given = [
      card("Prompt", "", text(whole(prompt), "given")),
      card("Reference", "", text(whole(row.reference), "given")),
    ];
    const both = [of.left.value, of.right.value];
    const pieces = difference(...both.map((side) => answer(row, side)[0]));
    const answers = both.map((side, i) => {
      const [, score, ended] = answer(row, side);
      const remark = `${score === null ? "" : `ROUGE-L ${score.toFixed(3)}`}${ended ? "" : ", cut at the length limit"}`;
      return card(sides[side], remark, text(pieces[i]));
    });
    const beside = (cards) => made("div", { className: "answers" }, ...cards);
    return made(
      "section",
      { className: "example" },
      made("h3", { textContent: row.id }),
      beside(given),
      beside(answers),
    );
  }

  function draw() {
    const found = chosen();
    page = Math.max(0, Math.min(page, Math.ceil(found.length / PAGE) - 1));
    const from = page * PAGE;
    const here = found.slice(from, from + PAGE);
    of.says.textContent = here.length
      ? `${from + 1} to ${from + here.length} of ${found.length.toLocaleString("en")} rows`
      : rows.length === total
        ? "No row has this."
        : `None of the ${rows.length.toLocaleString("en")} rows in this file has this.`;
    of.back.disabled = page === 0;
    of.next.disabled = from + PAGE >= found.length;
    list.replaceChildren(...here.map(shown));
  }

  const again = () => {
    page = 0;
    draw();
  };
  const turn = (by) => () => {
    page += by;
    draw();
  };
  for (const name of ["left", "right", "part", "order", "differing", "raw"])
    of[name].addEventListener("change", again);
  of.search.addEventListener("input", again);
  of.back.addEventListener("click", turn(-1));
  of.next.addEventListener("click", turn(1));
  draw();

  const [some, all] = [rows.length, total].map((n) => n.toLocaleString("en"));
  const held =
    some === all
      ? `All ${all} test rows.`
      : `${some} of the ${all} test rows are in this file, spread over the parts of the data and from bad to good, ` +
        "so that it stays small; all of them are in outputs.jsonl of each run.";
  const how =
    "Each technique answers with its lowest seed; words that the other answer has not, or not in this order, are marked.";
  const tick = (input, said) =>
    made("label", { className: "name" }, input, made("span", { textContent: said }));
  const fields = [
    field("Left", of.left),
    field("Right", of.right),
    field("Search", of.search),
    field("Order", of.order),
  ];
  if (parts.length > 1) fields.push(field("Part", of.part));
  fields.push(tick(of.differing, "only where they differ"));
  if (rows.some((row) => row.raw)) fields.push(tick(of.raw, "prompts with template marks"));
  return made(
    "div",
    { id: "samples" },
    made("p", { textContent: `${held} ${how}` }),
    made("div", { className: "bar" }, ...fields),
    made("div", { className: "bar" }, of.back, of.next, of.says),
    list,
  );
}

const chapter = find("answers-side-by-side");
if (chapter && data.samples?.rows.length) {
  const title = made("summary", { textContent: "Some test rows, with all answers side by side" });
  const few = made("details", {}, title, ...chapter.childNodes);
  chapter.append(browser(data.samples), few);
}
redraw();
