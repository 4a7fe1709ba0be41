"""稠密 <-> 混合专家：第 0 步算出同样的 logits，平均回来是原样，剪掉没用到的专家什么也不变。"""

import pytest
import torch

from app.models.transformer import GPT2Config, GPT2Model, MoEConfig
from app.models.transformer.experts.upcycle import average, most_used, prune, upcycle

NORMS = ("post", "pre", "deepnorm", "keel")
ACTIVATIONS = ("gelu_tanh", "gelu", "relu2", "swiglu", "silu")


def dense_model(**changes):
    values = {"vocab_size": 61, "context_size": 16, "n_layer": 3, "n_head": 2, "n_embed": 16}
    model = GPT2Model(GPT2Config(**values | {"dropout": 0.0} | changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def target(dense, experts=4, k=2, **moe):
    config = dense.config
    moe = MoEConfig(hidden=config.mlp_hidden, **moe)
    return config.replace(moe_num_experts=experts, moe_top_k=k, moe=moe)


def loaded(config, state, dtype=None):
    model = GPT2Model(config).to(dtype or next(iter(state.values())).dtype)
    model.load_state_dict(state)
    return model.eval()


def grown(dense, config, **options):
    return loaded(config, upcycle(dense.state_dict(), dense.config, config, **options))


def ids(batch=2, length=16):
    return torch.randint(61, (batch, length))


@torch.no_grad()
def difference(one, other, tokens):
    return float((one(tokens)["logits"] - other(tokens)["logits"]).abs().max())


@pytest.mark.parametrize("router, bias", [("softmax_topk", True), ("sigmoid", False)])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("norm", NORMS)
def test_equal_at_step_0_in_float64(norm, activation, router, bias):
    dense = dense_model(norm=norm, activation=activation, bias=bias).double()
    assert difference(dense, grown(dense, target(dense, router=router)), ids()) < 1e-12


@pytest.mark.parametrize("changes", [
    {"norm": "pre"},
    {"norm": "pre", "norm_type": "rmsnorm", "position": "rope", "bias": False},
    {"norm": "keel", "n_kv_head": 1, "qk_norm": True},
])  # fmt: skip
def test_equal_at_step_0_in_float32(changes):
    dense = dense_model(**changes)
    moe = grown(dense, target(dense))
    with torch.no_grad():
        largest = float(dense(ids())["logits"].abs().max())
    assert difference(dense, moe, ids()) < 1e-6 * max(1.0, largest)


@pytest.mark.parametrize("dispatch", ["reference", "sorted"])
@pytest.mark.parametrize("layers, chosen", [
    ({}, (0, 1, 2)), ({"every": 2}, (1,)),
    ({"first_dense": 1}, (1, 2)), ({"layers": (0, 2)}, (0, 2)),
])  # fmt: skip
def test_only_the_chosen_layers_get_experts(layers, chosen, dispatch):
    dense = dense_model(norm="pre").double()
    config = target(dense, dispatch=dispatch, **layers)
    moe = grown(dense, config)
    assert config.moe_layers == chosen
    assert difference(dense, moe, ids()) < 1e-12
    assert set(moe(ids(), return_routing=chosen)["routing"]) == set(chosen)


def test_the_seed_gives_the_router_and_noise_breaks_the_symmetry():
    dense = dense_model()
    config = target(dense)
    one, same, other = (
        upcycle(dense.state_dict(), dense.config, config, seed=s, noise=0.05) for s in (1, 1, 2)
    )
    name = "h.1.mlp.experts.c_fc.weight"
    assert torch.equal(one[name], same[name]) and not torch.equal(one[name], other[name])
    assert not torch.equal(one["h.0.mlp.router.weight"], other["h.0.mlp.router.weight"])
    for part in ("c_fc", "c_proj"):
        weight = dense.state_dict()[f"h.1.mlp.{part}.weight"]
        drawn = one[f"h.1.mlp.experts.{part}.weight"] - weight
        assert float(drawn.std() / weight.std()) == pytest.approx(0.05, rel=0.1)
        assert torch.equal(
            one[f"h.1.mlp.experts.{part}.bias"][3], dense.state_dict()[f"h.1.mlp.{part}.bias"]
        )
    assert 1e-6 < difference(dense, loaded(config, one), ids()) < 1.0


def test_copies_do_not_share_memory_and_the_source_is_untouched():
    dense = dense_model()
    before = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    state = upcycle(dense.state_dict(), dense.config, target(dense))
    state["h.0.mlp.experts.c_fc.weight"][0].zero_()
    assert state["h.0.mlp.experts.c_fc.weight"][1].abs().sum() > 0
    assert all(torch.equal(before[n], t) for n, t in dense.state_dict().items())


def test_average_is_the_way_back():
    dense = dense_model(norm="pre", activation="swiglu").double()
    config = target(dense, router="sigmoid", first_dense=1)
    state = average(upcycle(dense.state_dict(), dense.config, config), config)
    back = loaded(config.dense(), state)
    assert config.dense() == dense.config
    assert difference(dense, back, ids()) < 1e-12


def test_average_is_the_mean():
    dense = dense_model()
    config = target(dense, k=3)
    state = upcycle(dense.state_dict(), dense.config, config, noise=1.0)
    found = average(state, config)["h.2.mlp.c_proj.weight"]
    torch.testing.assert_close(found, sum(state["h.2.mlp.experts.c_proj.weight"]) / 4)


@pytest.mark.parametrize("router", ["softmax_topk", "sigmoid"])
def test_pruning_experts_without_tokens_changes_nothing(router):
    dense = dense_model(norm="pre").double()
    config = target(dense, experts=6, router=router)
    state = upcycle(dense.state_dict(), dense.config, config, noise=0.5)
    for layer in range(3):
        # 这两个没有词元去：偏置压下去，或打分恒为 0 而别的两两相反（总有一个为正、够 k 个）。
        if router == "sigmoid":
            state[f"h.{layer}.mlp.router.selection_bias"][[layer, 5]] = -9.0
        else:
            rows = state[f"h.{layer}.mlp.router.weight"]
            rows[[layer, 5]] = 0.0
            a, b, c, d = (e for e in range(5) if e != layer)
            rows[b], rows[d] = -rows[a], -rows[c]
    moe = loaded(config, state)
    tokens = ids(4)
    load = moe(tokens)["expert_load"]
    keep = most_used(load, config)
    assert keep == {n: [e for e in range(5) if e != n] for n in range(3)}
    less = loaded(*reversed(prune(state, config, keep)))
    assert difference(moe, less, tokens) < 1e-12


def test_pruning_keeps_the_most_used_and_their_weights():
    dense = dense_model()
    config = target(dense, experts=5, layers=(0, 2))
    state = upcycle(dense.state_dict(), dense.config, config, noise=0.5)
    load = torch.tensor([[3, 0, 7, 7, 1], [0, 0, 1, 2, 3]])
    keep = most_used(load, config, 3)
    assert keep == {0: [0, 2, 3], 2: [2, 3, 4]}
    assert most_used(load, config) == {0: [0, 2, 3, 4], 2: [0, 2, 3, 4]}
    less, smaller = prune(state, config, keep)
    assert smaller.moe_num_experts == 3
    name = "h.2.mlp.experts.c_fc.bias"
    assert torch.equal(less[name], state[name][2:])
    assert torch.equal(less["h.0.mlp.router.weight"], state["h.0.mlp.router.weight"][[0, 2, 3]])
    assert torch.equal(less["h.1.mlp.c_fc.weight"], state["h.1.mlp.c_fc.weight"])
    loaded(smaller, less)


@pytest.mark.parametrize("moe, words", [
    ({"router": "softmax", "hidden": 64}, "'softmax'.*do not sum to 1.*'softmax_topk' or"),
    ({"hidden": 32}, "width 32 but the dense MLP is 64"),
    ({"hidden": 64, "shared_experts": 1}, "moe.shared_experts=1"),
])  # fmt: skip
def test_what_cannot_be_equal_is_refused_both_ways(moe, words):
    dense = dense_model()
    config = dense.config.replace(moe_num_experts=4, moe=MoEConfig(**moe))
    with pytest.raises(ValueError, match=words):
        upcycle(dense.state_dict(), dense.config, config)
    with pytest.raises(ValueError, match=words):
        average(GPT2Model(config).state_dict(), config)


def test_wrong_use_names_both_values():
    dense = dense_model()
    config = target(dense)
    state = upcycle(dense.state_dict(), dense.config, config)
    with pytest.raises(ValueError, match="already has moe_num_experts=4"):
        upcycle(state, config, config)
    with pytest.raises(ValueError, match="more than its experts"):
        upcycle(dense.state_dict(), dense.config.replace(norm="keel"), config)
    with pytest.raises(ValueError, match="noise=-1.0"):
        upcycle(dense.state_dict(), dense.config, config, noise=-1.0)
    with pytest.raises(ValueError, match="moe_num_experts=0"):
        average(dense.state_dict(), dense.config)
    for keep, words in (
        ({0: [0, 1]}, r"layers \[0\] but the MoE layers are \[0, 1, 2\]"),
        ({0: [0, 1], 1: [0, 1, 2], 2: [0, 1]}, r"leaves \[2, 3\] experts"),
        (dict.fromkeys(range(3), [0]), "keep=1 must be from 2"),
        (dict.fromkeys(range(3), [0, 4]), "expert 4 in layer 0: experts go from 0 to 3"),
    ):
        with pytest.raises(ValueError, match=words):
            prune(state, config, keep)
