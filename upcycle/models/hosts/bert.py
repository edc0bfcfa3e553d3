"""BERT: FFNs split over two modules, the second with its LayerNorm."""

from __future__ import annotations

from dense2moe.upcycle.models.host import Host, HostStack

BERT_LAYER = HostStack(
    num_layers="num_hidden_layers",
    layer="encoder.layer.{layer}",
    ffn="intermediate",
    passed=("output.dense",),
    up="intermediate.dense",
    down="output.dense",
    norm="attention.output.LayerNorm",
)

BERT = Host(
    model_type="bert",
    base="BertModel",
    prefix="bert",
    stacks=(BERT_LAYER,),
    dropped=("bert.embeddings.position_ids", "cls.seq_relationship.*", "bert.pooler.*"),
)
