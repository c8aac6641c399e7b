import threading

import pytest

from engine.workers import Workers


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

    with pytest.raises(ConnectionError, match="the disk went away"), Workers(threads=1, limit=1) as workers:
        workers.do(fails)
        if how == "do":
            workers.do(lambda: None)
        workers.wait()


def test_leaving_waits_for_what_is_at_work_and_drops_the_rest() -> None:
    gate, done = threading.Event(), []

    def work(number: int) -> None:
        gate.wait(10)
        done.append(number)

    with pytest.raises(KeyboardInterrupt), Workers(threads=1, limit=3) as workers:
        for number in range(3):
            workers.do(lambda n=number: work(n))
        threading.Timer(0.05, gate.set).start()
        raise KeyboardInterrupt
    assert done == [0]


def test_outside_there_are_no_threads() -> None:
    with pytest.raises(RuntimeError, match="inside `with`"):
        Workers().do(lambda: None)
