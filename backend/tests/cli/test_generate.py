"""`gpt2 generate`：标准输出只有文本；每个错误一句话、退出码 2。"""

import os
import subprocess
import sys

import pytest
import torch

from app.cli.main import main
from app.data.tokenizers import ByteTokenizer, CharTokenizer
from app.generation.config import SamplingConfig
from app.models.transformer import GPT2Model, create_gpt2_model
from tests.generation.helpers import completions

CHARS = CharTokenizer("\n .:abcdefghijklmnopqrstuvwxyzRJOMEU")


def save(folder, tokenizer, context_size=32, **changes):
    torch.manual_seed(0)
    model = create_gpt2_model(
        vocab_size=tokenizer.vocab_size + 3,
        context_size=context_size,
        n_layer=2,
        n_head=2,
        n_embed=16,
        tie_weights=False,
        **changes,
    )
    model.save_pretrained(folder)
    tokenizer.save(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(tmp_path_factory.mktemp("chars"), CHARS)


@pytest.fixture(scope="module")
def rope(tmp_path_factory):
    window = {"attention_pattern": "local(6)", "position": "rope"}
    return save(tmp_path_factory.mktemp("rope"), CHARS, **window)


def gpt2(capsys, *argv):
    code = main(["generate", *argv])
    out = capsys.readouterr()
    return code, out.out, out.err


def expected(folder, prompt, seed=0, **options):
    tokenizer = CHARS
    return completions(
        GPT2Model.from_pretrained(folder),
        [tokenizer.encode(prompt) or [tokenizer.document_separator]],
        **{
            "max_new_tokens": 10,
            "sampling": SamplingConfig(temperature=0.8, top_p=0.95),
            "stop_ids": [tokenizer.document_separator],
            "tokenizer": tokenizer,
            "seeds": [seed],
            **options,
        },
    )[0]


def test_one_prompt_streams_prompt_and_text(folder, capsys):
    code, out, err = gpt2(capsys, folder, "--prompt", "ROMEO:", "--max-new-tokens", "10")
    assert code == 0
    assert out == "ROMEO:" + expected(folder, "ROMEO:").text + "\n"
    assert "tokens/s" in err and len(err.splitlines()) == 1


def test_text_is_written_piece_by_piece(folder, capsys, monkeypatch):
    pieces = []
    monkeypatch.setattr("app.cli.commands.generate._write", pieces.append)
    gpt2(capsys, folder, "--prompt", "JO", "--max-new-tokens", "6", "--seed", "2")
    text = expected(folder, "JO", 2, max_new_tokens=6).text
    assert pieces == ["JO" + text[0], *text[1:], "\n"]


@pytest.mark.parametrize("batch", ["1", "2", "16"])
def test_many_prompts_and_samples_are_labelled_and_the_same_in_any_batch(
    folder, capsys, tmp_path, batch
):
    file = tmp_path / "prompts.txt"
    file.write_text("abc\n\nRJ\r\n", encoding="utf-8")
    argv = ["--prompt", "x", "--prompts-file", str(file), "--num-samples", "2", "--seed", "5"]
    code, out, _ = gpt2(capsys, folder, *argv, "--max-new-tokens", "10", "--batch-size", batch)
    assert code == 0
    wanted = {
        f"--- prompt {i}, sample {s + 1} ---\n{p}{expected(folder, p, 5 + s).text}\n"
        for i, p in enumerate(["x", "abc", "RJ"], start=1)
        for s in range(2)
    }
    parts = out.split("--- prompt ")[1:]
    assert {"--- prompt " + part for part in parts} == wanted


def test_no_prompt_starts_from_the_document_separator(folder, capsys):
    code, out, _ = gpt2(capsys, folder, "--max-new-tokens", "10")
    assert (code, out) == (0, expected(folder, "").text + "\n")


def test_greedy_ignores_the_seed_and_stop_cuts(folder, capsys):
    best = {"sampling": SamplingConfig(temperature=0), "max_new_tokens": 12}
    texts = {p: expected(folder, p * 2, **best).text for p in "abcdefghijkl"}
    prompt = 2 * next(p for p, text in texts.items() if len(set(text)) > 4)
    greedy = ("--prompt", prompt, "--greedy", "--max-new-tokens", "12")
    _, first, _ = gpt2(capsys, folder, *greedy, "--seed", "1")
    _, second, _ = gpt2(capsys, folder, *greedy, "--seed", "2")
    assert first == second
    stop = first[5:7]
    _, cut, _ = gpt2(capsys, folder, *greedy, "--stop", stop, "--stop", "never")
    assert cut == first[: 2 + first[2:].index(stop)] + "\n"


def test_by_default_it_goes_to_the_end_of_the_context_and_says_so(folder, capsys):
    code, out, err = gpt2(capsys, folder, "--prompt", "ab", "--seed", "3")
    text = expected(folder, "ab", 3, max_new_tokens=30).text
    assert (code, out) == (0, f"ab{text}\n")
    assert "30 new tokens, to the end of context_size=32; --overflow slide goes on" in err
    code, out, err = gpt2(capsys, folder, "--prompt", "ab", "--overflow", "slide", "--seed", "3")
    text = expected(folder, "ab", 3, max_new_tokens=200, overflow="slide").text
    assert (code, out) == (0, f"ab{text}\n")
    assert "note" not in err


@pytest.mark.parametrize("mode", ["extend", "sinks", "slide"])
def test_three_times_the_context(rope, capsys, mode):
    argv = ["--prompt", "RO", "--max-new-tokens", "96", "--overflow", mode, "--seed", "1"]
    code, out, err = gpt2(capsys, rope, *argv)
    text = expected(rope, "RO", 1, max_new_tokens=96, overflow=mode).text
    assert (code, out) == (0, f"RO{text}\n")
    # 窗口 6 加上一块 32 的余量减一：比 97 个少，而一个上下文 32 比它还少。
    ring = "note: layers with local(6) use a ring cache of 37 keys, however long the text\n"
    assert err.startswith(ring) == (mode == "extend")


def test_the_note_names_what_this_model_can_use(rope, capsys):
    _, _, err = gpt2(capsys, rope, "--prompt", "a")
    assert "--overflow slide or extend or sinks goes on past it" in err
    _, _, err = gpt2(capsys, rope, "--prompt", "a", "--overflow", "extend", "--stop", "a")
    assert "note" in err and "new tokens" not in err


@pytest.mark.parametrize("argv, wanted", [([], None), (["--kv-dtype", "int8"], "int8")])
def test_an_int8_cache(rope, capsys, monkeypatch, argv, wanted):
    real, asked = GPT2Model.new_cache, []

    def new_cache(model, *args, **options):
        asked.append(options["kv_dtype"])
        return real(model, *args, **options)

    monkeypatch.setattr(GPT2Model, "new_cache", new_cache)
    code, out, _ = gpt2(capsys, rope, "--prompt", "RO", "--max-new-tokens", "20", *argv)
    assert (code, asked) == (0, [wanted]) and out.startswith("RO")


def test_the_old_name_of_the_flag_still_works_with_a_note(rope, capsys):
    argv = ["--prompt", "RO", "--max-new-tokens", "20"]
    new = gpt2(capsys, rope, *argv, "--kv-dtype", "int8")[1]
    for old in (["--cache-dtype", "int8"], ["--cache_dtype=int8"]):
        code, out, err = gpt2(capsys, rope, *argv, *old)
        assert (code, out) == (0, new)
        assert "is now called --kv-dtype" in err.splitlines()[0]


def test_a_line_break_typed_in_a_shell_stops(folder, capsys):
    """shell 交来的是反斜杠与 n 两个字符。"""
    best = {"sampling": SamplingConfig(temperature=1.0), "max_new_tokens": 29}
    seed = next(n for n in range(99) if "\n" in expected(folder, "ab", n, **best).text[1:])
    argv = ["--prompt", "ab", "--temperature", "1", "--top-p", "1", "--max-new-tokens", "29"]
    argv += ["--seed", str(seed)]
    whole = gpt2(capsys, folder, *argv)[1]
    code, out, _ = gpt2(capsys, folder, *argv, "--stop", r"\n")
    assert (code, out) == (0, whole[: whole.index("\n")] + "\n")


def test_an_escape_that_is_none_is_refused(folder, capsys):
    code, out, err = gpt2(capsys, folder, "--prompt", "a", "--stop", r"\d")
    assert (code, out) == (2, "") and "for a backslash itself write two" in err


def test_a_prompt_from_a_file_is_named_by_its_line(folder, capsys, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("\ufeffabc\n\né\n", encoding="utf-8")
    code, out, err = gpt2(capsys, folder, "--prompts-file", str(file))
    assert (code, out) == (2, "") and f"{file}:3 cannot be encoded: character 'é'" in err
    file.write_text("abc\n" + "a" * 40 + "\n", encoding="utf-8")
    argv = ["--num-samples", "3", "--max-new-tokens", "9"]
    code, out, err = gpt2(capsys, folder, "--prompt", "a", "--prompts-file", str(file), *argv)
    assert (code, out) == (2, "") and f"error: {file}:2 has 40 tokens" in err


@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin", None])
def test_a_hugging_face_folder_names_the_command_that_reads_it(tmp_path, capsys, weights):
    for number, config in enumerate(
        ('{"model_type": "gpt2", "n_embd": 8}', '{"architectures": ["X"]}', '{"hidden_size": 8}')
    ):
        place = tmp_path / str(number)
        place.mkdir()
        (place / "config.json").write_text(config)
        (place / "tokenizer.json").write_text("{}")
        if weights:
            (place / weights).write_bytes(b"x")
        code, out, err = gpt2(capsys, str(place), "--prompt", "a")
        assert (code, out) == (2, "")
        assert f"`gpt2 import {place} --out NEW`" in err and len(err.splitlines()) == 1


def test_a_file_of_weights_names_the_command_that_reads_it(tmp_path, capsys):
    file = tmp_path / "ckpt.pt"
    file.write_bytes(b"x")
    code, _, err = gpt2(capsys, str(file), "--prompt", "a")
    assert code == 2 and f"`gpt2 import {file} --out NEW`" in err and "exist" not in err


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("command", ["generate", "eval"])
def test_an_adapter_beside_the_weights_is_not_left_out(tmp_path, capsys, name, command):
    place = save(tmp_path / "model", CHARS)
    (tmp_path / "model" / name).write_text("{}")
    code = main([command, place, *(["--prompt", "a"] if command == "generate" else [])])
    out, err = capsys.readouterr()
    assert (code, out) == (2, "") and name in err and "merge it" in err


def test_bytes_come_out_as_whole_characters(tmp_path, capsys):
    folder = save(tmp_path / "bytes", ByteTokenizer())
    code, out, _ = gpt2(capsys, folder, "--prompt", "é漢", "--seed", "1")
    assert code == 0 and out.startswith("é漢")


@pytest.mark.parametrize(
    "message, argv",
    [
        ("the prompt cannot be encoded: character 'é'", ["--prompt", "é"]),
        ("prompt 2 cannot be encoded", ["--prompt", "a", "--prompt", "é"]),
        ("together 41, beyond context_size=32", ["--prompt", "a", "--max-new-tokens", "40"]),
        ("together 240, beyond context_size=32", ["--prompt", "a" * 40]),
        ("temperature=-1", ["--temperature", "-1"]),
        ("top_p=2", ["--top-p", "2"]),
        ("num_samples=0", ["--num-samples", "0"]),
        ("batch_size=0", ["--batch-size", "0"]),
        ("max_new_tokens=0", ["--max-new-tokens", "0"]),
        ("prefill_chunk=0", ["--prefill-chunk", "0"]),
        ("seed=-1", ["--seed", "-1"]),
        ("empty", ["--stop", ""]),
        ("overflow='sinks' needs position='rope'", ["--overflow", "sinks"]),
        ("trained for context_size=32 positions: use overflow='slide'", ["--overflow", "extend"]),
        ("device='toaster'", ["--device", "toaster"]),
        ("nowhere.txt", ["--prompts-file", "nowhere.txt"]),
    ],
)
def test_wrong_use_is_one_sentence(folder, capsys, message, argv):
    code, out, err = gpt2(capsys, folder, *argv)
    assert (code, out) == (2, "")
    assert message in err and err.startswith("error: ") and len(err.splitlines()) == 1


def test_a_folder_that_is_no_checkpoint(tmp_path, capsys, folder):
    (tmp_path / "x.txt").write_text("x")
    for bad in (tmp_path, tmp_path / "missing", tmp_path / "x.txt"):
        code, out, err = gpt2(capsys, str(bad), "--prompt", "a")
        assert (code, out) == (2, "")
        assert str(bad) in err and len(err.splitlines()) == 1


def test_a_checkpoint_without_tokenizer(tmp_path, capsys):
    create_gpt2_model(vocab_size=9, n_layer=1, n_head=1, n_embed=8).save_pretrained(tmp_path)
    code, _, err = gpt2(capsys, str(tmp_path), "--prompt", "a")
    assert code == 2 and "tokenizer" in err


def test_a_prompts_file_of_junk(tmp_path, capsys, folder):
    file = tmp_path / "junk"
    file.write_bytes(b"\xff\xfe\x00")
    code, _, err = gpt2(capsys, folder, "--prompts-file", str(file))
    assert code == 2 and "not UTF-8" in err
    file.write_text(" \n\n")
    code, _, err = gpt2(capsys, folder, "--prompts-file", str(file))
    assert code == 2 and "holds no prompt" in err


def test_a_reader_that_leaves_is_no_error(folder, capsys, monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        code = main(["generate", folder, "--prompt", "a", "--num-samples", "3"])
    assert code == 0
    assert "error" not in capsys.readouterr().err


def test_help_needs_no_torch():
    code = (
        "import sys, app.cli.commands.generate\n"
        "assert not {'torch', 'numpy', 'tokenizers', 'rich'} & set(sys.modules)\n"
        "from app.cli.main import main\n"
        "try: main(['generate', '--help'])\n"
        "except SystemExit as stop: assert not stop.code\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ
    )
    assert done.returncode == 0, done.stderr
    assert "--max-new-tokens" in done.stdout
