"""With what a run was made: the commit is Tuneoff's own, or none."""

import subprocess
from dataclasses import replace

import pytest

import harness
from harness.record import Provenance
from harness.training import environment


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A repository, somebody's, and in a folder of it the files of Tuneoff."""
    root = tmp_path / "lib" / "site-packages"
    (root / "harness").mkdir(parents=True)
    (root / "harness" / "__init__.py").write_text("")
    (tmp_path / "paper.tex").write_text("1")
    monkeypatch.setattr(environment, "ROOT", root)
    for key, value in (("GIT_CONFIG_GLOBAL", "/dev/null"), ("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))):
        monkeypatch.setenv(key, value)
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", "paper.tex")
    commit(tmp_path)
    return tmp_path


def git(folder, *command) -> str:
    named = ["-c", "user.name=a", "-c", "user.email=a@b.example"]
    done = subprocess.run(["git", *named, *command], cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def commit(folder) -> str:
    git(folder, "commit", "--quiet", "--message", "x")
    return git(folder, "rev-parse", "--short=12", "HEAD")


def test_the_repository_around_an_installation_is_another_programs(place):
    assert environment.source() == {"version": harness.__version__, "commit": None, "dirty": None}


def test_a_commit_is_of_our_own_files_and_says_whether_they_were_changed(place):
    git(place, "add", "lib")
    own = commit(place)
    (place / "paper.tex").write_text("2")  # beside us, in the same repository
    assert environment.source() == {"version": harness.__version__, "commit": own, "dirty": False}
    (environment.ROOT / "harness" / "__init__.py").write_text("changed = True")
    assert environment.source()["dirty"] is True


def test_without_git_the_version_says_which_code_it_was(place, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert environment.source() == {"version": harness.__version__, "commit": None, "dirty": None}


def test_the_code_is_named_by_its_commit_else_by_its_version():
    made = Provenance(version="0.1.0", commit="0123456789ab", dirty=False)
    assert made.code == "0123456789ab" and replace(made, dirty=True).code == "0123456789ab+"
    assert replace(made, commit=None, dirty=None).code == "0.1.0" and Provenance().code is None
