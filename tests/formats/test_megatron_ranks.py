"""A folder of Megatron-LM's ranks is one model, whose layers are numbered through.

``fixtures/megatron`` was made by Megatron-Core (fixtures/make_megatron.py); the wholes beside it are put together by
the offsets that Core itself gives.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import pytest
import torch
from command_line import Run
from tables import assert_same

import ckpt_surgeon
from ckpt_surgeon.errors import BrokenFile, NotACheckpoint

MADE = Path(__file__).parents[2] / "fixtures" / "megatron"
FUSED = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}
State = dict[str, torch.Tensor]


def expected(name: str) -> State:
    """The whole model by the keys of Core's local layers; ``sharded_state_dict`` has those of fused ones."""
    state: State = torch.load(MADE / f"{name}.pth")
    for fused, plain in FUSED.items():
        state = {key.replace(fused, plain): tensor for key, tensor in state.items()}
    return state


def tensors(path: Path) -> State:
    loaded = ckpt_surgeon.load(ckpt_surgeon.open(path))
    return {key: value for key, value in loaded.items() if isinstance(value, torch.Tensor)}


def copied(name: str, to: Path) -> Path:
    return Path(shutil.copytree(MADE / name / "iter_0000010", to / "iter_0000010"))


@pytest.mark.parametrize("name", ["gpt", "llama"])
def test_the_ranks_make_up_the_model_that_core_describes(name: str, ckpt: Run, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    assert_same(tensors(MADE / name), expected(name), order=False)
    assert ckpt("drop", MADE / name, out, "*._extra_state").status == 0
    assert_same(ckpt_surgeon.load(out), expected(name), order=False)
    opened = ckpt_surgeon.open(MADE / name)
    assert not opened.part
    assert opened.value("iteration") == 10
    assert opened.value("args.num_layers") == 4
    assert any("rows from 37 on are padding of the vocabulary" in note for note in opened.notes)
    assert any("optimizer's state in the files of the ranks is not joined" in note for note in opened.notes)


def test_the_recipe_of_a_gpt_gives_what_transformers_computes_alike(ckpt: Run, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    recipe, out = MADE.parents[1] / "docs" / "recipes" / "megatron_gpt.toml", tmp_path / "out.safetensors"
    assert ckpt("apply", recipe, MADE / "gpt", out).status == 0
    config = transformers.GPT2Config(
        n_embd=8, n_inner=12, n_layer=4, n_head=4, vocab_size=40, n_positions=6, tie_word_embeddings=False,
        activation_function="gelu", bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config).eval()
    model.load_state_dict(ckpt_surgeon.load(out), strict=True)
    core = torch.load(MADE / "gpt_logits.pth")
    torch.testing.assert_close(model(core["ids"]).logits, core["logits"])


def test_one_ranks_file_says_that_its_folder_is_the_model(ckpt: Run, tmp_path: Path) -> None:
    file = MADE / "llama" / "iter_0000010" / "mp_rank_01_000" / "model_optim_rng.pt"
    ran = ckpt("convert", file, tmp_path / "out.pth")
    assert (ran.status, ran.err.count("\n")) == (2, 1)
    assert f"open the folder, {file.parent.parent}, which joins the files of all ranks" in ran.err


@pytest.mark.parametrize("gone", ["mp_rank_01_001", "mp_rank_00_000"])
def test_a_missing_rank_is_named(gone: str, ckpt: Run, tmp_path: Path) -> None:
    folder = copied("gpt", tmp_path)
    shutil.rmtree(folder / gone)
    ran = ckpt("ls", folder)
    assert (ran.status, ran.err.count("\n")) == (2, 1)
    assert f"has 3 of 4 ranks; missing: '{gone}'" in ran.err


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    path = copied("gpt", tmp_path) / "mp_rank_01_000" / "model_optim_rng.pt"
    path.write_bytes(path.read_bytes()[:-800])
    with pytest.raises(BrokenFile, match="mp_rank_01_000"):
        ckpt_surgeon.open(path.parent.parent)


def test_an_iteration_that_is_not_there_is_named(tmp_path: Path) -> None:
    folder = copied("gpt", tmp_path).parent
    (folder / "latest_checkpointed_iteration.txt").write_text("20\n")
    with pytest.raises(NotACheckpoint, match="names 'iter_0000020', which is not there; name one: 'iter_0000010'"):
        ckpt_surgeon.open(folder)
    (folder / "latest_checkpointed_iteration.txt").write_text("release")
    (folder / "iter_0000010").rename(folder / "release")
    assert_same(tensors(folder), expected("gpt"), order=False)


# -- folders made by the layout


def ranks(folder: Path, parts: dict[str, dict[str, object]], **args: int) -> Path:
    """A folder of ranks, by their names; ``args`` are those of the training."""
    for name, model in parts.items():
        (folder / name).mkdir(parents=True)
        chunks = model if any(key.startswith("model") for key in model) else {"model": model}
        torch.save({**chunks, "args": argparse.Namespace(**args)}, folder / name / "model_optim_rng.pt")
    return folder


def test_the_nested_state_dict_of_before_core_is_joined_by_the_same_rules(tmp_path: Path) -> None:
    qkv, dense = torch.arange(48.0).reshape(12, 4), torch.arange(16.0).reshape(4, 4)

    def part(tensor: int, stage: int) -> dict[str, object]:
        layer = {
            "layers.0.self_attention.query_key_value.weight": qkv[6 * tensor : 6 * tensor + 6].clone() + stage,
            "layers.0.self_attention.dense.weight": dense[:, 2 * tensor : 2 * tensor + 2].clone() + stage,
            "layers.0.self_attention.dense.bias": torch.ones(4) * stage,
        }
        embedding = {"word_embeddings": {"weight": torch.full((3, 4), float(tensor))}}
        return {"language_model": {"encoder": layer, **({} if stage else {"embedding": embedding})}}

    folder = ranks(tmp_path, {f"mp_rank_{t:02d}_{p:03d}": part(t, p) for t in range(2) for p in range(2)})
    found = tensors(folder)
    for stage in range(2):
        prefix = f"language_model.encoder.layers.{stage}.self_attention."
        assert torch.equal(found[f"{prefix}query_key_value.weight"], qkv + stage)
        assert torch.equal(found[f"{prefix}dense.weight"], dense + stage)
        assert torch.equal(found[f"{prefix}dense.bias"], torch.ones(4) * stage)
    words = found["language_model.embedding.word_embeddings.weight"]
    assert torch.equal(words, torch.tensor([0.0] * 3 + [1.0] * 3)[:, None].expand(6, 4))


def test_interleaved_stages_are_put_in_the_order_of_the_layers(tmp_path: Path) -> None:
    def part(stage: int) -> dict[str, object]:
        return {
            f"model{number}": {
                f"decoder.layers.{layer}.mlp.router.weight": torch.tensor([4.0 * number + 2 * stage + layer])
                for layer in range(2)
            }
            for number in range(2)
        }

    found = tensors(ranks(tmp_path, {f"mp_rank_00_{stage:03d}": part(stage) for stage in range(2)}))
    assert [found[f"decoder.layers.{layer}.mlp.router.weight"].item() for layer in range(8)] == list(range(8))


@pytest.mark.parametrize(
    ("one", "two", "words"),
    [
        ({"a.norm.weight": torch.ones(2)}, {"a.norm.weight": torch.zeros(2)}, "not the same in all ranks"),
        ({"a.norm.weight": torch.ones(2)}, {"a.norm.weight": torch.ones(3)}, r"is \[2\] and \[3\] in two ranks"),
        ({"a.linear_fc2.weight": torch.ones(2, 2)}, {"a.linear_fc2.weight": torch.ones(3, 2)}, "does not join"),
        ({"a.weight": torch.ones(2)}, {"b.weight": torch.ones(2)}, "'a.weight' is not in tensor rank 1"),
        ({}, {}, "no rank has a 'model'"),
    ],
)
def test_ranks_that_do_not_fit_are_refused(one: State, two: State, words: str, tmp_path: Path) -> None:
    folder = ranks(tmp_path, {"mp_rank_00": dict(one), "mp_rank_01": dict(two)})
    with pytest.raises(BrokenFile, match=words):
        ckpt_surgeon.open(folder)


def test_views_of_one_storage_are_compared_while_they_are_written(ckpt: Run, tmp_path: Path) -> None:
    for value in (1.0, 2.0):
        folder = tmp_path / str(value)
        parts: dict[str, dict[str, object]] = {}
        for rank in range(2):
            buffer = torch.full((6,), value if rank else 1.0)
            parts[f"mp_rank_{rank:02d}"] = {"a.norm.weight": buffer[:2], "b.norm.weight": buffer[2:]}
        ranks(folder, parts)
        ran = ckpt("convert", folder, tmp_path / f"{value}.pth")
        assert (ran.status == 0) == (value == 1.0), ran.err
    assert "is not the same in all ranks" in ran.err


def test_expert_parallel_ranks_are_named(tmp_path: Path) -> None:
    folder = ranks(tmp_path, {"mp_rank_00_000_000": {}, "mp_rank_00_000_001": {}})
    with pytest.raises(NotACheckpoint, match="expert-parallel ranks"):
        ckpt_surgeon.open(folder)


def test_arguments_that_lie_about_the_ranks_are_refused(tmp_path: Path) -> None:
    folder = ranks(tmp_path, {"mp_rank_00": {"a": torch.ones(1)}}, tensor_model_parallel_size=1 << 40)
    with pytest.raises(BrokenFile, match="do not use it"):
        ckpt_surgeon.open(folder)
