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

function browser() {
  const { labels: names, total, rows } = data.samples;
  const reference = names.length,
    title = (side) => (side === reference ? "Reference" : names[side]);
  const sides = [...names.map((name, i) => [String(i), name]), [String(reference), "Reference"]];
  const bases = names.filter((name) => data.techniques.find((t) => t.label === name).base).length;
  const left = choice(sides, "0"),
    right = choice(sides, String(Math.min(bases, reference)));
  const parts = [...new Set(rows.map((row) => row.part))];
  const part = choice([["", "all"], ...parts.map((name, i) => [String(i), name])], "");
  const order = choice(
    [
      ["", "of the data"],
      ["left", "left ahead in ROUGE-L"],
      ["right", "right ahead in ROUGE-L"],
    ],
    "",
  );
  const search = made("input", {
    type: "search",
    placeholder: "in prompt, reference, answers",
    size: 28,
    autocomplete: "off",
  });
  const differing = made("input", { type: "checkbox" }),
    raw = made("input", { type: "checkbox" });
  const says = made("output", { className: "says" }),
    list = made("div", { id: "rows" });
  const back = made("button", { type: "button", textContent: "Previous" }),
    next = made("button", { type: "button", textContent: "Next" });
  let page = 0;
  const answer = (row, side) => (side === reference ? [row.reference, null, true] : row.answers[side]);
  const card = (head, remark, body) =>
    made(
      "div",
      { className: "answer" },
      made("h4", {}, head + " ", made("span", { className: "remark", textContent: remark })),
      body,
    );

  function draw() {
    const [a, b] = [Number(left.value), Number(right.value)],
      wanted = search.value.trim().toLowerCase();
    const found = rows.filter(
      (row) =>
        (part.value === "" || row.part === parts[part.value]) &&
        (!differing.checked || answer(row, a)[0] !== answer(row, b)[0]) &&
        [row.prompt, row.reference, row.id, ...row.answers.map(([said]) => said)].some((said) =>
          said.toLowerCase().includes(wanted),
        ),
    );
    const sign = { left: 1, right: -1 }[order.value];
    if (sign)
      found.sort(
        (one, two) =>
          sign *
          ((answer(two, a)[1] ?? 1) -
            (answer(two, b)[1] ?? 1) -
            (answer(one, a)[1] ?? 1) +
            (answer(one, b)[1] ?? 1)),
      );
    page = Math.max(0, Math.min(page, Math.ceil(found.length / PAGE) - 1));
    const from = page * PAGE,
      shown = found.slice(from, from + PAGE);
    says.textContent = found.length
      ? `${from + 1} to ${from + shown.length} of ${found.length.toLocaleString("en")} rows`
      : "No row has this.";
    back.disabled = page === 0;
    next.disabled = from + PAGE >= found.length;
    list.replaceChildren(
      ...shown.map((row) => {
        const given = made(
          "div",
          { className: "answers" },
          card(
            "Prompt",
            "",
            text(
              [[raw.checked ? (row.raw ?? row.prompt) : row.prompt, true]].filter(([said]) => said),
              "given",
            ),
          ),
          card(
            "Reference",
            "",
            text(
              [[row.reference, true]].filter(([said]) => said),
              "given",
            ),
          ),
        );
        const pieces = difference(answer(row, a)[0], answer(row, b)[0]);
        const cards = [a, b].map((side, i) => {
          const [, rouge, ended] = answer(row, side),
            remark =
              side === reference
                ? ""
                : `ROUGE-L ${rouge === null ? "–" : rouge.toFixed(3)}${ended ? "" : ", cut at the length limit"}`;
          return card(title(side), remark, text(pieces[i]));
        });
        return made(
          "section",
          { className: "example" },
          made("h3", { textContent: row.id }),
          given,
          made("div", { className: "answers" }, ...cards),
        );
      }),
    );
  }

  const again = () => {
    page = 0;
    draw();
  };
  [left, right, part, order, differing, raw].forEach((input) => input.addEventListener("change", again));
  search.addEventListener("input", again);
  [
    [back, -1],
    [next, 1],
  ].forEach(([button, step]) =>
    button.addEventListener("click", () => {
      page += step;
      draw();
    }),
  );
  const part_of =
    rows.length < total
      ? `${rows.length.toLocaleString("en")} of the ${total.toLocaleString("en")} test rows are in this file, spread over the parts of the data and from bad to good, so that it stays small; all of them are in outputs.jsonl of each run.`
      : `All ${total.toLocaleString("en")} test rows.`;
  const tick = (input, said) =>
    made("label", { className: "name" }, input, made("span", { textContent: said }));
  const box = made(
    "div",
    { id: "samples" },
    made("p", {
      textContent: `${part_of} Each technique answers with its lowest seed; words that the other answer has not, or not in this order, are marked.`,
    }),
    made(
      "div",
      { className: "bar" },
      field("Left", left),
      field("Right", right),
      field("Search", search),
      ...(parts.length > 1 ? [field("Part", part)] : []),
      field("Order", order),
      tick(differing, "only where they differ"),
      ...(rows.some((row) => row.raw) ? [tick(raw, "prompts with template marks")] : []),
    ),
    made("div", { className: "bar" }, back, next, says),
    list,
  );
  draw();
  return box;
}

if (data.samples?.rows.length) {
  const chapter = find("answers-side-by-side");
  const few = made(
    "details",
    {},
    made("summary", { textContent: "Ten of them, all answers side by side" }),
    ...chapter.childNodes,
  );
  chapter.append(browser(), few);
}
redraw();
