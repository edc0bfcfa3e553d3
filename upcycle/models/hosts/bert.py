"""BERT and its kin: FFNs split over two modules."""

from __future__ import annotations

from dataclasses import replace

from dense2moe.upcycle.models.architecture import Condition
from dense2moe.upcycle.models.host import READ_FROM, Host, HostHead, HostStack

BERT_LAYER = HostStack(
    num_layers="num_hidden_layers",
    layer="encoder.layer.{layer}",
    ffn="intermediate",
    passed=("output.dense",),
    up="intermediate.dense",
    down="output.dense",
    norm="attention.output.LayerNorm",
)
_NORM_BEFORE = replace(BERT_LAYER, norm="LayerNorm")
_UNGROUPED = Condition(
    lambda config: config.num_groups == 1,
    lambda config: f"num_groups is {config.num_groups}; it must be 1: an expert's matrices are whole",
)
_SINGLE = Condition(
    lambda config: config.inner_group_num == 1,
    lambda config: f"inner_group_num is {config.inner_group_num}; it must be 1: a group is one layer",
)
_POSITIONS = "*embeddings.position_ids"  # a buffer that old checkpoints store


def _bert(model_type: str, start: str, prefix: str, layer: HostStack = BERT_LAYER, *dropped: str) -> Host:
    """A family of BERT's layers, whose files may hold a pooler."""
    return Host(
        model_type=model_type,
        base=f"{start}Model",
        prefix=prefix,
        stacks=(layer,),
        dropped=(_POSITIONS, f"{prefix}.pooler.*", *dropped),
        reads_both_ways=True,
    )


def _roberta(model_type: str, start: str, prefix: str, layer: HostStack = BERT_LAYER) -> Host:
    """A family of BERT's layers that counts positions past the padding's."""
    return replace(_bert(model_type, start, prefix, layer), counts_past_padding=True)


HOSTS: tuple[Host, ...] = (
    Host(
        model_type="albert",
        base="AlbertModel",
        prefix="albert",
        stacks=(
            HostStack(
                num_layers="num_hidden_groups",  # of layers that share their weights, and so their experts
                runs="num_hidden_layers",
                layer="encoder.albert_layer_groups.{layer}.albert_layers.0",
                ffn="ffn",
                passed=("activation", "ffn_output"),
                up="ffn",
                down="ffn_output",
                norm="attention.LayerNorm",
            ),
        ),
        stand_ins={"AlbertForPreTraining": "AlbertForMaskedLM"},
        conditions=(_SINGLE,),
        dropped=(_POSITIONS, "albert.pooler.*", "sop_classifier.*"),
    ),
    replace(
        _bert("bert", "Bert", "bert", BERT_LAYER, "cls.seq_relationship.*"),
        stand_ins={"BertForPreTraining": "BertForMaskedLM"},
    ),
    Host(
        model_type="bert-generation",
        base="BertGenerationEncoder",
        prefix="bert",
        stacks=(BERT_LAYER,),
        heads={
            "BertGenerationEncoder": HostHead("feature-extraction", prefix=""),
            "BertGenerationDecoder": HostHead("text-generation"),
        },
        reads_both_ways=True,
        dropped=(_POSITIONS,),
    ),
    replace(
        _bert("big_bird", "BigBird", "bert", BERT_LAYER, "cls.seq_relationship.*"),
        stand_ins={"BigBirdForPreTraining": "BigBirdForMaskedLM"},
    ),
    _roberta("camembert", "Camembert", "roberta"),
    replace(_bert("convbert", "ConvBert", "convbert"), conditions=(_UNGROUPED,)),
    _roberta("data2vec-text", "Data2VecText", "data2vec_text"),
    replace(  # it masks with the least number of float32
        _bert("deberta", "Deberta", "deberta", BERT_LAYER, "lm_predictions.*"), trains_in_half=False
    ),
    _bert("deberta-v2", "DebertaV2", "deberta", BERT_LAYER, "lm_predictions.*", "mask_predictions.*"),
    replace(
        _bert("electra", "Electra", "electra", BERT_LAYER, "discriminator_predictions.*"),
        stand_ins={"ElectraForPreTraining": "ElectraModel"},
    ),
    replace(
        _bert("ernie", "Ernie", "ernie", BERT_LAYER, "cls.seq_relationship.*"),
        stand_ins={"ErnieForPreTraining": "ErnieForMaskedLM"},
    ),
    _bert(
        "esm",
        "Esm",
        "esm",
        replace(_NORM_BEFORE, activation_name="gelu_python"),
        "*rotary_embeddings.inv_freq",
        "*contact_head.*",
    ),
    replace(
        _bert("fnet", "FNet", "fnet", replace(BERT_LAYER, norm="fourier.output.LayerNorm"), "cls.seq_relationship.*"),
        stand_ins={"FNetForPreTraining": "FNetForMaskedLM"},
    ),
    _bert("layoutlm", "LayoutLM", "layoutlm"),
    replace(
        _roberta("longformer", "Longformer", "longformer"),
        heads={"LongformerForQuestionAnswering": None},  # its forward pass looks for a question among the ids
    ),
    replace(_roberta("luke", "Luke", "luke"), oldest_transformers=READ_FROM),  # 4 lacks its head for masked tokens
    _roberta("markuplm", "MarkupLM", "markuplm"),
    replace(
        _bert("megatron-bert", "MegatronBert", "bert", replace(BERT_LAYER, norm="ln"), "cls.seq_relationship.*"),
        stand_ins={"MegatronBertForPreTraining": "MegatronBertForMaskedLM"},
    ),
    _roberta("mpnet", "MPNet", "mpnet", replace(BERT_LAYER, norm="attention.LayerNorm")),
    _bert("rembert", "RemBert", "rembert"),
    _roberta("roberta", "Roberta", "roberta"),
    _roberta(
        "roberta-prelayernorm",
        "RobertaPreLayerNorm",
        "roberta_prelayernorm",
        replace(
            BERT_LAYER,
            ffn="intermediate.dense",
            passed=("intermediate.intermediate_act_fn", "output.dense"),
            norm="intermediate.LayerNorm",
        ),
    ),
    _bert("roformer", "RoFormer", "roformer"),
    _bert("splinter", "Splinter", "splinter"),
    _roberta("xlm-roberta", "XLMRoberta", "roberta"),
    _roberta("xlm-roberta-xl", "XLMRobertaXL", "roberta", _NORM_BEFORE),
)
