import threading

import pytest

from engine.core.streaming import Workers


def test_no_more_than_the_limit_is_under_way() -> None:
    gate, begun = threading.Event(), []

    def work() -> None:
        begun.append(threading.current_thread().name)
        gate.wait(10)

    with Workers(threads=2, limit=2) as workers:
        workers.do(work)
        workers.do(work)
        assert not workers.idle
        late = threading.Timer(0.05, gate.set)
        late.start()
        workers.do(work)  # waits for one of the others
        assert gate.is_set()
        workers.wait()
        assert workers.idle
    assert len(begun) == 3
    assert all(name.startswith("bands") for name in begun)
    assert not [t for t in threading.enumerate() if t.name.startswith("bands")]


@pytest.mark.parametrize("how", ["wait", "do"])
def test_an_error_reaches_the_caller_as_it_is(how: str) -> None:
    def fails() -> None:
        raise ConnectionError("the disk went away")

    with Workers(threads=1, limit=1) as workers:
        workers.do(fails)
        with pytest.raises(ConnectionError, match="the disk went away"):
            workers.do(lambda: None) if how == "do" else workers.wait()


def test_leaving_waits_for_what_is_at_work_and_drops_the_rest() -> None:
    gate, done = threading.Event(), []

    def work(number: int) -> None:
        gate.wait(10)
        done.append(number)

    begun = threading.Event()

    def first() -> None:
        begun.set()
        work(0)

    with Workers(threads=1, limit=3) as workers:
        workers.do(first)
        workers.do(lambda: work(1))
        begun.wait(10)
        threading.Timer(0.05, gate.set).start()
    assert done == [0]


def test_outside_there_are_no_threads() -> None:
    with pytest.raises(RuntimeError, match="inside `with`"):
        Workers().do(lambda: None)
