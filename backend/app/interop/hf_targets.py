"""transformers 的几个导出目标：现成的模型，或连代码一起写。"""

from __future__ import annotations

from app.interop.compare import Exported
from app.interop.equivalent import Weights
from app.interop.hf import compare_hf, write_hf
from app.interop.job import Job
from app.interop.own_code import write_own_code
from app.interop.targets import family_name


def export_hf(job: Job) -> Exported:
    """现成的模型里认得这种配置的那一种；一种也没有就连代码一起写。"""
    family = family_name(job.model.config)
    if family is not None:
        return _export(job, family)
    written = write_own_code(Weights.of(job.model), job.tokenizer, job.folder, job.dtype)
    checked = compare_hf(job.model, job.folder, own_code=True)
    return Exported(job.folder, "own code", written.notes, checked)


def export_opt(job: Job) -> Exported:
    return _export(job, "opt")


def export_openai_gpt(job: Job) -> Exported:
    return _export(job, "openai-gpt")


def export_mixtral(job: Job) -> Exported:
    return _export(job, "mixtral")


def _export(job: Job, family: str) -> Exported:
    written = write_hf(Weights.of(job.model), family, job.tokenizer, job.folder, job.dtype)
    return Exported(job.folder, family, written.notes, compare_hf(job.model, job.folder))
