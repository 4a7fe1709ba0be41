"""lm-eval 的适配：与 `gpt2 eval --task` 逐题相同，与 hf 导出在 lm-eval 里的数相同，全部离线。"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from app.data.tokenizers import BPETokenizer, train_bpe
from app.evaluation.tasks import load_task, score_items, summarize_task
from app.generation.config import SamplingConfig
from app.interop.lm_eval import WorkbenchLM
from app.interop.transformers import save, wrap
from app.models.transformer import GPT2Config, GPT2Model
from tests.generation.helpers import completions

from .test_hf_files import TEXT, hub_tokenizer

BACKEND = Path(__file__).parents[2]
ITEMS = [
    {"prompt": "the cat sat on", "choices": ["the mat", "the dog", "logs"], "answer": 0},
    {"prompt": "as dogs do when", "choices": ["cats are at home", "mats sat"], "answer": 0},
    {"prompt": "the", "choices": ["cat", "at home"], "answer": 1},
    {"prompt": "and the dog sat on the log, as dogs do" * 3, "choices": ["when", "mat"],
     "answer": 1},
]  # fmt: skip


@pytest.fixture(scope="module")
def trained() -> tuple[GPT2Model, BPETokenizer]:
    tokenizer = train_bpe([TEXT] * 3, 290)
    torch.manual_seed(1)
    shape = GPT2Config(
        vocab_size=tokenizer.vocab_size, context_size=32, n_layer=2, n_head=2, n_embed=16,
        norm="pre",
    )  # fmt: skip
    model = GPT2Model(shape).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(3.0)
    return model, tokenizer


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """本地的 yaml + jsonl 任务：多项选择、困惑度、续写。"""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in ITEMS))
    (folder / "texts.jsonl").write_text(
        "".join(json.dumps({"text": TEXT[i : i + 40 + 60 * i]}) + "\n" for i in range(3))
    )
    source = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder}/%s.jsonl}}}}\n"
    (folder / "pick.yaml").write_text(
        "task: pick\n" + source % "items" + "test_split: test\noutput_type: multiple_choice\n"
        "doc_to_text: prompt\ndoc_to_choice: choices\ndoc_to_target: answer\n"
        "metric_list: [{metric: acc}, {metric: acc_norm}]\n"
    )
    (folder / "roll.yaml").write_text(
        "task: roll\n" + source % "texts" + "test_split: test\n"
        "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: text\n"
        "metric_list: [{metric: word_perplexity}]\n"
    )
    (folder / "write.yaml").write_text(
        "task: write\n" + source % "items" + "test_split: test\noutput_type: generate_until\n"
        "doc_to_text: 'the {{prompt}}'\ndoc_to_target: ' mat'\n"
        "generation_kwargs: {until: ['e'], max_gen_toks: 6, do_sample: false}\n"
        "metric_list: [{metric: exact_match}]\n"
    )
    return folder


def evaluate(lm: Any, folder: Path, *names: str) -> dict[str, Any]:
    return lm_eval.simple_evaluate(
        lm, tasks=list(names), log_samples=True, bootstrap_iters=0,
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
    )  # fmt: skip


@pytest.fixture(scope="module")
def results(trained: Any, tasks: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(适配器, hf 导出) 各跑一遍的结果。"""
    os.environ["HF_DATASETS_OFFLINE"] = "1"
    model, tokenizer = trained
    ours = evaluate(WorkbenchLM.of(model, tokenizer), tasks, "pick", "roll", "write")
    hub = hub_tokenizer(tokenizer)
    folder = tmp_path_factory.mktemp("hf")
    save(model, folder, hub)
    theirs = evaluate(
        HFLM(pretrained=wrap(model, eos_token_id=tokenizer.document_separator), tokenizer=hub,
             batch_size=3, device="cpu", max_length=32),
        tasks, "pick", "roll", "write",
    )  # fmt: skip
    return ours, theirs


def test_scores_equal_our_own_evaluation(trained: Any, tasks: Path, results: Any) -> None:
    model, tokenizer = trained
    task = load_task(tasks / "items.jsonl", tokenizer, 32)
    scores = [one for block in score_items(model, task.items, 3, lambda n: None) for one in block]
    ours = summarize_task(task, scores).metrics
    theirs = results[0]["results"]["pick"]
    assert theirs["acc,none"] == ours["acc"].value
    assert theirs["acc_norm,none"] == ours["acc_norm"].value
    assert 0 < ours["acc"].value < 1
    for sample, score in zip(results[0]["samples"]["pick"], scores, strict=True):
        got = [-pair[0][0] for pair in sample["resps"]]
        assert got == pytest.approx(score.nats, rel=1e-6)


def test_the_adapter_equals_the_hf_export(results: Any) -> None:
    ours, theirs = results
    for name in ("pick", "roll", "write"):
        for a, b in zip(ours["samples"][name], theirs["samples"][name], strict=True):
            if name == "write":
                assert a["resps"] == b["resps"]
            else:
                flat = torch.tensor(a["resps"], dtype=torch.float64).flatten()
                torch.testing.assert_close(
                    flat, torch.tensor(b["resps"], dtype=torch.float64).flatten(),
                    rtol=1e-5, atol=1e-5,
                )  # fmt: skip
    assert any(sample["resps"][0][0] for sample in ours["samples"]["write"])
    key = "word_perplexity,none"
    assert ours["results"]["roll"][key] == pytest.approx(theirs["results"]["roll"][key], rel=1e-5)


def test_rolling_counts_every_token_once(trained: Any) -> None:
    model, tokenizer = trained
    text = TEXT * 4
    ids = [tokenizer.document_separator, *tokenizer.encode(text)]
    assert len(ids) > 2 * 32
    expected, at = 0.0, 0
    while at < len(ids) - 1:
        # 每个窗口尽量满：最后一个往回取足上下文，只给新的打分。
        end = min(at + 32, len(ids) - 1)
        begin = max(0, end - 32)
        logits = model(torch.tensor([ids[begin:end]]))["logits"][0].double().log_softmax(-1)
        for target in range(at + 1, end + 1):
            expected += float(logits[target - 1 - begin, ids[target]])
        at = end
    request = Instance("loglikelihood_rolling", {}, (text,), 0)
    for batch in (1, 4):
        got = WorkbenchLM.of(model, tokenizer, batch_size=batch).loglikelihood_rolling([request])
        assert got == pytest.approx([expected], rel=1e-6)


def test_generation_options(trained: Any) -> None:
    lm = WorkbenchLM.of(*trained)
    model, tokenizer = trained

    def written(**options: Any) -> str:
        return lm.generate_until([Instance("generate_until", {}, ("the cat", options), 0)])[0]

    prompt = tokenizer.encode("the cat")
    whole = completions(
        model, [prompt], max_new_tokens=6, sampling=SamplingConfig(temperature=0),
        stop_ids=(tokenizer.document_separator,), tokenizer=tokenizer,
    )[0].text  # fmt: skip
    assert whole and written(until=[], max_gen_toks=6) == whole
    middle = whole[len(whole) // 2]
    assert written(until=[middle], max_gen_toks=6) == whole.split(middle)[0]
    torch.manual_seed(2)
    drawn = {written(do_sample=True, temperature=2.0, max_gen_toks=6) for _ in range(8)}
    assert len(drawn) > 3
    with pytest.raises(ValueError, match="generation options \\['num_beams'\\] are not known"):
        written(num_beams=3)
    with pytest.raises(ValueError, match="max_gen_toks=32 leaves no room in context_size=32"):
        written(max_gen_toks=32)


def test_requests_that_cannot_be_scored_are_named(trained: Any) -> None:
    lm = WorkbenchLM.of(*trained)
    ok, long = ("a", " cat"), ("a", " zqj" * 40)
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate((ok, long))]
    with pytest.raises(ValueError, match="request 2: .* more than context_size=32"):
        lm.loglikelihood(requests)
    assert math.isfinite(lm.loglikelihood(requests[:1])[0][0])


def test_an_empty_context_and_spaces_at_its_end(trained: Any) -> None:
    """空的上文是文档分隔符；上文末尾的空白归续文。"""
    model, tokenizer = trained
    lm = WorkbenchLM.of(model, tokenizer)
    pairs = [("", "the cat"), ("the cat ", "sat"), ("the cat", " sat")]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    empty, spaced, plain = lm.loglikelihood(requests)
    ids = [tokenizer.document_separator, *tokenizer.encode("the cat")]
    scores = model(torch.tensor([ids[:-1]]))["logits"][0].log_softmax(-1)
    expected = sum(scores[i, token].item() for i, token in enumerate(ids[1:]))
    assert empty[0] == pytest.approx(expected, rel=1e-5)
    assert spaced == plain


@pytest.mark.slow
def test_the_documented_command(trained: Any, tasks: Path, results: Any, tmp_path: Path) -> None:
    model, tokenizer = trained
    model.save_pretrained(tmp_path / "run")
    tokenizer.save(tmp_path / "run")
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "app.interop.lm_eval", "--model", "gpt2-workbench",
         "--model_args", f"path={tmp_path / 'run'}", "--tasks", "pick",
         "--include_path", str(tasks), "--output_path", str(tmp_path / "out.json")],
        capture_output=True, text=True, cwd=BACKEND, env=env,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    written = json.loads(next(tmp_path.glob("out*.json")).read_text())
    assert written["results"]["pick"]["acc,none"] == results[0]["results"]["pick"]["acc,none"]
    assert "|pick" in done.stdout
    if not torch.cuda.is_available():
        assert "device=cuda:0 but there is no CUDA here: using cpu" in done.stderr
