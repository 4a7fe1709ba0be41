"""`gpt2 verify`：配置从哪里来、退出码。"""

import subprocess
import sys

import pytest

from app.cli.main import main
from app.models.transformer import GPT2Config
from app.verification import verify
from app.verification.said import Said

TINY = ("--model.n-layer", "2", "--model.n-embed", "16", "--model.n-head", "2")
TINY += ("--model.vocab-size", "31", "--model.context-size", "16")


def gpt2(capsys, *argv):
    code = main(["verify", *argv])
    out = capsys.readouterr()
    return code, out.out.splitlines(), out.err


def test_flags_make_the_configuration(capsys):
    code, lines, _ = gpt2(capsys, *TINY, "--model.norm", "keel")
    assert code == 0
    assert lines[0].startswith("configuration: vocab_size=31, context_size=16, n_layer=2")
    assert "norm=keel" in lines[0]
    assert len(lines) == 2 + len(verify.BEHAVIOUR)
    assert "\n".join(lines).replace("✅", "").replace("±", "").isascii()
    assert all(line.startswith("✅ ") for line in lines[1:-1])


def test_a_config_file_and_flags_over_it(capsys, tmp_path):
    file = tmp_path / "config.json"
    small = GPT2Config(vocab_size=31, context_size=16, n_layer=2, n_head=2, n_embed=16)
    file.write_text(small.to_json())
    code, lines, _ = gpt2(capsys, "--config", str(file), "--model.n-head", "4")
    assert code == 0 and "n_head=4" in lines[0] and "vocab_size=31" in lines[0]


def test_a_run_file(capsys, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        "model: {vocab_size: 31, context_size: 16, n_layer: 2, n_head: 2, n_embed: 16, norm: pre}\n"
    )
    code, lines, _ = gpt2(capsys, f"--config={file}")
    assert code == 0 and "norm=pre" in lines[0]


def test_one_failing_check_is_exit_code_1(capsys, monkeypatch):
    broken = (Said("bad", "坏"), lambda subject: (False, Said("1.0", "1.0")))
    monkeypatch.setattr(verify, "BEHAVIOUR", (broken, verify.BEHAVIOUR[0]))
    code, lines, _ = gpt2(capsys, *TINY)
    assert code == 1
    assert lines[1] == "❌ bad: 1.0" and lines[2].startswith("✅ ")


def test_what_was_shrunk_is_said_in_the_lines(capsys, monkeypatch):
    seen = []
    monkeypatch.setattr(
        verify,
        "BEHAVIOUR",
        (
            verify.BEHAVIOUR[0],
            (Said("look", "看"), lambda subject: (not seen.append(subject), Said("1", "1"))),
        ),
    )
    code, lines, _ = gpt2(capsys, "--model.n-layer", "48")
    assert code == 0
    assert "vocab_size 50304→4096" in lines[1] and "n_layer 48→2" in lines[1]
    assert lines[2].startswith("✅ parameters equal the formula: ")
    assert lines[3] == "✅ look [smaller]: 1"
    assert seen[0].config.n_layer == 2


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("a.json", "{", "not valid JSON"),
        ("a.json", '{"n_layers": 3}', "did you mean 'n_layer'"),
        ("a.json", '{"n_head": 7}', "n_head=7"),
        ("a.yaml", "model: {n_layers: 3}", "did you mean"),
    ],
)
def test_a_bad_file_is_one_sentence_with_its_name(capsys, tmp_path, name, text, message):
    file = tmp_path / name
    file.write_text(text)
    code, lines, err = gpt2(capsys, "--config", str(file))
    assert (code, lines) == (2, [])
    assert message in err and name in err and len(err.splitlines()) == 1


def test_a_missing_file(capsys, tmp_path):
    for name in ("none.json", "none.yaml"):
        code, _, err = gpt2(capsys, "--config", str(tmp_path / name))
        assert code == 2 and name in err and len(err.splitlines()) == 1


def test_help_needs_no_torch():
    code = (
        "import sys\n"
        "from app.cli.main import main\n"
        "try: main(['verify', '--help'])\n"
        "except SystemExit as stop: assert not stop.code\n"
        "assert not {'torch', 'numpy', 'tokenizers', 'rich'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--model.n-layer" in done.stdout
