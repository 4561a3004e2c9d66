"""What is asked: some test rows, and under each the different answers to it, in no method's order."""

from collections.abc import Iterable
from dataclasses import dataclass

from harness.grade.grades import CRITERIA, HIGHEST, Grades
from harness.plain import plain, shorten
from harness.record import RunRecord
from harness.spec import digest
from harness.store import Store

LONGEST = 20_000  # characters of a shown text: more than anybody reads, less than slows a browser


@dataclass(frozen=True)
class Question:
    """A test row. `answers`: key -> text, each text once, however many methods wrote it."""

    row: str
    prompt: str
    reference: str
    answers: dict[str, str]


@dataclass(frozen=True)
class Sheet:
    title: str  # of the comparison; it names no method
    questions: list[Question]

    @classmethod
    def drawn(cls, title: str, store: Store, runs: Iterable[RunRecord], prompts: int, seed: int) -> "Sheet":
        """`prompts` of the test rows that the runs share; of fewer rows, all. More prompts of the same seed
        are the same ones and others."""
        tested = [store.outputs(run) for run in runs]
        rows = sorted(range(len(tested[0])), key=lambda i: digest([seed, tested[0][i]["id"]]))[:prompts]
        found = []
        for i in rows:
            first = tested[0][i]
            answers = {key(outputs[i]): outputs[i]["output"] for outputs in tested}
            found.append(Question(first["id"], first["prompt"], first["reference"], answers))
        return cls(title, found)

    @property
    def answers(self) -> int:
        return sum(len(question.answers) for question in self.questions)

    def start(self, grades: Grades) -> dict:
        """For a rater who has not said who it is."""
        raters, _ = grades.load()
        return {
            "title": plain(self.title), "prompts": len(self.questions), "answers": self.answers,
            "criteria": CRITERIA, "highest": HIGHEST, "raters": [rater["rater"] for rater in raters],
        }  # fmt: skip

    def of(self, name: str, grades: Grades) -> dict:
        """For one rater: the answers in an order of its own, and what it said of them."""
        rater = grades.of(name)
        given = {k: graded["grades"] for k, graded in rater["answers"].items()}
        questions = [
            {
                "prompt": shown(question.prompt),
                "reference": shown(question.reference),
                "answers": [
                    {"key": k, "text": shown(question.answers[k]),
                     "grades": {c: given.get(k, {}).get(c) for c in CRITERIA}}
                    for k in sorted(question.answers, key=lambda k: digest([rater["rater"].casefold(), k]))
                ],
            }
            for question in self.questions
        ]  # fmt: skip
        return {"rater": rater["rater"], "questions": questions}

    def row(self, answer: str) -> str:
        """That an answer is to. Raises ValueError for an answer that was not asked about."""
        for question in self.questions:
            if answer in question.answers:
                return question.row
        raise ValueError("no such answer on this sheet: load the page again")


def key(output: dict) -> str:
    """Of a text under a test row: the same for all who wrote it, and of a run that wrote it again."""
    return digest([output["id"], output["prompt"], output["output"]])


def shown(text: str) -> str:
    return shorten(plain(text), LONGEST)
