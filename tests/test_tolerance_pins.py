"""What counts as right, written out a second time, so that nobody widens it unseen."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import tolerance
import torch

from lora_kernels import criterion

FP16, BF16, FP32, FP64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
MEANT = (
    "; if the change is meant, say in its commit which measurement needs it, what the planted bugs "
    "of tests/mutants*.py still show (`make test-all`), and write it here too"
)
CRITERION = {
    "UNIT": {FP16: 0.00048828125, BF16: 0.00390625, FP32: 5.9604644775390625e-08,
             FP64: 1.1102230246251565e-16},
    "SLACK": 1.05,
    "ACCUMULATE": 1.1920928955078125e-07,
    "TINY": {FP16: 5.9604644775390625e-08, BF16: 9.183549615799121e-41,
             FP32: 1.401298464324817e-45},
}  # fmt: skip
TOLERANCE = {
    "NORM": {"activation": 0.75, "adapter": 0.80, "wide": 0.55, "fp32": 32.0},
    "EAGER_NORM": 1.0,
    "NORM_MIN_ELEMENTS": 4096,
    "EAGER_RMS": 1.0,
    "EAGER_MAX": 2.0,
    "TRAINING_STEPS": 200,
    "TRAINING_SEEDS": 3,
    "TRAINING_LOSS": {BF16: 1e-2, FP32: 1e-5},
    "TRAINING_COSINE": 0.999,
    "TRAINING_GRADIENT": 0.02,
}
# Of the files: what a bound is made of is as much of it as its numbers.
SOURCES = {
    "080eabb3f2ea6460dc6344f1598a4fb40d308750e80a26d2f8a296ea6f6095bb": criterion,
    "054d301ff3f4efdf0fb47e4e7bac9f634b821ab960f1008bbedb743abb546908": tolerance,
}


@pytest.mark.parametrize("module, pinned", [(criterion, CRITERION), (tolerance, TOLERANCE)])
def test_every_constant_is_as_pinned(module, pinned):
    own = {n: v for n, v in vars(module).items() if n.isupper() and v is not criterion.UNIT}
    own |= {"UNIT": criterion.UNIT} if module is criterion else {}
    assert own == pinned, f"a constant of {module.__name__} has changed{MEANT}"


@pytest.mark.parametrize("digest, module", SOURCES.items(), ids=["criterion", "tolerance"])
def test_the_formulas_are_as_pinned(digest, module):
    found = hashlib.sha256(Path(module.__file__).read_bytes()).hexdigest()
    assert found == digest, f"{module.__name__} has changed, to {found}{MEANT}"
