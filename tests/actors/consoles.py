"""A console for tests of what writes to one."""


class Console:
    """Keeps its lines, and how far it was told that things are."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.done: list[tuple[int, int]] = []

    def line(self, text: str) -> None:
        self.lines.append(text)

    def progress(self, done: int, total: int) -> None:
        self.done.append((done, total))
