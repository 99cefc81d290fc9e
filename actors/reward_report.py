"""A comparison of rewards as lines for a terminal and as a page."""

import math
from collections.abc import Iterator
from pathlib import Path

from algorithms.rewards.comparison import Case, Comparison, Distribution, Signal
from configs.errors import WriteError

_BAR = 30
_TEXT = 160
# A page of every case of a long run would not open; the rest is one command away.
_CASES = 200


def comparison_lines(found: Comparison, new: str, old: str | None, *, show: int) -> Iterator[str]:
    """The comparison, line by line; of each kind of case `show` are written out."""
    yield f"{len(found.cases)} completions in {found.signal.groups} groups"
    yield from _distribution_lines("new" if old else "reward", new, found.new)
    if old is not None and found.old is not None:
        yield from _distribution_lines("old", old, found.old)
        differing = found.disagreements
        same = len(found.cases) - len(differing)
        yield f"agreement: {same} of {len(found.cases)} the same, correlation {number(found.correlation)}"
        yield from _cases("they disagree most on", differing[:show], with_old=True)
    yield from _signal_lines(found.signal, show, with_old=old is not None)
    yield from _cases("failed", found.failed[:show], with_old=False)
    yield "slowest calls:"
    for case in found.slowest[:show]:
        yield f"  {case.seconds * 1e3:.1f} ms: {place(case)}"


def _signal_lines(signal: Signal, show: int, *, with_old: bool) -> Iterator[str]:
    """How many groups have rewards that differ, and which gain or lose that."""
    before = f", {signal.old} under the old reward" if with_old else ""
    yield f"groups with signal: {signal.new} of {signal.groups}{before}"
    if with_old:
        for title, names in (("gained", signal.gained), ("lost", signal.lost)):
            dots = ["..."] if len(names) > show else []
            yield f"  {len(names)} {title}" + (": " if names else "") + "; ".join([*names[:show], *dots])


def _distribution_lines(kind: str, title: str, found: Distribution) -> Iterator[str]:
    yield f"{kind}: {title}"
    yield "  " + describe(found)
    largest = max((count for _, _, count in found.bins), default=1)
    for low, high, count in found.bins:
        bar = "#" * math.ceil(_BAR * count / largest)
        yield f"  {number(low):>8} to {number(high):<8} {bar:<{_BAR}} {count}"


def describe(found: Distribution) -> str:
    """One line about a distribution."""
    edges = "/".join(map(number, found.quantiles)) or "none"
    return (
        f"mean {number(found.mean)}, std {number(found.std)}, min/10%/50%/90%/max {edges}, "
        f"{found.distinct} different values, {found.none} None, {found.errors} failed"
    )


def _cases(title: str, cases: list[Case], *, with_old: bool) -> Iterator[str]:
    if not cases:
        return
    yield f"{title}:"
    for case in cases:
        change = f"{value(case.old)} -> {value(case.new)}" if with_old else case.error
        yield f"  {place(case)}: {change}"
        yield f"    prompt: {short(repr(case.prompt), _TEXT)}"
        yield f"    completion: {short(repr(case.completion), _TEXT)}"


def place(case: Case) -> str:
    """Where a completion is."""
    return f"step {case.step}, {case.prompt_id}, completion {case.index}"


def value(reward: float | None) -> str:
    """A reward, or None."""
    return "None" if reward is None else number(reward)


def number(amount: float) -> str:
    """A few digits."""
    return f"{amount:.4g}"


def short(text: str, length: int) -> str:
    """The text, or its ends with dots between."""
    if len(text) <= length:
        return text
    head = (length - 5) * 2 // 3
    return f"{text[:head]} ... {text[head - length + 5 :]}"


def write_page(path: Path, found: Comparison, new: str, old: str | None, *, rollouts: Path) -> None:
    """A page that stands by itself. Raises WriteError."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader = PackageLoader("actors", "templates")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined)
    environment.filters.update(number=number, value=value)
    differing = found.disagreements if old is not None else []
    text = environment.get_template("reward_score.html.j2").render(
        found=found,
        new=new,
        old=old,
        rollouts=str(rollouts),
        same=len(found.cases) - len(differing),
        sections=[
            ("Disagreements", differing[:_CASES], len(differing)),
            ("Failed calls", found.failed[:_CASES], len(found.failed)),
            ("Slowest calls", found.slowest[:20], len(found.cases)),
        ],
        describe=describe,
        place=place,
    )
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise WriteError(f"--html: {path} cannot be written: {error.strerror}") from None
