# 只是 start.py 与 gpt2 的简写；没有 make 也能做同样的事。
.PHONY: quickstart test slow check verify
quickstart:
	python3 start.py
test:
	python3 start.py test
slow:
	python3 start.py test -m "slow or not slow"
check:
	cd backend && ../.venv/bin/python -m ruff check . && ../.venv/bin/python -m ruff format --check . && ../.venv/bin/python -m mypy
verify:
	cd backend && ../.venv/bin/python verify_implementation.py
