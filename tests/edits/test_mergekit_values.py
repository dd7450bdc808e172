"""What mergekit 0.1.5 wrote (float32, a random Llama) for one tensor, beside what our edits make of the same."""

from __future__ import annotations

import pytest
import torch

import ckpt_surgeon

STEPS = torch.arange(16.0)
BASE, ONE, TWO = ({"norm.weight": torch.sin(STEPS * factor)} for factor in (1, 2, 3))

# fmt: off
WRITTEN = {
    "linear": [
        0.0, 0.67884415, -0.61358637, -0.07195529, 0.5315789, -0.18572842, -0.60089725, 0.94442189,
        -0.47320583, -0.23877823, 0.3426522, 0.29377764, -0.93143857, 0.8229295, -0.08532242, -0.43635106,
    ],
    "slerp": [
        0.0, 0.88398957, -0.81055987, -0.0612212, 0.64301121, -0.18946511, -0.83009934, 1.27852058,
        -0.67759514, -0.2344301, 0.36564496, 0.4539547, -1.27361596, 1.13190305, -0.17945848, -0.49660665,
    ],
    "task_arithmetic": [
        0.0, 0.60880911, -0.7324577, -0.04485546, 0.5536018, -0.02480721, -0.64805442, 0.96238875,
        -0.6626994, -0.18435252, 0.29825115, 0.49376774, -0.97695911, 0.87729239, -0.27603531, -0.41628957,
    ],
    "ties": [
        0.0, 0.14112002, -0.58320719, 0.14112, 0.98935813, 0.65028787, -0.27941549, 0.65698659,
        -0.51251227, -0.75098723, 0.91294527, 0.35797155, -0.53657293, 0.96379536, -0.16088593, -0.98803163,
    ],
}
# fmt: on


@pytest.mark.parametrize("method", WRITTEN)
def test_an_edit_gives_what_mergekit_wrote(method: str) -> None:
    made = {
        "linear": lambda: ckpt_surgeon.average(ONE, TWO, weights=[0.7, 0.3]),
        "slerp": lambda: ckpt_surgeon.slerp(ONE, TWO, 0.3),
        "task_arithmetic": lambda: ckpt_surgeon.merge(BASE, ONE, TWO, weights=[0.7, 0.4]),
        "ties": lambda: ckpt_surgeon.merge(BASE, ONE, TWO, method="ties-mergekit", density=0.5, weights=[0.7, 0.4]),
    }[method]()
    torch.testing.assert_close(made["norm.weight"], torch.tensor(WRITTEN[method]), rtol=0, atol=3e-7)
