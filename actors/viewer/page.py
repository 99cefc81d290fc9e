"""The page: one template, one style sheet and a few scripts, put together into one file."""

import json
import secrets
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from actors.viewer.run import ViewedRun
from configs.errors import BasculeError

# In the order in which they need each other.
SCRIPTS = ("dom.js", "live.js", "written.js", "charts.js", "filters.js", "groups.js", "tokens.js", "main.js")
# Tokens with their numbers are large: a written file holds those of the latest steps up to about so many.
_MAX_TOKENS = 200_000


def plotly_path() -> Path:
    """plotly.min.js of the plotly package, which is not imported: that takes a second."""
    spec = find_spec("plotly")
    if spec is None or not spec.submodule_search_locations:
        raise BasculeError("plotly is not installed; `pip install plotly`, or install this project again")
    return Path(spec.submodule_search_locations[0]) / "package_data" / "plotly.min.js"


def policy(nonce: str, *, live: bool) -> str:
    """A Content-Security-Policy: only the page's own scripts run, and only its server is asked, if it has one."""
    script = f"'nonce-{nonce}'" + (" 'self'" if live else "")
    connect = "'self'" if live else "'none'"
    return (
        f"default-src 'none'; script-src {script}; style-src 'unsafe-inline'; img-src data: blob:; "
        f"connect-src {connect}; base-uri 'none'; form-action 'none'"
    )


def render(*, nonce: str, data: dict[str, Any] | None) -> str:
    """The page as HTML: one that asks its server, or, given data, one that needs nothing else."""
    page = files("actors.viewer") / "assets"

    def read(name: str) -> str:
        return (page / name).read_text(encoding="utf-8")

    template = Environment(autoescape=True, undefined=StrictUndefined).from_string(read("page.html"))
    return template.render(
        nonce=nonce,
        policy=policy(nonce, live=data is None),
        style=Markup(read("style.css")),
        script=Markup("\n".join(map(read, SCRIPTS))),
        plotly=None if data is None else Markup(plotly_path().read_text(encoding="utf-8")),
        data=None if data is None else Markup(script_json(data)),
    )


def script_json(data: Any) -> str:
    """JSON that can stand inside of a script element, whatever its strings hold: no `<`, no line separators."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    # Half of a pair of surrogates, which a damaged text may hold, is not UTF-8.
    return "".join(f"\\u{ord(c):04x}" if "\ud800" <= c <= "\udfff" else c for c in text)


def written(run: ViewedRun, max_rollouts: int) -> tuple[str, dict[str, Any]]:
    """The page with the run's data in it, and what it says about what was left out.

    All metrics and events are in it, and the groups of the latest steps, up to `max_rollouts` completions.
    """
    run.refresh()
    state = run.state()
    kept = _latest(run, max_rollouts)
    left, groups, token_steps = _MAX_TOKENS, list[dict[str, Any]](), set[int]()
    for position in reversed(kept):
        detail = run.rollouts.detail(run.rollouts.groups[position].key)
        assert detail is not None, "of the same run"
        records = [each for each in detail["completions"] if each["record"] is not None]
        size = sum(len(each["record"]["tokens"]) for each in records)
        if size > left:
            for each in records:
                each["record"] = None
        elif records:
            token_steps.add(detail["step"])
            left -= size
        groups.append(detail)
    steps = [group["step"] for group in groups]
    note = {
        "completions": sum(len(group["completions"]) for group in groups),
        "of": state["num_rollouts"],
        "first_step": min(steps, default=None),
        "last_step": max(steps, default=None),
        "token_steps": sorted(token_steps),
    }
    series = run.values(list(run.series), [0] * len(run.series))
    data = {"state": state, "series": series, "groups": groups[::-1], "note": note}
    return render(nonce=secrets.token_urlsafe(16), data=data), note


def _latest(run: ViewedRun, max_rollouts: int) -> list[int]:
    """Positions of the groups of the latest steps, in order: whole steps while there is room for them. A step that
    alone is more gives its first groups."""
    steps: dict[int, list[int]] = {}
    for group in run.rollouts.groups:
        steps.setdefault(group.step, []).append(group.position)
    left, kept = max_rollouts, list[int]()
    for step in sorted(steps, reverse=True):
        sizes = [len(run.rollouts.groups[position].entries) for position in steps[step]]
        if sum(sizes) <= left:
            kept += steps[step]
            left -= sum(sizes)
            continue
        if not kept:
            for position, size in zip(steps[step], sizes, strict=True):
                if size > left:
                    break
                kept.append(position)
                left -= size
        break
    return sorted(kept)
