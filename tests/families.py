"""The table of families for tests: what each dense model says, what it becomes, and what would be lost on the way.

A new family is one row of `other_families.py`, and a new target one of `SPARSE`. `test_plan.py` and
`test_target_config.py` ask every row about plans and configs, `test_families.py` about the function,
`test_decoder_families.py` about packages, `test_tracing.py` about classes of tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from family_records import NUM_LAYERS, UNTIED, WINDOW, Becomes, Exported, Family, Kept, Sparse
from llama_families import LLAMA_FAMILIES
from other_families import OTHER_FAMILIES

__all__ = [
    "EXPORTED",
    "FAMILIES",
    "KEPT",
    "NUM_LAYERS",
    "SPARSE",
    "UNTIED",
    "WINDOW",
    "Becomes",
    "Exported",
    "Kept",
    "Sparse",
]

SPARSE: Mapping[str, Sparse] = {
    "mixtral": Sparse({"num_local_experts": 4}),
    "qwen2_moe": Sparse(
        {
            "num_experts": 4,
            "decoder_sparse_step": 2,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 16,
        },
        shared=True,
        partial=True,
    ),
    "qwen3_moe": Sparse(
        {"num_experts": 4, "mlp_only_layers": [0], "moe_intermediate_size": 24, "attention_bias": True}, partial=True
    ),
    "granitemoe": Sparse({"num_local_experts": 4, "attention_bias": True, "tie_word_embeddings": True}),
    "granitemoeshared": Sparse({"num_local_experts": 4, "shared_intermediate_size": 16}, shared=True),
    "glm4_moe": Sparse(
        {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "first_k_dense_replace": 1},
        shared=True,
        last=True,
        biased=True,
    ),
    "flex_olmo": Sparse({"num_experts": 4}),
    "granitemoe_swa": Sparse({"num_local_experts": 4}, shared=True, built=False),
    "cohere2_moe": Sparse({"num_experts": 4}, shared=True, partial=True, last=True, built=False),
    "ernie4_5_moe": Sparse(
        {"moe_num_experts": 4, "moe_k": 2}, shared=True, partial=True, last=True, biased=True, built=False
    ),
    "hunyuan_v1_moe": Sparse(
        {"num_experts": 4, "moe_topk": 2}, shared=True, cut=False, built=False, settings={"shared_expert": "zero"}
    ),
    "lfm2_moe": Sparse({"num_experts": 4}, last=True, biased=True, built=False),
    "switch_transformers": Sparse(
        {"num_experts": 4}, partial=True, cut=False, built=False, settings={"num_experts_per_tok": 1}
    ),
}

FAMILIES: Mapping[str, Family] = {**LLAMA_FAMILIES, **OTHER_FAMILIES}
KEPT: Mapping[str, Kept] = {
    name: replace(case, architecture=family.architecture)
    for family in FAMILIES.values()
    for name, case in family.kept.items()
}
EXPORTED: Mapping[str, Exported] = {
    name: replace(case, architecture=family.architecture)
    for family in FAMILIES.values()
    for name, case in family.exported.items()
}
