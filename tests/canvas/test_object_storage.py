"""The canvas in object storage: the same promises as on a disk, kept by conditional writes; every refusal in words.

memory:// stands for any store where only the order of operations matters, a local S3-compatible server for the rest.
"""

import contextlib
import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import obstore
import pytest
from obstore.store import MemoryStore

from engine.canvas import lease, object_client
from engine.canvas.canvas import Canvas, Progress
from engine.canvas.object_client import Objects
from engine.canvas.object_storage import ObjectStorage
from engine.canvas.storage import open_storage
from engine.canvas.view import CanvasView
from engine.core.errors import CanvasError, CanvasMismatchError, EngineError
from tests.support.storage_contract import KEYS, LEVELS, Place, StorageTests, assert_holds, committed, write_step


class Memory:
    """A bucket in memory, seen anew by every process that connects."""

    def __init__(self) -> None:
        self.store, self.chunks = MemoryStore(), MemoryStore()

    def connect(self) -> ObjectStorage:
        return ObjectStorage("memory://bucket/run", self.store, self.chunks)

    def kill(self) -> None:
        """Leave what a killed process of this machine leaves: a lease of a process that is gone."""
        found = Objects("memory", self.store).get("run.lock")
        if found is not None and json.loads(found[0])["owner"] is not None:
            self.own(started=-1)

    def own(self, **owner: object) -> None:
        """Rewrite the owner of the lease."""
        record = json.loads(obstore.get(self.store, "run.lock").bytes().to_bytes())
        record["owner"] |= owner
        obstore.put(self.store, "run.lock", json.dumps(record).encode())


def folder_of(tmp_path: Path) -> Callable[[], Path]:
    """Return a maker of new run folders: every process has one of its own."""
    count = iter(range(10_000))
    return lambda: tmp_path / f"machine-{next(count)}" / "run"


@pytest.fixture(params=["s3", "file"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return request.getfixturevalue("s3_url") if request.param == "s3" else (tmp_path / "shared space").as_uri()


class TestBelowAUrl(StorageTests):
    @pytest.fixture
    def place(self, url: str, tmp_path: Path) -> Place:
        return Place(tmp_path, url)


def test_what_is_decoded_counts_where_it_lies(url: str, tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    with Canvas.open(here, KEYS, LEVELS, open_storage(url)) as canvas:
        committed(canvas, 1)
        canvas.record(decoded_px=1024)
    with Canvas.open(there, KEYS, LEVELS, open_storage(url)) as canvas:
        assert canvas.progress == Progress(0, 1)
    with Canvas.open(here, KEYS, LEVELS, open_storage(url)) as canvas:
        assert canvas.progress == Progress(0, 1, decoded_px=1024)
    with Canvas.open(there, KEYS, LEVELS, open_storage(url)) as canvas:
        committed(canvas, 2)
    with Canvas.open(here, KEYS, LEVELS, open_storage(url)) as canvas:
        assert canvas.progress == Progress(0, 2)


class Killed(BaseException):
    """What a process does not live to handle."""


class Death:
    """Kills the process at its nth write or deletion, when it is done or before; then nothing works any more."""

    def __init__(self, patch: pytest.MonkeyPatch, number: int, done: bool) -> None:
        self.left, self.done, self.dead = number, done, False
        for name in ("put", "delete"):
            patch.setattr(obstore, name, self.plain(getattr(obstore, name)))
            patch.setattr(obstore, f"{name}_async", self.later(getattr(obstore, f"{name}_async")))

    def begins(self) -> None:
        self.left -= 1
        self.dead = self.dead or self.left == 0
        if self.dead and not (self.done and self.left == 0):
            raise Killed

    def plain(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **options: Any) -> Any:
            self.begins()
            try:
                return call(*args, **options)
            finally:
                if self.dead:
                    raise Killed

        return wrapped

    def later(self, call: Callable[..., Any]) -> Callable[..., Any]:
        async def wrapped(*args: Any, **options: Any) -> Any:
            self.begins()
            try:
                return await call(*args, **options)
            finally:
                if self.dead:
                    raise Killed

        return wrapped


@pytest.mark.parametrize("done", [False, True])
def test_death_at_any_operation_leaves_a_committed_step(
    done: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two steps, then a death in the third one's opening, writing, commit or clearing, each on another machine."""
    new, number, seen = folder_of(tmp_path), 0, set()
    while True:
        number += 1
        bucket = Memory()
        with Canvas.open(new(), KEYS, LEVELS, bucket.connect()) as canvas:
            committed(canvas, 1)
            committed(canvas, 2)
        with monkeypatch.context() as patch:
            death = Death(patch, number, done)
            with contextlib.suppress(Killed), Canvas.open(new(), KEYS, LEVELS, bucket.connect()) as canvas:
                committed(canvas, 3)
        if not death.dead:
            break
        bucket.kill()
        with Canvas.open(new(), KEYS, LEVELS, bucket.connect()) as canvas:
            step = canvas.progress.steps
            seen.add(step)
            assert_holds(canvas, step)
            committed(canvas, step + 1)
            assert_holds(canvas, step + 1)
    assert number > 20
    assert seen == {2, 3}


@pytest.mark.parametrize("done", [False, True])
def test_death_while_the_run_is_made_is_made_good(done: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    new = folder_of(tmp_path)
    for number in range(1, 12):
        bucket = Memory()
        with monkeypatch.context() as patch:
            Death(patch, number, done)
            with pytest.raises(Killed), Canvas.open(new(), KEYS, LEVELS, bucket.connect()) as canvas:
                write_step(canvas, 1)
        bucket.kill()
        with Canvas.open(new(), KEYS, LEVELS, bucket.connect()) as canvas:
            assert canvas.fresh
            committed(canvas, 1)
            assert_holds(canvas, 1)


def test_arrays_of_earlier_writers_go_when_nothing_names_them(tmp_path: Path) -> None:
    bucket, new = Memory(), folder_of(tmp_path)
    for step in (1, 2, 3):
        with Canvas.open(new(), KEYS, LEVELS, bucket.connect()) as canvas:
            committed(canvas, step)
    chunks = Objects("memory", bucket.chunks)
    assert [n for n in chunks.children("20x") if n.startswith("latent")] == ["latent_6", "latent_7"]


def test_a_sleeper_who_wakes_spoils_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lease passes to another machine while its owner does not run; then the owner goes on."""
    monkeypatch.setattr(lease, "WATCH_S", 0.2)
    monkeypatch.setattr(lease, "BEAT_S", 1e6)
    bucket = Memory()
    with Canvas.open(tmp_path / "sleeper", KEYS, LEVELS, bucket.connect()) as sleeper:
        committed(sleeper, 1)
        committed(sleeper, 2)
        write_step(sleeper, 3, ("1.25x",))
        bucket.own(machine="another")
        with Canvas.open(tmp_path / "next", KEYS, LEVELS, bucket.connect()) as canvas:
            for step in (3, 4, 5):
                committed(canvas, step)
                write_step(sleeper, 3)  # into arrays that no state names
                assert_holds(canvas, step)
            with pytest.raises(CanvasError, match=r"state\.json must be written by one run at a time"):
                sleeper.commit(0, 3)
            assert_holds(canvas, 5)
    with Canvas.open(tmp_path / "last", KEYS, LEVELS, bucket.connect()) as canvas:
        assert canvas.progress == Progress(0, 5)
        assert_holds(canvas, 5)


def test_a_lost_lease_is_noticed_at_the_next_beat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "BEAT_S", 0.01)
    bucket = Memory()
    storage = bucket.connect()
    with Canvas.open(tmp_path / "run", KEYS, LEVELS, storage) as canvas:
        bucket.own(machine="another")
        storage._lease._thread.join(20)  # type: ignore[union-attr]  # it ends with the beat that is refused
        with pytest.raises(CanvasError, match="another run has taken it"):
            write_step(canvas, 1)


def test_second_run_is_refused_while_the_first_lives(s3_url: str, tmp_path: Path) -> None:
    new = folder_of(tmp_path)
    with (
        Canvas.open(new(), KEYS, LEVELS, open_storage(s3_url)) as canvas,
        pytest.raises(CanvasError, match=f"one run at a time.*process {os.getpid()}"),
    ):
        Canvas.open(new(), KEYS, LEVELS, open_storage(s3_url))
    committed_before = canvas.progress
    with Canvas.open(new(), KEYS, LEVELS, open_storage(s3_url)) as canvas:  # at once: it was given back
        assert canvas.progress == committed_before


def test_run_on_another_machine_is_refused_at_its_next_beat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "BEAT_S", 0.1)
    bucket, new = Memory(), folder_of(tmp_path)
    me = lease._myself
    monkeypatch.setattr(lease, "_myself", lambda: me() | {"machine": "another", "host": "node7"})
    with Canvas.open(new(), KEYS, LEVELS, bucket.connect()):
        monkeypatch.setattr(lease, "_myself", me)
        end = time.monotonic() + 200
        while "node7" not in bucket.store.get("run.lock").bytes().to_bytes().decode() and time.monotonic() < end:
            time.sleep(0.01)
        monkeypatch.setattr(lease, "_is_gone", lambda owner: None)  # its beats are of this machine now
        with pytest.raises(CanvasError, match="in use by process"):
            Canvas.open(new(), KEYS, LEVELS, bucket.connect())


def test_silent_lease_of_another_machine_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "WATCH_S", 0.2)
    monkeypatch.setattr(lease, "BEAT_S", 1e6)
    bucket, new = Memory(), folder_of(tmp_path)
    canvas = Canvas.open(new(), KEYS, LEVELS, bucket.connect())
    committed(canvas, 1)
    bucket.own(machine="another")
    with Canvas.open(new(), KEYS, LEVELS, bucket.connect()) as taken:
        assert_holds(taken, 1)
    canvas.close()


def test_processes_that_ended_are_told_from_living_ones() -> None:
    me = lease._myself()
    assert lease._is_gone(me) is False  # type: ignore[arg-type]
    assert lease._is_gone(me | {"started": 1}) is True  # type: ignore[operator]  # the number was given anew
    assert lease._is_gone(me | {"namespace": "pid:[1]"}) is None  # type: ignore[operator]
    with subprocess.Popen([sys.executable, "-c", ""], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.read()
        end = time.monotonic() + 200
        while lease._started(child.pid) is not None and time.monotonic() < end:  # dead, and not yet waited for
            time.sleep(0.01)
        assert lease._is_gone(me | {"process": child.pid}) is True  # type: ignore[operator]


def test_store_that_ignores_conditions_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put = obstore.put
    monkeypatch.setattr(obstore, "put", lambda store, name, data, mode=None, **kw: put(store, name, data, **kw))
    with pytest.raises(CanvasError, match="must refuse a write whose condition"):
        Canvas.open(tmp_path / "run", KEYS, LEVELS, Memory().connect())


def test_store_without_conditions_is_refused(tmp_path: Path) -> None:
    (tmp_path / "objects").mkdir()
    store = obstore.store.LocalStore(tmp_path / "objects")  # knows If-None-Match, not If-Match
    with pytest.raises(CanvasError, match="must know conditional writes"):
        Canvas.open(tmp_path / "run", KEYS, LEVELS, ObjectStorage("local", store, store))


def test_foreign_prefix_is_refused_and_left_alone(s3_url: str, tmp_path: Path) -> None:
    store = object_client.connect(s3_url)
    store.put("thesis.tex", b"mine")
    with pytest.raises(CanvasError, match=r"thesis\.tex.*another canvas\.store"):
        Canvas.open(tmp_path / "run", KEYS, LEVELS, open_storage(s3_url))
    assert Objects("", store).children() == ["thesis.tex"]
    assert not (tmp_path / "run").exists()


def test_latents_without_state_are_not_overwritten(s3_url: str, tmp_path: Path) -> None:
    with Canvas.open(tmp_path / "run", KEYS, LEVELS, open_storage(s3_url)) as canvas:
        committed(canvas, 1)
    object_client.connect(s3_url).delete("state.json")
    with pytest.raises(CanvasError, match=r"canvas\.zarr.*Restore state\.json"):
        Canvas.open(tmp_path / "run", KEYS, LEVELS, open_storage(s3_url))


def test_garbled_state_and_lease_are_named(s3_url: str, tmp_path: Path) -> None:
    with Canvas.open(tmp_path / "run", KEYS, LEVELS, open_storage(s3_url)) as canvas:
        committed(canvas, 1)
    store = object_client.connect(s3_url)
    good = store.get("state.json").bytes().to_bytes()
    store.put("state.json", good.replace(b'"steps": 1', b'"steps": 3'))
    with pytest.raises(CanvasError, match=rf"{s3_url}/state\.json must.*remove {s3_url} or"):
        Canvas.open(tmp_path / "run", KEYS, LEVELS, open_storage(s3_url))
    store.put("state.json", good)
    store.put("run.lock", b"\xff")
    with pytest.raises(CanvasError, match=rf"{s3_url}/run\.lock must be a lease"):
        Canvas.open(tmp_path / "run", KEYS, LEVELS, open_storage(s3_url))


def test_a_folder_stays_with_its_storage(url: str, tmp_path: Path) -> None:
    Canvas.open(tmp_path / "local", KEYS, LEVELS).close()
    with pytest.raises(CanvasMismatchError, match=f"latents in the folder itself; got canvas.store={url}"):
        Canvas.open(tmp_path / "local", KEYS, LEVELS, open_storage(url))
    Canvas.open(tmp_path / "away", KEYS, LEVELS, open_storage(url)).close()
    for other in (None, open_storage((tmp_path / "elsewhere").as_uri())):
        with pytest.raises(CanvasMismatchError, match="Use the old value, or another output.folder"):
            Canvas.open(tmp_path / "away", KEYS, LEVELS, other)
    with pytest.raises(CanvasError, match="must be another folder than output.folder"):
        Canvas.open(tmp_path / "same", KEYS, LEVELS, open_storage((tmp_path / "same").as_uri()))


def test_server_that_is_gone_is_an_error_with_words(
    s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing listens at port 9 (discard) of this machine."""
    with Canvas.open(tmp_path / "run", KEYS, LEVELS, open_storage(s3_url)) as canvas:
        committed(canvas, 1)
    monkeypatch.setattr(object_client, "PATIENCE_S", 0.3)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(CanvasError, match=r"must answer within 0\.3 s.*127\.0\.0\.1:9.*Nothing committed is lost"):
        Canvas.open(tmp_path / "run", KEYS, LEVELS, open_storage(s3_url))
    with pytest.raises(CanvasError, match="must answer"):
        CanvasView(tmp_path / "run")


def test_server_lost_in_a_step_keeps_the_committed_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def gone(*_: object, **__: object) -> None:
        raise obstore.exceptions.GenericError("Generic S3 error: no route to host")

    bucket = Memory()
    with Canvas.open(tmp_path / "run", KEYS, LEVELS, bucket.connect()) as canvas:
        committed(canvas, 1)
        with monkeypatch.context() as patch:
            patch.setattr(obstore, "put_async", gone)
            patch.setattr(obstore, "get_async", gone)
            with pytest.raises(CanvasError, match=r"rows 0\.\.\d+, cannot be written; the store must answer"):
                write_step(canvas, 2)
            with pytest.raises(CanvasError, match=r"rows 0\.\.520, cannot be read; the store must answer"):
                canvas.read("20x", 0, 520)
        assert_holds(canvas, 1)
        committed(canvas, 2)
        assert_holds(canvas, 2)


def test_missing_bucket_is_named(s3_url: str, tmp_path: Path) -> None:
    where = s3_url.replace("canvases", "nobodys")
    with pytest.raises(CanvasError, match=rf"{where}.*the bucket must be there.*NoSuchBucket.*canvas\.store"):
        Canvas.open(tmp_path / "run", KEYS, LEVELS, open_storage(where))


def test_wrong_credentials_are_named_and_not_repeated(s3_url: str, s3_endpoint: str, tmp_path: Path) -> None:
    def checked_after(requests: str) -> None:
        """Let the server check credentials after so many requests; it knows none."""
        url, plain = f"{s3_endpoint}/moto-api/reset-auth", {"Content-Type": "text/plain"}
        urllib.request.urlopen(urllib.request.Request(url, requests.encode(), plain)).close()

    checked_after("0")
    try:
        with pytest.raises(
            CanvasError, match=r"credentials must allow.*InvalidAccessKeyId.*AWS_ACCESS_KEY_ID"
        ) as error:
            Canvas.open(tmp_path / "run", KEYS, LEVELS, open_storage(s3_url))
    finally:
        checked_after("inf")
    assert "told-to-nobody" not in str(error.value)
    assert "an-owner" not in str(error.value)


def test_url_and_package_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CanvasError, match="must name a bucket"):
        open_storage("az://container/run")  # the environment names no account
    monkeypatch.setitem(sys.modules, "engine.canvas.object_storage", None)
    with pytest.raises(EngineError, match=r"package obstore.*\[cloud\]"):
        open_storage("s3://bucket/run")


def test_a_copy_of_the_prefix_is_a_run_folder(s3_url: str, tmp_path: Path) -> None:
    """What lies in a store is what lies on a disk, so that a run can be brought home."""
    with Canvas.open(tmp_path / "run", KEYS, LEVELS, open_storage(s3_url)) as canvas:
        committed(canvas, 1)
    store = object_client.connect(s3_url)
    for entry in store.list().collect():
        path = tmp_path / "copy" / entry["path"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(store.get(entry["path"]).bytes().to_bytes())
    with Canvas.open(tmp_path / "copy", KEYS, LEVELS) as canvas:
        assert_holds(canvas, 1)
        committed(canvas, 2)
        assert_holds(canvas, 2)
