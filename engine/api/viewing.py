"""The viewer in a notebook: a server in a thread of this process, and a frame that shows it.

It listens on loopback alone and writes nothing. A folder is served once; it ends with the process, or by `stop`.
"""

import html
import threading
from pathlib import Path

from engine.viewer.config import ViewConfig
from engine.viewer.server import ViewServer, serve


class Viewing:
    """A viewer that is running."""

    def __init__(self, server: ViewServer, height: int) -> None:
        self._server, self._height = server, height

    @property
    def url(self) -> str:
        """The address to open in a browser."""
        return self._server.url

    def stop(self) -> None:
        """End it; the frame shows nothing more. Harmless when repeated."""
        with _LOCK:
            for path in [path for path, server in _RUNNING.items() if server is self._server]:
                del _RUNNING[path]
                self._server.stop()

    def __repr__(self) -> str:
        return f"Viewing({self.url!r})"

    def _repr_html_(self) -> str:
        """Return the frame for a notebook."""
        style = f"width:100%;height:{self._height}px;border:1px solid #999"
        return f'<iframe src="{html.escape(self.url)}" style="{style}" allow="fullscreen"></iframe>'


_RUNNING: dict[Path, ViewServer] = {}
_LOCK = threading.Lock()


def view(folder: Path, height: int) -> Viewing:
    """Show a run, a slide or a folder; a second call gives another frame of the same viewer. Raises: EngineError."""
    path = folder.resolve()
    with _LOCK:
        if path not in _RUNNING:
            server, _ = serve(ViewConfig(str(folder), port=0))
            threading.Thread(target=server.serve_forever, name=f"viewer of {folder}", daemon=True).start()
            _RUNNING[path] = server
        return Viewing(_RUNNING[path], height)
