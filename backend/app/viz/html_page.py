"""报告与对照共用的网页骨架：一个文件，离线可读，没有脚本，随系统的明暗。"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

_STYLE = """
:root{color-scheme:light dark;--bg:#fff;--fg:#1d2329;--soft:#66707a;--rule:#d9dee3;--mark:#fff3c4;
--c0:#1f6fb4;--c1:#d9660f;--c2:#2b8a3e;--c3:#c2255c;--c4:#6f42c1;--c5:#0b7285;--c6:#8d6708;--c7:#555}
@media(prefers-color-scheme:dark){:root{--bg:#14181c;--fg:#e3e7eb;--soft:#98a2ac;--rule:#343b42;
--mark:#4d4318;--c0:#6cb1ee;--c1:#ff9d57;--c2:#6fcf86;--c3:#ff7aa8;--c4:#b99bf5;--c5:#4fc3d6;
--c6:#d9b34a;--c7:#b0b0b0}}
body{margin:0 auto;max-width:1360px;padding:16px;background:var(--bg);color:var(--fg);
font:15px/1.5 system-ui,sans-serif}
h1{font-size:1.4em;margin:.2em 0}h2{font-size:1.1em;margin:1.6em 0 .4em}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,440px),1fr));gap:18px}
figure{margin:0}figcaption{font-weight:600}svg{width:100%;height:auto;display:block}
.legend{display:flex;flex-wrap:wrap;gap:2px 14px;font-size:13px;color:var(--soft);min-height:1.5em}
.legend i{display:inline-block;width:14px;height:3px;margin-right:5px;vertical-align:middle}
svg text{fill:var(--soft);font-size:11px}svg path{fill:none;stroke-width:1.6}
svg path.faint{stroke-width:1;opacity:.3}svg path.grid{stroke:var(--rule);stroke-width:.7}
svg path.level{stroke:var(--soft);stroke-dasharray:5 4;stroke-width:1}.legend i.level{height:0;
border-top:1px dashed var(--soft)}
.legend i.faint{opacity:.35}.legend i.band{height:10px;background:var(--soft);opacity:.25}
svg rect.band{fill:var(--soft);opacity:.16}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-size:14px}
td,th{padding:2px 14px 2px 0;text-align:left;vertical-align:top;border-bottom:1px solid var(--rule)}
td.number,th.number{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
tr.mark td{background:var(--mark)}.soft{color:var(--soft)}
pre{white-space:pre-wrap;overflow-wrap:anywhere;
background:color-mix(in srgb,var(--fg) 6%,var(--bg));
padding:10px;border-radius:6px;max-height:24em;overflow:auto}
"""
# 即使哪里漏了转义，浏览器也不执行任何脚本，不取任何外面的东西。
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def page(title: str, body: Iterable[str]) -> bytes:
    """完整的一页，UTF-8；body 是已转义的 HTML 片段。"""
    text = "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            '<meta name="viewport" content="width=device-width">',
            f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>",
            *body,
            "</body></html>\n",
        ]
    )
    return text.encode("utf-8", "replace")


def table(
    rows: Iterable[Sequence[str]],
    head: Sequence[str] = (),
    marked: Iterable[int] = (),
    numbers: Iterable[int] = (),
) -> str:
    """marked 行加底色，numbers 列右对齐；全部转义。"""
    right, strong = set(numbers), set(marked)

    def cells(tag: str, row: Sequence[str]) -> str:
        return "".join(
            f"<{tag}{' class=number' if column in right else ''}>{html.escape(cell)}</{tag}>"
            for column, cell in enumerate(row)
        )

    lines = [f"<tr>{cells('th', head)}</tr>"] if head else []
    lines += [
        f"<tr{' class=mark' if number in strong else ''}>{cells('td', row)}</tr>"
        for number, row in enumerate(rows)
    ]
    return f'<div class="scroll"><table>{"".join(lines)}</table></div>'
