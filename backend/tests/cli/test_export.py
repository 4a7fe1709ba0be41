"""`gpt2 import` 与 `gpt2 export`：从命令行走一圈；错误是一句话，退出码 2。"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from app.cli.main import main
from app.data.tokenizers import ByteTokenizer
from app.models.transformer import GPT2Model, create_gpt2_model


def saved(folder: Path, **changes: object) -> Path:
    torch.manual_seed(0)
    size = {"vocab_size": 257, "context_size": 32, "n_layer": 2, "n_head": 2, "n_embed": 16}
    create_gpt2_model(**{**size, **changes}).save_pretrained(folder)
    ByteTokenizer().save(folder)
    return folder


def gpt2(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str, str]:
    code = main([str(word) for word in argv])
    out = capsys.readouterr()
    return code, out.out, out.err


@pytest.mark.parametrize(
    ("norm", "kind", "to"),
    [("pre", "gpt2", "hf"), ("post", "opt", "hf"), ("post", "", "openai-gpt")],
)
def test_out_and_in_again(norm, kind, to, tmp_path, capsys) -> None:
    pytest.importorskip("transformers", reason="pip install 'gpt2-workbench[hf]'")
    model = saved(tmp_path / "model", norm=norm)
    code, out, err = gpt2(capsys, "export", model, "--to", to, "--out", tmp_path / "out")
    assert code == 0, err
    assert f"written  {tmp_path / 'out'} ({kind or to})" in out
    assert "largest logit difference" in out and "same next token at 100.0%" in out
    code, out, err = gpt2(capsys, "import", tmp_path / "out", "--out", tmp_path / "again")
    assert code == 0, err
    assert f"norm {norm}, 2 layers, 2 heads, width 16, context 32, vocabulary 257" in out
    a, b = GPT2Model.from_pretrained(model), GPT2Model.from_pretrained(tmp_path / "again")
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    code, out, _ = gpt2(
        capsys, "generate", tmp_path / "again", "--prompt", "ab", "--max-new-tokens", 3
    )
    assert code == 0 and out.startswith("ab")


def test_one_line_errors(tmp_path, capsys) -> None:
    model = saved(tmp_path / "model", norm="keel")
    for argv, message in (
        (("export", model, "--to", "gguf", "--out", tmp_path / "x"), "cannot become gguf: norm="),
        (("export", tmp_path / "no", "--to", "hf", "--out", tmp_path / "x"), "does not exist"),
        (("export", model, "--to", "onnx", "--out", model), "already exists: give another --out"),
        (
            ("import", tmp_path / "no", "--out", tmp_path / "x"),
            "is not a folder with a saved model",
        ),
        (("import", model, "--out", tmp_path / "x", "--norm", "pre"), "use norm='keel' or leave"),
    ):
        code, _, err = gpt2(capsys, *argv)
        assert code == 2 and err.startswith("error: ") and message in err and err.count("\n") == 1
    assert not (tmp_path / "x").exists()


def test_a_model_without_a_tokenizer_says_so(tmp_path, capsys) -> None:
    pytest.importorskip("transformers", reason="pip install 'gpt2-workbench[hf]'")
    model = saved(tmp_path / "model", norm="pre")
    for path in model.glob("tokenizer*"):
        path.unlink()
    _, out, _ = gpt2(capsys, "export", model, "--to", "hf", "--out", tmp_path / "out")
    assert "has no tokenizer, so none was written" in out
    _, out, _ = gpt2(capsys, "import", tmp_path / "out", "--out", tmp_path / "again")
    assert "tokenizer  none (" in out and "`gpt2 generate` needs one" in out


def test_what_was_not_written_as_asked_is_no_success(tmp_path, capsys, monkeypatch) -> None:
    """目标库算出的是另一个函数：写了，但退出码不是 0。"""
    pytest.importorskip("transformers", reason="pip install 'gpt2-workbench[hf]'")
    from app.interop.compare import Comparison

    model = saved(tmp_path / "model", norm="pre")
    for number, difference in enumerate((float("nan"), 1.0)):
        found = Comparison("twin", difference, largest=2.0, words=5, agree=0.9)
        monkeypatch.setattr("app.interop.hf.compare", lambda *a, found=found: found)
        out = tmp_path / f"out-{number}"
        code, _, err = gpt2(capsys, "export", model, "--to", "hf", "--out", out)
        assert code == 1 and "computes another function" in err


def test_clumsy_arguments(tmp_path, capsys) -> None:
    model = saved(tmp_path / "model", norm="pre")
    foreign = saved(tmp_path / "foreign", norm="pre")
    (foreign / "tokenizer_meta.json").unlink()
    for argv, message in (
        (("export", model / "config.json", "--to", "hf"), "config.json is a file: give a run"),
        (("export", foreign, "--to", "hf"), "has a tokenizer of another maker"),
        (
            ("export", model, "--to", "gguf", "--quantize", "q8_0", "--dtype", "float16"),
            "both say how the matrices are stored",
        ),
        (("import", ""), "the name of the model is empty"),
        (("import", model, "--n-head", "3"), "n_head=3 was asked for but the weights"),
        (("import", model, "--activation", "relu"), "activation='relu' was asked for"),
        (("import", model, "--tokenizer", tmp_path / "no"), "there is no such folder"),
    ):
        code, _, err = gpt2(capsys, *argv, "--out", tmp_path / "x")
        assert code == 2 and err.startswith("error: ") and message in err and err.count("\n") == 1
    assert not (tmp_path / "x").exists()
