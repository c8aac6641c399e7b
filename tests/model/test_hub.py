"""Finding files: each way of not finding them says what to do. A local server plays the Hub's refusals."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from engine.core.errors import CheckpointError
from engine.model.weights import hub
from engine.model.zoomldm import ZoomLDM

ASK = """
import sys, time
from engine.core.errors import CheckpointError
from engine.model.weights.hub import locate, locate_cdm, locate_files
time.sleep = lambda seconds: print("waited", seconds)
try:
    if sys.argv[1] == "model":
        print(locate("StonyBrook-CVLab/ZoomLDM", "brca"))
    elif sys.argv[1] == "cdm":
        print(locate_cdm("StonyBrook-CVLab/ZoomLDM", "brca"))
    elif sys.argv[1] == "features":
        from engine.model.encoders.registry import load_encoder  # brings torch, which the others do without
        load_encoder("phikon", flag="--features.encoder_source")
    else:
        print(locate_files("MahmoodLab/UNI", ["pytorch_model.bin"], "The SSL encoder UNI", "--model.encoder_source"))
except CheckpointError as error:
    print(error)
"""


def ask(what: str, home: Path, **environment: str) -> str:
    """What a fresh process is told; the library reads its environment once, at import."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", ASK, what],
        env=inherited | {"HF_HOME": str(home)} | environment,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=250,
        check=True,
    )
    return result.stdout


class Refusing(BaseHTTPRequestHandler):
    """Answers everything as the Hub answers for a gated repository."""

    def do_GET(self) -> None:
        self.send_response(403)
        self.send_header("X-Error-Code", "GatedRepo")
        self.send_header("X-Error-Message", "Access to model is restricted")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, format: str, *args: object) -> None:
        del format, args


@pytest.fixture
def gate() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), Refusing)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_offline_the_message_says_how_to_bring_the_files(tmp_path: Path) -> None:
    said = ask("model", tmp_path, HF_HUB_OFFLINE="1")
    assert "brca/weights.ckpt and brca/config.yaml of the Hub's StonyBrook-CVLab/ZoomLDM" in said
    assert (
        "hf download StonyBrook-CVLab/ZoomLDM brca/weights.ckpt brca/config.yaml --local-dir checkpoints/ZoomLDM"
        in said
    )
    assert "pass --model.source checkpoints/ZoomLDM --model.variant brca" in said
    assert "Traceback" not in said


def test_an_encoder_of_features_names_the_flag_of_its_command(tmp_path: Path) -> None:
    said = ask("features", tmp_path, HF_HUB_OFFLINE="1")
    assert "hf download owkin/phikon model.safetensors --local-dir checkpoints/phikon" in said
    assert "pass --features.encoder_source checkpoints/phikon" in said


def test_an_unreachable_hub_is_not_waited_for(tmp_path: Path) -> None:
    """The library would try again with ever longer pauses; where it does, `ask` says that it waited."""
    said = ask("encoder", tmp_path, HF_ENDPOINT="http://127.0.0.1:9")
    assert "waited" not in said
    assert "The SSL encoder UNI needs pytorch_model.bin of the Hub's MahmoodLab/UNI" in said
    assert "pass --model.encoder_source checkpoints/UNI" in said


@pytest.mark.parametrize(("what", "repo"), [("encoder", "MahmoodLab/UNI"), ("model", "StonyBrook-CVLab/ZoomLDM")])
def test_a_gated_repository_says_where_to_ask(tmp_path: Path, gate: str, what: str, repo: str) -> None:
    said = ask(what, tmp_path, HF_ENDPOINT=gate)
    assert f"https://huggingface.co/{repo}, which is gated" in said
    assert "hf auth login" in said


def cached_model(home: Path, files: tuple[str, ...]) -> Path:
    """The library's cache of a published model with these empty files."""
    cached = home / "hub/models--StonyBrook-CVLab--ZoomLDM"
    commit = "0" * 40
    (cached / "refs").mkdir(parents=True)
    (cached / "refs/main").write_text(commit)
    folder = cached / "snapshots" / commit / "brca"
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


@pytest.mark.parametrize("carried", [hub.CDM_FILES, ()])
def test_a_cdm_is_looked_for_beside_its_model(tmp_path: Path, carried: tuple[str, ...]) -> None:
    folder = cached_model(tmp_path, (*hub.LDM_FILES, *carried))
    assert ask("cdm", tmp_path, HF_HUB_OFFLINE="1").strip() == str(folder / "cdm" if carried else None)


@pytest.mark.parametrize("files", [hub.LDM_FILES, hub.LDM_FILES[:1]])
def test_the_local_cache_is_enough_when_it_is_complete(tmp_path: Path, files: tuple[str, ...]) -> None:
    folder = cached_model(tmp_path, files)
    said = ask("model", tmp_path, HF_HUB_OFFLINE="1")
    if len(files) == 2:
        assert said.strip() == str(folder)
    else:
        assert f"the copy in {folder} lacks them" in said
        assert "hf download" in said


def test_a_folder_wins_and_is_checked(model: ZoomLDM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model.save_pretrained("owner/models/tiny")
    assert hub.locate("owner/models", "tiny") == Path("owner/models/tiny")
    assert hub.locate("owner/models/tiny") == Path("owner/models/tiny")
    with pytest.raises(CheckpointError, match="holds the variants tiny; choose one"):
        hub.locate("owner/models")
    (tmp_path / "half").mkdir()
    (tmp_path / "half/weights.ckpt").touch()
    with pytest.raises(CheckpointError, match=r"missing: config.yaml\."):
        hub.locate("half")
    with pytest.raises(CheckpointError, match=r"missing: weights.ckpt, config.yaml\."):
        hub.locate(tmp_path, "nowhere")


def test_other_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match="must be 'demo', an existing folder or a Hub id"):
        hub.locate(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="holds brca and naip; choose one with --model.variant"):
        hub.locate("StonyBrook-CVLab/ZoomLDM")
    monkeypatch.setattr(hub, "DEMO", tmp_path / "demo")
    with pytest.raises(CheckpointError, match="embedded demo model"):
        hub.locate("demo")
