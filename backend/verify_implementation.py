"""核验实现：一项一行，带量到的数；有一项不过，退出码为 1。

用法：cd backend && python verify_implementation.py
"""

import sys

from app.common.console import tolerant_output
from app.verification.verify import verify_implementation

if __name__ == "__main__":
    tolerant_output()
    sys.exit(0 if verify_implementation("chinese") else 1)
