"""`run_bench.py data NAME`: what a model will see of a dataset, before anything is trained.

`preview` gives it as JSON values, `show` as text: a few rows with what is learned marked, their lengths, and
what was cut or left out.
"""

from itertools import dropwhile, zip_longest
from math import ceil
from statistics import fmean, median

from rich.console import Console
from rich.table import Table
from rich.text import Text

from harness.data import (
    COUNTED,
    FORMATS,
    LEAKS,
    SPLITS,
    Example,
    Template,
    dataset_names,
    examples_hash,
    height,
    load_spec,
    marked,
    order,
    pack,
    pieces,
    required,
    study,
    token_rows,
    tokens_of,
)
from harness.errors import Problems, shown
from harness.plain import listed, plain, shorten
from harness.plan import DRAWN, Request, find_dataset, find_sources, local_folder, read_request, unreachable
from harness.spec import Hyperparams

SAID = ("name", "licence", "format", "mapping")  # of a part
BINS = 12  # of the histogram, at most
WIDTHS = [digit * 10**zeros for zeros in range(9) for digit in (1, 2, 5)]  # of a bin
BAR = 40  # characters of its longest bar
EXAMPLES = 3  # of the refused rows
DEMO = "demo/model"  # whose tokenizer is taken, unless another is named
LONGEST = 4000  # characters shown of a row
TURNS = "system, Instruction and Response, turn by turn"
TEMPLATE_FIELDS = {  # format -> its field -> what the template makes of it
    "instruction": {"instruction": "Instruction", "input": "Input", "output": "Response"},
    "prompt": {"prompt": "Instruction", "completion": "Response"},
    "question": {"question": "Instruction", "answer": "Response"},
    "messages": {"messages": TURNS},
    "pairs": {"chosen": TURNS, "rejected": "the worse last Response"},
    "text": {"text": "Response, without a prompt"},
}
COLOURS = {  # learned, special -> the style of a piece
    (False, False): "dim", (False, True): "dim magenta", (True, False): "green", (True, True): "bold magenta",
}  # fmt: skip


def preview(request: Request, rows: int) -> dict:
    """As JSON values, `rows` of them whole. Without a preset the model is the demo's. Raises BadRequest."""
    problems = Problems()
    wanted = read_request(request, problems)
    model = wanted.model or DEMO
    dataset = find_dataset(wanted.dataset, wanted.data, problems)
    sources = find_sources(request.sources, wanted.dataset, dataset, problems)
    for group in wanted.options:
        problems.add(f"--set {group}.…", "only hp and data have values here")
    tokenizer = find_tokenizer(model, problems)
    problems.refuse()
    template = Template(tokenizer, dataset["template"], dataset.get("loss", "all"))
    read = token_rows(dataset, sources, template, wanted.hp.max_length)
    made = read.rows["train"]
    found = {
        "dataset": dataset["name"],
        "title": dataset["title"],
        "model": model,
        "template": "none" if made and not any(row.prompt for row in made) else template.kind,
        "loss": template.loss,
        "max_length": wanted.hp.max_length,
        "parts": [{key: part[key] for key in SAID} for part in dataset["parts"]],
        "left_out": {what: n for what, n in read.left_out.items() if not what.startswith(SPLITS)},
        "refused": read.refused,
        "unused": read.unused,
        "revisions": read.revisions,
        "origins": read.origins,
        "splits": {},
        "study": study(tokenizer, read.sample, template.loss),
    }
    for split in reversed(read.rows):
        made = read.rows[split]
        counts = {what: read.left_out.get(f"{split}_{what}", 0) for what in COUNTED}
        found["splits"][split] = {"hash": examples_hash(made), **lengths(made), **counts}
        if split == "train":
            sizes = [row.length for row in made]
            found["histogram"] = histogram(sizes)
            found["padding"] = padding(made, wanted.hp) if made else {}
            found["rows"] = [written(tokenizer, row) for row in spread_out(made, rows)]
    return found


def mappings() -> str:
    """Every dataset's source fields and the template's, as a Markdown table: the one of the README."""
    lines = [
        "| dataset | source | licence | source field → template field | in words |",
        "|---|---|---|---|---|",
    ]
    for name in dataset_names():
        dataset = load_spec(name, {})
        for part in dataset["parts"]:
            columns = {field: columns[0] for field, columns in FORMATS[part["format"]].items()} | part[
                "fields"
            ]
            known = TEMPLATE_FIELDS[part["format"]].items()
            fields = "; ".join(f"`{columns[field]}` → {becomes}" for field, becomes in known)
            source = part["hub"] or part["path"]
            cells = (name, source, part["licence"], fields, part["mapping"])
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def find_tokenizer(model: str, problems: Problems):
    from transformers import AutoTokenizer

    name, where = model.removeprefix(DRAWN), f"model {shown(model)}"
    folder = local_folder(name)
    if problems.add(where, unreachable(name, folder)):
        return None
    try:
        return AutoTokenizer.from_pretrained(folder or name, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds for what is no tokenizer
        problems.add(where, f"no tokenizer to be had ({' '.join(str(error).split())[:200]})")


def lengths(rows: list[Example]) -> dict:
    """Tokens of rows, and the share of them that training learns."""
    sizes = sorted(row.length for row in rows)
    if not sizes:
        return {"rows": 0}
    learned = sum(sum(tokens_of(row)[1]) for row in rows)

    def share(p: float) -> int:  # nearest rank
        return sizes[ceil(len(sizes) * p / 100) - 1]

    return {"rows": len(sizes), "tokens": sum(sizes), "mean": fmean(sizes), "median": median(sizes),
            "p90": share(90), "p99": share(99), "max": sizes[-1],
            "supervised": learned / sum(sizes)}  # fmt: skip


def histogram(sizes: list[int]) -> list[tuple[int, int, int]]:
    """(from, to, rows) of even bins up to the longest row, their width easy to read."""
    width = next(w for w in WIDTHS if w * BINS > max(sizes, default=0))
    starts = range(0, max(sizes, default=0) + 1, width)
    return [(a, a + width - 1, sum(a <= size < a + width for size in sizes)) for a in starts]


def padding(rows: list[Example], hp: Hyperparams) -> dict[str, float]:
    """Share of the tokens read in an epoch that is padding, with and without packing."""
    read = {"apart": 0, "packed": 0}
    total = 0
    for step in order([row.length for row in rows], Hyperparams(batch_size=hp.batch_size), seed=0):
        for start in range(0, len(step), hp.micro_batch_size):
            chosen = [rows[i] for i in step[start : start + hp.micro_batch_size]]
            total += sum(row.length for row in chosen)
            read["apart"] += len(chosen) * max(row.length for row in chosen)
            packed = pack(chosen, hp.max_length)
            read["packed"] += len(packed) * height(packed)
    return {way: 1 - total / slots for way, slots in read.items()} if total else {}


def spread_out(rows: list[Example], count: int) -> list[Example]:
    """Rows of each part in turn, so that every kind is seen."""
    parts: dict[str, list[Example]] = {}
    for row in rows:
        parts.setdefault(row.part, []).append(row)
    turns = [row for turn in zip_longest(*parts.values()) for row in turn if row]
    return turns[:count]


def written(tokenizer, row: Example) -> dict:
    ids, learned = tokens_of(row)
    return {"id": row.id, "tokens": row.length, "learned": sum(learned), "cut": row.cut,
            "pieces": pieces(tokenizer, ids, learned),
            "rejected": tokenizer.decode(row.rejected_ids) if row.rejected_ids else None}  # fmt: skip


# As text


def show(found: dict, console: Console) -> None:
    """In colours on a terminal; elsewhere what is learned stands between ⟦ and ⟧."""
    form = {"chat": "the model's chat template", "none": "plain text, no template"}.get(
        found["template"], "the Instruction/Response form"
    )
    answers = {"all": "every answer", "last": "the last answer"}[found["loss"]]
    answers = "every token" if found["template"] == "none" else answers
    say(console, f"{found['title'] or found['dataset']} as {found['model']} will see it", "bold")
    say(console, f"{form}; loss on {answers}; rows of at most {found['max_length']} tokens")
    for part in found["parts"]:
        licence = f" ({part['licence']})" if part["licence"] else ""
        fields = f"read as {part['format']}, of {', '.join(required(part['format']))}"
        say(console, f"{part['name']}{licence}: {part['mapping'] or fields}")
        own = found["origins"][part["name"]]
        if len(set(own.values())) > 1:
            drawn = ", ".join(f"{split} from {own[split]!r}" for split in found["splits"])
            say(console, f"{part['name']}, splits of its source: {drawn}")
    console.print()
    console.print(table_of(found["splits"]))
    show_left_out(found, console)
    if not found["splits"]["train"]["rows"]:
        say(console, "\nNo training row is left: raise hp.max_length, or read what was left out above.")
        return
    show_lengths(found, console)
    show_rows(found["rows"], console)
    if found["study"]:
        show_study(found["study"], console)


def show_left_out(found: dict, console: Console) -> None:
    notes = [f"{split}: {counts[what]} {meaning}" for split, counts in found["splits"].items()
             for what, meaning in COUNTED.items() if counts[what]]  # fmt: skip
    notes += [f"not read: {n} {what.replace('_', ' ')}" + (f" ({LEAKS[what]})" if what in LEAKS else "")
              for what, n in found["left_out"].items() if n]  # fmt: skip
    notes += [f"    such as {r['part']}, row {r['row']}: {r['reason']}" for r in found["refused"][:EXAMPLES]]
    notes += [f"not used of {part}: {listed(names)}" for part, names in found["unused"].items() if names]
    for note in notes:
        say(console, "  " + note)


def show_lengths(found: dict, console: Console) -> None:
    heading(console, "Lengths of the training rows, in tokens")
    most = max(count for *_, count in found["histogram"])
    for start, stop, count in dropwhile(lambda bar: not bar[2], found["histogram"]):
        bar = "█" * round(BAR * count / most) or "▏" * (count > 0)
        end = "  ← max_length" if start <= found["max_length"] <= stop else ""
        say(console, f"{start:>7}–{stop:<6} {bar} {count}{end}")
    if found["padding"]:
        way = "{apart:.1%} of what a step reads is padding; {packed:.1%} with hp.packing=true"
        say(console, "\n" + way.format(**found["padding"]))


def show_rows(rows: list[dict], console: Console) -> None:
    heading(console, "Rows")
    console.print(legend(console))
    for row in rows:
        cut = f", {row['cut']} more cut off" if row["cut"] else ""
        console.rule(
            Text(f"{row['id']}: {row['tokens']} tokens, {row['learned']} learned{cut}"), align="left"
        )
        console.print(painted(row["pieces"], console))
        if row["rejected"]:
            say(console, f"worse answer: {shorten(row['rejected'], LONGEST)}", "red")


def say(console: Console, text: str, style: str = "") -> None:
    console.print(Text(plain(text), style))


def heading(console: Console, text: str) -> None:
    say(console, f"\n{text}\n", "bold")


def table_of(splits: dict) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    columns = ("", "rows", "tokens", "mean", "median", "90 %", "99 %", "max", "learned")
    for column in columns:
        table.add_column(column, justify="right" if column else "left")
    for split, v in splits.items():
        known = (f"{v['tokens']:,}", f"{v['mean']:.0f}", f"{v['median']:.0f}", f"{v['p90']}", f"{v['p99']}",
                 f"{v['max']}", f"{v['supervised']:.0%}") if v["rows"] else ()  # fmt: skip
        table.add_row(split, f"{v['rows']:,}", *known)
    return table


def legend(console: Console) -> Text:
    if not coloured(console):
        return Text("⟦ ⟧ around what is learned")
    names = {"given": (False, False), "learned": (True, False), "special token": (False, True),
             "special and learned": (True, True)}  # fmt: skip
    return Text("   ").join(Text(name, COLOURS[kind]) for name, kind in names.items())


def painted(found: list[list], console: Console) -> Text:
    if not coloured(console):
        return Text(shorten(plain(marked(found)), LONGEST))
    text = Text()
    for piece, learned, special in found:
        text.append(plain(piece), COLOURS[learned, special])
    text.truncate(LONGEST, overflow="ellipsis")
    return text


def coloured(console: Console) -> bool:
    return console.is_terminal and not console.no_color


def show_study(found: dict, console: Console) -> None:
    heading(console, f"One conversation in each form: {found['id']}")
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("form", "tokens", "learned", "tokens a row", "learned a row", "special tokens"):
        left = column in ("form", "special tokens")
        table.add_column(column, justify="left" if left else "right", overflow="fold")
    for name, form in found["forms"].items():
        special = " ".join(f"{count}×{plain(token)}" for token, count in form["special"].items())
        table.add_row(name, str(form["tokens"]), str(form["learned"]), f"{form['mean_tokens']:.0f}",
                      f"{form['mean_learned']:.0f}", Text(special))  # fmt: skip
    console.print(table)
    say(console, f"  a row: the mean of {found['rows']} test conversations, uncut")
    for name, form in found["forms"].items():
        console.rule(Text(name), align="left")
        console.print(painted(form["pieces"], console))
