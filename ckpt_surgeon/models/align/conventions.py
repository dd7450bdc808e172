"""How libraries name the parts of well-known architectures: regular expressions that give one spelling to all of them.

The names on the right are timm's, but for blocks: ``block<2-0>`` is block 0 of stage 2, and blocks are counted through
the whole model afterwards, since libraries cut the same row of blocks into other stages.  Sources: the models' code
in transformers, timm and torchvision, and the conversion scripts that transformers ships.  Heads are left out: a
head's name says what it was trained for, not that it is the same.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

# {1} is a group of the pattern, {1+1} its number and one.
Replacement = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Convention:
    """One library's names of an architecture: a key that it has for sure, and what its keys become, in this order.

    ``without`` is a part (``conv_pwl``) that blocks with an expansion have: the others follow ``plain`` first.
    """

    marker: str
    rules: tuple[Replacement, ...] = ()
    without: str = ""
    plain: tuple[Replacement, ...] = ()


_VIT_EMBEDDINGS: tuple[Replacement, ...] = (
    (r"embeddings\.patch_embeddings\.projection", "patch_embed.proj"),
    (r"embeddings\.cls_token", "cls_token"),
    (r"embeddings\.mask_token", "mask_token"),
    (r"embeddings\.distillation_token", "dist_token"),
    (r"embeddings\.position_embeddings", "pos_embed"),
)
_ATTENTION: tuple[Replacement, ...] = (
    (r"(?:relative_position_bias|attention)\.relative_position_bias\.(relative_position_\w+)", "attn.{1}"),
    (r"relative_position_bias\.(relative_position_\w+)", "attn.{1}"),
    (r"attention\.(?:attention|self)\.(relative_position_\w+)", "attn.{1}"),
    (r"attention\.attn\.", "attn."),
    (r"attention\.(?:(?:attention|self)\.)?(?:query|q_proj)", "attn.q"),
    (r"attention\.(?:(?:attention|self)\.)?(?:key|k_proj)", "attn.k"),
    (r"attention\.(?:(?:attention|self)\.)?(?:value|v_proj)", "attn.v"),
    (r"attention\.(?:output\.dense|o_proj)", "attn.proj"),
    (r"intermediate\.dense", "mlp.fc1"),
    (r"output\.dense", "mlp.fc2"),
    (r"layernorm_before", "norm1"),
    (r"layernorm_after", "norm2"),
    (r"lambda_(\d)", "gamma_{1}"),
)
_VIT = (
    *_VIT_EMBEDDINGS,
    (r"encoder\.layer\.(\d+)", "blocks.{1}"),
    (r"layers\.(\d+)", "blocks.{1}"),
    *_ATTENTION,
    (r"pooler\.layernorm", "fc_norm"),
    (r"layernorm", "norm"),
)
_SWIN = (
    (r"embeddings\.patch_embeddings\.projection", "patch_embed.proj"),
    (r"embeddings\.norm", "patch_embed.norm"),
    (r"embeddings\.mask_token", "mask_token"),
    (r"encoder\.layers\.(\d+)\.blocks\.(\d+)", "block<{1}-{2}>"),
    (r"encoder\.layers\.(\d+)\.downsample", "down<{1}>"),
    *_ATTENTION,
    (r"layernorm", "norm"),
)
_HF_STAGES = r"encoder\.stages\.(\d+)\.layers\.(\d+)\."

VISION_TRANSFORMER = (
    Convention(r"encoder\.layer\.\d+\.layernorm_before\.weight", _VIT),
    Convention(r"(?<!encoder\.)layers\.\d+\.layernorm_before\.weight", _VIT),
    Convention(r"blocks\.\d+\.attn\.qkv\.weight", ((r"attn\.([qv])_bias", "attn.{1}.bias"),)),
    Convention(
        r"encoder_layer_\d+\.ln_1\.weight",
        (
            (r"class_token", "cls_token"),
            (r"conv_proj", "patch_embed.proj"),
            (r"encoder\.pos_embedding", "pos_embed"),
            (r"encoder\.layers\.encoder_layer_(\d+)", "blocks.{1}"),
            (r"ln_(\d)", "norm{1}"),
            (r"self_attention\.in_proj_(weight|bias)", "attn.qkv.{1}"),
            (r"self_attention\.out_proj", "attn.proj"),
            (r"mlp\.(?:0|linear_1)", "mlp.fc1"),
            (r"mlp\.(?:3|linear_2)", "mlp.fc2"),
            (r"encoder\.ln", "norm"),
            (r"heads\.head", "head"),
        ),
    ),
)
SWIN_TRANSFORMER = (
    Convention(r"encoder\.layers\.\d+\.blocks\.\d+\.attention\.self\.query\.weight", _SWIN),
    Convention(r"encoder\.layers\.\d+\.blocks\.\d+\.attention\.q_proj\.weight", _SWIN),
    Convention(
        r"layers\.\d+\.blocks\.\d+\.attn\.qkv\.weight",
        (
            (r"layers\.(\d+)\.blocks\.(\d+)", "block<{1}-{2}>"),
            (r"layers\.(\d+)\.downsample", "down<{1}>"),
        ),
    ),
    Convention(
        r"features\.\d+\.\d+\.attn\.qkv\.weight",
        (
            (r"features\.0\.0", "patch_embed.proj"),
            (r"features\.0\.2", "patch_embed.norm"),
            (r"features\.(\d+)\.(\d+)", "block<{1}-{2}>"),
            (r"features\.(\d+)\.(reduction|norm)", "down<{1}>.{2}"),
            (r"mlp\.0", "mlp.fc1"),
            (r"mlp\.3", "mlp.fc2"),
        ),
    ),
)
RESNET = (
    Convention(r"layer1\.0\.conv1\.weight"),
    Convention(
        r"stages\.\d+\.layers\.\d+\.layer\.0\.convolution\.weight",
        (
            (r"embedder\.embedder\.convolution", "conv1"),
            (r"embedder\.embedder\.normalization", "bn1"),
            (_HF_STAGES + r"shortcut\.convolution", "layer{1+1}.{2}.downsample.0"),
            (_HF_STAGES + r"shortcut\.normalization", "layer{1+1}.{2}.downsample.1"),
            (_HF_STAGES + r"layer\.(\d+)\.convolution", "layer{1+1}.{2}.conv{3+1}"),
            (_HF_STAGES + r"layer\.(\d+)\.normalization", "layer{1+1}.{2}.bn{3+1}"),
        ),
    ),
)
_LETTERS = tuple(
    (rf"trunk_output\.block(\d+)\.block\d+-(\d+)\.f\.{letter}\.{at}", f"s{{1}}.b{{2+1}}.conv{number}.{leaf}")
    for number, letter in enumerate("abc", 1)
    for at, leaf in enumerate(("conv", "bn"))
)
REGNET = (
    Convention(r"s1\.b1\.conv1\.conv\.weight"),
    Convention(
        r"trunk_output\.block1\.block1-0\.f\.a\.0\.weight",
        (
            (r"stem\.0", "stem.conv"),
            (r"stem\.1", "stem.bn"),
            *_LETTERS,
            (r"trunk_output\.block(\d+)\.block\d+-(\d+)\.f\.se", "s{1}.b{2+1}.se"),
            (r"trunk_output\.block(\d+)\.block\d+-(\d+)\.proj\.0", "s{1}.b{2+1}.downsample.conv"),
            (r"trunk_output\.block(\d+)\.block\d+-(\d+)\.proj\.1", "s{1}.b{2+1}.downsample.bn"),
        ),
    ),
    Convention(
        r"stages\.\d+\.layers\.\d+\.layer\.0\.convolution\.weight",
        (
            (r"embedder\.embedder\.convolution", "stem.conv"),
            (r"embedder\.embedder\.normalization", "stem.bn"),
            (_HF_STAGES + r"shortcut\.convolution", "s{1+1}.b{2+1}.downsample.conv"),
            (_HF_STAGES + r"shortcut\.normalization", "s{1+1}.b{2+1}.downsample.bn"),
            (_HF_STAGES + r"layer\.2\.attention\.0", "s{1+1}.b{2+1}.se.fc1"),
            (_HF_STAGES + r"layer\.2\.attention\.2", "s{1+1}.b{2+1}.se.fc2"),
            (_HF_STAGES + r"layer\.([01])\.convolution", "s{1+1}.b{2+1}.conv{3+1}.conv"),
            (_HF_STAGES + r"layer\.([01])\.normalization", "s{1+1}.b{2+1}.conv{3+1}.bn"),
            (_HF_STAGES + r"layer\.[23]\.convolution", "s{1+1}.b{2+1}.conv3.conv"),
            (_HF_STAGES + r"layer\.[23]\.normalization", "s{1+1}.b{2+1}.conv3.bn"),
        ),
    ),
)
CONVNEXT = (
    Convention(
        r"stages\.\d+\.blocks\.\d+\.conv_dw\.weight",
        (
            (r"stages\.(\d+)\.blocks\.(\d+)", "block<{1}-{2}>"),
            (r"stages\.(\d+)\.downsample", "down<{1}>"),
        ),
    ),
    Convention(
        r"stages\.\d+\.layers\.\d+\.dwconv\.weight",
        (
            (r"embeddings\.patch_embeddings", "stem.0"),
            (r"embeddings\.layernorm", "stem.1"),
            (r"encoder\.stages\.(\d+)\.layers\.(\d+)\.layernorm", "block<{1}-{2}>.norm"),
            (r"encoder\.stages\.(\d+)\.layers\.(\d+)", "block<{1}-{2}>"),
            (r"encoder\.stages\.(\d+)\.downsampling_layer", "down<{1}>"),
            (r"dwconv", "conv_dw"),
            (r"pwconv(\d)", "mlp.fc{1}"),
            (r"layer_scale_parameter", "gamma"),
            (r"layernorm", "head.norm"),
        ),
    ),
    Convention(
        r"features\.\d+\.\d+\.layer_scale",
        (
            (r"features\.0\.(\d)", "stem.{1}"),
            (r"features\.(\d+)\.(\d+)\.layer_scale", "block<{1}-{2}>.gamma"),
            (r"features\.(\d+)\.(\d+)\.block\.0", "block<{1}-{2}>.conv_dw"),
            (r"features\.(\d+)\.(\d+)\.block\.2", "block<{1}-{2}>.norm"),
            (r"features\.(\d+)\.(\d+)\.block\.3", "block<{1}-{2}>.mlp.fc1"),
            (r"features\.(\d+)\.(\d+)\.block\.5", "block<{1}-{2}>.mlp.fc2"),
            (r"features\.(\d+)\.(\d+)", "down<{1}>.{2}"),
            (r"classifier\.0", "head.norm"),
        ),
    ),
)
_TIMM_INVERTED = Convention(
    r"blocks\.\d+\.\d+\.conv_pwl\.weight",
    (
        (r"blocks\.(\d+)\.(\d+)\.conv_pwl", "block<{1}-{2}>.project"),
        (r"blocks\.(\d+)\.(\d+)\.conv_pw", "block<{1}-{2}>.expand"),
        (r"blocks\.(\d+)\.(\d+)\.bn1", "block<{1}-{2}>.expand_bn"),
        (r"blocks\.(\d+)\.(\d+)\.bn2", "block<{1}-{2}>.dw_bn"),
        (r"blocks\.(\d+)\.(\d+)\.bn3", "block<{1}-{2}>.project_bn"),
        (r"blocks\.(\d+)\.(\d+)", "block<{1}-{2}>"),
    ),
    r"(blocks\.\d+\.\d+)\.conv_pwl",
    (
        (r"blocks\.(\d+)\.(\d+)\.conv_pw", "block<{1}-{2}>.project"),
        (r"blocks\.(\d+)\.(\d+)\.bn1", "block<{1}-{2}>.dw_bn"),
        (r"blocks\.(\d+)\.(\d+)\.bn2", "block<{1}-{2}>.project_bn"),
        (r"blocks\.(\d+)\.(\d+)", "block<{1}-{2}>"),
    ),
)


def _norms(pattern: str, new: str) -> tuple[Replacement, Replacement]:
    return (pattern + r"\.convolution", new), (pattern + r"\.normalization", new + "_bn")


_TORCHVISION_STEM = (
    (r"features\.0\.0", "conv_stem"),
    (r"features\.0\.1", "bn1"),
    (r"features\.[1-9]\d*\.0(?=\.\w+$)", "conv_head"),
    (r"features\.[1-9]\d*\.1(?=\.\w+$)", "bn2"),
)
MOBILENET_V2 = (
    _TIMM_INVERTED,
    Convention(
        r"conv_stem\.first_conv\.convolution\.weight",
        (
            (r"conv_stem\.first_conv\.convolution", "conv_stem"),
            (r"conv_stem\.first_conv\.normalization", "bn1"),
            *_norms(r"conv_stem\.conv_3x3", "block<0>.conv_dw"),
            *_norms(r"conv_stem\.reduce_1x1", "block<0>.project"),
            *_norms(r"layer\.(\d+)\.expand_1x1", "block<{1+1}>.expand"),
            *_norms(r"layer\.(\d+)\.conv_3x3", "block<{1+1}>.conv_dw"),
            *_norms(r"layer\.(\d+)\.reduce_1x1", "block<{1+1}>.project"),
            (r"conv_dw_bn", "dw_bn"),
            (r"conv_1x1\.convolution", "conv_head"),
            (r"conv_1x1\.normalization", "bn2"),
        ),
    ),
    Convention(
        r"features\.1\.conv\.0\.0\.weight",
        (
            *_TORCHVISION_STEM,
            (r"features\.(\d+)\.conv\.0\.0", "block<{1}>.expand"),
            (r"features\.(\d+)\.conv\.0\.1", "block<{1}>.expand_bn"),
            (r"features\.(\d+)\.conv\.1\.0", "block<{1}>.conv_dw"),
            (r"features\.(\d+)\.conv\.1\.1", "block<{1}>.dw_bn"),
            (r"features\.(\d+)\.conv\.2", "block<{1}>.project"),
            (r"features\.(\d+)\.conv\.3", "block<{1}>.project_bn"),
        ),
        r"(features\.\d+)\.conv\.3",
        (
            *_TORCHVISION_STEM,
            (r"features\.(\d+)\.conv\.0\.0", "block<{1}>.conv_dw"),
            (r"features\.(\d+)\.conv\.0\.1", "block<{1}>.dw_bn"),
            (r"features\.(\d+)\.conv\.1", "block<{1}>.project"),
            (r"features\.(\d+)\.conv\.2", "block<{1}>.project_bn"),
        ),
    ),
)
_TORCHVISION_BLOCK = r"features\.(\d+)\.(\d+)\.block\."
EFFICIENTNET = (
    _TIMM_INVERTED,
    Convention(
        r"encoder\.blocks\.\d+\.depthwise_conv\.depthwise_conv\.weight",
        (
            (r"embeddings\.convolution", "conv_stem"),
            (r"embeddings\.batchnorm", "bn1"),
            (r"encoder\.top_conv", "conv_head"),
            (r"encoder\.top_bn", "bn2"),
            (r"encoder\.blocks\.(\d+)", "block<{1}>"),
            (r"expansion\.expand_conv", "expand"),
            (r"expansion\.expand_bn", "expand_bn"),
            (r"depthwise_conv\.depthwise_conv", "conv_dw"),
            (r"depthwise_conv\.depthwise_norm", "dw_bn"),
            (r"squeeze_excite\.reduce", "se.conv_reduce"),
            (r"squeeze_excite\.expand", "se.conv_expand"),
            (r"projection\.project_conv", "project"),
            (r"projection\.project_bn", "project_bn"),
        ),
    ),
    Convention(
        r"features\.\d+\.\d+\.block\.3\.0\.weight",
        (
            *_TORCHVISION_STEM,
            (_TORCHVISION_BLOCK + r"0\.0", "block<{1}-{2}>.expand"),
            (_TORCHVISION_BLOCK + r"0\.1", "block<{1}-{2}>.expand_bn"),
            (_TORCHVISION_BLOCK + r"1\.0", "block<{1}-{2}>.conv_dw"),
            (_TORCHVISION_BLOCK + r"1\.1", "block<{1}-{2}>.dw_bn"),
            (_TORCHVISION_BLOCK + r"2\.fc1", "block<{1}-{2}>.se.conv_reduce"),
            (_TORCHVISION_BLOCK + r"2\.fc2", "block<{1}-{2}>.se.conv_expand"),
            (_TORCHVISION_BLOCK + r"3\.0", "block<{1}-{2}>.project"),
            (_TORCHVISION_BLOCK + r"3\.1", "block<{1}-{2}>.project_bn"),
        ),
        r"(features\.\d+\.\d+)\.block\.3",
        (
            *_TORCHVISION_STEM,
            (_TORCHVISION_BLOCK + r"0\.0", "block<{1}-{2}>.conv_dw"),
            (_TORCHVISION_BLOCK + r"0\.1", "block<{1}-{2}>.dw_bn"),
            (_TORCHVISION_BLOCK + r"1\.fc1", "block<{1}-{2}>.se.conv_reduce"),
            (_TORCHVISION_BLOCK + r"1\.fc2", "block<{1}-{2}>.se.conv_expand"),
            (_TORCHVISION_BLOCK + r"2\.0", "block<{1}-{2}>.project"),
            (_TORCHVISION_BLOCK + r"2\.1", "block<{1}-{2}>.project_bn"),
        ),
    ),
)

_BLOCKS = ((r"encoder\.layer\.(\d+)", "blocks.{1}"), (r"layers\.(\d+)", "blocks.{1}"), *_ATTENTION)
TRANSFORMERS_ATTENTION = (  # transformers' own names before and after its attention modules became alike
    Convention(r"attention\.(?:attention|self)\.query\.weight", _BLOCKS),
    Convention(r"attention\.q_proj\.weight", _BLOCKS),
)

_SEGFORMER = (
    (r"encoder\.patch_embeddings\.(\d+)", "stages.{1}.patch_embeddings"),
    (r"encoder\.block\.(\d+)\.(\d+)", "stages.{1}.blocks.{2}"),
    (r"encoder\.layer_norm\.(\d+)", "stages.{1}.layer_norm"),
    (r"attention\.(?:self\.sr|sequence_reduction\.sequence_reduction)", "attn.sr"),
    (r"attention\.(?:self|sequence_reduction)\.layer_norm", "attn.layer_norm"),
    *_ATTENTION,
    (r"mlp\.dense(\d)", "mlp.fc{1}"),
    (r"layer_norm_(\d)", "norm{1}"),
)
SEGFORMER = (
    Convention(r"encoder\.block\.\d+\.\d+\.attention\.self\.query\.weight", _SEGFORMER),
    Convention(r"stages\.\d+\.blocks\.\d+\.attention\.q_proj\.weight", _SEGFORMER),
)

ARCHITECTURES = (
    VISION_TRANSFORMER, SWIN_TRANSFORMER, RESNET, REGNET, CONVNEXT, MOBILENET_V2, EFFICIENTNET, SEGFORMER,
    TRANSFORMERS_ATTENTION,
)  # fmt: skip


def conventions_of(source: Iterable[str], target: Iterable[str]) -> tuple[Convention, Convention] | None:
    """The two conventions that the keys of both sides follow, where both are known and differ."""
    ours, theirs = "\n".join(source), "\n".join(target)
    for architecture in ARCHITECTURES:
        mine, other = (
            next((one for one in architecture if re.search(rf"(?:^|\.){one.marker}", text, re.M)), None)
            for text in (ours, theirs)
        )
        if mine is not None and other is not None and mine is not other:
            return mine, other
    return None
