"""`bascule view`: a run's curves, completions and events in a browser, live or as one file."""

from collections.abc import Callable
from pathlib import Path

from actors.viewer.page import written
from actors.viewer.run import ViewedRun
from actors.viewer.server import ViewServer
from configs.errors import WriteError


def serve(directory: Path, port: int, say: Callable[[str], None]) -> None:
    """Serve the run to this machine until interrupted. Raises ConfigError for what is no run, or no free port."""
    with ViewServer(ViewedRun(directory), port) as server:
        say(f"{directory}: {server.url} (Ctrl-C ends it)")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            return


def write(directory: Path, file: Path, max_rollouts: int, say: Callable[[str], None]) -> None:
    """Write the run into one HTML file. Raises ConfigError for what is no run, WriteError for the file."""
    page, note = written(ViewedRun(directory), max_rollouts)
    content = page.encode()
    try:
        file.write_bytes(content)
    except OSError as error:
        raise WriteError(f"--html: {file} cannot be written: {error.strerror}") from error
    what = f"{note['completions']} of {note['of']} completions"
    if 0 < note["completions"] < note["of"]:
        what += f", those of steps {note['first_step']} to {note['last_step']}"
    say(f"{file}: {len(content) / 1e6:.1f} MB with {what}")
