"""导入主干要多久，与只导入 torch 比（新的进程，交替，中位数）。

cd backend && python -m benchmarks.import_time
"""

from __future__ import annotations

import subprocess
import sys

from .common import interleaved, table, write_result

BACKBONE = "from app.models.transformer import GPT2Model, KVCache, create_gpt2_model"


def main() -> None:
    def run(code: str) -> None:
        subprocess.run([sys.executable, "-c", code], check=True)

    seconds = interleaved(
        {"import torch": lambda: run("import torch"), BACKBONE: lambda: run(BACKBONE)}, 9
    )
    base = seconds["import torch"]
    rows = [[f"`{k}`", f"{v:.2f}", f"{v / base - 1:+.1%}"] for k, v in seconds.items()]
    body = table(["in a new process", "seconds", "against torch"], rows)
    write_result("import_time", "cd backend && python -m benchmarks.import_time", body)


if __name__ == "__main__":
    main()
