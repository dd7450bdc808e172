"""What is known of the classes of modules that were saved whole: their versions, and which have more than tensors.

The tables are those of torch 2.14, torchvision 0.29, timm 1.0 and transformers 5.24, made by importing the modules of
these packages and walking all subclasses of ``torch.nn.Module``: :data:`VERSIONS` has every class whose ``_version``
is not 1, which is torch's default, :data:`OWN_STATE` every class whose own ``_save_to_state_dict`` or ``state_dict``
gives other entries than its parameters and buffers.  ``tests/reading/test_module_classes.py`` compares them with the
packages that are installed.
"""

from __future__ import annotations

DEFAULT = 1  # torch.nn.Module._version
KNOWN = frozenset({"torch", "torchvision", "timm", "transformers"})  # packages whose classes the tables cover

# Where classes were before they moved, and where they are now.
_MOVED = (
    ("torch.nn.quantized.", "torch.ao.nn.quantized."),
    ("torch.nn.quantizable.", "torch.ao.nn.quantizable."),
    ("torch.nn.intrinsic.", "torch.ao.nn.intrinsic."),
    ("torch.nn.qat.", "torch.ao.nn.qat."),
    ("torch.nn.sparse.", "torch.ao.nn.sparse."),
    ("torch.quantization.", "torch.ao.quantization."),
    ("timm.models.layers.", "timm.layers."),
)


def _named(table: dict[str, str]) -> list[str]:
    return [f"{module}.{name}" for module, names in table.items() for name in names.split()]


VERSIONS: dict[str, int | str] = {
    **dict.fromkeys(
        _named({
            "torch.nn.modules.batchnorm":
                "BatchNorm1d BatchNorm2d BatchNorm3d LazyBatchNorm1d LazyBatchNorm2d LazyBatchNorm3d SyncBatchNorm "
                "_BatchNorm _LazyNormBase _NormBase",
            "torch.nn.modules.instancenorm":
                "InstanceNorm1d InstanceNorm2d InstanceNorm3d LazyInstanceNorm1d LazyInstanceNorm2d LazyInstanceNorm3d "
                "_InstanceNorm",
            "torch.ao.nn.intrinsic.qat.modules.conv_fused":
                "ConvBn1d ConvBn2d ConvBn3d ConvBnReLU1d ConvBnReLU2d ConvBnReLU3d _ConvBnNd",
            "torch.ao.nn.intrinsic.quantized.modules.bn_relu": "BNReLU2d BNReLU3d",
            "torch.ao.nn.quantized.dynamic.modules.rnn": "GRU LSTM RNNBase",
            "torch.ao.nn.quantized.modules.batchnorm": "BatchNorm2d BatchNorm3d _BatchNorm",
            "torch.ao.nn.quantized.modules.normalization": "InstanceNorm1d InstanceNorm2d InstanceNorm3d",
            "torchvision.models._utils": "IntermediateLayerGetter",
            "torchvision.models.densenet": "_DenseBlock",
            "torchvision.models.detection.mask_rcnn": "MaskRCNNHeads",
            "torchvision.models.detection.retinanet": "RetinaNetClassificationHead RetinaNetRegressionHead",
            "torchvision.models.detection.rpn": "RPNHead",
            "torchvision.models.mnasnet": "MNASNet",
            "torchvision.models.quantization.mobilenetv3": "QuantizableSqueezeExcitation",
            "torchvision.models.vision_transformer": "MLPBlock",
            "torchvision.ops.feature_pyramid_network": "FeaturePyramidNetwork",
            "timm.layers.norm_act": "BatchNormAct2d SyncBatchNormAct",
            "timm.layers.split_batchnorm": "SplitBatchNorm2d",
            "timm.models.densenet": "DenseBlock",
        }),
        2,
    ),
    **dict.fromkeys(
        _named({
            "torch.ao.nn.intrinsic.quantized.modules.linear_relu": "LinearLeakyReLU LinearReLU LinearTanh",
            "torch.ao.nn.quantized.modules.linear": "Linear LinearPackedParams",
            "torch.ao.quantization.observer":
                "HistogramObserver MinMaxObserver MovingAverageMinMaxObserver MovingAveragePerChannelMinMaxObserver "
                "PerChannelMinMaxObserver UniformQuantizationObserverBase",
        }),
        3,
    ),
    **dict.fromkeys(
        _named({
            "torch.ao.nn.intrinsic.quantized.dynamic.modules.linear_relu": "LinearReLU",
            "torch.ao.nn.quantized.dynamic.modules.linear": "Linear",
        }),
        4,
    ),
    **dict.fromkeys(
        _named({
            "transformers.models.phi3.modeling_phi3":
                "Phi3ForCausalLM Phi3ForSequenceClassification Phi3ForTokenClassification Phi3Model "
                "Phi3PreTrainedModel",
            "transformers.models.phi4_multimodal.modeling_phi4_multimodal":
                "Phi4MultimodalForCausalLM Phi4MultimodalModel Phi4MultimodalPreTrainedModel",
        }),
        "0.0.5",
    ),
}  # fmt: skip

OWN_STATE = frozenset(
    _named({
        "torch.ao.nn.intrinsic.quantized.dynamic.modules.linear_relu": "LinearReLU",
        "torch.ao.nn.intrinsic.quantized.modules.conv_add": "ConvAdd2d ConvAddReLU2d",
        "torch.ao.nn.intrinsic.quantized.modules.conv_relu": "ConvReLU1d ConvReLU2d ConvReLU3d",
        "torch.ao.nn.intrinsic.quantized.modules.linear_relu": "LinearLeakyReLU LinearReLU LinearTanh",
        "torch.ao.nn.quantized.dynamic.modules.conv":
            "Conv1d Conv2d Conv3d ConvTranspose1d ConvTranspose2d ConvTranspose3d",
        "torch.ao.nn.quantized.dynamic.modules.linear": "Linear",
        "torch.ao.nn.quantized.dynamic.modules.rnn": "GRUCell LSTMCell PackedParameter RNNCell RNNCellBase",
        "torch.ao.nn.quantized.modules.conv":
            "Conv1d Conv2d Conv3d ConvTranspose1d ConvTranspose2d ConvTranspose3d _ConvNd _ConvTransposeNd",
        "torch.ao.nn.quantized.modules.embedding_ops": "EmbeddingPackedParams",
        "torch.ao.nn.quantized.modules.functional_modules": "QFunctional",
        "torch.ao.nn.quantized.modules.linear": "Linear LinearPackedParams",
        "torch.ao.nn.quantized.reference.modules.conv":
            "Conv1d Conv2d Conv3d ConvTranspose1d ConvTranspose2d ConvTranspose3d _ConvNd _ConvTransposeNd",
        "torch.ao.nn.quantized.reference.modules.linear": "Linear",
        "torch.ao.nn.quantized.reference.modules.sparse": "Embedding EmbeddingBag",
        "torch.ao.nn.quantized.reference.modules.utils": "ReferenceQuantizedModule",
        "torch.ao.nn.sparse.quantized.dynamic.linear": "Linear",
        "torch.ao.nn.sparse.quantized.linear": "Linear LinearPackedParams",
        "torch.ao.pruning._experimental.pruner.parametrization": "FakeStructuredSparsity",
        "torch.ao.pruning.sparsifier.utils": "FakeSparsity",
        "torch.distributed.nn.api.remote_module": "RemoteModule _RemoteModule",
    })
)  # fmt: skip


def current_name(class_name: str) -> str:
    """The name that a class has now, where it was saved under one of before it moved.

    >>> current_name("torch.nn.quantized.modules.linear.Linear")
    'torch.ao.nn.quantized.modules.linear.Linear'
    """
    for before, now in _MOVED:
        if class_name.startswith(before):
            return now + class_name.removeprefix(before)
    return class_name


def is_known(class_name: str) -> bool:
    """Whether the tables tell about a class.

    >>> is_known("torch.nn.modules.linear.Linear"), is_known("__main__.Net")
    (True, False)
    """
    return class_name.partition(".")[0] in KNOWN


def version_of(class_name: str) -> int | str:
    """The ``_version`` of a class: what ``state_dict()`` writes into ``_metadata`` for it.

    >>> version_of("torch.nn.modules.batchnorm.BatchNorm2d"), version_of("torch.nn.modules.linear.Linear")
    (2, 1)
    """
    return VERSIONS.get(current_name(class_name), DEFAULT)


def has_own_state(class_name: str) -> bool:
    """Whether the state_dict of a class has more than, or not all of, its parameters and buffers.

    >>> has_own_state("torch.ao.nn.quantized.modules.conv.Conv2d")
    True
    """
    return current_name(class_name) in OWN_STATE
