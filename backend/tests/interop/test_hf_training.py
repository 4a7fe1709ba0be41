"""transformers 的 Trainer 与 PEFT 用在我们的模型上。"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import Trainer, TrainingArguments

from app.interop.transformers import WorkbenchConfig, WorkbenchForCausalLM, save, unwrap, wrap
from app.models.transformer import GPT2Model

from .variants import model, tokens

STEPS, BATCH = 6, 4


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """每行的最后几个不计损失，个数不同：求平均的分母才看得出对错。"""

    def __len__(self) -> int:
        return STEPS * BATCH

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        ids = tokens(1, 16, seed=i)[0]
        labels = ids.clone()
        labels[16 - i % 5 :] = -100
        return {"input_ids": ids, "labels": labels}


def arguments(folder: Path, **changes: object) -> TrainingArguments:
    options: dict[str, object] = {
        "output_dir": str(folder), "max_steps": STEPS, "per_device_train_batch_size": BATCH,
        "learning_rate": 0.1, "optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 1.0,
        "weight_decay": 0.0, "logging_steps": 1, "save_strategy": "no", "report_to": [],
        "use_cpu": True, "seed": 3, "train_sampling_strategy": "sequential",
        "disable_tqdm": True, **changes,
    }  # fmt: skip
    return TrainingArguments(**options)  # type: ignore[arg-type]


def our_losses(core: GPT2Model) -> list[float]:
    """同样的步子，主干与 torch 自己走：错开的目标、裁剪、SGD。

    不用 Adam：键的偏置的梯度本来是零（softmax 不看公共的平移），Adam 会把舍入噪声放大成整步。
    """
    core.train()
    optimizer = torch.optim.SGD(core.parameters(), lr=0.1)
    rows, losses = Rows(), []
    for step in range(STEPS):
        batch = [rows[step * BATCH + i] for i in range(BATCH)]
        ids = torch.stack([row["input_ids"] for row in batch])
        labels = torch.stack([row["labels"] for row in batch])
        loss = core(ids, targets=F.pad(labels[:, 1:], (0, 1), value=-100))["loss"]
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(core.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("way", ["plain", "accumulated", "checkpointed"])
def test_trainer_walks_the_same_path(way: str, tmp_path: Path) -> None:
    changes = {
        "plain": {},
        "accumulated": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": BATCH},
        "checkpointed": {"activation_checkpointing": True},
    }[way]
    twin = model("pre").float()
    expected = our_losses(twin)
    wrapped = wrap(model("pre").float())
    trainer = Trainer(wrapped, arguments(tmp_path, **changes), train_dataset=Rows())
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses == pytest.approx(expected, abs=1e-4)
    for (name, got), want in zip(wrapped.model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(
            got, want, rtol=0.0, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert wrapped.lm_head.weight is wrapped.get_input_embeddings().weight


def test_trainer_resumes_from_its_own_checkpoint(tmp_path: Path) -> None:
    straight = wrap(model("post").float())
    Trainer(straight, arguments(tmp_path / "a"), train_dataset=Rows()).train()
    half = Trainer(
        wrap(model("post").float()),
        arguments(tmp_path / "b", save_strategy="steps", save_steps=3),
        train_dataset=Rows(),
    )
    half.train()
    again = wrap(model("post").float())
    Trainer(again, arguments(tmp_path / "b"), train_dataset=Rows()).train(
        resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-3")
    )
    for a, b in zip(again.parameters(), straight.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0.0, atol=0.0)
    loaded = WorkbenchForCausalLM.from_pretrained(tmp_path / "b" / "checkpoint-6")
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight


@pytest.mark.parametrize("name", ["pre", "deepnorm rope gqa"])
def test_lora_on_the_linear_layers(name: str, tmp_path: Path) -> None:
    wrapped = wrap(model(name).float())
    ids = tokens(2, 12)
    before = wrapped(ids).logits.detach().clone()
    lora = LoraConfig(
        r=4, target_modules=["c_attn", "c_proj", "c_fc"], lora_dropout=0.0, task_type="CAUSAL_LM"
    )
    tuned = get_peft_model(wrapped, lora)
    trained = [n for n, p in tuned.named_parameters() if p.requires_grad]
    # 每层 c_attn、attn.c_proj、c_fc、mlp.c_proj，各一对 A、B。
    assert len(trained) == 2 * 4 * 2 and all("lora_" in n for n in trained)
    torch.testing.assert_close(tuned(ids).logits, before)
    frozen = {n: p.clone() for n, p in tuned.named_parameters() if "lora_" not in n}
    options = {"max_steps": 3, "activation_checkpointing": True, "learning_rate": 1.0}
    Trainer(tuned, arguments(tmp_path / "run", **options), train_dataset=Rows()).train()
    tuned.eval()
    for n, p in tuned.named_parameters():
        if n in frozen:
            assert torch.equal(p, frozen[n]), n
    after = tuned(ids).logits.detach().clone()
    assert (after - before).abs().max() > 0.1
    tuned.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(wrap(model(name).float()), tmp_path / "adapter").eval()
    torch.testing.assert_close(again(ids).logits, after)
    out = again.generate(input_ids=ids, max_new_tokens=5, do_sample=False, pad_token_id=0)
    merged = again.merge_and_unload()
    assert type(merged) is WorkbenchForCausalLM
    torch.testing.assert_close(merged(ids).logits, after, rtol=1e-4, atol=1e-4)
    assert torch.equal(merged.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0), out)
    assert merged.lm_head.weight is merged.get_input_embeddings().weight


def trained_adapter(**options: object) -> tuple[PeftModel, Tensor, Tensor]:
    """(三步之后的模型, 输入, 它的 logits)。"""
    lora = LoraConfig(r=4, target_modules=["c_attn"], task_type="CAUSAL_LM", **options)  # type: ignore[arg-type]
    tuned, ids = get_peft_model(wrap(model("pre").float()), lora), tokens(2, 12)
    optimizer = torch.optim.SGD([p for p in tuned.parameters() if p.requires_grad], lr=1.0)
    for _ in range(3):
        optimizer.zero_grad()
        tuned(ids, labels=ids).loss.backward()
        optimizer.step()
    return tuned.eval(), ids, tuned(ids).logits.detach().clone()


def test_peft_trains_single_tokens_of_a_tied_head_as_tied() -> None:
    """它从 config.to_dict() 里看共享与否：没有这一项就另训一个头，合并之后对不上。"""
    tuned, ids, after = trained_adapter(trainable_token_indices=[3, 5])
    merged = tuned.merge_and_unload()
    assert merged.lm_head.weight is merged.get_input_embeddings().weight
    core = unwrap(merged)
    assert core.config.tie_weights
    for logits in (merged(ids).logits, core(ids)["logits"]):
        torch.testing.assert_close(logits, after, rtol=1e-5, atol=1e-4)


def test_a_head_that_peft_untied_stays_untied(tmp_path: Path) -> None:
    tuned, ids, after = trained_adapter(modules_to_save=["lm_head"])
    with pytest.raises(ValueError, match=r"h.0.attn.c_attn.bias.*merge adapters first"):
        unwrap(tuned.get_base_model())
    merged = tuned.merge_and_unload()
    # 哪怕配置仍说共享（旧的 PEFT 不改它）：张量说了算。
    merged.config.tie_weights = True
    core = unwrap(merged)
    assert not core.config.tie_weights and not torch.equal(core.head_weight, core.embed.wte.weight)
    save(merged, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] is False
    back, again = (
        GPT2Model.from_pretrained(tmp_path),
        WorkbenchForCausalLM.from_pretrained(tmp_path),
    )
    for logits in (core(ids)["logits"], back(ids)["logits"], again(ids).logits):
        torch.testing.assert_close(logits, after, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", ["pre", "strided gqa", "untied rmsnorm swiglu"])
def test_other_libraries_find_what_they_read_in_a_configuration(name: str, tmp_path: Path) -> None:
    wrapped = wrap(model(name))
    core = wrapped.config.core()
    wanted = {
        "vocab_size": core.vocab_size, "hidden_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": core.kv_heads, "head_dim": 8,
        "intermediate_size": core.mlp_hidden, "max_position_embeddings": core.context_size,
        "tie_word_embeddings": core.tie_weights,
    }  # fmt: skip
    wrapped.config.save_pretrained(tmp_path)
    on_disk = json.loads((tmp_path / "config.json").read_text())
    for found in (wrapped.config.to_dict(), on_disk):
        assert {key: found[key] for key in wanted} == wanted
    assert WorkbenchConfig.from_pretrained(tmp_path).core() == core


def test_two_names_of_one_value_must_agree() -> None:
    for options, message in (
        ({"n_embed": 32, "hidden_size": 64}, "hidden_size=64 but n_embed is 32"),
        ({"tie_weights": True, "tie_word_embeddings": False}, "tie_word_embeddings=False but"),
        ({"n_embed": 32, "n_head": 4, "head_dim": 9}, "head_dim=9 but what follows"),
        ({"n_kv_head": 2, "n_head": 4, "num_key_value_heads": 1}, "num_key_value_heads=1 but"),
    ):
        with pytest.raises(ValueError, match=message):
            WorkbenchConfig(**options)
