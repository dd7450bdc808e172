"""What a proof by running makes of other layouts, long tables, rotary embeddings and other heads: equal outputs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
import transformers
from command_line import Run
from torch import nn

import ckpt_surgeon
from ckpt_surgeon.models.align import Alignment, align
from ckpt_surgeon.models.align_recipe import alignment_recipe
from ckpt_surgeon.models.execution import EPS, pairs_by_running

Make = Callable[[], nn.Module]

WORDS, LONG, WIDTH, LAYERS, HEADS = 50, 16, 24, 2, 3


class Block(nn.Module):
    """A block of GPT-2 with Linear layers, query, key and value in one or in three."""

    def __init__(self, *, fused: bool) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        if fused:
            self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        else:
            self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.out = nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.ln_1(x)
        three = self.qkv(y).chunk(3, -1) if hasattr(self, "qkv") else (self.q(y), self.k(y), self.v(y))
        q, k, v = (one.view(*x.shape[:2], HEADS, -1).transpose(1, 2) for one in three)
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(x.shape))
        made = x + self.down(nn.functional.gelu(self.up(self.ln_2(x)), approximate="tanh"))
        assert isinstance(made, torch.Tensor)
        return made


class Gpt(nn.Module):
    def __init__(self, *, fused: bool) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(WORDS, WIDTH), nn.Embedding(LONG, WIDTH)
        self.blocks = nn.ModuleList(Block(fused=fused) for _ in range(LAYERS))
        self.ln_f = nn.LayerNorm(WIDTH)
        self.lm_head = nn.Linear(WIDTH, WORDS, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        x = self.wte(words) + self.wpe(torch.arange(words.shape[1])[None])
        for block in self.blocks:
            x = block(x)
        made = self.lm_head(self.ln_f(x))
        assert isinstance(made, torch.Tensor)
        return made


def hf_gpt2() -> nn.Module:
    made = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=WORDS, n_positions=LONG, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS,
            bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip
    assert isinstance(made, nn.Module)
    return made


class Scaled(nn.Module):
    """Meta's RMSNorm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), 1e-6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))


class MetaAttention(nn.Module):
    """Meta's attention: the rotary embedding turns neighbours in a head, which Hugging Face's keeps in two halves."""

    def __init__(self, width: int, heads: int, key_heads: int) -> None:
        super().__init__()
        self.head_dim = width // heads
        self.n_heads, self.n_kv_heads = heads, key_heads
        self.wq, self.wo = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.wk = nn.Linear(width, key_heads * self.head_dim, bias=False)
        self.wv = nn.Linear(width, key_heads * self.head_dim, bias=False)

    def forward(self, x: torch.Tensor, freqs_cis: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            part(x).view(*x.shape[:2], -1, self.head_dim).transpose(1, 2) for part in (self.wq, self.wk, self.wv)
        )
        q, k = (self.turned(one, freqs_cis) for one in (q, k))
        k, v = (one.repeat_interleave(self.n_heads // self.n_kv_heads, 1) for one in (k, v))
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        made = self.wo(y.transpose(1, 2).reshape(x.shape))
        assert isinstance(made, torch.Tensor)
        return made

    def turned(self, x: torch.Tensor, freqs_cis: torch.Tensor) -> torch.Tensor:
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * freqs_cis).flatten(-2)


class MetaBlock(nn.Module):
    def __init__(self, width: int, heads: int, key_heads: int) -> None:
        super().__init__()
        self.attention = MetaAttention(width, heads, key_heads)
        self.attention_norm, self.ffn_norm = Scaled(width), Scaled(width)
        self.w1, self.w3 = nn.Linear(width, 48, bias=False), nn.Linear(width, 48, bias=False)
        self.w2 = nn.Linear(48, width, bias=False)

    def forward(self, x: torch.Tensor, freqs_cis: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.attention_norm(x), freqs_cis)
        y = self.ffn_norm(x)
        made = x + self.w2(nn.functional.silu(self.w1(y)) * self.w3(y))
        assert isinstance(made, torch.Tensor)
        return made


class Meta(nn.Module):
    def __init__(self, heads: int = 4, key_heads: int = 2) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(WORDS, 32)
        self.layers = nn.ModuleList(MetaBlock(32, heads, key_heads) for _ in range(LAYERS))
        self.norm, self.output = Scaled(32), nn.Linear(32, WORDS, bias=False)
        self.rope_theta, self.head_dim = 10000.0, 32 // heads

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        powers = torch.arange(0, self.head_dim, 2).float() / self.head_dim
        speeds = (1.0 / (self.rope_theta**powers)).double()
        angles = torch.outer(torch.arange(words.shape[1]).double(), speeds)
        x = self.tok_embeddings(words)
        for layer in self.layers:
            x = layer(x, torch.polar(torch.ones_like(angles), angles))
        made = self.output(self.norm(x))
        assert isinstance(made, torch.Tensor)
        return made


def hf_llama() -> nn.Module:
    made = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=WORDS, hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=4,
            num_key_value_heads=2, bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip
    assert isinstance(made, nn.Module)
    return made


def randomised(model: nn.Module) -> nn.Module:
    torch.manual_seed(7)
    for value in model.state_dict().values():
        if value.is_floating_point():
            value.copy_(torch.randn_like(value) * 0.2)
    return model


def answer(model: nn.Module, words: torch.Tensor) -> torch.Tensor:
    """A model's logits in float64, with the eps at which pairs are found."""
    model = model.double().eval()
    for module in model.modules():
        for name in ("eps", "variance_epsilon"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, EPS)
    with torch.no_grad():
        made = model(words)
    found = getattr(made, "logits", made)
    assert isinstance(found, torch.Tensor)
    return found


def assert_the_written_file_answers_alike(source: nn.Module, target: nn.Module, folder: Path) -> tuple[Alignment, str]:
    """Align by running, write what the recipe makes, load it strictly, and run both models."""
    randomised(source)
    file, out = folder / "source.pth", folder / "target.pth"
    torch.save(source.state_dict(), file)
    found = align(file, target, source_model=source, target_model=target)
    recipe = alignment_recipe(found, ckpt_surgeon.open(file))
    ckpt_surgeon.save(recipe.apply(ckpt_surgeon.open(file)), out)
    assert not found.missing
    assert not found.ambiguous
    target.load_state_dict(torch.load(out, weights_only=True), strict=True)
    words = torch.randint(0, WORDS, (2, 7), generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(answer(target, words), answer(source, words), rtol=1e-5, atol=1e-6)
    return found, recipe.dumps()


@pytest.mark.parametrize("backwards", [False, True], ids=["to Linear", "to Conv1D"])
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "apart"])
def test_matrices_that_one_side_stores_transposed_become_steps(fused: bool, backwards: bool, tmp_path: Path) -> None:
    makes: list[Make] = [hf_gpt2, lambda: Gpt(fused=fused)]
    source, target = (make() for make in (makes[::-1] if backwards else makes))
    found, recipe = assert_the_written_file_answers_alike(source, target, tmp_path)
    assert {one.certainty for one in found.proposals} == {"proven"}
    assert "do = 'transpose'" in recipe
    assert ("do = 'split'" in recipe) == (not fused and not backwards)
    assert ("do = 'concat'" in recipe) == (not fused and backwards)


def test_every_row_of_a_table_of_positions_is_reached_by_a_longer_input() -> None:
    found = pairs_by_running(hf_gpt2(), Gpt(fused=True))
    assert found.example == (1, LONG)
    [table] = [pair for pair in found.pairs if pair.new == "wpe.weight"]
    assert (table.reached, table.rows, table.is_whole) == (LONG, LONG, True)


class Longest(Gpt):
    """Takes no more than nine words, whatever its table has."""

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        assert words.shape[1] <= 9
        return super().forward(words)


def test_rows_that_no_input_reaches_are_certain_and_not_proven() -> None:
    source, target = Longest(fused=True), Longest(fused=True)
    found = align(source, target, source_model=source, target_model=target)
    [table] = [one for one in found.proposals if one.new == "wpe.weight"]
    assert table.certainty == "certain"
    assert table.reason.startswith("9 of 16 rows are proven")


def test_a_table_that_is_shorter_than_the_target_s_stays_open() -> None:
    target = Gpt(fused=True)
    target.wpe = nn.Embedding(LONG + 4, WIDTH)
    found = pairs_by_running(Gpt(fused=True), target)
    assert "wpe.weight" in found.unproven


@pytest.mark.parametrize("backwards", [False, True], ids=["to Hugging Face", "to Meta"])
def test_rows_of_queries_and_keys_are_put_in_the_other_order_of_rotary_embeddings(
    backwards: bool, tmp_path: Path
) -> None:
    makes: list[Make] = [Meta, hf_llama]
    source, target = (make() for make in (makes[::-1] if backwards else makes))
    found, recipe = assert_the_written_file_answers_alike(source, target, tmp_path)
    assert {one.certainty for one in found.proposals} == {"proven"}
    turned = {one.new.split(".")[-2] for one in found.proposals if one.permute is not None}
    assert turned == ({"wq", "wk"} if backwards else {"q_proj", "k_proj"})
    assert recipe.count("do = 'transpose'") == 2  # as many as there are shapes, not layers


class Interleaved(nn.Module):
    """Attention whose fused rows hold query, key and value of each head side by side (GPT-NeoX, BLOOM)."""

    def __init__(self, *, fused: bool) -> None:
        super().__init__()
        self.num_heads = HEADS
        if fused:
            self.query_key_value = nn.Linear(WIDTH, 3 * WIDTH)
        else:
            self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.dense = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if hasattr(self, "query_key_value"):
            q, k, v = self.query_key_value(x).view(len(x), HEADS, 3, -1).permute(2, 1, 0, 3)
        else:
            q, k, v = (part(x).view(len(x), HEADS, -1).transpose(0, 1) for part in (self.q, self.k, self.v))
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        made = self.dense(y.transpose(0, 1).reshape(x.shape))
        assert isinstance(made, torch.Tensor)
        return made


@pytest.mark.parametrize("backwards", [False, True], ids=["taken apart", "joined"])
def test_heads_that_are_interleaved_become_groups(backwards: bool) -> None:
    source, target = randomised(Interleaved(fused=not backwards)), Interleaved(fused=backwards)
    found = align(source, target, source_model=source, target_model=target)
    recipe = alignment_recipe(found, source.state_dict())
    assert f"groups = {HEADS}" in recipe.dumps()
    target.load_state_dict(recipe.apply(source.state_dict()), strict=True)
    x = torch.randn(5, WIDTH, dtype=torch.float64)
    torch.testing.assert_close(target.double()(x), source.double()(x))


# Different heads


def bert(name: str) -> nn.Module:
    made = getattr(transformers, name)(
        transformers.BertConfig(
            vocab_size=WORDS, hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
            intermediate_size=48, max_position_embeddings=LONG, num_labels=4,
        )
    )  # fmt: skip
    assert isinstance(made, nn.Module)
    return made


@pytest.mark.parametrize(
    ("source", "target", "head"),
    [
        ("BertForMaskedLM", "BertForSequenceClassification", {"pooler", "classifier"}),
        ("BertForSequenceClassification", "BertForMaskedLM", {"cls"}),
        ("BertForMaskedLM", "BertModel", {"pooler"}),
        ("BertForNextSentencePrediction", "BertForTokenClassification", {"classifier"}),
    ],
)
def test_the_trunk_is_proven_where_heads_differ_and_the_head_stays_open(
    source: str, target: str, head: set[str]
) -> None:
    ours, theirs = bert(source), bert(target)
    found = pairs_by_running(ours, theirs)
    assert found.cut is not None
    assert "computed the same up to" in found.reason
    open_keys = {key for key in found.unproven if "token_type" not in key}
    assert {key.removeprefix("bert.").split(".")[0] for key in open_keys} == head
    for pair in found.pairs:
        if not pair.new.endswith("decoder.weight"):  # tied to the words
            assert pair.olds[0].removeprefix("bert.") == pair.new.removeprefix("bert.")


def test_a_head_of_another_size_stays_open_and_the_alignment_says_so() -> None:
    source, target = (timm.create_model("resnet10t", num_classes=count) for count in (10, 5))
    found = align(source, target, source_model=source, target_model=target)
    proven = {one.new for one in found.proposals if one.certainty == "proven"}
    wanted = {key for key, value in target.state_dict().items() if value.is_floating_point()}
    assert wanted - proven == {"fc.weight", "fc.bias"}
    assert any("the same up to fc" in note for note in found.notes)


class Tail(nn.Module):
    """Two equal layers side by side, of which the second counts double, then a head."""

    def __init__(self, outputs: int, *, crossed: bool = False) -> None:
        super().__init__()
        self.a, self.b, self.norm = nn.Linear(4, 4), nn.Linear(4, 4), nn.LayerNorm(4)
        self.head = nn.Linear(4, outputs)
        self.crossed = crossed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b = (self.b(x), self.a(x)) if self.crossed else (self.a(x), self.b(x))
        made = self.head(self.norm(a.relu() + 2 * b))
        assert isinstance(made, torch.Tensor)
        return made


def test_a_cut_proves_which_of_two_equal_layers_is_which() -> None:
    found = pairs_by_running(Tail(3), Tail(7, crossed=True))
    names = {pair.new: pair.olds[0] for pair in found.pairs}
    assert names["a.weight"] == "b.weight"
    assert names["b.weight"] == "a.weight"
    assert set(found.unproven) == {"head.weight", "head.bias"}


def test_nothing_behind_the_first_difference_is_proven() -> None:
    class Other(Tail):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            made = self.head(self.norm(self.a(x).sigmoid() + 2 * self.b(x)))
            assert isinstance(made, torch.Tensor)
            return made

    assert not pairs_by_running(Tail(3), Other(7)).pairs


def test_the_command_writes_transposes_into_the_recipe(tmp_path: Path, ckpt: Run) -> None:
    (tmp_path / "nets.py").write_text(NETS)
    nets, file, recipe, out = (tmp_path / name for name in ("nets.py", "net.pth", "recipe.toml", "out.pth"))
    torch.save({"weight": torch.arange(12.0).view(3, 4), "bias": torch.zeros(4), "end.weight": torch.ones(2, 4)}, file)
    ran = ckpt("align", file, f"{nets}:Target()", "--source", f"{nets}:Source()", "-o", recipe)
    assert (ran.status, ran.err) == (0, ""), ran.out
    assert "transposed; both models gave the same output" in ran.out
    assert ckpt("apply", recipe, file, out).status == 0
    made = torch.load(out, weights_only=True)
    assert torch.equal(made["first.weight"], torch.arange(12.0).view(3, 4).t())


NETS = """
import torch
from torch import nn

class Source(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(3, 4)), nn.Parameter(torch.ones(4))
        self.end = nn.Linear(4, 2, bias=False)
    def forward(self, x):
        return self.end(torch.addmm(self.bias, x, self.weight).relu())

class Target(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2, bias=False)
    def forward(self, x):
        return self.last(self.first(x).relu())
"""
