"""What killed a server, dug out of its log."""

from __future__ import annotations

import re
import signal

# Names that the last lines of a dead server's log give to any failure; the cause stands above them.
CONSEQUENCES = (
    "Engine core initialization failed",
    "Orchestrator initialization failed",
    "EngineCore failed",
    "EngineDeadError",
    "failed to start",
    "died unexpectedly",
    "SystemExit",
    "KeyboardInterrupt",
    "CancelledError",
)

_NOISE = re.compile(r"\x1b\[[0-9;]*m|^\([A-Za-z_0-9]+ pid=\d+\) ?")
_STAMP = re.compile(r"^(?:ERROR|WARNING|INFO|CRITICAL) +\d\d-\d\d \d\d:\d\d:\d\d (?:\[[^\]]*\] ?)+")
_RAISED = re.compile(r"^(?:[\w.]+\.)?([A-Z]\w*(?:Error|Exception|Interrupt|Exit))(?:: (.*))?$")


def find_error(log: str) -> str:
    """What really went wrong: the first exception that is not the consequence of another.

    Falls back to the last lines when there is none.
    """
    lines = [_clean(line) for line in log.splitlines()]
    for number, line in enumerate(lines):
        if (match := _RAISED.match(line)) and not any(c in line for c in CONSEQUENCES):
            if not (match[2] or "").strip():
                continue
            where = next(
                (past for past in reversed(lines[:number]) if past.lstrip().startswith("File ")), ""
            )
            return line + (f"\n  raised at {where.strip()}" if where else "")
    return "\n".join([line for line in lines if line.strip()][-5:])


def epitaph(code: int, log: str) -> str | None:
    """Why a server that had been up ended by itself; None when it just did."""
    if code == 0:
        return None
    if code < 0:
        hint = ": by hand, or by the system because memory ran out" * (code == -signal.SIGKILL)
        return f"the server was killed by {signal.Signals(-code).name}{hint}"
    # Requests that failed long ago have left their errors in the log too; this one is at its end.
    return f"the server ended with exit code {code}:\n{find_error(log[-20_000:])}"


def last_line(log: str) -> str:
    lines = [clean for line in log.splitlines() if (clean := _clean(line).strip())]
    return lines[-1][:120] if lines else "..."


def _clean(line: str) -> str:
    """A log line without colours, process and time stamp."""
    line = _NOISE.sub("", _NOISE.sub("", line))
    return _STAMP.sub("", line)
