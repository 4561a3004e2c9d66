"""People grade answers: what the page says and whom it answers, what is kept, what the report makes of it."""

import http.client
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from threading import Thread

import fabricate
import numpy as np
import pytest

from harness.errors import BadRequest
from harness.grade import CRITERIA, Grades, Sheet, key, serving
from harness.report import contestants, render
from harness.report import grades as told
from harness.spec import Hyperparams
from harness.store import Store

ROOT = Path(__file__).resolve().parents[1]
METHODS = ("qlora", "galore")
HOSTILE = (
    '<script>window.hit = 1</script><img src="/x" onerror="window.hit = 1"> {{ 7 * 7 }} \x1b[2J\u202eevil\0'
)
LONG = "word " * 200_000  # 1 MB
# Krippendorff 2011, Computing Krippendorff's Alpha-Reliability, part D: four observers, twelve units. Its
# alphas: 0.743 nominal, 0.815 ordinal, 0.849 interval.
PUBLISHED = ["123321412...", "1233224125.3", ".3332342251.", "12332441251."]


@pytest.fixture
def store(tmp_path):
    return Store(fabricate.results(tmp_path / "results", METHODS, seeds=(0, 1)))


def drawn(store, prompts=10, seed=0, methods=()) -> Sheet:
    return Sheet.drawn(*contestants_of(store, methods), prompts, seed)


def contestants_of(store, methods=()):
    title, runs = contestants(store, 1, list(methods))
    return title, store, runs


def grade(store, rater: str, sheet: Sheet, of) -> None:
    """Every answer of a sheet in full: `of(question, text)` is the grade of all three criteria."""
    for question in sheet.questions:
        for answer, text in question.answers.items():
            for criterion in CRITERIA:
                Grades(store.folder).give(rater, answer, question.row, criterion, of(question, text))


def report(store, folder) -> str:
    """Of several comparisons, which are a file each, all of them."""
    render(store, folder, ("md",), now="now")
    files = sorted(folder.glob("report-*.md")) or [folder / "report.md"]
    return "".join(file.read_text("utf-8") for file in files)


def section(text: str) -> str:
    return text.split("## Graded samples")[1].split("\n## ")[0]


def cells(text: str, row: str) -> list[str]:
    [line] = [line for line in text.split("\n") if line.startswith(f"| {row} |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


# What is asked


def test_the_page_is_told_of_no_method(store):
    sheet, grades = drawn(store), Grades(store.folder)
    grade(store, "Ann", sheet, lambda question, text: 3)
    said = json.dumps([sheet.start(grades), sheet.of("Ann", grades), sheet.of("Ben", grades)])
    said += "".join(path.read_text() for path in grades.folder.glob("*.json"))
    records, _ = store.load()
    known = (
        {r.folder for r in records} | {r.spec.method for r in records} | {r.card["title"] for r in records}
    )
    known |= {r.spec.digest for r in records} | {r.hashes["outputs"] for r in records}
    assert not [name for name in known if re.search(rf"\b{re.escape(name)}\b", said, re.I)]


def test_the_place_of_an_answer_says_nothing_of_its_method(store):
    sheet = drawn(store, prompts=90)
    runs = contestants_of(store)[2]
    own = [{o["id"]: key(o) for o in store.outputs(run)} for run in runs]
    for rater in ("Ann", "Ben"):
        shown = sheet.of(rater, Grades(store.folder))["questions"]
        places = np.zeros((len(runs), len(runs)))
        for asked, question in zip(shown, sheet.questions, strict=True):
            order = [answer["key"] for answer in asked["answers"]]
            if len(order) == len(runs):
                for i, keys in enumerate(own):
                    places[i, order.index(keys[question.row])] += 1
        assert places.sum() > 200
        shares = places / places.sum(1, keepdims=True)
        assert (abs(shares - 1 / 3) < 4 * (2 / 9 / places.sum(1).min()) ** 0.5).all(), shares
    orders = [
        [[a["key"] for a in q["answers"]] for q in sheet.of(rater, Grades(store.folder))["questions"]]
        for rater in ("Ann", "ann", "Ben")
    ]
    assert orders[0] == orders[1] != orders[2], "an order of each rater's own, the same after a refresh"


def test_more_prompts_are_the_same_and_others(store):
    rows = {n: [q.row for q in drawn(store, prompts=n).questions] for n in (5, 10, 1000)}
    assert rows[10][:5] == rows[5] and len(set(rows[10])) == 10
    assert len(rows[1000]) == 90, "all there are"
    assert rows[10] != [q.row for q in drawn(store, seed=1).questions]


def test_the_same_text_is_asked_about_once(tmp_path):
    folder = tmp_path / "results"
    same = fabricate.outputs("qlora")
    for name in ("base", "qlora", "galore"):
        fabricate.keep(folder, fabricate.record(name), same)
    assert drawn(Store(folder)).answers == 10


def test_some_methods_and_what_cannot_be_graded(store, tmp_path):
    _, runs = contestants(store, 1, ["galore"])
    assert [run.spec.method for run in runs] == ["base", "galore"]
    assert {run.spec.seed for run in runs} == {0}
    with pytest.raises(BadRequest, match="did you mean galore"):
        contestants(store, 1, ["galor"])
    with pytest.raises(BadRequest, match=r"--comparison: there is no 2. Available: 1 \(google"):
        contestants(store, 2, [])
    with pytest.raises(BadRequest, match="no run to grade"):
        contestants(Store(tmp_path), 1, [])


# Who is answered


@pytest.fixture(scope="module")
def sheet(tmp_path_factory):
    return drawn(Store(fabricate.results(tmp_path_factory.mktemp("sheet"), METHODS, seeds=(0,))))


@pytest.fixture
def served(sheet, tmp_path):
    grades = Grades(tmp_path)
    with serving(sheet, grades) as address:
        yield sheet, grades, address


def asked(
    address: str, method: str, place: str, body: bytes | None = None, **headers
) -> tuple[int, dict, bytes]:
    """`headers` as they are: one that is None is not sent."""
    host, token = address.split("/")[2:4]
    own = {"Host": host}
    if method == "POST":
        own |= {
            "Origin": f"http://{host}",
            "Content-Type": "application/json",
            "Content-Length": str(len(body)),
        }
    connection = http.client.HTTPConnection(host, timeout=5)
    connection.putrequest(method, place.replace("TOKEN", token), skip_host=True, skip_accept_encoding=True)
    for name, value in (own | {name.replace("_", "-"): value for name, value in headers.items()}).items():
        if value is not None:
            connection.putheader(name, value)
    connection.endheaders(body)
    reply = connection.getresponse()
    return reply.status, dict(reply.getheaders()), reply.read()


def one(sheet: Sheet, **changes) -> bytes:
    answer = next(iter(sheet.questions[0].answers))
    return json.dumps(
        {"rater": "Ann", "answer": answer, "criterion": "fluency", "grade": 4} | changes
    ).encode()


def test_its_own_page_is_answered(served):
    sheet, grades, address = served
    assert address.startswith("http://127.0.0.1:")
    status, headers, page = asked(address, "GET", "/TOKEN/")
    assert status == 200 and b"<h1>Grade answers" in page
    policy = headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "frame-ancestors 'none'" in policy
    assert headers["Referrer-Policy"] == "no-referrer" and headers["Cache-Control"] == "no-store"
    assert asked(address, "POST", "/TOKEN/grade", one(sheet))[0] == 200
    [graded] = grades.of("Ann")["answers"].values()
    assert graded == {"row": sheet.questions[0].row, "grades": {"fluency": 4}}
    assert asked(address, "POST", "/TOKEN/grade", one(sheet, grade=None))[0] == 200
    [graded] = grades.of("Ann")["answers"].values()
    assert graded["grades"] == {}


STRANGERS = {
    "a name bound anew to 127.0.0.1": {"Host": "evil.example:{port}"},
    "its own address on another port": {"Host": "127.0.0.1:1"},
    "another address of this machine": {"Host": "0.0.0.0:{port}"},
    "a name that begins like its own": {"Host": "127.0.0.1:{port}.evil.example"},
    "no host": {"Host": None},
    "another site": {"Origin": "http://evil.example"},
    "another site of the same address": {"Origin": "http://127.0.0.1:1"},
    "a sandboxed frame, a file": {"Origin": "null"},
    "its own address, encrypted": {"Origin": "https://127.0.0.1:{port}"},
    "no origin": {"Origin": None},
    "a form": {"Content_Type": "text/plain"},
    "a form's other kind": {"Content_Type": "application/x-www-form-urlencoded"},
    "no kind": {"Content_Type": None},
}


@pytest.mark.parametrize("headers", STRANGERS.values(), ids=STRANGERS.keys())
def test_a_stranger_is_not_answered(served, headers):
    sheet, grades, address = served
    port = address.split(":")[2].split("/")[0]
    headers = {name: value and value.replace("{port}", port) for name, value in headers.items()}
    status, _, said = asked(address, "POST", "/TOKEN/grade", one(sheet), **headers)
    assert status in (403, 415) and not grades.folder.exists()
    token = address.split("/")[3]
    assert token.encode() not in said
    if "Host" in headers or headers.get("Origin"):
        for place in ("/TOKEN/", "/TOKEN/start", "/TOKEN/sheet?rater=Ann"):
            status, _, said = asked(address, "GET", place, **headers)
            assert status == 403 and b"prompt" not in said


PLACES = ["/", "/grade", "/x/", "/TOKENx/", "/TOKEN/../", "/TOKEN/page.html", "/TOKEN/../../etc/passwd",
          "/TOKEN/grade/", "http://evil.example/", "/%s/" % ("x" * 32), "//["]  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
def test_without_the_token_nothing_is_there(served, place):
    _, _, address = served
    status, _, said = asked(address, "GET", place)
    assert status in (400, 404) and b"<h1>" not in said and b"criteria" not in said


WRONG = {
    "too high": {"grade": 6},
    "below 0": {"grade": -1},
    "a half": {"grade": 2.5},
    "true": {"grade": True},
    "a text": {"grade": "3"},
    "another criterion": {"criterion": "row"},
    "no answer of the sheet": {"answer": "0" * 12},
    "no name": {"rater": " "},
    "a name that acts on a terminal": {"rater": "Ann\x1b[2J"},
    "a name that turns the text": {"rater": "\u202eAnn"},
    "a name without end": {"rater": "A" * 61},
    "a name that no file holds": {"rater": "\ud800"},
    "a list": {"rater": ["Ann"]},
    "too long": {"more": "x" * 5000},
}


@pytest.mark.parametrize("changes", WRONG.values(), ids=WRONG.keys())
def test_what_is_no_grade_is_refused_and_not_kept(served, changes):
    sheet, grades, address = served
    status, _, said = asked(address, "POST", "/TOKEN/grade", one(sheet, **changes))
    assert status in (400, 413) and json.loads(said)["error"]
    assert not list(grades.folder.glob("*.json"))


@pytest.mark.parametrize("body", [b"", b"{", b"null", b"[" * 4000, b"\xff\xfe", b'{"grade": NaN}'])
def test_what_is_no_json_is_refused(served, body):
    assert asked(served[2], "POST", "/TOKEN/grade", body)[0] == 400


def test_names_lead_to_no_other_file(store):
    grades = Grades(store.folder)
    for name in ("../../x", "/etc/passwd", "a/b", "CON", ".", "名前", "A" * 60, "<b>Ann</b>"):
        assert grades.path(name).parent == grades.folder
        grades.give(name, "k" * 12, "row", "fluency", 1)
    assert len(grades.load()[0]) == 8
    assert grades.path(" ann ") == grades.path("Ann") != grades.path("Anne")
    assert grades.path("名前") != grades.path("名簿")


def test_a_port_that_is_taken_is_refused(served):
    sheet, grades, address = served
    taken = int(address.split(":")[2].split("/")[0])
    with pytest.raises(BadRequest, match="--port"), serving(sheet, grades, taken):
        pass


# What is kept


def test_grades_that_come_at_once_are_all_kept(served):
    sheet, grades, address = served
    said = [(answer, c) for q in sheet.questions for answer in q.answers for c in CRITERIA]

    def post(part):
        for answer, criterion in said[part::4]:
            asked(address, "POST", "/TOKEN/grade", one(sheet, answer=answer, criterion=criterion))

    threads = [Thread(target=post, args=(part,)) for part in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert sum(len(graded["grades"]) for graded in grades.of("Ann")["answers"].values()) == len(said)


DAMAGED = ["", "{", "[]", '{"schema": 2, "rater": "Ann", "answers": {}}',
           '{"schema": 1, "rater": "Ann", "answers": {"k": {"row": "r", "grades": {"fluency": 9}}}}',
           '{"schema": 1, "rater": "Ann\\u001b", "answers": {}}']  # fmt: skip


@pytest.mark.parametrize("text", DAMAGED)
def test_a_file_that_cannot_be_read_is_named_and_not_written_over(store, tmp_path, undrawn, text):
    grades = Grades(store.folder)
    grades.folder.mkdir()
    grades.path("Ann").write_text(text)
    with pytest.raises(ValueError):
        grades.give("Ann", "k", "row", "fluency", 1)
    assert grades.path("Ann").read_text() == text
    found = section(report(store, tmp_path))
    assert "Grades that could not be read" in found and grades.path("Ann").stem.split("-")[1] in found


def test_a_full_disk_leaves_what_was_there(store, monkeypatch):
    grades = Grades(store.folder)
    grades.give("Ann", "k", "row", "fluency", 1)
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError):
        grades.give("Ann", "k", "row", "fluency", 2)
    assert grades.of("Ann")["answers"]["k"]["grades"] == {"fluency": 1}


# What the report makes of it


def test_no_grades_no_section(store, tmp_path, undrawn):
    assert "Graded" not in report(store, tmp_path)


def test_a_comparison_of_which_only_the_shared_base_was_graded_has_no_section(store, tmp_path, undrawn):
    grade(store, "Ann", drawn(store, 4), lambda *_: 3)
    other = fabricate.record("lora", hp=Hyperparams(learning_rate=1e-3), started="2024")
    fabricate.keep(store.folder, other)
    text = report(store, tmp_path)
    assert text.count("\n## Decision") == 2 and text.count("\n## Graded samples") == 1
    assert cells(section(text), "GaLore")


def test_means_differences_and_counts_by_hand(store, tmp_path, undrawn):
    sheet = drawn(store, prompts=4)
    texts = {
        run.spec.method: {o["id"]: o["output"] for o in store.outputs(run)}
        for run in contestants_of(store)[2]
    }
    rows = [question.row for question in sheet.questions]
    by = {
        "Ann": {"base": [0, 1, 2, 3], "qlora": [5, 5, 4, 4], "galore": [1, 1, 2, 2]},
        "Ben": {"base": [2, 1, 2, 1], "qlora": [3, 5, 4, 0], "galore": [1, 3, 0, 4]},
    }
    for rater, grades in by.items():
        of = {(row, texts[m][row]): g for m in grades for row, g in zip(rows, grades[m], strict=True)}
        grade(store, rater, sheet, lambda question, text, of=of: of[question.row, text])
    last = sheet.questions[3]
    for answer, text in last.answers.items():  # Ben leaves one of three grades of one answer open
        if text == texts["galore"][last.row]:
            Grades(store.folder).give("Ben", answer, last.row, "fluency", None)
    found = section(report(store, tmp_path))
    # Base (1 1 2 2), QLoRA (4 5 4 2), GaLore (1 2 1 2): the last by Ann alone, as is its difference.
    for label, mean, less in (("Base", "1.50", "–"), ("QLoRA", "3.75", "+2.25"), ("GaLore", "1.50", "−0.25")):
        got = cells(found, label)
        assert [cell.split(" (")[0] for cell in got[1:5]] == [mean] * 4, got
        assert got[5].split(" (")[0] == less and got[6] == "4"
    assert "2 raters: Ann and Ben." in found
    assert cells(found, "Fluency")[2] == "11", "answers that both have graded"


def test_a_text_that_several_wrote_counts_for_each_and_one_that_was_changed_for_none(tmp_path, undrawn):
    folder = tmp_path / "results"
    same = fabricate.outputs("qlora")
    for name in ("base", "qlora"):
        fabricate.keep(folder, fabricate.record(name), same)
    store = Store(folder)
    grade(store, "Ann", drawn(store), lambda question, text: 2 if question.row[0] == "a" else 4)
    found = section(report(store, tmp_path))
    assert cells(found, "Base")[1:5] == cells(found, "QLoRA")[1:5]
    assert cells(found, "QLoRA")[5] == "+0.00", "every prompt: no interval"
    assert cells(found, "Fluency")[1] == "–", "one rater agrees with nobody"
    grade(store, "Ben", drawn(store), lambda question, text: 2 if question.row[0] == "a" else 4)
    assert cells(section(report(store, tmp_path)), "Fluency")[1:] == ["1.00", "10"]
    fabricate.keep(folder, fabricate.record("lora"), same)
    fabricate.keep(folder, fabricate.record("qlora"), [o | {"output": o["output"] + " indeed"} for o in same])
    found = section(report(Store(folder), tmp_path))
    assert cells(found, "Base") and cells(found, "LoRA") and "| QLoRA |" not in found


def test_a_raters_name_is_text(store, tmp_path, undrawn):
    grade(store, "<script>alert(1)</script> | *Ann*", drawn(store, 2), lambda question, text: 3)
    render(store, tmp_path, now="now")
    assert "<script>alert" not in (tmp_path / "report.html").read_text()
    assert r"\<script\>alert(1)\</script\> \| \*Ann\*" in (tmp_path / "report.md").read_text()


def test_alpha_is_krippendorffs():
    grades = np.array([[np.nan if c == "." else float(c) for c in line] for line in PUBLISHED])
    given = np.repeat(grades[:, :, None, None], 3, 3)  # raters, prompts, one technique, criteria
    table = told.agreement([[f"text {i}"] for i in range(12)], given)
    for row in table.rows:
        assert row[1].startswith("0.81 (") or row[1].startswith("0.82 (")
        assert row[2] == "11", "one unit has one observer"
    counts = (grades.T[:, :, None] == np.arange(6)).sum(1)
    assert told.alpha(counts) == pytest.approx(0.815, abs=5e-4)


def test_the_interval_of_ten_prompts_holds_as_often_as_it_says():
    luck, held = np.random.default_rng(1), 0
    chances = np.array([0.1, 0.1, 0.15, 0.25, 0.25, 0.15])
    truth = chances @ np.arange(6)
    for _ in range(400):
        low, high = told.interval(luck.choice(6, 10, p=chances).astype(float))
        held += low <= truth <= high
    assert 0.93 <= held / 400 <= 0.98  # a plain percentile bootstrap: 0.90


def test_an_interval_of_too_little_is_unknown():
    """Fewer than six lie on one side of the median in more than 5 of 100 cases: 2 / 2^5."""
    for values in ([3.0], [1.0, 3.0], [0.0, 1.0, 3.0, 4.0, 5.0], [3.0] * 10):
        assert np.isnan(told.interval(np.array(values))).all()
    low, high = told.interval(np.array([0.0, 1.0, 3.0, 4.0, 5.0, 5.0]))
    assert 0 <= low < 3 < high <= 5


# In a browser, by keyboard alone


def command(folder: Path) -> tuple[subprocess.Popen, str]:
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "run_bench.py"), "grade", "--prompts", "3", "--json"],
        cwd=folder, stdout=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # the suite may run behind an &
    )  # fmt: skip
    return process, json.loads(process.stdout.readline())["address"]


def test_from_the_first_grade_to_the_report(tmp_path, browser, undrawn):
    folder = tmp_path / "results"
    for name, text in (("base", ""), ("qlora", HOSTILE), ("galore", LONG)):
        rows = [o | {"output": text} for o in fabricate.outputs(name, rows=3)]
        fabricate.keep(folder, fabricate.record(name), rows)
    process, address = command(tmp_path)
    page = browser.new_page()
    seen, complaints = [], []
    page.on("dialog", lambda dialog: complaints.append(dialog.message))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: seen.append(request.url))
    try:
        page.goto(address)
        page.locator("#name:focus").wait_for()
        page.keyboard.type("Ann <i>")
        page.keyboard.press("Enter")
        page.locator("#sheet").wait_for()
        texts = page.locator(".answer .text").all_text_contents()
        assert len(texts) == 3 and "(empty)" in texts
        hostile = next(text for text in texts if "script" in text)
        assert hostile == HOSTILE.replace("\x1b", "⟨U+001B⟩").replace("\u202e", "⟨U+202E⟩").replace(
            "\0", "⟨U+0000⟩"
        )
        assert next(len(text) for text in texts if "word" in text) < 21_000 and "characters more" in str(
            texts
        )
        assert (
            page.locator("main img, main script, main b img").count() == 0
            and page.locator("#rater i").count() == 0
        )
        source = page.content() + page.evaluate("JSON.stringify([about, sheet])")
        assert not re.search(r"qlora|galore|\bbase-s|-s0-", source, re.I)

        order = [text[:1] for text in texts]  # "(", "<" or "w"
        value = {"(": 0, "<": 5, "w": 3}
        for c in order[:2]:
            for _ in CRITERIA:
                page.keyboard.press(str(value[c]))
        long = page.locator(".answer .text", has_text="word")
        while "word" not in page.locator(".answer", has=page.locator(".row.here")).text_content():
            page.keyboard.press("ArrowUp")
        page.keyboard.press("Space")
        page.keyboard.press("r")
        assert long.evaluate("text => text.scrollTop") > 0 and page.locator("#reference").is_visible()
        while page.locator(".row.here").get_attribute("aria-label") != "Answer C, fluency":
            page.keyboard.press("ArrowDown")
        page.keyboard.press("1")  # a slip, in the next answer
        page.get_by_text("Answer C, fluency: 1, saved.").wait_for()
        page.keyboard.press("ArrowUp")
        page.keyboard.press("Backspace")
        page.get_by_text("Answer C, fluency: taken back, saved.").wait_for()
        page.reload()
        page.locator("#sheet").wait_for()
        assert page.locator("#count").text_content() == "6 of 27 grades", "a refresh loses nothing"
        assert page.locator(".row.here").get_attribute("aria-label") == "Answer C, fluency"
        page.keyboard.press(str(value[order[2]]))
        page.get_by_text(f"Answer C, fluency: {value[order[2]]}, saved.").wait_for()

        process.send_signal(signal.SIGKILL)
        process.wait()
        page.keyboard.press("5")
        page.get_by_text("not saved: the server is not there").wait_for()
        assert page.locator("#count").text_content() == "7 of 27 grades", "what was not saved is not shown"
        assert page.locator(".row.here").get_attribute("aria-label") == "Answer C, relevance", (
            "its place again"
        )
        process, address = command(tmp_path)
        page.goto(address)
        assert page.locator("#known").text_content() == "Raters so far: Ann <i>."
        page.locator("#name:focus").wait_for()
        page.keyboard.type("ann <I>")
        page.keyboard.press("Enter")
        page.locator("#sheet").wait_for()
        assert page.locator("#count").text_content() == "7 of 27 grades", "a kill loses nothing"
        assert page.locator(".row.here").get_attribute("aria-label") == "Answer C, relevance"
        while not page.locator("#end").is_visible():
            if not page.evaluate("at < sheet.questions.length && open(sheet.questions[at]) >= 0"):
                page.keyboard.press("Enter")
                page.wait_for_timeout(30)
                continue
            card = page.locator(".answer", has=page.locator(".row.here"))
            page.keyboard.press(str(value[card.locator(".text").text_content()[0]]))
        page.keyboard.press("7")  # no grade, and no place for one
        assert page.evaluate("window.hit") is None and not complaints
        host = address.split("/")[2]
        assert {url.split("/")[2] for url in seen if not url.startswith("data:")} <= {
            host,
            seen[0].split("/")[2],
        }
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
    found = section(report(Store(folder), tmp_path))
    for label, mean in (("Base", "0.00"), ("QLoRA", "5.00"), ("GaLore", "3.00")):
        assert cells(found, label)[1:5] == [mean] * 4 and cells(found, label)[6] == "3"
