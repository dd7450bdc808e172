"""After the load: freezing, groups and initialisation, on torchvision's models, trained for some steps."""

from __future__ import annotations

import copy
import io
import json
import math
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
import torchvision
from command_line import Run
from networks import CONVOLUTIONS, FCN32s, Regrouped
from torch import nn

import ckpt_surgeon
from ckpt_surgeon import (
    CheckpointError,
    EditError,
    FrozenChanged,
    NothingMatched,
    ParamGroups,
    RecipeError,
    Rule,
    Rules,
    TargetError,
    freeze,
    from_torch,
    initialize,
    load_into,
    param_groups,
    snapshot,
    trainable,
    unfreeze,
    verify_frozen,
)
from ckpt_surgeon.models.modules import meta_twin
from ckpt_surgeon.training.selectors import Selectors


def small_net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 2))


def resnet18(classes: int = 10) -> nn.Module:
    torch.manual_seed(0)
    made: nn.Module = torchvision.models.resnet18(num_classes=classes)
    return made


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, *, steps: int = 2, size: Iterable[int] = (3, 32, 32)
) -> list[float]:
    """Some steps on random data towards random classes; the losses."""
    torch.manual_seed(1)
    inputs = torch.randn(4, *size)
    model.train()
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        outputs = model(inputs)
        labels = torch.arange(4) % outputs.shape[1]
        labels = labels.view(4, *[1] * (outputs.dim() - 2)).expand(4, *outputs.shape[2:])
        loss = nn.functional.cross_entropy(outputs, labels)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.detach().clone() for key, value in model.state_dict().items()}


def moved(model: nn.Module, before: dict[str, torch.Tensor]) -> set[str]:
    return {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}


def statistics(model: nn.Module) -> set[str]:
    return {key for key, _ in model.named_buffers()}


# Scenario F: everything frozen, another head


def test_only_the_new_head_is_trained_and_not_a_bit_of_the_rest_moves() -> None:
    model = resnet18()
    report = freeze(model, except_="fc.*", norm="eval")
    assert report.trainable == ("fc.weight", "fc.bias")
    before, seal = values(model), snapshot(model)
    optimizer = torch.optim.SGD(param_groups(model, lr=0.1), momentum=0.9, weight_decay=0.1)
    assert [len(group["params"]) for group in optimizer.param_groups] == [2]
    losses = train(model, optimizer)
    assert losses[0] != losses[1]
    assert moved(model, before) == {"fc.weight", "fc.bias"}
    assert set(verify_frozen(model, seal)) == before.keys() - {"fc.weight", "fc.bias"}


def test_with_norm_train_the_statistics_move_and_the_parameters_do_not() -> None:
    model = resnet18()
    freeze(model, except_="fc.*", norm="train")
    before, seal = values(model), snapshot(model)
    train(model, torch.optim.SGD(param_groups(model, lr=0.1)))
    assert moved(model, before) == {"fc.weight", "fc.bias"} | statistics(model)
    assert not statistics(model) & set(verify_frozen(model, seal))


def test_a_frozen_part_with_batch_norm_asks_for_the_choice_and_changes_nothing() -> None:
    model = resnet18()
    with pytest.raises(EditError, match=r"20 layers: 'bn1', .* norm='eval' .* norm='train'"):
        freeze(model, except_="fc.*")
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(module.training for module in model.modules())
    with pytest.raises(EditError, match="norm='evl' is none of 'eval', 'train'"):
        freeze(model, norm="evl")


def test_what_was_frozen_by_hand_is_caught_by_the_proof() -> None:
    model = resnet18()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("fc."))
    seal = snapshot(model)
    train(model, torch.optim.SGD([one for one in model.parameters() if one.requires_grad], lr=0.1))
    with pytest.raises(FrozenChanged, match="norm='eval'") as raised:
        verify_frozen(model, seal)
    assert set(raised.value.keys) == statistics(model)
    assert "move, though frozen" in str(trainable(model))


def test_a_frozen_parameter_that_moves_is_named() -> None:
    model = small_net()
    freeze(model, "0.*")
    seal = snapshot(model)
    with torch.no_grad():
        model.get_parameter("0.bias").add_(1)
    with pytest.raises(FrozenChanged, match=r"^'0\.bias' changed though frozen$"):
        verify_frozen(model, seal)
    with pytest.raises(EditError, match="no parameter of the model is frozen"):
        verify_frozen(nn.Linear(1, 1), seal)
    other = nn.Linear(1, 1)
    freeze(other)
    with pytest.raises(EditError, match="of another model"):
        verify_frozen(other, seal)


def test_freezing_in_the_middle_of_a_training_stops_momentum_and_decay() -> None:
    model = small_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    train(model, optimizer, size=(4,))
    freeze(model, "0.*")
    seal = snapshot(model)
    train(model, optimizer, size=(4,))
    assert verify_frozen(model, seal) == ("0.weight", "0.bias")


# Scenario G: by name, or by class


def test_layers_are_frozen_by_name() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    assert freeze(model, ["0.weight", "2.weight"]).trainable == ("0.bias", "2.bias")


def test_a_class_used_as_a_name_is_recognised() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    with pytest.raises(NothingMatched, match=r"'Linear' is a class.*'class:Linear' \(2 modules are of it\)"):
        freeze(model, "Linear")
    assert freeze(model, "class:Linear").trainable == ()


@pytest.mark.parametrize(
    ("selector", "said"),
    [
        ("layer1", "'layer1' is a module: select it with 'module:layer1' or 'layer1.*'"),
        ("bn", "'*bn*' would match 34 keys"),
        ("norm", "for the role, write 'role:norm'"),
        ("fc.wieght", "near it: 'fc.weight'"),
        ("class:Liner", "near it: 'Linear'"),
        ("class:ReLU", "have no parameters"),
        ("module:layr1", "near it: 'layer1'"),
        ("module:relu", "there is no parameter in it"),
        ("module:stem", "the modules are 'conv1', 'bn1'"),
        ("klass:Linear", "is no selector: before the colon stands one of class, module, role"),
        ("role:hat", "the roles are bias, norm, head, backbone"),
        (nn.Conv3d, "the classes are 'ResNet', 'Conv2d'"),
        (nn.ReLU, "have no parameters"),
        (nn.Linear(1, 1), "it is no part of this model"),
        ([], "nothing is chosen"),
        ("*.running_mean", "are buffers"),
    ],
)
def test_what_chooses_nothing_says_what_would(selector: Selectors, said: str) -> None:
    model = meta_twin(resnet18())
    with pytest.raises(CheckpointError) as raised:
        freeze(model, selector, norm="eval")
    assert said in str(raised.value)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_every_selector_that_chooses_nothing_is_named_at_once() -> None:
    with pytest.raises(NothingMatched) as raised:
        freeze(small_net(), ["1.*", "nothing", "class:Conv2d"], norm="eval")
    assert raised.value.patterns == ("nothing", "class:Conv2d")


# Scenario H: every BatchNorm of a regrouped network


def test_by_class_every_batch_norm_is_frozen_and_by_name_two_kinds_are_missed() -> None:
    model = meta_twin(Regrouped())
    norms = {name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    assert len(norms) == 53
    by_name = freeze(copy.deepcopy(model), "*bn*", norm="eval")
    assert {key.rpartition(".")[0] for key in by_name.frozen} < norms
    for selector in (nn.BatchNorm2d, "class:BatchNorm2d", "class:BatchNorm*", "role:norm"):
        twin = copy.deepcopy(model)
        found = freeze(twin, selector, norm="eval")
        assert {key.rpartition(".")[0] for key in found.frozen} == norms
        assert {module.path for module in found.modules if module.norm == "eval"} == norms
        assert "53 stay (eval)" in str(found)
        twin.train()
        assert {name for name, module in twin.named_modules() if not module.training} == norms


class RegroupedNet(Regrouped):
    """The regrouped ResNet-50 with its forward pass."""

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        found = self.convnet_4(self.convnet_3(self.convnet_2(self.convnet_1(pictures))))
        made: torch.Tensor = self.fc(found.flatten(1))
        return made


def test_a_regrouped_resnet_50_trains_and_of_its_batch_norms_not_a_bit_moves() -> None:
    torch.manual_seed(0)
    model = RegroupedNet()
    freeze(model, nn.BatchNorm2d, norm="eval")
    norms = {name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    before, seal = values(model), snapshot(model)
    losses = train(model, torch.optim.SGD(param_groups(model, lr=0.01), momentum=0.9))
    assert losses[0] != losses[1]
    assert moved(model, before) == {key for key in before if key.rpartition(".")[0] not in norms}
    assert len(verify_frozen(model, seal)) == 53 * 5


# norm="eval" outlives everything that sets modes


@pytest.mark.parametrize("carry", [copy.deepcopy, lambda model: pickled(model)], ids=["deep copy", "pickle"])
def test_frozen_statistics_stay_in_a_copy_of_the_model(carry: Callable[[nn.Module], nn.Module]) -> None:
    model = small_net()
    freeze(model, "module:1", norm="eval")
    twin = carry(model)
    twin.train()
    before = values(twin)
    twin(torch.randn(8, 4))
    assert moved(twin, before) == set()
    unfreeze(twin)
    twin(torch.randn(8, 4))
    assert moved(twin, before) == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    assert not model.train()[1].training  # the original keeps its choice


def pickled(model: nn.Module) -> nn.Module:
    out = io.BytesIO()
    torch.save(model, out)
    out.seek(0)
    made: nn.Module = torch.load(out, weights_only=False)
    return made


def test_unfreezing_gives_a_layer_the_mode_of_its_model() -> None:
    model = small_net().eval()
    freeze(model, "module:1", norm="eval")
    unfreeze(model, "module:1")
    assert not model[1].training
    assert model.train()[1].training
    assert "train" not in vars(model[1])


def test_the_choice_can_be_changed() -> None:
    model = small_net()
    freeze(model, norm="eval")
    assert freeze(model, norm="train").modules[1].norm == "train"
    assert model.train()[1].training
    freeze(model, "0.*")  # no statistics among them: no choice is needed
    assert freeze(model, "module:1").modules[1].norm == "train"  # it was made before


def test_a_norm_layer_without_parameters_belongs_to_what_is_frozen_around_it() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, affine=False), nn.Linear(3, 2))
    with pytest.raises(EditError, match="running statistics"):
        freeze(model, except_="2.*")
    freeze(model, except_="2.*", norm="eval")
    assert not model.train()[1].training
    assert "1.running_mean" in verify_frozen(model, snapshot(model))


def test_layers_without_running_statistics_need_no_choice() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 1), nn.GroupNorm(2, 4), nn.InstanceNorm2d(4, affine=True))
    assert freeze(model).trainable == ()


def test_other_buffers_of_frozen_modules_are_proven_too() -> None:
    model = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(40, 30)), nn.Linear(30, 2))
    freeze(model, "module:0")
    seal = snapshot(model)
    train(model, torch.optim.SGD(param_groups(model, lr=0.1)), size=(40,))
    with pytest.raises(FrozenChanged, match="_u"):  # power iteration goes on in training
        verify_frozen(model, seal)


def test_a_tied_parameter_is_frozen_under_all_its_names_or_not_at_all() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(5, 3), "head": nn.Linear(3, 5, bias=False)})
    model["head"].weight = model["embed"].weight
    assert freeze(model, "embed.weight").frozen == ("embed.weight", "head.weight")
    assert trainable(model).numel == 15
    with pytest.raises(EditError, match=r"'embed\.weight' and 'head\.weight' are one parameter"):
        freeze(model, except_="head.*")


# wrapped, compiled, Lightning


def compiled(model: nn.Module) -> nn.Module:
    made = torch.compile(model, backend="eager")
    assert isinstance(made, nn.Module)
    return made


def test_wrapped_and_compiled_models_are_frozen_inside() -> None:
    for wrap in (nn.DataParallel, compiled):
        model = small_net()
        wrapped = wrap(model)
        found = freeze(wrapped, except_="3.*", norm="eval")
        assert found.trainable == ("3.weight", "3.bias")
        seal, before = snapshot(wrapped), values(model)
        with warnings.catch_warnings(action="ignore"):
            losses = train(wrapped, torch.optim.SGD(param_groups(wrapped, lr=0.1)), size=(4,))
        assert losses[0] != losses[1]
        assert moved(model, before) == {"3.weight", "3.bias"}
        assert verify_frozen(wrapped, seal)
        unfreeze(wrapped)
        with warnings.catch_warnings(action="ignore"):
            train(wrapped, torch.optim.SGD(param_groups(wrapped, lr=0.1)), size=(4,))
        assert "1.running_mean" in moved(model, before)


class LightningStyle(nn.Module):
    """What a LightningModule looks like: a net inside, hooks, its own optimizers."""

    def __init__(self) -> None:
        super().__init__()
        self.net = small_net()
        self.loss = nn.CrossEntropyLoss()

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.net(inputs)
        return made

    def configure_optimizers(self) -> tuple[list[torch.optim.Optimizer], list[object]]:
        optimizer = torch.optim.AdamW(param_groups(self, {"head": "net.3.*"}, lr=0.01))
        return [optimizer], [torch.optim.lr_scheduler.MultiStepLR(optimizer, [1], gamma=0.1)]


def test_a_lightning_style_module_trains_through_epochs_that_call_train_and_eval() -> None:
    model = LightningStyle()
    freeze(model, ["net.0.*", "module:net.1"], norm="eval")
    (optimizer,), (scheduler,) = model.configure_optimizers()
    seal = snapshot(model)
    for _ in range(2):
        train(model, optimizer, size=(4,))
        scheduler.step()  # type: ignore[attr-defined]
        model.eval()
    assert len(verify_frozen(model, seal)) == 7
    assert [(group["name"], group["lr"]) for group in optimizer.param_groups] == [("head", pytest.approx(0.001))]


# Scenario I: learning rates by group


def test_the_head_learns_ten_times_as_fast_and_milestones_drop_both() -> None:
    model = resnet18()
    groups = param_groups(model, [Rule("head", "role:head", lr="10x")], lr=0.01, weight_decay=1e-4)
    assert [(one.name, one.lr, len(one.keys)) for one in groups.summary] == [("rest", 0.01, 60), ("head", 0.1, 2)]
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=[1, 2], gamma=0.1)
    rates = []
    for _ in range(3):
        train(model, optimizer, steps=1)
        rates.append({group["name"]: group["lr"] for group in optimizer.param_groups})
        scheduler.step()
    assert rates == [
        {"rest": pytest.approx(0.01 * 0.1**epoch), "head": pytest.approx(0.1 * 0.1**epoch)} for epoch in range(3)
    ]
    assert [group["name"] for group in optimizer.state_dict()["param_groups"]] == ["rest", "head"]


class Fcn(FCN32s):
    """FCN32s with its forward pass, cropped as the paper does."""

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        found, parts = pictures, dict(self.named_children())
        for name in CONVOLUTIONS.values():
            if name.endswith("_1") and name != "1_1":
                found = nn.functional.max_pool2d(found, 2)
            found = parts[f"conv{name}"](found).relu()
        found = nn.functional.pad(nn.functional.max_pool2d(found, 2), [3] * 4)
        made: torch.Tensor = self.upscore(self.score_fr(self.fc7(self.fc6(found).relu()).relu()))
        return made[..., 16 : 16 + pictures.shape[2], 16 : 16 + pictures.shape[3]]


def test_fcn32s_on_vgg_16_trains_weights_and_biases_at_their_rates_and_its_upsampling_not_at_all() -> None:
    torch.manual_seed(0)
    model, vgg = Fcn(), torchvision.models.vgg16()
    report = load_into(model, from_torch(vgg.state_dict()), allow_missing=["score_fr.*", "upscore.*"])
    assert initialize(model, "score_fr.*", "zeros").keys == ("score_fr.weight", "score_fr.bias")
    assert initialize(model, "upscore.weight", "bilinear").how == {"upscore.weight": "bilinear"}
    assert set(report.initialized) == {"score_fr.weight", "score_fr.bias", "upscore.weight"}
    freeze(model, "module:upscore")
    rules = [Rule("biases", "role:bias", lr="2x", weight_decay=0)]
    groups = param_groups(model, rules, lr=1e-3, weight_decay=5e-4, only=[nn.Conv2d, nn.ConvTranspose2d])
    assert [(one.name, one.lr, one.weight_decay, len(one.keys)) for one in groups.summary] == [
        ("rest", 1e-3, 5e-4, 16),
        ("biases", 2e-3, 0, 16),
    ]
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=[1], gamma=0.1)
    before, seal = values(model), snapshot(model)
    losses = train(model, optimizer, size=(3, 32, 32))
    scheduler.step()
    assert losses[0] != losses[1]
    assert verify_frozen(model, seal) == ("upscore.weight",)
    assert moved(model, before) == before.keys() - {"upscore.weight"}
    assert [group["lr"] for group in optimizer.param_groups] == [pytest.approx(1e-4), pytest.approx(2e-4)]
    model.add_module("extra", nn.Linear(1, 1))
    with pytest.raises(EditError, match="'extra': class Linear is not expected"):
        param_groups(model, rules, lr=1e-3, weight_decay=5e-4, only=[nn.Conv2d, nn.ConvTranspose2d])


def test_every_trainable_parameter_is_in_exactly_one_group_whatever_the_rules() -> None:
    model = resnet18()
    freeze(model, "layer1.*", norm="train")
    rules = [Rule("head", "module:fc", lr="10x"), Rule("plain", ["role:bias", "role:norm"], weight_decay=0)]
    for overlap in ("first", "last", "combine"):
        groups = param_groups(model, rules, lr=0.1, weight_decay=1e-4, on_overlap=overlap)
        held = [id(one) for group in groups for one in group["params"]]  # type: ignore[attr-defined]
        wanted = [id(one) for one in model.parameters() if one.requires_grad]
        assert sorted(held) == sorted(wanted)
        assert len(groups.frozen) == 12
    combined = {one.name: (one.lr, one.weight_decay, one.keys) for one in groups.summary}
    assert combined["head+plain"] == (1.0, 0, ("fc.bias",))
    assert combined["head"] == (1.0, 1e-4, ("fc.weight",))


def test_an_overlap_without_an_order_is_an_error_that_names_both_rules() -> None:
    with pytest.raises(EditError, match=r"'3\.bias': caught by 'head' and 'bias'; .*on_overlap='first'"):
        param_groups(small_net(), {"head": "3.*", "bias": "role:bias"}, lr=0.1)


@pytest.mark.parametrize(
    ("rules", "arguments", "said"),
    [
        ([Rule("a", "nothing.*")], {}, "rule 'a: nothing.*' matches no key"),
        ([Rule("a", "Linear")], {}, "is a class"),
        ([Rule("a", "0.*")], {}, "rule 'a' catches only frozen parameters"),
        ([Rule("a", "1.running_mean")], {}, "rule 'a' catches no parameter"),
        ([Rule("a", "3.*"), Rule("a", "1.*")], {}, "two rules are called 'a'"),
        ([Rule("rest", "3.*")], {}, "'rest', which is the name of what no rule catches"),
        ([Rule("a", "3.*", weight_decay="2x")], {}, "a multiple, but no base weight_decay is given"),
        ([Rule("a", "3.*", lr="twice")], {}, "'twice' is no number and no multiple like '10x'"),
        ([], {"lr": None}, "no base learning rate is given"),
        ([], {"layer_decay": 1.5}, "layer_decay=1.5 is not between 0 and 1"),
        ([], {"on_overlap": "mix"}, "on_overlap='mix' is none of error, first, last, combine"),
        ([], {"only": [nn.Linear]}, "'1': class BatchNorm1d is not expected (only Linear)"),
        ([], {"only": "class:Conv*"}, "'0', '3': class Linear is not expected (only Conv*)"),
        ([Rule("a", "3.*", lr=0.1), Rule("b", "*.bias", lr=0.2)], {"on_overlap": "combine"}, "only multiples combine"),
        ([], {"layer_decay": 0.5, "layers": ["0.*"]}, "are in none of the 1 layers"),
    ],
)
def test_rules_that_cannot_be_meant_are_errors(rules: list[Rule], arguments: dict[str, object], said: str) -> None:
    model = small_net()
    freeze(model, "0.*")
    with pytest.raises(EditError) as raised:
        param_groups(model, rules, **{"lr": 0.1, **arguments})  # type: ignore[arg-type]
    assert said in str(raised.value)


def test_a_model_of_which_nothing_is_trained_has_no_groups() -> None:
    model = nn.Linear(1, 1)
    freeze(model)
    with pytest.raises(EditError, match="no parameter of the model is trainable"):
        param_groups(model, lr=0.1)


def test_the_classes_that_are_expected_pass_and_layers_without_parameters_do_not_count() -> None:
    assert len(param_groups(small_net(), lr=0.1, only=[nn.Linear, "class:BatchNorm*"])) == 1


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop, torch.optim.Adagrad])
def test_any_optimizer_takes_the_groups_and_its_state_comes_back(make: type[torch.optim.Optimizer]) -> None:
    def optimizer(model: nn.Module) -> torch.optim.Optimizer:
        return make(param_groups(model, [Rule("head", "3.*", lr="2x", weight_decay=0)], lr=0.01))  # type: ignore[call-arg]

    model = small_net()
    first = optimizer(model)
    train(model, first, size=(4,))
    second = optimizer(model)
    second.load_state_dict(first.state_dict())
    assert [group["name"] for group in second.param_groups] == ["rest", "head"]
    assert [group["lr"] for group in second.param_groups] == [0.01, 0.02]


@pytest.mark.parametrize(
    "schedule",
    [
        lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5),
        lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.5**epoch),
        lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5),
    ],
)
def test_schedulers_keep_the_ratio_of_the_groups(
    schedule: Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler],
) -> None:
    optimizer = torch.optim.SGD(param_groups(small_net(), [Rule("head", "3.*", lr="10x")], lr=0.01))
    scheduler = schedule(optimizer)
    optimizer.step()
    scheduler.step()
    assert scheduler.get_last_lr() == [pytest.approx(0.005), pytest.approx(0.05)]


# layer-wise decay


def rates(groups: ParamGroups) -> dict[str, float]:
    return {key: one.lr for one in groups.summary for key in one.keys}


def test_the_learning_rate_falls_layer_by_layer_towards_the_input_of_a_vision_transformer() -> None:
    model = meta_twin(torchvision.models.vit_b_16())
    found = rates(param_groups(model, lr=1.0, layer_decay=0.5))
    assert {found[key] for key in ("class_token", "conv_proj.weight", "encoder.pos_embedding")} == {0.5**13}
    for number in range(12):
        assert found[f"encoder.layers.encoder_layer_{number}.mlp.0.weight"] == 0.5 ** (12 - number)
    assert {found[key] for key in ("encoder.ln.weight", "heads.head.bias")} == {1.0}


def test_frozen_layers_do_not_shift_the_decay_of_the_others() -> None:
    model = meta_twin(resnet18())
    whole = rates(param_groups(model, lr=1.0, layer_decay=0.5))
    freeze(model, ["conv1.*", "module:layer1"], norm="train")
    assert all(whole[key] == rate for key, rate in rates(param_groups(model, lr=1.0, layer_decay=0.5)).items())


def test_layers_are_taken_as_they_are_named() -> None:
    layers = ["role:norm", "module:conv1", *(f"module:layer{number}" for number in range(1, 5)), "module:fc"]
    model = meta_twin(resnet18())
    found = rates(param_groups(model, lr=1.0, layer_decay=0.5, layers=layers))
    assert found["fc.weight"] == 1.0
    assert found["layer4.1.conv2.weight"] == 0.5
    assert found["conv1.weight"] == 0.5**5
    assert found["layer4.1.bn2.weight"] == 0.5**6


def test_a_model_without_blocks_asks_for_its_layers() -> None:
    with pytest.raises(EditError, match="name its layers, input first"):
        param_groups(nn.Linear(1, 1), lr=0.1, layer_decay=0.5)


# rules in a file


def test_rules_are_read_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "rules.toml"
    path.write_text(
        "lr = 0.01\nweight_decay = 1e-4\non_overlap = 'first'\n"
        "[[group]]\nname = 'head'\nmatch = ['3.*']\nlr = '10x'\n"
        "[[group]]\nname = 'bias'\nmatch = 'role:bias'\nlr = '2x'\nweight_decay = 0\noptions = {momentum = 0.5}\n"
    )
    groups = param_groups(small_net(), path)
    assert [(one["name"], one["lr"], one["weight_decay"]) for one in groups] == [
        ("rest", 0.01, 1e-4),
        ("head", 0.1, 1e-4),
        ("bias", 0.02, 0.0),
    ]
    assert groups[2]["momentum"] == 0.5
    assert param_groups(small_net(), str(path), lr=1.0)[1]["lr"] == 10.0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("lr = 'fast'", "line 1: lr should be a number, not 'fast'"),
        ("[[group]]\nname = 'a'", "line 1: group 'a': needs match = …"),
        ("[[group]]\nname = 'a'\nmatch = [1]", "line 3: group 'a': match should be a string or a list of strings"),
        ("[[groups]]\nname = 'a'", "line 1: unknown entry 'groups'; known are lr, weight_decay"),
        ("group = 3", "line 1: groups are [[group]] tables"),
        ("[[group]]\nname = 'a'\nmatch = 'x'\nrate = 3", "line 4: group 'a': unknown entry 'rate'"),
        ("lr = ", "line 1"),
    ],
)
def test_a_file_that_cannot_be_read_says_why(text: str, said: str) -> None:
    with pytest.raises(RecipeError) as raised:
        Rules.loads(text)
    assert said in str(raised.value)


# Scenario J: initialising what was not loaded


def test_convolutions_that_were_not_loaded_get_the_normal_of_their_fan_out(tmp_path: Path) -> None:
    source = resnet18()
    state = {key: value for key, value in source.state_dict().items() if not key.startswith("layer4.")}
    torch.manual_seed(1)
    model = torchvision.models.resnet18(num_classes=10)
    for parameter in model.parameters():
        nn.init.constant_(parameter, 9.0)
    report = load_into(model, from_torch(state), allow_missing=["layer4.*"])
    touched = initialize(model, report, "conv_normal_fan_out", generator=torch.Generator().manual_seed(0))
    assert (
        set(touched.keys) == set(report.initialized) == {key for key in model.state_dict() if key.startswith("layer4.")}
    )
    for key, value in state.items():
        assert torch.equal(model.state_dict()[key], value)
    for name, module in model.named_modules():
        if name.startswith("layer4.") and isinstance(module, nn.Conv2d):
            wanted = math.sqrt(2 / (math.prod(module.kernel_size) * module.out_channels))
            assert float(module.weight.detach().std()) == pytest.approx(wanted, rel=0.02)
        if name.startswith("layer4.") and isinstance(module, nn.BatchNorm2d):
            assert module.weight.eq(1).all()
            assert module.bias.eq(0).all()
            assert module.running_var is not None
            assert module.running_var.eq(1).all()
    assert "conv_normal_fan_out" in str(touched)


def test_a_generator_makes_it_repeatable_and_leaves_the_global_one_alone() -> None:
    models = [small_net() for _ in range(2)]
    state = torch.get_rng_state()
    for how in ("kaiming_normal", "xavier_uniform_", "reset_parameters", nn.init.orthogonal_):
        for model in models:
            initialize(model, ["0.weight", "3.weight"], how, generator=torch.Generator().manual_seed(3))
        first, second = (model.get_parameter("0.weight") for model in models)
        assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), state)


def test_schemes_are_torchs_own_with_their_options() -> None:
    model = nn.Linear(300, 300)
    initialize(model, "weight", "trunc_normal", std=0.02, generator=torch.Generator().manual_seed(0))
    wanted = nn.init.trunc_normal_(torch.empty(300, 300), std=0.02, generator=torch.Generator().manual_seed(0))
    assert torch.equal(model.weight, wanted)
    initialize(model, "bias", "constant", val=3.0)
    assert model.bias.eq(3).all()
    initialize(model, "*", "zeros")
    assert model.weight.eq(0).all()
    initialize(model, "*", lambda value: value.fill_(5))
    assert model.bias.eq(5).all()


@pytest.mark.parametrize("groups", [1, 21])
def test_bilinear_upsampling_is_what_interpolation_gives(groups: int) -> None:
    layer = nn.ConvTranspose2d(21, 21, 4, 2, padding=1, groups=groups)
    initialize(layer, "*", "bilinear")
    picture = torch.rand(1, 21, 8, 8)
    wanted = nn.functional.interpolate(picture, scale_factor=2, mode="bilinear", align_corners=False)
    torch.testing.assert_close(layer(picture)[..., 1:-1, 1:-1], wanted[..., 1:-1, 1:-1])


@pytest.mark.parametrize(
    ("model", "what", "how", "said"),
    [
        (small_net(), "*", "conv_normal_fan_out", "'0.weight': weight of Linear is no convolution's"),
        (small_net(), "*", "kaiming_normal", "'0.bias': Fan in and fan out can not be computed"),
        (
            small_net(),
            "*",
            "kaiming_norm",
            "no scheme is called 'kaiming_norm'; there are conv_normal_fan_out, bilinear",
        ),
        (small_net(), "0.*", "bilinear", "Linear is no transposed convolution"),
        (nn.ConvTranspose2d(2, 4, 4), "*", "bilinear", "2 channels become 4"),
        (nn.Linear(1, 1, device="meta"), "*", "zeros", "on the meta device"),
        (small_net(), [], "zeros", "nothing is to be initialised"),
        (nn.PReLU(), "*", "trunc_norm", "no scheme"),
        (
            torchvision.models.VisionTransformer(32, 16, 1, 1, 8, 8),
            "class_token",
            "reset_parameters",
            "has no reset",
        ),
        (nn.TransformerEncoderLayer(4, 1), "self_attn.in_proj_weight", "zeros_", None),
    ],
)
def test_a_key_that_a_scheme_has_no_rule_for_is_an_error_and_nothing_changes(
    model: nn.Module, what: list[str] | str, how: str, said: str | None
) -> None:
    if said is None:
        assert initialize(model, what, how).keys == (what,)
        return
    before = {} if next(model.parameters()).is_meta else values(model)
    with pytest.raises(CheckpointError) as raised:
        initialize(model, what, how)
    assert said in str(raised.value)
    assert not before or moved(model, before) == set()


def test_one_name_of_a_tied_parameter_is_not_initialised_alone() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(5, 3), "head": nn.Linear(3, 5, bias=False)})
    model["head"].weight = model["embed"].weight
    with pytest.raises(EditError, match=r"same parameter as 'embed\.weight', which is not chosen"):
        initialize(model, "head.weight", "zeros")
    assert initialize(model, "*", "ones").how == {"embed.weight": "ones", "head.weight": "as embed.weight"}


# the report of a load feeds all of these


def test_freeze_what_was_loaded_and_train_what_was_not_is_one_line_each() -> None:
    source, model = resnet18(1000), resnet18(10)
    report = load_into(model, from_torch(source.state_dict()), on_mismatch="drop")
    freeze(model, report.loaded, norm="eval")
    assert initialize(model, report, "normal", std=0.01).keys == ("fc.weight", "fc.bias")
    groups = param_groups(model, {"new": report.initialized}, lr=0.1)
    assert [one.keys for one in groups.summary] == [("fc.weight", "fc.bias")]
    seal = snapshot(model)
    train(model, torch.optim.SGD(groups))
    assert len(verify_frozen(model, seal)) == len(report.loaded)


# snapshots


def test_a_snapshot_is_the_hash_of_the_file_and_knows_buffers_that_are_not_saved(tmp_path: Path) -> None:
    model = small_net()
    model.register_buffer("grid", torch.arange(3.0), persistent=False)
    torch.save(model.state_dict(), tmp_path / "m.pth")
    found = snapshot(model)
    assert found.whole == ckpt_surgeon.hash(tmp_path / "m.pth").whole
    assert "grid" in found.tensors
    assert snapshot(nn.DataParallel(model)) == found
    with pytest.raises(EditError, match="meta"):
        snapshot(meta_twin(model))


# tables


def test_tables_are_text_data_and_html() -> None:
    model = small_net()
    found = freeze(model, except_="3.*", norm="eval")
    assert str(found).splitlines()[0].split() == [
        "module", "modules", "class", "parameters", "state", "running", "statistics"
    ]  # fmt: skip
    assert "8 of 29 parameters are trained (27.6 %); running statistics of 1 layer: 1 stay (eval)" in str(found)
    assert "<table>" in found._repr_html_()
    groups = param_groups(model, [Rule("<b>", "3.bias")], lr=0.1)
    assert "&lt;b&gt;" in groups._repr_html_()
    assert "frozen, in no group: 4 keys" in str(groups)
    assert repr(groups) == "<ParamGroups: rest (1), <b> (1)>"
    assert "<table>" in initialize(model, "*", "zeros")._repr_html_()


# the command line


def test_the_plan_of_freezing_is_printed_for_a_model_without_values(ckpt: Run) -> None:
    ran = ckpt("freeze-plan", "torchvision.models:resnet18()", "--except", "fc.*", "--norm", "eval")
    assert ran.status == 0
    assert "513,000 of 11,689,512 parameters are trained (4.4 %)" in ran.out
    shown = json.loads(ckpt("freeze-plan", "torchvision.models:resnet18()", "class:Conv2d", "--json").out)
    assert len(shown["frozen"]) == 20
    assert ckpt("freeze-plan", "torchvision.models:resnet18()").err.count("norm='eval'") == 1
    assert "'class:Conv2d' (20 modules are of it)" in ckpt("freeze-plan", "torchvision.models:resnet18()", "Conv2d").err


def test_the_groups_of_a_file_are_printed(ckpt: Run, tmp_path: Path) -> None:
    path = tmp_path / "rules.toml"
    path.write_text("lr = 0.01\n[[group]]\nname = 'head'\nmatch = 'role:head'\nlr = '10x'\n")
    target = "torchvision.models:resnet18()"
    ran = ckpt("groups", target, "--rules", path, "--freeze", "module:layer1", "--norm", "train")
    assert ran.status == 0
    assert "frozen, in no group: 12 keys" in ran.out
    shown = json.loads(ckpt("groups", target, "--rules", path, "--lr", 1, "--json").out)["groups"]
    assert [(one["name"], one["lr"]) for one in shown] == [("rest", 1.0), ("head", 10.0)]
    assert ckpt("groups", target).err == "ckpt: no base learning rate is given: --lr\n"


def test_a_target_that_is_a_state_dict_has_no_modules(ckpt: Run, tmp_path: Path) -> None:
    path = tmp_path / "weights.py"
    path.write_text("import torch\nweights = {'a': torch.zeros(1)}\n")
    ran = ckpt("freeze-plan", f"{path}:weights")
    assert ran.status == 2
    assert TargetError.__name__ not in ran.err
    assert "is a state_dict; give a model" in ran.err
