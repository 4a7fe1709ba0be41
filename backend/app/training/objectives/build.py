"""配置点名的目标；教师在这里装入。"""

from __future__ import annotations

from app.adapters.load import open_model
from app.common.tell import Tell
from app.data.tokenizers import Tokenizer, load_tokenizer
from app.models.transformer import GPT2Model
from app.quantization.model import check_float

from ..config import TrainConfig
from ..machine.runtime import Runtime
from ..saving.checkpoint import resolve_checkpoint
from .distill import Distill
from .language_model import LanguageModel
from .objective import Objective
from .preference import Preference


def build_objective(
    config: TrainConfig, tokenizer: Tokenizer, runtime: Runtime, tell: Tell
) -> Objective:
    """
    Raises:
        ValueError: 教师不能用：别的分词器、上下文太短，或是量化的。
    """
    objective = config.objective
    if objective.kind == "dpo":
        return Preference(objective.dpo_beta, objective.dpo_sft)
    if objective.kind == "lm" or objective.teacher is None:
        return LanguageModel()
    teacher = load_other(objective.teacher, "objective.teacher", config, tokenizer, tell)
    teacher.to(runtime.device).eval().requires_grad_(False)
    tell(f"teacher: {objective.teacher}, {teacher.num_parameters():,} parameters")
    return Distill(teacher, objective.alpha, objective.temperature)


def load_other(
    folder: str, what: str, config: TrainConfig, tokenizer: Tokenizer, tell: Tell
) -> GPT2Model:
    """要与学生看同样的行的另一个模型。"""
    found = resolve_checkpoint(folder, tell)
    written, used = load_tokenizer(found).fingerprint(), tokenizer.fingerprint()
    if written != used:
        raise ValueError(
            f"{what}={found} has the tokenizer {written[:12]} but the data has {used[:12]}: the "
            "ids mean different tokens; use a model with the data's tokenizer, or prepare the "
            "data with its own"
        )
    model = open_model(found)
    check_float(model, f"{what}={found}")
    theirs, ours = model.config, config.model
    if theirs.position == "learned" and theirs.context_size < ours.context_size:
        raise ValueError(
            f"{what}={found} has context_size={theirs.context_size} but model.context_size="
            f"{ours.context_size}: use a context of at most {theirs.context_size}"
        )
    return model
