"""Networks of other people's kind, whose weights come from a published model under other names."""

from __future__ import annotations

import torchvision
from torch import nn


class Regrouped(nn.Module):
    """ResNet-50 in four groups with a head of 64."""

    def __init__(self) -> None:
        super().__init__()
        parts = list(torchvision.models.resnet50().children())
        self.convnet_1 = nn.Sequential(*parts[:-6])
        self.convnet_2 = nn.Sequential(*parts[-6:-4])
        self.convnet_3 = nn.Sequential(*parts[-4:-2])
        self.convnet_4 = nn.Sequential(*parts[-2:-1])
        self.fc = nn.Linear(2048, 64)


CONVOLUTIONS = {
    0: "1_1", 2: "1_2", 5: "2_1", 7: "2_2", 10: "3_1", 12: "3_2", 14: "3_3", 17: "4_1", 19: "4_2", 21: "4_3",
    24: "5_1", 26: "5_2", 28: "5_3",
}  # fmt: skip


class FCN32s(nn.Module):
    """The layers with weights of the fully convolutional VGG-16."""

    def __init__(self) -> None:
        super().__init__()
        channels = [3, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]
        for name, before, after in zip(CONVOLUTIONS.values(), channels, channels[1:], strict=False):
            self.add_module(f"conv{name}", nn.Conv2d(before, after, 3, padding=1))
        self.fc6 = nn.Conv2d(512, 4096, 7)
        self.fc7 = nn.Conv2d(4096, 4096, 1)
        self.score_fr = nn.Conv2d(4096, 21, 1)
        self.upscore = nn.ConvTranspose2d(21, 21, 64, 32, bias=False)
