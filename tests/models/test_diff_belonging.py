"""What ``diff`` says of tensors that belong together: ties, LoRA, codes."""

from pathlib import Path

import pytest
import torch
from command_line import Run

import ckpt_surgeon


class Tied(torch.nn.Module):
    """A small language model whose head is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(7, 4)
        self.lm_head = torch.nn.Linear(4, 7, bias=False)
        self.lm_head.weight = self.embed.weight


def test_a_name_that_the_model_ties_to_a_key_that_is_there_is_no_difference() -> None:
    state = Tied().state_dict()
    found = ckpt_surgeon.diff({"embed.weight": state["embed.weight"]}, Tied())
    assert found.loadable
    assert found.missing == ()
    assert found.tied == (("lm_head.weight", "embed.weight"),)
    assert found.share == 1.0
    with pytest.raises(RuntimeError, match=r"lm_head\.weight"):
        Tied().load_state_dict({"embed.weight": state["embed.weight"]})


def test_load_into_and_fit_fill_what_diff_counts_as_tied(tmp_path: Path) -> None:
    state = {"embed.weight": torch.ones(7, 4)}
    model = Tied()
    ckpt_surgeon.load_into(model, state)
    assert model.lm_head.weight is model.embed.weight
    assert torch.equal(model.lm_head.weight, torch.ones(7, 4))
    Tied().load_state_dict(ckpt_surgeon.load(ckpt_surgeon.fit(state, Tied()).result), strict=True)


def test_both_names_missing_are_a_difference() -> None:
    found = ckpt_surgeon.diff({"other": torch.ones(2)}, Tied())
    assert found.missing == ("embed.weight", "lm_head.weight")
    assert not found.loadable


def test_a_folder_of_the_hub_is_loadable_into_its_own_tied_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ckpt: Run
) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=16, n_positions=8)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "hub")
    code = "import transformers as t\n\ndef make():\n"
    code += f"    return t.GPT2LMHeadModel(t.GPT2Config(**{config.to_diff_dict()}))\n"
    (tmp_path / "own_model.py").write_text(code)
    told = ckpt("diff", tmp_path / "hub", f"{tmp_path / 'own_model.py'}:make")
    assert told.status == 0, told.out
    assert "lm_head.weight from transformer.wte.weight" in told.out
    assert "load_state_dict alone asks for them" in told.out


def test_an_unmerged_lora_is_said_to_stay_out(tmp_path: Path, ckpt: Run) -> None:
    state = {"q.base_layer.weight": torch.ones(8, 8), "k.weight": torch.ones(8, 8)}
    state |= {"q.lora_A.default.weight": torch.ones(2, 8), "q.lora_B.default.weight": torch.ones(8, 2)}
    torch.save(state, tmp_path / "peft.pth")
    torch.save({"q.weight": torch.ones(8, 8), "k.weight": torch.ones(8, 8)}, tmp_path / "plain.pth")
    told = ckpt("diff", tmp_path / "peft.pth", tmp_path / "plain.pth")
    assert told.status == 1
    assert "2 LoRA tensors stay out" in told.out


def test_codes_in_the_place_of_weights_are_named() -> None:
    state = {"weight": torch.ones(4, 4).to(torch.float8_e4m3fn), "weight_scale": torch.ones(4, 1)}
    found = ckpt_surgeon.diff(state, torch.nn.Linear(4, 4, bias=False))
    assert not found.loadable
    assert any("float8 codes" in note and "dequantize" in note for note in found.notes)


def test_fit_takes_codes_as_numbers_where_that_is_asked_for(tmp_path: Path, ckpt: Run) -> None:
    codes = {"weight": torch.ones(4, 4).to(torch.float8_e4m3fn), "weight_scale": torch.ones(4, 1)}
    torch.save(codes, tmp_path / "codes.pth")
    target = "torch.nn:Linear(4, 4, bias=False)"
    refused = ckpt("fit", tmp_path / "codes.pth", target, tmp_path / "o.pth")
    assert refused.status == 2
    assert "--allow-codes" in refused.err
    assert ckpt("fit", tmp_path / "codes.pth", target, tmp_path / "o.pth", "--allow-codes").status == 0
