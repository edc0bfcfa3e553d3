"""The table of hosts for tests: a tiny model of each, whose FFNs a mixture of ours replaces.

A new host is one row here. `test_hosts.py` asks every row about its tensors, its function and its files.
"""

from __future__ import annotations

from host_row import ENCODER, HEADS, HIDDEN, INNER, LAYERS, VOCABULARY, HostRow
from text_hosts import TEXT_ROWS

IMAGES = {
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "image_size": 16,
    "patch_size": 4,
}
TOWERS = {
    "text_config": {**ENCODER, "projection_size": 24, "eos_token_id": 3},
    "vision_config": {**IMAGES, "hidden_size": 24, "intermediate_size": 48},
    "projection_dim": 16,
}
SEQ2SEQ = {
    "d_model": HIDDEN,
    "encoder_layers": LAYERS,
    "decoder_layers": LAYERS,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "encoder_ffn_dim": INNER,
    "decoder_ffn_dim": 48,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}
T5 = {
    "d_model": HIDDEN,
    "d_kv": 8,
    "d_ff": INNER,
    "num_layers": LAYERS,
    "num_decoder_layers": LAYERS + 1,
    "num_heads": HEADS,
    "vocab_size": VOCABULARY,
    "decoder_start_token_id": 0,
}
SOUNDS = {
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "vocab_size": VOCABULARY,
    "conv_dim": (8, 8, 8),
    "conv_kernel": (10, 3, 3),
    "conv_stride": (5, 4, 4),
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "num_codevectors_per_group": 8,
    "codevector_dim": 8,
    "proj_codevector_dim": 8,
    "classifier_proj_size": 8,
    "tdnn_dim": (16, 16, 16, 16, 16),
    "xvector_output_dim": 8,
}
SPEECH_HEADS = ("Model", "ForSequenceClassification", "ForAudioFrameClassification", "ForXVector")


def with_heads(start: str, *ends: str) -> tuple[str, ...]:
    """The classes of a family with these ends."""
    return tuple(f"{start}{end}" for end in ends)


ROWS: dict[str, HostRow] = {
    **TEXT_ROWS,
    "audio-spectrogram-transformer": HostRow(
        "ASTForAudioClassification",
        {**IMAGES, "frequency_stride": 4, "time_stride": 4, "max_length": 24, "num_mel_bins": 16},
        more=("ASTModel",),
    ),
    "bart": HostRow(
        "BartForConditionalGeneration",
        SEQ2SEQ,
        "matrices of the layers themselves, in an encoder and a decoder",
        more=with_heads("Bart", "Model", "ForSequenceClassification", "ForQuestionAnswering", "ForCausalLM"),
    ),
    "beit": HostRow(
        "BeitForImageClassification",
        {**IMAGES, "vocab_size": 20, "use_relative_position_bias": True, "use_mask_token": True},
        more=with_heads("Beit", "Model", "ForMaskedImageModeling"),
    ),
    "blenderbot": HostRow(
        "BlenderbotForConditionalGeneration",
        SEQ2SEQ,
        more=with_heads("Blenderbot", "Model", "ForCausalLM"),
    ),
    "blenderbot-small": HostRow(
        "BlenderbotSmallForConditionalGeneration",
        SEQ2SEQ,
        more=with_heads("BlenderbotSmall", "Model", "ForCausalLM"),
    ),
    "clip": HostRow("CLIPModel", TOWERS, "two towers", more=("CLIPForImageClassification",)),
    "clip-text": HostRow("CLIPTextModel", {**ENCODER, "eos_token_id": 3}, more=("CLIPTextModelWithProjection",)),
    "clip-vision": HostRow("CLIPVisionModel", IMAGES, more=("CLIPVisionModelWithProjection",)),
    "data2vec-audio": HostRow(
        "Data2VecAudioForCTC",
        {**SOUNDS, "conv_pos_kernel_size": 5, "num_conv_pos_embeddings": 2},
        more=with_heads("Data2VecAudio", *SPEECH_HEADS),
    ),
    "deit": HostRow(
        "DeiTForImageClassificationWithTeacher",
        IMAGES,
        more=with_heads("DeiT", "Model", "ForImageClassification", "ForMaskedImageModeling"),
    ),
    "dinov2": HostRow(
        "Dinov2ForImageClassification",
        {**IMAGES, "mlp_ratio": 2, "use_swiglu_ffn": True},
        "gated, fused in the files",
        more=("Dinov2Model",),
    ),
    "dinov2-plain": HostRow("Dinov2ForImageClassification", {**IMAGES, "mlp_ratio": 2}),
    "dinov2-with-registers": HostRow(
        "Dinov2WithRegistersForImageClassification",
        {**IMAGES, "mlp_ratio": 2, "num_register_tokens": 2},
        more=("Dinov2WithRegistersModel",),
    ),
    "dinov3": HostRow("DINOv3ViTModel", {**IMAGES, "use_gated_mlp": True, "num_register_tokens": 2}),
    "dinov3-plain": HostRow("DINOv3ViTModel", {**IMAGES, "mlp_bias": False}),
    "hubert": HostRow("HubertForCTC", SOUNDS, more=with_heads("Hubert", *SPEECH_HEADS[:2])),
    "ijepa": HostRow("IJepaForImageClassification", IMAGES, more=("IJepaModel",)),
    "led": HostRow(
        "LEDForConditionalGeneration",
        {
            **SEQ2SEQ,
            "attention_window": 8,
            "max_encoder_position_embeddings": 64,
            "max_decoder_position_embeddings": 64,
        },
        more=with_heads("LED", "Model", "ForQuestionAnswering"),
    ),
    "m2m-100": HostRow(
        "M2M100ForConditionalGeneration",
        SEQ2SEQ,
        more=("M2M100Model",),
    ),
    "marian": HostRow(
        "MarianMTModel",
        {**SEQ2SEQ, "pad_token_id": 95, "eos_token_id": 0, "forced_eos_token_id": 0, "decoder_start_token_id": 95},
        more=with_heads("Marian", "Model", "ForCausalLM"),
    ),
    "mbart": HostRow(
        "MBartForConditionalGeneration",
        SEQ2SEQ,
        more=with_heads("MBart", "Model", "ForSequenceClassification", "ForQuestionAnswering", "ForCausalLM"),
    ),
    "mt5": HostRow("MT5ForConditionalGeneration", T5, more=("MT5EncoderModel",)),
    "pegasus": HostRow(
        "PegasusForConditionalGeneration",
        SEQ2SEQ,
        more=with_heads("Pegasus", "Model", "ForCausalLM"),
    ),
    "plbart": HostRow(
        "PLBartForConditionalGeneration",
        SEQ2SEQ,
        more=with_heads("PLBart", "Model", "ForCausalLM"),
    ),
    "sew": HostRow("SEWForCTC", {**SOUNDS, "squeeze_factor": 2}, more=with_heads("SEW", *SPEECH_HEADS[:2])),
    "siglip": HostRow(
        "SiglipModel",
        {**TOWERS, "text_config": {**TOWERS["text_config"], "projection_size": 24}},
        more=("SiglipForImageClassification",),
    ),
    "siglip-text": HostRow("SiglipTextModel", ENCODER),
    "siglip-vision": HostRow("SiglipVisionModel", IMAGES),
    "t5": HostRow(
        "T5ForConditionalGeneration",
        {**T5, "feed_forward_proj": "gated-gelu"},
        "of T5",
        more=with_heads(
            "T5", "Model", "EncoderModel", "ForTokenClassification", "ForSequenceClassification", "ForQuestionAnswering"
        ),
    ),
    "umt5": HostRow("UMT5ForConditionalGeneration", T5, more=("UMT5EncoderModel",)),
    "unispeech": HostRow("UniSpeechForCTC", SOUNDS, more=with_heads("UniSpeech", *SPEECH_HEADS[:2])),
    "unispeech-sat": HostRow("UniSpeechSatForCTC", SOUNDS, more=with_heads("UniSpeechSat", *SPEECH_HEADS)),
    "vit": HostRow("ViTForImageClassification", IMAGES, "images", more=("ViTModel",)),
    "vit-mae": HostRow(
        "ViTMAEForPreTraining",
        {
            **IMAGES,
            "decoder_hidden_size": 16,
            "decoder_num_hidden_layers": 1,
            "decoder_num_attention_heads": 2,
            "decoder_intermediate_size": 32,
        },
        more=("ViTMAEModel",),
    ),
    "vit-msn": HostRow("ViTMSNForImageClassification", IMAGES, more=("ViTMSNModel",)),
    "wav2vec2": HostRow(
        "Wav2Vec2ForCTC",
        {**SOUNDS, "do_stable_layer_norm": True, "feat_extract_norm": "layer"},
        "dropouts within",
        more=with_heads("Wav2Vec2", *SPEECH_HEADS, "ForPreTraining"),
    ),
    "wav2vec2-bert": HostRow(
        "Wav2Vec2BertForCTC",
        {**SOUNDS, "feature_projection_input_dim": 16, "conv_depthwise_kernel_size": 7},
        "two FFNs a layer",
        more=with_heads("Wav2Vec2Bert", *SPEECH_HEADS),
    ),
    "wavlm": HostRow(
        "WavLMForCTC",
        {**SOUNDS, "num_buckets": 8, "max_bucket_distance": 16},
        more=with_heads("WavLM", *SPEECH_HEADS),
    ),
    "whisper": HostRow(
        "WhisperForConditionalGeneration",
        {
            **SEQ2SEQ,
            "decoder_layers": LAYERS + 1,
            "max_source_positions": 20,
            "max_target_positions": 64,
            "num_mel_bins": 8,
            "suppress_tokens": None,
        },
        more=("WhisperForAudioClassification",),
    ),
}
