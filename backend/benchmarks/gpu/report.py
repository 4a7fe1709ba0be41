"""各行 -> 终端的一行、Markdown 的表与 JSON；没有过的放在最后。"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..common import table
from .card import file_name
from .log import Row


def line(row: Row) -> str:
    state = {None: "     ", True: "ok   ", False: "FAIL "}[row.ok]
    if row.kind == "skip":
        state = "skip "
    wanted = f"  ({row.wanted})" if row.wanted else ""
    return f"{state}{row.part}: {row.what}: {row.value}{wanted}"


def failures(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row.ok is False]


def markdown(facts: Mapping[str, str], rows: Sequence[Row], command: str, took: float) -> str:
    bad = failures(rows)
    verdict = "everything that ran passed" if not bad else f"{len(bad)} rows failed"
    head = ", ".join(f"{name} {value}" for name, value in facts.items() if name != "date")
    parts = [
        f"# {facts['card']}",
        f"{facts['date']}, {head}; {took:.0f} s; {verdict}.",
        f"```bash\n{command}\n```",
    ]
    for title, kinds in (
        ("Failed", ()), ("Checks", ("check",)), ("Figures", ("figure",)), ("Left out", ("skip",)),
    ):  # fmt: skip
        shown = bad if title == "Failed" else [row for row in rows if row.kind in kinds]
        if shown:
            cells: list[list[object]] = [
                [row.part, row.what, row.value, row.wanted, _word(row)] for row in shown
            ]
            body = table(["part", "what", "found", "wanted", ""], cells)
            parts.append(f"## {title}\n\n{body}")
    return "\n\n".join(parts) + "\n"


def _word(row: Row) -> str:
    return {None: "", True: "ok", False: "FAILED"}[row.ok]


def write(
    folder: Path, facts: Mapping[str, str], rows: Sequence[Row], command: str, took: float
) -> list[Path]:
    """folder/gpu-<card>.md 与 .json。"""
    folder.mkdir(parents=True, exist_ok=True)
    name = file_name(facts["card"])
    text, data = folder / f"{name}.md", folder / f"{name}.json"
    text.write_text(markdown(facts, rows, command, took), encoding="utf-8")
    found = {"facts": dict(facts), "seconds": round(took, 1), "command": command}
    found |= {"rows": [row.to_dict() for row in rows]}
    data.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return [text, data]
