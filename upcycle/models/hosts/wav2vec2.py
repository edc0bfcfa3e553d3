"""wav2vec 2.0 and its kin: convolutions over a sound, then an encoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from dense2moe.upcycle.models.host import Host, HostHead, HostStack

_POST_NORM = HostStack(
    num_layers="num_hidden_layers",
    layer="encoder.layers.{layer}",
    ffn="feed_forward",
    up="feed_forward.intermediate_dense",
    down="feed_forward.output_dense",
    norm="layer_norm",
    inner_dropout="activation_dropout",
    dropout="hidden_dropout",
)
_LAYERS = (
    replace(_POST_NORM, when=("do_stable_layer_norm", False)),
    replace(_POST_NORM, norm="final_layer_norm", when=("do_stable_layer_norm", True)),
)
_CONFORMER = tuple(
    replace(_POST_NORM, ffn=ffn, up=f"{ffn}.intermediate_dense", down=f"{ffn}.output_dense", norm=f"{ffn}_layer_norm")
    for ffn in ("ffn1", "ffn2")
)


def _heads(start: str) -> Mapping[str, HostHead]:
    return {
        f"{start}ForSequenceClassification": HostHead("audio-classification"),
        f"{start}ForAudioFrameClassification": HostHead("audio-frame-classification"),
        f"{start}ForXVector": HostHead("audio-xvector"),
    }


WAV2VEC2 = Host(
    model_type="wav2vec2",
    base="Wav2Vec2Model",
    prefix="wav2vec2",
    stacks=_LAYERS,
    heads={**_heads("Wav2Vec2"), "Wav2Vec2ForPreTraining": HostHead("pretraining")},
)
HUBERT = Host(model_type="hubert", base="HubertModel", prefix="hubert", stacks=_LAYERS, heads=_heads("Hubert"))
WAVLM = Host(model_type="wavlm", base="WavLMModel", prefix="wavlm", stacks=_LAYERS, heads=_heads("WavLM"))
UNISPEECH = Host(
    model_type="unispeech",
    base="UniSpeechModel",
    prefix="unispeech",
    stacks=_LAYERS,
    heads=_heads("UniSpeech"),
)
UNISPEECH_SAT = Host(
    model_type="unispeech-sat",
    base="UniSpeechSatModel",
    prefix="unispeech_sat",
    stacks=_LAYERS,
    heads=_heads("UniSpeechSat"),
)
DATA2VEC_AUDIO = Host(
    model_type="data2vec-audio",
    base="Data2VecAudioModel",
    prefix="data2vec_audio",
    stacks=(_POST_NORM,),
    heads=_heads("Data2VecAudio"),
)
SEW = Host(model_type="sew", base="SEWModel", prefix="sew", stacks=(_POST_NORM,), heads=_heads("SEW"))
WAV2VEC2_BERT = Host(
    model_type="wav2vec2-bert",
    base="Wav2Vec2BertModel",
    prefix="wav2vec2_bert",
    stacks=_CONFORMER,
    heads=_heads("Wav2Vec2Bert"),
)

HOSTS = (
    WAV2VEC2,
    HUBERT,
    WAVLM,
    UNISPEECH,
    UNISPEECH_SAT,
    DATA2VEC_AUDIO,
    SEW,
    WAV2VEC2_BERT,
)
