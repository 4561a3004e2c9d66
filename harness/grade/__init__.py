"""Answers graded by people: what is asked, what was said, and the page between them. Never torch.

A grade belongs to a text under a test row. So no file, and nothing that the page is sent, says which method
wrote what: the report finds it out.
"""

from harness.grade.grades import CRITERIA, HIGHEST, Graded, Grades
from harness.grade.server import serving
from harness.grade.sheet import Sheet, key

__all__ = ["CRITERIA", "HIGHEST", "Graded", "Grades", "Sheet", "key", "serving"]
