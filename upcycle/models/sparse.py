"""Facts about mixture-of-experts architectures: names of experts and routers, and what they can hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal


@dataclass(frozen=True)
class ExpertNames:
    """Names of one layer's experts and router, with `{layer}` and, where an expert has tensors of its own, `{expert}`.

    `stacked`: `gate` names one tensor [experts, 2 * width, hidden] for gate and up, and `down` one of [experts, hidden,
    width]. `dense_*`: the names of the FFN in a layer without experts, where the architecture has such layers.
    `selection_bias` [experts]: what the gate adds to its sigmoid scores for the choice of experts alone, float32 in
    every checkpoint; a gate without one scores by a softmax.
    """

    router: str
    gate: str | None
    up: str
    down: str
    stacked: bool = False
    dense_gate: str | None = None
    dense_up: str | None = None
    dense_down: str | None = None
    selection_bias: str | None = None


@dataclass(frozen=True)
class SharedNames:
    """Names of the expert that every token visits.

    `gate_up` is one tensor where there is no `gate`; `scale` gates the output by a sigmoid.

    `in_experts`: the config tells its width in routed experts, and not in neurons.
    """

    width_field: str
    up: str
    down: str
    gate: str | None = None
    scale: str | None = None
    required: bool = False  # a model of this architecture always builds one; width 0 where none is wanted
    in_experts: bool = False


@dataclass(frozen=True)
class MoeTarget:
    """One mixture-of-experts architecture of transformers.

    `fixed` are config fields whose value does not depend on the source. `top_1`: each token visits one expert, whose
    output is multiplied by its probability. `partial_layers`: "last" are those behind the first few.
    """

    model_type: str
    architecture: str
    experts: tuple[ExpertNames, ...]
    count_field: str
    top_k_field: str | None
    width_field: str
    fixed: Mapping[str, Any]
    partial_layers: Literal["none", "list", "step", "last"] = "none"
    shared: SharedNames | None = None
    top_1: bool = False
    min_experts: int = 1


_LAYER = "model.layers.{layer}."
_MLP = f"{_LAYER}mlp."
_SPARSE = f"{_LAYER}block_sparse_moe."
_QWEN_EXPERTS = ExpertNames(
    router=f"{_MLP}gate.weight",
    gate=f"{_MLP}experts.{{expert}}.gate_proj.weight",
    up=f"{_MLP}experts.{{expert}}.up_proj.weight",
    down=f"{_MLP}experts.{{expert}}.down_proj.weight",
    dense_gate=f"{_MLP}gate_proj.weight",
    dense_up=f"{_MLP}up_proj.weight",
    dense_down=f"{_MLP}down_proj.weight",
)
_GRANITE_EXPERTS = ExpertNames(
    router=f"{_SPARSE}router.layer.weight",
    gate=None,
    up=f"{_SPARSE}input_linear.weight",
    down=f"{_SPARSE}output_linear.weight",
    stacked=True,
)

MIXTRAL = MoeTarget(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    experts=(
        ExpertNames(
            router=f"{_SPARSE}gate.weight",
            gate=f"{_SPARSE}experts.{{expert}}.w1.weight",
            up=f"{_SPARSE}experts.{{expert}}.w3.weight",
            down=f"{_SPARSE}experts.{{expert}}.w2.weight",
        ),
    ),
    count_field="num_local_experts",
    top_k_field="num_experts_per_tok",
    width_field="intermediate_size",
    fixed={"router_jitter_noise": 0.0},
)
QWEN2_MOE = MoeTarget(
    model_type="qwen2_moe",
    architecture="Qwen2MoeForCausalLM",
    experts=(_QWEN_EXPERTS,),
    count_field="num_experts",
    top_k_field="num_experts_per_tok",
    width_field="moe_intermediate_size",
    fixed={"norm_topk_prob": True, "decoder_sparse_step": 1},
    partial_layers="list",
    shared=SharedNames(
        width_field="shared_expert_intermediate_size",
        gate=f"{_MLP}shared_expert.gate_proj.weight",
        up=f"{_MLP}shared_expert.up_proj.weight",
        down=f"{_MLP}shared_expert.down_proj.weight",
        scale=f"{_MLP}shared_expert_gate.weight",
        required=True,
    ),
)
QWEN3_MOE = MoeTarget(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    experts=(_QWEN_EXPERTS,),
    count_field="num_local_experts",
    top_k_field="num_experts_per_tok",
    width_field="moe_intermediate_size",
    fixed={"norm_topk_prob": True, "decoder_sparse_step": 1},
    partial_layers="list",
)
GRANITE_MOE = MoeTarget(
    model_type="granitemoe",
    architecture="GraniteMoeForCausalLM",
    experts=(_GRANITE_EXPERTS,),
    count_field="num_local_experts",
    top_k_field="num_experts_per_tok",
    width_field="intermediate_size",
    fixed={},
)
GRANITE_MOE_SHARED = MoeTarget(
    model_type="granitemoeshared",
    architecture="GraniteMoeSharedForCausalLM",
    experts=(_GRANITE_EXPERTS,),
    count_field="num_local_experts",
    top_k_field="num_experts_per_tok",
    width_field="intermediate_size",
    fixed={},
    shared=SharedNames(
        width_field="shared_intermediate_size",
        up=f"{_LAYER}shared_mlp.input_linear.weight",
        down=f"{_LAYER}shared_mlp.output_linear.weight",
    ),
)
GLM4_MOE = MoeTarget(
    model_type="glm4_moe",
    architecture="Glm4MoeForCausalLM",
    experts=(replace(_QWEN_EXPERTS, selection_bias=f"{_MLP}gate.e_score_correction_bias"),),
    count_field="n_routed_experts",
    top_k_field="num_experts_per_tok",
    width_field="moe_intermediate_size",
    fixed={
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
        "n_group": 1,
        "topk_group": 1,
        "num_nextn_predict_layers": 0,
    },
    partial_layers="last",
    shared=SharedNames(
        width_field="n_shared_experts",
        gate=f"{_MLP}shared_experts.gate_proj.weight",
        up=f"{_MLP}shared_experts.up_proj.weight",
        down=f"{_MLP}shared_experts.down_proj.weight",
        required=True,
        in_experts=True,
    ),
    min_experts=2,  # its gate ranks groups of experts, of which there is one, by the two best scores in each
)
FLEX_OLMO = MoeTarget(
    model_type="flex_olmo",
    architecture="FlexOlmoForCausalLM",
    experts=(ExpertNames(_QWEN_EXPERTS.router, _QWEN_EXPERTS.gate, _QWEN_EXPERTS.up, _QWEN_EXPERTS.down),),
    count_field="num_experts",
    top_k_field="num_experts_per_tok",
    width_field="intermediate_size",
    fixed={"norm_topk_prob": True},
)


def _switch_experts(stack: str, layer: int) -> ExpertNames:
    mlp = f"{stack}.block.{{layer}}.layer.{layer}.mlp."
    return ExpertNames(
        router=f"{mlp}router.classifier.weight",
        gate=None,
        up=f"{mlp}experts.expert_{{expert}}.wi.weight",
        down=f"{mlp}experts.expert_{{expert}}.wo.weight",
        dense_up=f"{mlp}wi.weight",
        dense_down=f"{mlp}wo.weight",
    )


SWITCH_TRANSFORMERS = MoeTarget(
    model_type="switch_transformers",
    architecture="SwitchTransformersForConditionalGeneration",
    experts=(_switch_experts("encoder", 1), _switch_experts("decoder", 2)),
    count_field="num_experts",
    top_k_field=None,
    width_field="d_ff",
    fixed={
        "expert_capacity": 1_000_000_000,  # no token is ever dropped
        "router_bias": False,
        "router_jitter_noise": 0.0,
        "router_dtype": "float32",
        "router_ignore_padding_tokens": False,
        "add_cross_attention": False,
    },
    partial_layers="step",
    top_1=True,
)
