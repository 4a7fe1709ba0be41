"""transformers 的模型与主干逐位置相同，并守 transformers 的约定（docs/transformers.md）。"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AttentionInterface, AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.cache_utils import DynamicCache

from app.interop.transformers import (
    WorkbenchCache,
    WorkbenchConfig,
    WorkbenchForCausalLM,
    WorkbenchModel,
    register,
    unwrap,
    wrap,
)
from app.models.transformer import GPT2Config, GPT2Model
from app.models.transformer.layers.init import base_std, residual_std

from .variants import VARIANTS, VOCAB, config, model, tokens

EXACT = {"rtol": 0.0, "atol": 1e-12}


@pytest.fixture(scope="module", params=VARIANTS)
def pair(request: pytest.FixtureRequest) -> tuple[GPT2Model, WorkbenchForCausalLM]:
    core = model(request.param)
    return core, wrap(core)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_logits_equal_the_backbone(pair: Any, implementation: str) -> None:
    core, wrapped = pair
    wrapped.set_attn_implementation(implementation)
    ids = tokens(2, 20)
    torch.testing.assert_close(wrapped(ids).logits, core(ids)["logits"], **EXACT)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_row_equals_the_row_alone(pair: Any, implementation: str, side: str) -> None:
    """transformers 自己的 GPT-2 在左侧填充的普通前向里会错（位置不看掩码）。"""
    core, wrapped = pair
    wrapped.set_attn_implementation(implementation)
    ids, mask = tokens(2, 16), torch.ones(2, 16, dtype=torch.long)
    hidden = slice(0, 5) if side == "left" else slice(11, 16)
    mask[1, hidden] = 0
    real = mask[1].bool()
    out = wrapped(ids, attention_mask=mask).logits
    torch.testing.assert_close(out[1, real], core(ids[1:, real])["logits"][0], **EXACT)
    torch.testing.assert_close(out[0], core(ids[:1])["logits"][0], **EXACT)


@pytest.mark.parametrize("make", [DynamicCache, WorkbenchCache])
def test_chunks_through_a_cache_equal_the_whole(pair: Any, make: Any) -> None:
    core, wrapped = pair
    wrapped.set_attn_implementation("sdpa")
    ids, mask = tokens(2, 20), torch.ones(2, 20, dtype=torch.long)
    mask[1, :4] = 0
    whole = wrapped(ids, attention_mask=mask).logits
    own = make is WorkbenchCache
    past = make() if own else make(config=wrapped.config)
    parts, at = [], 0
    with torch.no_grad():
        for n in (7, 1, 3, 1, 8):
            seen = mask[:, : at + n]
            out = wrapped(
                ids[:, at : at + n], attention_mask=seen, past_key_values=past, use_cache=True
            )
            parts.append(out.logits)
            at += n
    assert past.get_seq_length() == 20
    real = mask.bool()
    torch.testing.assert_close(torch.cat(parts, 1)[real], whole[real], **EXACT)


def test_maps_and_hidden_states_equal_the_backbone(pair: Any) -> None:
    core, wrapped = pair
    ids = tokens(2, 12)
    expected = core(ids, return_attention=(0, 1), return_hidden=(0, 1, 2))
    for implementation in ("eager", "sdpa"):
        wrapped.set_attn_implementation(implementation)
        out = wrapped(ids, output_attentions=True, output_hidden_states=True)
        assert len(out.attentions) == 2
        for layer, weights in expected["attentions"].items():
            torch.testing.assert_close(out.attentions[layer], weights, **EXACT)
        for i in (0, 1):
            torch.testing.assert_close(out.hidden_states[i], expected["hidden"][i], **EXACT)
        # transformers 的约定：最后一个已过末尾的归一化。
        last = expected["hidden"][2]
        last = last if core.ln_f is None else core.ln_f(last)
        torch.testing.assert_close(out.hidden_states[-1], last, **EXACT)
        torch.testing.assert_close(out.logits, expected["logits"], **EXACT)
    with torch.no_grad():
        own = wrapped(ids, output_attentions=True, past_key_values=WorkbenchCache(), use_cache=True)
    torch.testing.assert_close(own.attentions[1], expected["attentions"][1], **EXACT)


def test_loss_and_gradients_equal_the_backbone(pair: Any) -> None:
    """labels 与 input_ids 对齐，由 transformers 错开一位；-100 不计。"""
    core, wrapped = pair
    wrapped.set_attn_implementation("sdpa")
    ids = tokens(3, 14)
    labels = ids.clone()
    labels[0, 4:8] = -100
    targets = F.pad(labels[:, 1:], (0, 1), value=-100)
    out = core(ids, targets=targets)
    ours = out["loss"] + out.get("aux_loss", 0.0)
    expected = torch.autograd.grad(ours, list(core.parameters()))
    theirs = wrapped(ids, labels=labels).loss
    # 参数就是同一些张量，所以梯度可以逐个比较。
    got = torch.autograd.grad(theirs, list(core.parameters()))
    # transformers 的损失一律用 float32 算。
    torch.testing.assert_close(theirs.double(), ours, rtol=1e-6, atol=0.0)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_loss_divides_by_num_items_in_batch() -> None:
    wrapped = wrap(model("post"))
    ids = tokens(2, 9)
    mean, total = wrapped(ids, labels=ids).loss, wrapped(ids, labels=ids, num_items_in_batch=4).loss
    torch.testing.assert_close(total, mean * 16 / 4)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing_but_memory(reentrant: bool) -> None:
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    wrapped = wrap(model("pre")).train()
    wrapped.model.h["0"].attn.register_forward_hook(count)
    ids = tokens(2, 10)

    def gradients() -> list[torch.Tensor]:
        wrapped.zero_grad()
        wrapped(ids, labels=ids).loss.backward()
        return [p.grad.clone() for p in wrapped.parameters()]

    plain, before = gradients(), calls
    wrapped.activation_checkpointing_enable({"use_reentrant": reentrant})
    calls = 0
    if reentrant:
        wrapped.enable_input_require_grads()
    for a, b in zip(gradients(), plain, strict=True):
        torch.testing.assert_close(a, b, **EXACT)
    assert (before, calls) == (1, 2)
    wrapped.activation_checkpointing_disable()
    assert not wrapped.is_activation_checkpointing


def test_embeddings_positions_and_return_dict() -> None:
    core = model("prefix and window")
    wrapped = wrap(core)
    ids = tokens(2, 10)
    expected = core(ids)["logits"]
    embeds = wrapped.get_input_embeddings()(ids)
    torch.testing.assert_close(wrapped(inputs_embeds=embeds).logits, expected, **EXACT)
    shifted = torch.arange(10)[None] + 7
    torch.testing.assert_close(
        wrapped(ids, position_ids=shifted).logits,
        core(ids, positions=shifted.expand(2, -1))["logits"],
        **EXACT,
    )
    logits, *_ = wrapped(ids, return_dict=False)
    torch.testing.assert_close(logits, expected, **EXACT)
    last = wrapped(ids, logits_to_keep=3).logits
    torch.testing.assert_close(last, expected[:, -3:], **EXACT)
    picked = wrapped(ids, logits_to_keep=torch.tensor([0, 4])).logits
    torch.testing.assert_close(picked, expected[:, [0, 4]], **EXACT)
    for wrong in ({}, {"input_ids": ids, "inputs_embeds": embeds}):
        with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
            wrapped.model(**wrong)
    with pytest.raises(ValueError, match="needs 58 positions but context_size=48"):
        wrapped(tokens(1, 58))


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_packed_documents_do_not_see_each_other(pair: Any, implementation: str) -> None:
    """位置从 0 重来就是新的文档；与 use_cache 无关（transformers 的 GPT-2 里有关）。"""
    core, wrapped = pair
    wrapped.set_attn_implementation(implementation)
    ids = tokens(1, 15)
    where = torch.cat([torch.arange(6), torch.arange(9)])[None]
    segment = torch.tensor([[0] * 6 + [1] * 9])
    for use_cache in (False, True):
        out = wrapped(ids, position_ids=where, use_cache=use_cache).logits
        torch.testing.assert_close(out, core(ids, segment_ids=segment)["logits"], **EXACT)


def test_a_prepared_mask_is_used_as_it_is() -> None:
    wrapped = wrap(model("pre"))
    ids = tokens(1, 6)
    mask = torch.ones(6, 6).tril().bool()
    mask[5, 2] = False
    wrapped.set_attn_implementation("sdpa")
    out = wrapped(ids, attention_mask=mask[None, None]).logits
    plain = wrapped(ids).logits
    torch.testing.assert_close(out[:, :5], plain[:, :5], **EXACT)
    assert (out[:, 5] - plain[:, 5]).abs().max() > 1e-3


def test_wrapping_shares_the_tensors_and_keeps_the_names() -> None:
    for name in ("post", "untied rmsnorm swiglu"):
        core = model(name)
        wrapped = wrap(core, eos_token_id=3)
        own = {
            f"model.{k}".replace("model.lm_head", "lm_head"): v for k, v in core.named_parameters()
        }
        theirs = dict(wrapped.named_parameters())
        assert own.keys() == theirs.keys()
        assert all(theirs[k] is v for k, v in own.items())
        tied = wrapped.lm_head.weight is wrapped.get_input_embeddings().weight
        assert tied == core.config.tie_weights
        assert wrapped.config.eos_token_id == 3
        back = unwrap(wrapped)
        assert back.config == core.config
        assert all(a is b for a, b in zip(back.parameters(), core.parameters(), strict=True))


@pytest.mark.parametrize("name", ["post", "untied rmsnorm swiglu"])
def test_resizing_the_vocabulary_keeps_rows_and_ties(name: str) -> None:
    core = model(name)
    wrapped = wrap(core)
    ids = tokens(1, 8)
    expected = core(ids)["logits"].detach().clone()
    wrapped.resize_token_embeddings(VOCAB + 5)
    assert wrapped.config.vocab_size == VOCAB + 5
    assert (wrapped.lm_head.weight is wrapped.get_input_embeddings().weight) == (name == "post")
    out = wrapped(ids).logits
    assert out.shape[-1] == VOCAB + 5
    torch.testing.assert_close(out[..., :VOCAB], expected, **EXACT)
    wrapped(torch.tensor([[VOCAB + 4, 1]]))
    assert unwrap(wrapped).config.vocab_size == VOCAB + 5


def test_initialisation_is_the_backbones() -> None:
    for norm in ("pre", "deepnorm"):
        # 宽一些，标准差才量得准。
        shape = GPT2Config(
            vocab_size=500, context_size=64, n_layer=2, n_head=2, n_embed=128, norm=norm
        )
        wrapped = WorkbenchForCausalLM(WorkbenchConfig(**shape.to_dict()))
        core = GPT2Model(shape)
        for key, parameter in core.named_parameters():
            theirs = wrapped.model.get_parameter(key)
            if parameter.dim() == 2:
                assert theirs.std().item() == pytest.approx(parameter.std().item(), rel=0.05), key
            else:
                torch.testing.assert_close(theirs, parameter, rtol=0, atol=0)
    block = WorkbenchModel(WorkbenchConfig(**shape.replace(norm="post").to_dict())).h["0"]
    assert block.mlp.c_fc.weight.std().item() == pytest.approx(base_std(shape), rel=0.05)
    assert block.mlp.c_proj.weight.std().item() == pytest.approx(residual_std(shape), rel=0.05)


def test_a_missing_weight_is_initialised_and_the_others_kept(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    wrapped = wrap(model("post"))
    wrapped.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    state = load_file(path)
    del state["model.h.1.mlp.c_fc.weight"]
    save_file(state, path, metadata={"format": "pt"})
    again = WorkbenchForCausalLM.from_pretrained(tmp_path)
    for key, value in state.items():
        assert torch.equal(again.state_dict()[key], value), key
    fresh = again.model.h["1"].mlp.c_fc.weight
    assert fresh.std().item() == pytest.approx(base_std(config("post")), rel=0.1)


def test_save_and_load_keep_weights_ties_and_precision(pair: Any, tmp_path: Path) -> None:
    register()
    core, wrapped = pair
    wrapped.save_pretrained(tmp_path)
    ids = tokens(2, 9)
    for make in (WorkbenchForCausalLM, AutoModelForCausalLM):
        again, info = make.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert again.dtype == torch.float64 and not again.training
        torch.testing.assert_close(again(ids).logits, core(ids)["logits"], **EXACT)
        tied = again.lm_head.weight is again.get_input_embeddings().weight
        assert tied == core.config.tie_weights
    base = AutoModel.from_pretrained(tmp_path)
    assert type(base) is WorkbenchModel
    torch.testing.assert_close(
        base(ids).last_hidden_state, wrapped.model(ids).last_hidden_state, **EXACT
    )
    assert unwrap(again).config == core.config


def test_the_configuration_speaks_both_languages() -> None:
    register()
    ours = WorkbenchConfig(
        vocab_size=7, hidden_size=32, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=16, num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    core = ours.core()
    assert core == GPT2Config(
        vocab_size=7, n_embed=32, n_layer=3, n_head=4, context_size=16, n_kv_head=2,
        tie_weights=False,
    )  # fmt: skip
    assert (ours.n_embed, ours.head_dim, ours.intermediate_size) == (32, 8, 128)
    assert WorkbenchConfig().num_key_value_heads == 12
    again = AutoConfig.for_model(**ours.to_dict())
    assert type(again) is WorkbenchConfig and again.core() == core
    for options, message in (
        ({"n_head": 7}, "n_embed=768 is not a multiple of n_head=7"),
        ({"n_layer": 10**9}, "n_layer=1000000000 must be between 1 and"),
        ({"attention_pattern": "lokal(3)"}, "lokal"),
        ({"rope": {"thet": 3.0}, "position": "rope"}, "unknown model option 'rope.thet'"),
    ):
        with pytest.raises(ValueError, match=message):
            WorkbenchConfig(**options)
    ours.n_head = 5
    with pytest.raises(ValueError, match="n_embed=32 is not a multiple of n_head=5"):
        ours.core()


def test_windows_are_told_to_transformers() -> None:
    def told(pattern: Any) -> tuple[int | None, list[str]]:
        made = WorkbenchConfig(**config("post", attention_pattern=pattern).to_dict())
        return getattr(made, "sliding_window", None), made.layer_types

    full, sliding = "full_attention", "sliding_attention"
    assert told(None) == (None, [full, full])
    assert told(("local(6)", "causal")) == (6, [sliding, full])
    assert told("local(6)") == (6, [sliding, sliding])
    # 两个不同的窗口、窗口加前缀：transformers 说不出，缓存留全部，掩码由图样给。
    assert told(("local(6)", "local(5)")) == (None, [full, full])
    assert told("local(6) | global(2)") == (None, [full, full])
    made = WorkbenchConfig(**config("post", attention_pattern=("local(6)", "causal")).to_dict())
    made.sliding_window = 4
    assert made.core().attention_pattern == ("local(4)", "causal")
    wrapped = wrap(model("window and causal"))
    past = wrapped(tokens(1, 20), use_cache=True).past_key_values
    assert [layer.keys.shape[2] for layer in past.layers] == [5, 20]


def test_the_conditions_of_vllms_transformers_backend() -> None:
    """vLLM 文档（Transformers modeling backend）所列；vLLM 本身装不进测试。"""
    seen: list[tuple[Any, dict[str, Any]]] = []

    def outside(
        module: nn.Module, query: Any, key: Any, value: Any, mask: Any, scaling: float, **more: Any
    ) -> tuple[torch.Tensor, None]:
        # vLLM 的函数收到 (1, H, T, D)，给回摊平的 (T, H·D)，且不看掩码。
        assert mask is None
        seen.append((module, more))
        groups = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
        y = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
        return y.transpose(1, 2).reshape(query.shape[2], -1), None

    AttentionInterface.register("outside", outside)
    assert WorkbenchForCausalLM._supports_attention_backend
    assert WorkbenchModel._supports_attention_backend
    core = model("deepnorm rope gqa")
    base = wrap(core).model
    base.set_attn_implementation("outside")
    ids, marker = tokens(1, 9), object()
    hidden = base(
        inputs_embeds=base.get_input_embeddings()(ids), position_ids=torch.arange(9)[None],
        use_cache=False, return_dict=False, attention_instances=marker,
    )[0]  # fmt: skip
    expected = core(ids, return_hidden=(2,))["hidden"][2]
    torch.testing.assert_close(hidden, expected, **EXACT)
    assert [module.layer_idx for module, _ in seen] == [0, 1]
    assert all(more["attention_instances"] is marker for _, more in seen)
    assert all(module.is_causal and module.num_key_value_groups == 2 for module, _ in seen)
    linears = [m for name, m in base.named_modules() if name.split(".")[-1].startswith("c_")]
    assert len(linears) == 8 and all(isinstance(m, nn.Linear) for m in linears)


def test_a_pattern_that_the_attention_would_ignore_is_refused() -> None:
    AttentionInterface.register("outside", lambda *a, **k: pytest.fail("must not be reached"))
    wrapped = wrap(model("prefix and window"))
    wrapped.set_attn_implementation("outside")
    with pytest.raises(ValueError, match="knows causal and sliding-window.*global"):
        wrapped(tokens(1, 9))


@pytest.mark.slow
def test_flex_attention_equals_the_backbone(pair: Any) -> None:
    """FlexAttention 在 CPU 上要编译：float32，所以允差也是。"""
    core, _ = pair
    single = GPT2Model(core.config).eval()
    wrapped = wrap(single)
    wrapped.set_attn_implementation("flex_attention")
    ids, mask = tokens(2, 20), torch.ones(2, 20, dtype=torch.long)
    mask[1, :5] = 0
    with torch.no_grad():
        out = wrapped(ids, attention_mask=mask).logits[mask.bool()]
        expected = single(ids, attention_mask=mask)["logits"][mask.bool()]
    torch.testing.assert_close(out, expected, rtol=0.0, atol=2e-5)


def test_the_whole_forward_compiles_into_one_graph() -> None:
    core = model("deepnorm rope gqa")
    wrapped = wrap(core)
    run = torch.compile(wrapped.forward, fullgraph=True, backend="eager")
    ids = tokens(2, 12)
    with torch.no_grad():
        out = run(ids, use_cache=False).logits
    torch.testing.assert_close(out, core(ids)["logits"], **EXACT)
