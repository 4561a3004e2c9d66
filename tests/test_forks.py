import os
import signal
import sys
import threading

import pytest

from harness.forks import each

linux = pytest.mark.skipif(sys.platform != "linux", reason="copies are made on Linux alone")


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """Also where the tests themselves run beside threads."""
    monkeypatch.setattr(threading, "active_count", lambda: 1)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2})


@linux
def test_work_is_shared_out_and_comes_back_in_order():
    things = [lambda i=i: i for i in range(20)]  # which cannot be sent
    found = each(lambda thing: (thing(), os.getpid()), things)
    assert [i for i, _ in found] == list(range(20))
    assert os.getpid() not in {where for _, where in found}


@linux
def test_beside_other_threads_nothing_is_copied(monkeypatch):
    monkeypatch.setattr(threading, "active_count", lambda: 2)
    assert set(each(lambda _: os.getpid(), [0, 1])) == {os.getpid()}


@linux
def test_what_work_raises_is_raised():
    with pytest.raises(ZeroDivisionError):
        each(lambda i: 1 // i, [1, 0, 2])


@linux
def test_the_work_of_a_copy_that_was_killed_is_done_here():
    here = os.getpid()

    def work(i):
        if i == 1 and os.getpid() != here:
            os.kill(os.getpid(), signal.SIGKILL)
        return i

    assert each(work, [0, 1, 2, 3]) == [0, 1, 2, 3]
