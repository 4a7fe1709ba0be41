"""`gpt2 serve` 这个命令：开、关、选项不对。"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from tests.serving.helpers import KEYS, LONG
from tests.serving.test_http import PATH

BACKEND = Path(__file__).parents[2]


def test_the_command_serves_and_leaves_in_order(model_folder: Path, tmp_path: Path) -> None:
    """整个命令：钥匙、curl 能问、SIGTERM 之后写完手上的，退出码 0。"""
    keys = tmp_path / "keys"
    keys.write_text(KEYS[0] + "\n")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "app.cli", "serve", str(model_folder), "--port", str(port),
         "--api-key-file", str(keys), "--kv-memory", "64MiB", "--rows", "2"],
        cwd=BACKEND, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        url, headers = f"http://127.0.0.1:{port}", {"authorization": f"Bearer {KEYS[0]}"}
        with httpx.Client(base_url=url, headers=headers, trust_env=False, timeout=30) as client:
            until = time.monotonic() + 60
            while True:
                try:
                    if client.get("/health/ready").status_code == 200:
                        break
                except httpx.TransportError:
                    assert time.monotonic() < until and process.poll() is None
                    time.sleep(0.1)
            assert client.get("/v1/models").json()["data"][0]["id"] == "mine"
            with client.stream("POST", PATH, json={**LONG, "stream": True}) as stream:
                lines = stream.iter_lines()
                next(lines)
                process.send_signal(signal.SIGTERM)
                assert list(lines)[-2:][0] == "data: [DONE]"
        assert process.wait(20) == 0
        assert process.stderr is not None
        said = process.stderr.read()
        assert "idle threads: passive" in said and "2 rows of 128 tokens" in said
        assert "Traceback" not in said
    finally:
        process.kill()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--host", "0.0.0.0"], "give --api-key-file"),
        (["--speculate", "magic"], "must be 'off' or 'ngram'"),
        (["--speculate", "ngram", "--draft", "x"], "give one of them"),
        (["--kv-memory", "many"], "KiB, MiB or GiB"),
        (["--kv-memory", "1KiB"], "a row of context_size=128 takes"),
        (["--rows", "65", "--kv-memory", "1GiB"], "at most 64 fit"),
        (["--port", "70000"], "between 0 and 65535"),
    ],
)
def test_wrong_options_are_refused(
    words: list[str], message: str, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from app.cli.main import main

    assert main(["serve", str(model_folder), *words]) == 2
    assert message in capsys.readouterr().err


def test_weak_keys_and_equal_names_are_refused(tmp_path: Path) -> None:
    from app.cli.commands.serve import read_keys, serving_names

    for text in ("", "short\n", "has a space in the key\n", "schl\u00fcssel-schl\u00fcssel\n"):
        (tmp_path / "keys").write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match="key"):
            read_keys(tmp_path / "keys")
    with pytest.raises(ValueError, match="two models would be called 'mine'"):
        serving_names(("a/mine", "b/mine"))


def test_a_draft_model_of_other_tokens_is_refused(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from app.cli.main import main
    from app.data.tokenizers import CharTokenizer
    from tests.serving.helpers import byte_model

    byte_model(context_size=128, n_layer=1).save_pretrained(tmp_path / "other")
    CharTokenizer("abc").save(tmp_path / "other")
    assert main(["serve", str(model_folder), "--draft", str(tmp_path / "other")]) == 2
    assert "has another tokenizer than" in capsys.readouterr().err


def test_a_port_in_use_is_told_before_anything_is_loaded(
    model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from app.cli.main import main

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["serve", str(model_folder), "--port", str(port)]) == 2
    said = capsys.readouterr().err
    assert f"cannot listen on host=127.0.0.1 port={port}" in said and "--port" in said
    assert "rows of" not in said and "serving on" not in said
