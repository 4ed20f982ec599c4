"""Speech, sound and time series, and recurrent networks."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from tests.networks.common import BATCH, LABELS, WORDS, Network, floats, hugging

WAVES: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48,
    "conv_dim": (8, 8, 8), "conv_stride": (5, 2, 2), "conv_kernel": (10, 3, 3), "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2, "vocab_size": WORDS,
}  # fmt: skip


def wave(length: int = 400, channels: int = 0, name: str = "input_values"):
    shape = (BATCH, channels, length) if channels else (BATCH, length)
    return floats(**{name: shape})


class Recurrent(nn.Module):
    """Embedding, a recurrent stack of two directions, a linear head over all time steps."""

    def __init__(self, kind: type[nn.Module], **options: object) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, 12)
        self.rnn = kind(12, 8, **options)
        self.head = nn.Linear(8 * (2 if options.get("bidirectional") else 1), LABELS)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.rnn(self.embed(ids))[0])


class LastState(nn.Module):
    """Packed sequences of different lengths; the head reads the last state of both directions."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(6, 8, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(16, LABELS)

    def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        _, (h, _) = self.rnn(packed)
        return self.head(torch.cat([h[-2], h[-1]], -1))


class Seq2Seq(nn.Module):
    """An LSTM encoder, and an LSTM decoder that starts from its state, with dot-product attention."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.LSTM(6, 8, batch_first=True), nn.LSTM(6, 8, batch_first=True)
        self.head = nn.Linear(16, LABELS)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        memory, state = self.encoder(x)
        h, _ = self.decoder(y, state)
        weights = torch.softmax(h @ memory.transpose(1, 2), -1)
        return self.head(torch.cat([h, weights @ memory], -1))


class Cells(nn.Module):
    """LSTMCell and GRUCell in a loop over time, as written by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.LSTMCell(6, 8), nn.GRUCell(8, 8), nn.Linear(8, LABELS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = c = g = x.new_zeros(x.shape[0], 8)
        for t in range(x.shape[1]):
            h, c = self.a(x[:, t], (h, c))
            g = self.b(h, g)
        return self.head(g)


class WaveNet(nn.Module):
    """Dilated causal convolutions with gates, residuals and skips."""

    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Conv1d(1, 8, 1)
        self.dilations = [1, 2, 4, 8]
        self.gates = nn.ModuleList(nn.Conv1d(8, 16, 2, dilation=d) for d in self.dilations)
        self.residual = nn.ModuleList(nn.Conv1d(8, 8, 1) for _ in self.dilations)
        self.skip = nn.ModuleList(nn.Conv1d(8, 8, 1) for _ in self.dilations)
        self.end = nn.Conv1d(8, LABELS, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h, total = self.start(x), 0
        for d, gate, residual, skip in zip(self.dilations, self.gates, self.residual, self.skip, strict=True):
            a, b = gate(nn.functional.pad(h, (d, 0))).chunk(2, 1)
            z = torch.tanh(a) * torch.sigmoid(b)
            total = total + skip(z)
            h = h + residual(z)
        return self.end(torch.relu(total))


class TemporalBlock(nn.Module):
    """A TCN's block: causal convolutions with weight normalization, chomped."""

    def __init__(self, inside: int, out: int, dilation: int) -> None:
        super().__init__()
        norm = nn.utils.parametrizations.weight_norm
        self.cut = 2 * dilation
        self.one = norm(nn.Conv1d(inside, out, 3, padding=self.cut, dilation=dilation))
        self.two = norm(nn.Conv1d(out, out, 3, padding=self.cut, dilation=dilation))
        self.down = nn.Conv1d(inside, out, 1) if inside != out else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.relu(self.one(x)[:, :, : -self.cut])
        h = torch.relu(self.two(h)[:, :, : -self.cut])
        return torch.relu(h + self.down(x))


SPEECH, RECURRENT, SERIES = "speech", "recurrent", "time series"


def _stack(kind: type[nn.Module], **options: object) -> Network:
    def make() -> nn.Module:
        return Recurrent(kind, num_layers=2, batch_first=True, **options)

    return Network(
        RECURRENT, make, lambda rng: {"ids": rng.integers(0, WORDS, (BATCH, 6))}, "cross-entropy", ("ids",)
    )


NETWORKS: dict[str, Network] = {
    "wav2vec2": hugging(SPEECH, "Wav2Vec2Config", "Wav2Vec2ForCTC", wave(), **WAVES, pad_token_id=0),
    "wav2vec2-stable": hugging(SPEECH, "Wav2Vec2Config", "Wav2Vec2ForCTC", wave(), **WAVES, pad_token_id=0,
                               do_stable_layer_norm=True, feat_extract_norm="layer"),
    "hubert": hugging(SPEECH, "HubertConfig", "HubertForCTC", wave(), **WAVES, pad_token_id=0),
    "wavlm": hugging(SPEECH, "WavLMConfig", "WavLMForCTC", wave(), **WAVES, pad_token_id=0, num_buckets=8),
    "unispeech": hugging(SPEECH, "UniSpeechConfig", "UniSpeechForCTC", wave(), **WAVES, pad_token_id=0),
    "data2vec-audio": hugging(SPEECH, "Data2VecAudioConfig", "Data2VecAudioForCTC", wave(),
                              **{**WAVES, "conv_pos_kernel_size": 3, "num_conv_pos_embeddings": 2}, pad_token_id=0),
    "sew": hugging(SPEECH, "SEWConfig", "SEWForCTC", wave(), **WAVES, pad_token_id=0, squeeze_factor=2),
    "wav2vec2-conformer": hugging(SPEECH, "Wav2Vec2ConformerConfig", "Wav2Vec2ConformerForCTC", wave(), **WAVES,
                                  pad_token_id=0, position_embeddings_type="relative", conv_depthwise_kernel_size=3),
    "whisper": hugging(SPEECH, "WhisperConfig", "WhisperForConditionalGeneration",
                       lambda rng: {"input_features": rng.standard_normal((BATCH, 8, 32)).astype(np.float32),
                                    "decoder_input_ids": rng.integers(3, WORDS, (BATCH, 5))},
                       loss="cross-entropy", fixed={"use_cache": False}, vocab_size=WORDS, num_mel_bins=8, d_model=32,
                       encoder_layers=2, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2,
                       encoder_ffn_dim=48, decoder_ffn_dim=48, max_source_positions=16, max_target_positions=16,
                       pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1),
    "speech2text": hugging(SPEECH, "Speech2TextConfig", "Speech2TextForConditionalGeneration",
                           lambda rng: {"input_features": rng.standard_normal((BATCH, 32, 8)).astype(np.float32),
                                        "decoder_input_ids": rng.integers(3, WORDS, (BATCH, 5))},
                           loss="cross-entropy", fixed={"use_cache": False}, vocab_size=WORDS, d_model=32,
                           encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
                           encoder_ffn_dim=48, decoder_ffn_dim=48, input_feat_per_channel=8, conv_channels=16,
                           max_source_positions=64, max_target_positions=16),
    "moonshine": hugging(SPEECH, "MoonshineConfig", "MoonshineForConditionalGeneration",
                         lambda rng: {"input_values": rng.standard_normal((BATCH, 2400)).astype(np.float32),
                                      "decoder_input_ids": rng.integers(3, WORDS, (BATCH, 5))},
                         loss="cross-entropy", fixed={"use_cache": False}, vocab_size=WORDS, hidden_size=32,
                         intermediate_size=48, encoder_num_hidden_layers=1, decoder_num_hidden_layers=1,
                         encoder_num_attention_heads=2, decoder_num_attention_heads=2, pad_token_id=2),
    "ast": hugging(SPEECH, "ASTConfig", "ASTForAudioClassification", floats(input_values=(BATCH, 32, 16)),
                   loss="cross-entropy", hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                   intermediate_size=48, patch_size=8, frequency_stride=4, time_stride=4, max_length=32,
                   num_mel_bins=16, num_labels=LABELS),
    "dac": hugging(SPEECH, "DacConfig", "DacModel", wave(256, 1), "audio_values", encoder_hidden_size=4,
                   downsampling_ratios=[2, 4], decoder_hidden_size=16, n_codebooks=2, codebook_size=8, codebook_dim=4,
                   hidden_size=16),
    "patchtst": hugging(SERIES, "PatchTSTConfig", "PatchTSTForPrediction", floats(past_values=(BATCH, 32, 2)),
                        "prediction_outputs", num_input_channels=2, context_length=32, patch_length=8, patch_stride=8,
                        prediction_length=4, d_model=16, num_attention_heads=2, ffn_dim=24, num_hidden_layers=2),
    "patchtsmixer": hugging(SERIES, "PatchTSMixerConfig", "PatchTSMixerForPrediction",
                            floats(past_values=(BATCH, 32, 2)), "prediction_outputs", num_input_channels=2,
                            context_length=32, patch_length=8, patch_stride=8, prediction_length=4, d_model=16,
                            num_layers=2),
    "decision-transformer": hugging("reinforcement learning", "DecisionTransformerConfig", "DecisionTransformerModel",
                                    lambda rng: {**floats(states=(BATCH, 4, 5), actions=(BATCH, 4, 3),
                                                          rewards=(BATCH, 4, 1), returns_to_go=(BATCH, 4, 1))(rng),
                                                 "timesteps": rng.integers(0, 8, (BATCH, 4)),
                                                 "attention_mask": np.ones((BATCH, 4), np.int64)},
                                    "action_preds", state_dim=5, act_dim=3, hidden_size=32, max_ep_len=8, n_layer=1,
                                    n_head=2, n_positions=24),
    "lstm": _stack(nn.LSTM),
    "bilstm": _stack(nn.LSTM, bidirectional=True),
    "gru": _stack(nn.GRU),
    "bigru": _stack(nn.GRU, bidirectional=True),
    "birnn-tanh": _stack(nn.RNN, bidirectional=True),
    "rnn-relu": _stack(nn.RNN, nonlinearity="relu"),
    "packed-bilstm": Network(RECURRENT, LastState, lambda rng: {**floats(x=(BATCH, 6, 6))(rng),
                                                               "lengths": np.array([6, 4])}),
    "seq2seq": Network(RECURRENT, Seq2Seq, floats(x=(BATCH, 6, 6), y=(BATCH, 4, 6))),
    "cells": Network(RECURRENT, Cells, floats(x=(BATCH, 4, 6))),
    "wavenet": Network("dilated convolution", WaveNet, floats(x=(BATCH, 1, 24))),
    "tcn": Network("dilated convolution",
                   lambda: nn.Sequential(TemporalBlock(3, 8, 1), TemporalBlock(8, 8, 2), nn.Flatten(),
                                         nn.Linear(8 * 16, LABELS)), floats(x=(BATCH, 3, 16))),
}  # fmt: skip
