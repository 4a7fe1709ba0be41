"""核验：真模型全部通过；每种植入的错误都被指定的那一项抓住。"""

import copy
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import app.models.transformer as transformer
from app.models.transformer import GPT2Config, GPT2Model, KVCache, MoEConfig
from app.models.transformer import attention as attention_module
from app.models.transformer import model as model_module
from app.models.transformer.backends import attend as attend_module
from app.models.transformer.backends import mask_plan as plan_module
from app.models.transformer.factory import PRESETS
from app.models.transformer.visibility import rule as masking
from app.models.transformer.visibility.pattern import CAUSAL
from app.models.transformer.visibility.positions import Positions
from app.models.transformer.weights import own_folder as weights
from app.models.transformer.weights import pretrained
from app.verification import checks, structure, verify
from app.verification.said import Said
from app.verification.subject import MAX_PARAMETERS, Subject, count_parameters

SMALL = GPT2Config(vocab_size=61, context_size=48, n_layer=2, n_head=2, n_embed=32)


def failures(config: GPT2Config = SMALL) -> dict[str, str]:
    """没有通过的检查与它的数；异常也算不通过。"""
    subject, failed = Subject.of(config), {}
    for _, check in verify.BEHAVIOUR:
        passed, figure = verify._attempt(lambda check=check: check(subject))
        if not passed:
            failed[check.__name__] = figure.english
    return failed


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"norm": "pre", "bias": False},
        {"norm": "deepnorm", "activation": "swiglu", "n_kv_head": 1},
        {"norm": "keel", "qk_norm": True, "norm_type": "rmsnorm"},
        {"position": "none", "tie_weights": False, "dropout": 0.0},
        {"attention_backend": "reference", "activation": "relu2"},
        {"n_layer": 1, "n_head": 1, "n_embed": 8, "context_size": 1, "vocab_size": 2},
        {"moe_num_experts": 4, "moe": MoEConfig(router="sigmoid", shared_experts=1, layers=(1,))},
        {"moe_num_experts": 3, "norm": "keel", "activation": "swiglu", "position": "rope"},
    ],
)
def test_the_real_model_passes_every_check(changes):
    assert failures(SMALL.replace(**changes)) == {}


def one_key_ahead(patch):
    """掩码错位一格：第 t 个查询看得见第 t+1 个键（稠密路径）。"""
    real = masking.visible

    def visible(q, k, pattern=CAUSAL):
        ahead = Positions(k.pos - 1, k.segment)
        return real(q, ahead, pattern) & (k.pos[:, None, :] >= 0)

    patch.setattr(plan_module, "visible", visible)


def no_causal_flag(patch):
    real = attend_module.attend_sdpa

    def full(q, k, v, plan, dropout=0.0):
        return real(q, k, v, replace(plan, causal=False), dropout)

    patch.setitem(attend_module._BACKENDS, "sdpa", full)


def forgotten_offset(patch):
    """有缓存时位置又从 0 数起。"""
    real = model_module.Embeddings.forward

    def forward(self, input_ids, positions):
        if positions.start:
            positions = Positions.plain(0, positions.length, positions.pos.device)
        return real(self, input_ids, positions)

    patch.setattr(model_module.Embeddings, "forward", forward)


def ragged_offset(patch):
    """长短不一的一批：解码的位置忘了各行的长度。"""
    real = Positions.padded.__func__
    patch.setattr(Positions, "padded", classmethod(lambda cls, mask, past=0: real(cls, mask, 0)))


def untied_head(patch):
    patch.setattr(GPT2Model, "head_weight", property(lambda self: self.embed.wte.weight.clone()))


def second_head(patch):
    """存盘时共享，读回来成了两份。"""
    real = pretrained.load_pretrained

    def load(*args):
        model = real(*args)
        model.spare = nn.Parameter(model.embed.wte.weight.detach().clone())
        return model

    patch.setattr(pretrained, "load_pretrained", load)


def dropout_in_eval(patch):
    patch.setattr(nn.Dropout, "forward", lambda self, x: nn.functional.dropout(x, self.p, True))


def no_dropout_at_all(patch):
    patch.setattr(nn.Dropout, "forward", lambda self, x: x)
    real = attention_module.attend

    def attend(*args, dropout):
        return real(*args, dropout=0.0)

    patch.setattr(attention_module, "attend", attend)


def padding_counts(patch):
    """位置不看掩码：左填充的行从中间的位置开始。"""

    def padded(cls, mask, past=0):
        pos = torch.arange(mask.shape[1]) + past * torch.ones_like(mask)
        return cls(pos.masked_fill(mask == 0, -1))

    patch.setattr(Positions, "padded", classmethod(padded))


def padding_is_seen(patch):
    real = masking.visible

    def visible(q, k, pattern=CAUSAL):
        return real(q, Positions(k.pos.clamp(min=0), k.segment), pattern)

    patch.setattr(plan_module, "visible", visible)


def documents_see_each_other(patch):
    real = masking.visible
    patch.setattr(
        plan_module,
        "visible",
        lambda q, k, pattern=CAUSAL: real(Positions(q.pos), Positions(k.pos), pattern),
    )


def positions_do_not_restart(patch):
    def packed(cls, segment, mask=None, last=None):
        return cls(torch.arange(segment.shape[1]).expand_as(segment), segment=segment)

    patch.setattr(Positions, "packed", classmethod(packed))


def rows_mix(patch):
    real = model_module.GPT2Model.forward

    def forward(self, input_ids, **options):
        out = real(self, input_ids, **options)
        if "logits" in out:
            out["logits"] = out["logits"] + 1e-9 * out["logits"].mean(0, keepdim=True)
        return out

    patch.setattr(GPT2Model, "forward", forward)


def no_rollback(patch):
    patch.setattr(KVCache, "truncate", lambda self, lengths: None)


def wrong_rows(patch):
    real = KVCache.reorder
    patch.setattr(KVCache, "reorder", lambda self, rows: real(self, rows.flip(0)))


def wrong_scale(patch):
    real = attend_module.attention_weights
    patch.setattr(
        attend_module, "attention_weights", lambda q, k, plan: real(q * 1.000001, k, plan)
    )


def half_saved(patch):
    real = weights.save_model

    def save(model, folder):
        real(copy.deepcopy(model).to(torch.bfloat16), folder)

    patch.setattr(weights, "save_model", save)


def ignored_targets_count(patch):
    real = model_module.head_cross_entropy
    patch.setattr(
        model_module,
        "head_cross_entropy",
        lambda hidden, weight, targets, *chunk: real(hidden, weight, targets.clamp(min=0)),
    )


def detached_positions(patch):
    real = model_module.Embeddings.forward

    def forward(self, input_ids, positions):
        wpe = self.wpe
        frozen = nn.Embedding.from_pretrained(wpe.weight.detach())
        self.__dict__["_modules"] = {**self._modules, "wpe": frozen}
        try:
            return real(self, input_ids, positions)
        finally:
            self.__dict__["_modules"] = {**self._modules, "wpe": wpe}

    patch.setattr(model_module.Embeddings, "forward", forward)


def loud_start(patch):
    """标准差 1 的嵌入（torch 的默认）。"""
    real = model_module.initialize

    def initialize(model, config):
        real(model, config)
        nn.init.normal_(model.embed.wte.weight)

    patch.setattr(model_module, "initialize", initialize)


def final_norm_on_post(patch):
    real = GPT2Model.__init__

    def init(self, config):
        real(self, config)
        self.ln_f = nn.LayerNorm(config.n_embed)

    patch.setattr(GPT2Model, "__init__", init)


def not_a_number(patch):
    """NaN 不能因为 max(0, NaN) 是 0 而混过去。"""
    real = GPT2Model.forward

    def forward(self, input_ids, **options):
        out = real(self, input_ids, **options)
        return {name: value * float("nan") for name, value in out.items()}

    patch.setattr(GPT2Model, "forward", forward)


MUTANTS = {
    one_key_ahead: {"check_backends", "check_cache", "check_padding"},
    no_causal_flag: {"check_causality", "check_backends"},
    forgotten_offset: {"check_cache"},
    ragged_offset: {"check_rows_cached"},
    untied_head: {"check_tying"},
    second_head: {"check_tying"},
    dropout_in_eval: {"check_eval_mode", "check_causality", "check_batch"},
    no_dropout_at_all: {"check_eval_mode"},
    padding_counts: {"check_padding"},
    padding_is_seen: {"check_padding"},
    documents_see_each_other: {"check_packing"},
    positions_do_not_restart: {"check_packing"},
    rows_mix: {"check_batch"},
    no_rollback: {"check_cache"},
    wrong_rows: {"check_rows_cached"},
    wrong_scale: {"check_backends"},
    half_saved: {"check_saving"},
    ignored_targets_count: {"check_loss"},
    detached_positions: {"check_gradients"},
    loud_start: {"check_forward"},
    final_norm_on_post: {"check_parameters"},
    not_a_number: {
        "check_forward", "check_causality", "check_cache", "check_rows_cached", "check_padding",
        "check_packing", "check_batch", "check_backends", "check_loss", "check_gradients",
    },
}  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.__name__)
def test_a_planted_fault_is_caught_by_the_check_that_names_it(mutant, monkeypatch):
    mutant(monkeypatch)
    missed = MUTANTS[mutant] - failures().keys()
    assert not missed


def test_structure_catches_its_faults(monkeypatch):
    monkeypatch.setattr(structure, "FILES", (*structure.FILES, "decoder"))
    wanted = Said("8/9 files, wrong: decoder.py", "8/9 个文件，不对：decoder.py")
    assert structure.check_files() == (False, wanted)
    monkeypatch.setitem(structure.DEFAULTS, "n_layer", 11)
    figure = structure.check_config()[1]
    assert "11/12 个默认值，不对：n_layer" in figure.chinese
    assert "11/12 defaults, wrong: n_layer" in figure.english
    monkeypatch.setitem(PRESETS["medium"], "n_layer", 23)
    monkeypatch.setattr(structure, "COUNTS", {p: structure.COUNTS[p] for p in ("small", "medium")})
    passed, figure = structure.check_factories()
    for text in figure:
        assert not passed and "6/12" in text and "medium/50257/pre" in text
    monkeypatch.setattr(transformer, "__all__", [*transformer.__all__, "Missing"])
    assert not structure.check_components()[0]


def test_an_accepted_bad_value_fails_the_configuration(monkeypatch):
    monkeypatch.setattr(structure, "BAD_CONFIGS", (({"n_layer": 3}, "n_layer=3"),))
    assert structure.check_config()[0] is False


def test_a_check_that_raises_is_one_failure_and_the_rest_go_on():
    lines = []

    def broken():
        raise RuntimeError("no such layer")

    threads = torch.get_num_threads()
    table = [(Said("A", "甲"), broken), (Said("B", "乙"), lambda: (True, Said("3", "三")))]
    ok = verify.run_checks(table, "chinese", lines.append)
    assert not ok and torch.get_num_threads() == threads
    assert lines[:2] == ["❌ 甲：RuntimeError: no such layer", "✅ 乙：三"]
    assert lines[2].startswith("共 2 项，1 项未通过")
    lines.clear()
    assert not verify.run_checks(table, "english", lines.append)
    assert lines[:2] == ["❌ A: RuntimeError: no such layer", "✅ B: 3"]
    assert lines[2].startswith("2 checks, 1 failed")


def test_every_variant_is_checked_and_the_failing_one_is_named():
    subjects = [Subject.of(SMALL), Subject.of(SMALL.replace(norm="keel"))]
    passed, figure = verify._worst(lambda s: (s.config.norm == "post", Said("7", "七")), subjects)
    assert (passed, figure) == (False, Said("norm=keel: 7", "norm=keel：七"))


@pytest.mark.parametrize("norm", ["post", "pre", "deepnorm", "keel"])
@pytest.mark.parametrize("preset", PRESETS)
def test_presets_shrink_openly_and_keep_what_matters(preset, norm):
    asked = GPT2Config(**PRESETS[preset], norm=norm)
    subject = Subject.of(asked)
    assert subject.asked == asked and subject.config.n_layer >= 2
    assert count_parameters(subject.config) <= MAX_PARAMETERS
    assert subject.config.head_dim == asked.head_dim
    assert f"n_layer {asked.n_layer}→{subject.config.n_layer}" in subject.shrunk
    for name, value in subject.config.to_dict().items():
        if value != asked.to_dict()[name]:
            assert f"{name} " in subject.shrunk


def test_a_small_configuration_is_taken_as_it_is():
    subject = Subject.of(SMALL)
    assert subject.shrunk == "" and subject.config == SMALL


def test_every_pattern_survives_the_shrinking():
    cycle = ("local(512)", "local(512)", "strided(300)", "causal")
    asked = GPT2Config(n_layer=24, attention_pattern=cycle)
    subject = Subject.of(asked)
    assert subject.config.n_layer < asked.n_layer
    assert subject.config.attention_pattern == ("local(512)", "strided(300)", "causal")
    assert subject.config.context_size == 512
    assert "attention_pattern" in subject.shrunk


def test_grouped_heads_keep_their_group_when_they_shrink():
    asked = GPT2Config(n_layer=80, n_head=64, n_kv_head=8, n_embed=8192)
    config = Subject.of(asked).config
    assert config.n_head // config.kv_heads == 8 and config.head_dim == 128


def test_default_parameters_equal_the_published_formula():
    """pre、默认选项：V·d + C·d + L·(12d² + 13d) + 2d。"""
    config = GPT2Config(norm="pre")
    d = config.n_embed
    wanted = 50304 * d + 1024 * d + 12 * (12 * d * d + 13 * d) + 2 * d
    assert checks.expected_parameters(Subject(config, config, "")) == wanted == 124_475_904


@pytest.mark.slow
def test_the_script_prints_one_line_a_check_and_exits_0():
    backend = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "verify_implementation.py"],
        cwd=backend,
        capture_output=True,
        text=True,
        encoding="utf-8",
        env={"PYTHONIOENCODING": "utf-8", "PATH": ""},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 1 + len(verify.STRUCTURE) + len(verify.BEHAVIOUR)
    assert all(line.startswith("✅ ") for line in lines[:-1])
    assert "全部通过" in lines[-1]


def test_the_two_languages_say_the_same_numbers(monkeypatch):
    """同一张表：英语里没有汉字，数一个不差。"""
    monkeypatch.setattr(structure, "COUNTS", {"small": structure.COUNTS["small"]})
    subject = Subject.of(SMALL.replace(moe_num_experts=2))
    found = [(title, check()[1]) for title, check in verify.STRUCTURE]
    found += [(title, check(subject)[1]) for title, check in verify.BEHAVIOUR]
    for title, figure in found:
        for said in (title, figure):
            assert not re.search("[\u3000-\u303f\u4e00-\u9fff\uff00-\uffef]", said.english)
        numbers = [re.findall(r"[\d.,]*\d", text) for text in figure]
        assert sorted(numbers[0]) == sorted(numbers[1]) and title.english != title.chinese
