"""transformers 的 Trainer 与 PEFT 用在我们的模型上。"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import Trainer, TrainingArguments

from app.interop.transformers import WorkbenchForCausalLM, wrap
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
