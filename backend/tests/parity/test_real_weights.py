"""真正的 GPT-2 权重：本机的 hub 缓存里有才跑（`hf download openai-community/gpt2`）。"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from app.generation.sampling import SamplingConfig
from app.models.transformer import GPT2Model
from tests.generation.helpers import new_tokens


@pytest.fixture(scope="module")
def gpt2() -> GPT2Model:
    hub = pytest.importorskip("huggingface_hub", reason="pip install 'gpt2-workbench[hf]'")
    for name in ("openai-community/gpt2", "gpt2"):
        found = hub.try_to_load_from_cache(name, "model.safetensors")
        if isinstance(found, str):
            return GPT2Model.from_pretrained(Path(found).parent)
    pytest.skip("the weights of openai-community/gpt2 are not in the Hugging Face cache")


def test_shape(gpt2: GPT2Model) -> None:
    assert gpt2.num_parameters() == 124_439_808
    assert gpt2.config.norm == "pre"


def test_logits(gpt2: GPT2Model) -> None:
    """Lokad.Onnx 的测试里的值。"""
    with torch.no_grad():
        logits = gpt2(torch.tensor([[15496, 11, 314, 716]]))["logits"]
    assert logits.mean().item() == pytest.approx(-111.89471436, abs=1e-4)
    columns = [0, 1, 2, 3, 4, 5, 6, 7, 100, 384, 385, 1000, 10000, 50000]
    want = [
        -35.2362442, -35.3265953, -38.9753494, -39.3906746, -37.6531830, -38.6724358, -36.0248909,
        -36.4841537, -43.3126373, -40.1302490, -38.9993935, -40.7498093, -41.9872284, -44.1137810,
    ]  # fmt: skip
    assert logits[0, 0, columns].tolist() == pytest.approx(want, abs=1e-3)


def test_greedy(gpt2: GPT2Model) -> None:
    """transformers 自己的测试：'The dog'。"""
    want = [
        373, 1043, 287, 257, 2214, 1474, 262, 16246, 286, 2688, 290, 2688, 27262, 13, 198, 198, 464,
        3290,
    ]  # fmt: skip
    (got,) = new_tokens(
        gpt2, [[464, 3290]], max_new_tokens=18, sampling=SamplingConfig(temperature=0.0)
    )
    assert got == want


def test_a_batch_of_two_lengths(gpt2: GPT2Model, real_data: Path) -> None:
    """transformers 自己的测试：左填充的一批。"""
    from app.data.tokenizers import gpt2_tokenizer

    tokenizer = gpt2_tokenizer(real_data)
    prompts = ["Hello, my dog is a little", "Today, I"]
    want = [
        " bit of a mess. I'm not sure if he's going",
        "'m going to be doing a lot of research on this. I",
    ]
    got = new_tokens(
        gpt2, [tokenizer.encode(p) for p in prompts], max_new_tokens=12,
        sampling=SamplingConfig(temperature=0.0),
    )  # fmt: skip
    for tokens, text in zip(got, want, strict=True):
        assert text.startswith(tokenizer.decode(tokens))
