"""GPT-2: matrices of the FFN are stored as Conv1D."""

from __future__ import annotations

from dense2moe.upcycle.models.host import Host, HostStack

GPT2 = Host(
    model_type="gpt2",
    base="GPT2Model",
    prefix="transformer",
    stacks=(
        HostStack(
            num_layers="n_layer",
            layer="h.{layer}",
            ffn="mlp",
            up="mlp.c_fc",
            down="mlp.c_proj",
            norm="ln_2",
            transposed=True,
            activation="activation_function",
            dropout="resid_pdrop",
        ),
    ),
    zero_router="rounding",  # Conv1D's product of one token is summed in another order
)
