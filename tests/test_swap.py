"""GAC swapped into a training script, at three depths: the scripts of `swaps/` before and after, and the printed diffs.

A changed line is a line that is not blank and is new, gone, or replaced; a block that replaces another counts as many
lines as the longer of the two.
"""

import re
import runpy
import sys
from difflib import SequenceMatcher, unified_diff
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

SWAPS, README = Path(__file__).parent / "swaps", Path(__file__).parents[1] / "adapters" / "README.md"
BEFORE = "dcgan_before.py"
DEPTHS = {"optimizer_after.py": 2, "generator_step_after.py": 3, "whole_step_after.py": 5}
"""Scripts with GAC, and how many lines of `BEFORE` each of them changes."""


def lines(script: str) -> list[str]:
    return (SWAPS / script).read_text(encoding="utf-8").splitlines(keepends=True)


def trained(script: str, steps: int):
    """The networks and the history of a few steps, the same start for every script."""
    torch.manual_seed(3)
    pictures = 2 * torch.rand(20, 3, 32, 32) - 1
    return runpy.run_path(str(SWAPS / script))["train"](pictures, steps, batch=8, width=4)


@pytest.mark.parametrize("script", DEPTHS)
def test_a_swap_changes_at_most_five_lines(script):
    def solid(block):
        return sum(bool(line.strip()) for line in block)

    before, after = lines(BEFORE), lines(script)
    blocks = SequenceMatcher(None, before, after, autojunk=False).get_opcodes()
    changed = sum(max(solid(before[a:b]), solid(after[c:d])) for tag, a, b, c, d in blocks if tag != "equal")
    assert changed == DEPTHS[script]
    assert changed <= 5


@pytest.mark.parametrize("script", DEPTHS)
def test_a_swap_that_keeps_the_arithmetic_keeps_the_numbers(script):
    """Adam without its first moment, and the non-saturating loss, are what the script had before."""
    (*networks, history), (*expected, old_history) = trained(script, steps=4), trained(BEFORE, steps=4)
    *untrained, _ = trained(script, steps=0)
    for network, other, start in zip(networks, expected, untrained, strict=True):
        torch.testing.assert_close(network.state_dict(), other.state_dict(), rtol=1e-5, atol=1e-6)
        for name, parameter in network.named_parameters():
            moved = parameter.detach() - start.get_parameter(name).detach()
            assert float(moved.abs().max()) > 1e-4, f"{name} has not moved"
    for logs, old in zip(history, old_history, strict=True):
        for name in ("loss_d", "loss_g"):
            assert torch.isfinite(logs[name])
            assert not logs[name].requires_grad
            torch.testing.assert_close(logs[name], old[name], rtol=1e-5, atol=0)


@pytest.mark.parametrize("script", [BEFORE, *DEPTHS])
def test_each_script_is_a_program_that_makes_pictures(script, tmp_path, monkeypatch):
    for number, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (5, 40, 40, 3), dtype=np.uint8)):
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    out = tmp_path / "out" / "samples.png"
    out.parent.mkdir()
    monkeypatch.setattr(sys, "argv", [script, str(tmp_path), "--steps", "1", "--out", str(out)])
    runpy.run_path(str(SWAPS / script), run_name="__main__")
    with Image.open(out) as picture:
        assert picture.size == (16 * 32, 32)


def test_the_documentation_shows_exactly_these_diffs():
    shown = re.findall(r"<!-- diff: (\S+) (\S+) -->\n```diff\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert {after: before for before, after, _ in shown} == dict.fromkeys(DEPTHS, BEFORE)
    for before, after, text in shown:
        assert text == "".join(unified_diff(lines(before), lines(after), before, after, n=1))
