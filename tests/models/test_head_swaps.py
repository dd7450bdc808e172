"""Another head on a body that is known: what is initialised is what ``from_pretrained`` leaves fresh, and no more.

transformers is the oracle: the keys that it reports as missing are those that no file has.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import ckpt_surgeon

COMMON: dict[str, object] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 99,
    "max_position_embeddings": 40,
}  # fmt: skip
SMALL: dict[str, Mapping[str, object]] = {
    "Bert": COMMON,
    "Roberta": COMMON,
    "XLMRoberta": COMMON,
    "Camembert": COMMON,
    "Electra": {**COMMON, "embedding_size": 32},
    "DistilBert": {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64, "vocab_size": 99},
    "Albert": {**COMMON, "embedding_size": 16},
    "MPNet": COMMON,
    "Deberta": COMMON,
    "DebertaV2": COMMON,
    "ConvBert": {**COMMON, "embedding_size": 32},
    "Longformer": {**COMMON, "attention_window": 4},
    "BigBird": COMMON,
    "Ernie": COMMON,
    "RoFormer": {**COMMON, "embedding_size": 32},
    "MobileBert": {**COMMON, "embedding_size": 32, "intra_bottleneck_size": 32, "true_hidden_size": 32},
    "SqueezeBert": {**COMMON, "embedding_size": 32, "q_groups": 1, "k_groups": 1, "v_groups": 1},
    "XLNet": {"d_model": 32, "n_layer": 2, "n_head": 2, "d_inner": 64, "vocab_size": 99},
    "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 99, "n_positions": 40},
    "Funnel": {"d_model": 32, "block_sizes": [1, 1], "n_head": 2, "d_head": 16, "d_inner": 64, "vocab_size": 99,
               "num_decoder_layers": 1},
    "Nystromformer": {**COMMON, "num_landmarks": 4, "segment_means_seq_len": 8},
    "Bart": {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
             "decoder_attention_heads": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "vocab_size": 99,
             "max_position_embeddings": 40},
    "T5": {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2, "vocab_size": 99},
    "ViT": {**COMMON, "image_size": 32, "patch_size": 16, "encoder_stride": 16},
    "DeiT": {**COMMON, "image_size": 32, "patch_size": 16, "encoder_stride": 16},
    "Beit": {**COMMON, "image_size": 32, "patch_size": 16, "use_mask_token": True},
    "Swin": {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2],
             "window_size": 4, "encoder_stride": 8},
    "Wav2Vec2": {**COMMON, "conv_dim": [16, 16], "conv_stride": [2, 2], "conv_kernel": [3, 3],
                 "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "codevector_dim": 32,
                 "proj_codevector_dim": 32, "classifier_proj_size": 32},
    "Dinov2": {**COMMON, "image_size": 32, "patch_size": 16},
    "Segformer": {"num_encoder_blocks": 2, "depths": [1, 1], "hidden_sizes": [16, 32], "num_attention_heads": [1, 2],
                  "sr_ratios": [2, 1], "decoder_hidden_size": 16, "patch_sizes": [7, 3], "strides": [4, 2],
                  "mlp_ratios": [2, 2]},
    "Llama": {**COMMON, "num_key_value_heads": 2},
}  # fmt: skip

SWAPS = [
    ("Bert", "ForMaskedLM", "ForSequenceClassification"),
    ("Bert", "ForMaskedLM", "Model"),
    ("Bert", "ForPreTraining", "ForTokenClassification"),
    ("Bert", "ForNextSentencePrediction", "ForSequenceClassification"),
    ("Bert", "ForQuestionAnswering", "ForMultipleChoice"),
    ("Bert", "Model", "ForMaskedLM"),
    ("Bert", "ForSequenceClassification", "ForMaskedLM"),
    ("Roberta", "ForMaskedLM", "ForSequenceClassification"),
    ("Roberta", "ForSequenceClassification", "ForMaskedLM"),
    ("XLMRoberta", "ForMaskedLM", "ForSequenceClassification"),
    ("Camembert", "ForMaskedLM", "Model"),
    ("Electra", "ForPreTraining", "ForSequenceClassification"),
    ("Electra", "ForMaskedLM", "ForSequenceClassification"),
    ("DistilBert", "ForMaskedLM", "ForSequenceClassification"),
    ("DistilBert", "ForSequenceClassification", "ForMaskedLM"),
    ("Albert", "ForMaskedLM", "ForSequenceClassification"),
    ("Albert", "ForPreTraining", "ForSequenceClassification"),
    ("MPNet", "ForMaskedLM", "ForSequenceClassification"),
    ("Deberta", "ForMaskedLM", "ForSequenceClassification"),
    ("DebertaV2", "ForMaskedLM", "ForSequenceClassification"),
    ("ConvBert", "ForMaskedLM", "ForSequenceClassification"),
    ("Longformer", "ForMaskedLM", "ForSequenceClassification"),
    ("BigBird", "ForMaskedLM", "ForSequenceClassification"),
    ("Ernie", "ForMaskedLM", "ForSequenceClassification"),
    ("RoFormer", "ForMaskedLM", "ForSequenceClassification"),
    ("MobileBert", "ForMaskedLM", "ForSequenceClassification"),
    ("SqueezeBert", "ForMaskedLM", "ForSequenceClassification"),
    ("XLNet", "LMHeadModel", "ForSequenceClassification"),
    ("GPT2", "LMHeadModel", "ForSequenceClassification"),
    ("GPT2", "DoubleHeadsModel", "ForTokenClassification"),
    ("Funnel", "ForMaskedLM", "ForSequenceClassification"),
    ("Nystromformer", "ForMaskedLM", "ForSequenceClassification"),
    ("Bart", "ForConditionalGeneration", "ForSequenceClassification"),
    ("T5", "ForConditionalGeneration", "ForSequenceClassification"),
    ("ViT", "ForMaskedImageModeling", "ForImageClassification"),
    ("DeiT", "ForMaskedImageModeling", "ForImageClassification"),
    ("Beit", "ForMaskedImageModeling", "ForImageClassification"),
    ("Swin", "ForMaskedImageModeling", "ForImageClassification"),
    ("Dinov2", "Model", "ForImageClassification"),
    ("ViT", "Model", "ForImageClassification"),
    ("Segformer", "ForImageClassification", "Model"),
    ("Wav2Vec2", "ForPreTraining", "ForCTC"),
    ("Wav2Vec2", "ForPreTraining", "ForSequenceClassification"),
    ("Llama", "ForCausalLM", "ForSequenceClassification"),
    ("Llama", "ForCausalLM", "ForTokenClassification"),
]


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)
    transformers.logging.set_verbosity(before)


def built(family: str, head: str) -> nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SMALL[family], pad_token_id=1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Initializing zero-element tensors")
        made: nn.Module = getattr(transformers, family + head)(config)
    return made


def saved(family: str, head: str, folder: Path) -> Path:
    made = built(family, head)
    made.save_pretrained(folder)  # type: ignore[operator]
    return folder


def loaded(family: str, head: str, folder: Path) -> tuple[nn.Module, dict[str, Any]]:
    """What transformers makes of a folder, and what it says about the keys."""
    kind = getattr(transformers, family + head)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Initializing zero-element tensors")
        model, said = kind.from_pretrained(folder, output_loading_info=True)
    return model, said


@pytest.mark.parametrize(("family", "before", "after"), SWAPS)
def test_the_keys_that_from_pretrained_leaves_fresh_are_initialised_and_no_others(
    family: str, before: str, after: str, tmp_path: Path
) -> None:
    folder = saved(family, before, tmp_path)
    model = built(family, after)
    report = ckpt_surgeon.load_into(model, folder / "model.safetensors", allow_missing=["*"])
    theirs, said = loaded(family, after, folder)
    assert set(report.initialized) == set(said["missing_keys"])
    ours, expected = model.state_dict(), theirs.state_dict()
    assert [key for key in report.loaded if not torch.equal(ours[key], expected[key])] == []
    assert all(one.certainty == "certain" for one in report.fit.outcomes if one.how == "renamed" and not one.detail)
