"""The doctor: what it says of machines that lack something, when it fails, and that it waits for nobody long."""

import json
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

from engine._backends.cluster import find_cluster
from engine.core.runtime import Hardware
from engine.doctor import main
from engine.installation import machine, reach
from engine.installation.findings import BROKEN, NOTE, OK, Finding, as_text

ANSWER: Any = SimpleNamespace(status_code=403, headers={}, request=None)


def test_it_reads_well_and_asks_nobody(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--wait_s", "0"]) == 0
    said = capsys.readouterr().out
    for subject in ("Python", "packages", "device", "bfloat16", "dtype", "OpenSlide", "Ray", "/dev/shm", "Hub", "UNI"):
        assert f"\n{subject} " in f"\n{said}", subject
    assert "model.dtype=auto will choose float32" in said
    assert said.endswith("Nothing that the engine needs is broken.\n")
    assert max(map(len, said.splitlines())) <= 110


def test_something_broken_is_code_1_and_has_a_remedy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        machine.metadata, "requires", lambda _: ["numpy>=99", "not-there-at-all", 'obstore; extra == "cloud"']
    )
    assert main(["--wait_s", "0", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    (found,) = [one for one in report["findings"] if one["subject"] == "packages"]
    assert report["broken"]
    assert (found["state"], "pip install" in found["remedy"]) == (BROKEN, True)
    assert "numpy" in found["text"]
    assert "not-there-at-all is absent" in found["text"]


def test_an_extra_that_is_absent_says_what_it_is_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.metadata, "requires", lambda _: ["numpy", 'not-there; extra == "cloud"'])
    found = {one.subject: one for one in machine.packages()}
    assert found["packages"].state == OK
    assert found["extra 'cloud'"].state == NOTE
    assert "buckets" in found["extra 'cloud'"].text
    assert found["extra 'cloud'"].remedy == "pip install -c constraints.txt -e '.[cloud]'"


@pytest.mark.parametrize(
    ("hardware", "chosen"),
    [
        (Hardware("cpu", "an old CPU", None), "float32: an old CPU multiplies no bfloat16"),
        (Hardware("cpu", "a new CPU", "AMX"), r"bfloat16: a new CPU multiplies bfloat16 \(AMX\)"),
    ],
)
def test_it_says_what_auto_will_choose_and_why(
    monkeypatch: pytest.MonkeyPatch, hardware: Hardware, chosen: str
) -> None:
    monkeypatch.setattr(machine, "hardware_of", lambda _: hardware)
    text = as_text(list(machine.arithmetic()))
    assert chosen.replace("\\", "") in " ".join(text.split())


def test_a_device_that_does_not_compute_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("no kernel image is available for execution on the device\nmore")

    monkeypatch.setattr(machine.torch, "eye", fails)
    (found,) = [one for one in machine.arithmetic() if one.subject == "device"]
    assert found.state == BROKEN
    assert found.text.endswith("no kernel image is available for execution on the device")
    assert "--model.device cpu" in found.remedy


def of_models(ask: Callable[[str], None], wait_s: float = 5.0) -> dict[str, Finding]:
    return {found.subject: found for found in reach.hub(wait_s, ask)}


@pytest.fixture
def nothing_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reach, "try_to_load_from_cache", lambda *_: None)
    monkeypatch.setattr(reach.constants, "HF_HUB_OFFLINE", False)


@pytest.mark.usefixtures("nothing_cached")
def test_gated_hidden_and_open_models() -> None:
    def ask(repo: str) -> None:
        if "UNI" in repo:
            raise GatedRepoError("gated", response=ANSWER)
        if "phikon" in repo:
            raise RepositoryNotFoundError("unknown", response=ANSWER)

    found = of_models(ask)
    assert "answers" in found["Hub"].text
    assert "hf auth login" in found["UNI"].remedy
    assert "does not show it" in found["phikon"].text
    assert found["ZoomLDM"].text.endswith("may be fetched")


@pytest.mark.usefixtures("nothing_cached")
def test_without_a_network_it_says_so_and_waits_for_nobody() -> None:
    never = threading.Event()

    def silent(_: str) -> None:
        never.wait()

    def refused(_: str) -> None:
        raise OSError("Network is unreachable")

    try:
        for ask, wait_s in ((silent, 0.01), (refused, 5.0)):
            found = of_models(ask, wait_s)
            assert "does not answer" in found["Hub"].text
            assert "cannot be fetched now" in found["UNI"].text
    finally:
        never.set()


def test_what_is_cached_needs_no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reach, "try_to_load_from_cache", lambda repo, file: f"/cache/{repo}/{file}")
    monkeypatch.setattr(reach.constants, "HF_HUB_OFFLINE", True)
    found = of_models(lambda _: pytest.fail("the Hub was asked"))
    assert "HF_HUB_OFFLINE is set" in found["Hub"].text
    assert found["UNI"] == Finding("UNI", "MahmoodLab/UNI: in the cache")


def test_a_cluster_is_looked_for_where_commands_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    assert "private Ray" in find_cluster(1.0)
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text("127.0.0.1:1\n")
    assert "`ray start` has left the cluster at 127.0.0.1:1, silent: " in find_cluster(1.0)
    monkeypatch.setenv("RAY_ADDRESS", "local")
    assert "private Ray" in find_cluster(1.0)
    with socket.create_server(("127.0.0.1", 0)) as server:  # it accepts, and never speaks
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{server.getsockname()[1]}")
        assert "RAY_ADDRESS names the cluster" in find_cluster(0.1)


def test_full_and_closed_disks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda _: SimpleNamespace(free=1e9, total=1 << 20))
    found = {one.subject: one for one in machine.disks()}
    assert found["this folder"].state == NOTE
    assert "--shm-size" in found["/dev/shm"].remedy
    monkeypatch.setattr(machine.os, "access", lambda *_: False)
    assert {one.subject: one.state for one in machine.disks()}["this folder"] == BROKEN
