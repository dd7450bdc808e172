"""Frameworks save, we operate, the frameworks resume: losses and weights are compared with the uninterrupted run."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset

import ckpt_surgeon
from ckpt_surgeon.runs.folder import open_run_folder, save_run_folder
from ckpt_surgeon.runs.opening import open_run_file as open_run
from ckpt_surgeon.runs.saving import save_whole as save_run

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(3)
    return TensorDataset(torch.randn(40, 4, generator=generator), torch.randn(40, 2, generator=generator))


def network(prefixed: bool) -> nn.Module:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    return nn.ModuleDict({"old": body}) if prefixed else body


def test_lightning_resumes_after_keys_were_renamed(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):  # type: ignore[misc,name-defined]
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name
            self.losses: list[float] = []
            setattr(self, name, network(prefixed=False))

        def training_step(self, batch: list[torch.Tensor], _index: int) -> torch.Tensor:
            loss = mse_loss(getattr(self, self.name)(batch[0]), batch[1])
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self) -> object:
            optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)]

    def trainer(epochs: int) -> object:
        return lightning.Trainer(
            max_epochs=epochs, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
            enable_checkpointing=False, default_root_dir=tmp_path,
        )  # fmt: skip

    def loader() -> DataLoader[tuple[torch.Tensor, ...]]:
        return DataLoader(data(), batch_size=8)

    whole = Module("net")
    trainer(2).fit(whole, loader())  # type: ignore[attr-defined]
    first = Module("net")
    half = trainer(1)
    half.fit(first, loader())  # type: ignore[attr-defined]
    half.save_checkpoint(tmp_path / "last.ckpt")  # type: ignore[attr-defined]

    run, _ = open_run(tmp_path / "last.ckpt").edited(lambda tensors: ckpt_surgeon.rename.plan(tensors, ["net=model"]))
    save_run(run, tmp_path / "renamed.ckpt")
    again = Module("model")
    trainer(2).fit(again, loader(), ckpt_path=tmp_path / "renamed.ckpt")  # type: ignore[attr-defined]
    assert again.losses == whole.losses[5:]
    assert all(map(torch.equal, again.state_dict().values(), whole.state_dict().values()))


def test_accelerate_resumes_from_a_folder_that_was_edited(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")

    def steps(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> list[float]:
        generator = torch.Generator().manual_seed(seed)
        losses = []
        for _ in range(5):
            optimizer.zero_grad()
            loss = model(torch.randn(4, 4, generator=generator)).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.old = network(prefixed=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.old(x)  # type: ignore[no-any-return]

    accelerator = accelerate.Accelerator(cpu=True)
    model = Wrapped()
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
    steps(model, optimizer, 1)
    accelerator.save_state(str(tmp_path / "state"))
    wanted = steps(model, optimizer, 2)

    run, _ = open_run_folder(tmp_path / "state").edited(lambda tensors: ckpt_surgeon.select.plan(tensors, "old."))
    save_run_folder(run, tmp_path / "edited")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    other = accelerate.Accelerator(cpu=True)
    bare = network(prefixed=False)
    bare, fresh = other.prepare(bare, torch.optim.AdamW(bare.parameters(), lr=1e-2))
    other.load_state(str(tmp_path / "edited"))
    assert steps(bare, fresh, 2) == wanted


def test_the_trainer_of_transformers_resumes_from_a_folder_that_was_edited(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    config = transformers.BertConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=20,
        max_position_embeddings=16, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    rows = [{"input_ids": [index % 20, 3, 5, 7], "labels": index % 2} for index in range(32)]

    def trainer(steps: int, folder: Path) -> object:
        torch.manual_seed(0)
        model = transformers.BertForSequenceClassification(config)
        args = transformers.TrainingArguments(
            str(folder), max_steps=steps, per_device_train_batch_size=4, save_steps=4, logging_steps=1, report_to=[],
            use_cpu=True, disable_tqdm=True, seed=1, lr_scheduler_type="constant",
        )  # fmt: skip
        return transformers.Trainer(model=model, args=args, train_dataset=rows)

    whole = trainer(8, tmp_path / "a")
    whole.train()  # type: ignore[attr-defined]
    source = tmp_path / "a" / "checkpoint-4"
    run, _ = open_run_folder(source).edited(lambda tensors: ckpt_surgeon.add_prefix.plan(tensors, "x."))
    run, _ = run.edited(lambda tensors: ckpt_surgeon.select.plan(tensors, "x."))
    save_run_folder(run, tmp_path / "checkpoint-4")
    again = trainer(8, tmp_path / "b")
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))  # type: ignore[attr-defined]
    states = [one.model.state_dict() for one in (whole, again)]  # type: ignore[attr-defined]
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


def test_timm_resumes_what_its_saver_wrote(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    from timm.models import resume_checkpoint
    from timm.optim import create_optimizer_v2
    from timm.utils import CheckpointSaver, ModelEmaV2

    def made() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = timm.create_model("resnet10t", num_classes=4)
        return model, create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.05)

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
        optimizer.zero_grad()
        loss = model(torch.ones(2, 3, 32, 32)).square().mean()
        loss.backward()
        optimizer.step()
        return float(loss)

    model, optimizer = made()
    step(model, optimizer)
    ema = ModelEmaV2(model)
    saver = CheckpointSaver(model, optimizer, model_ema=ema, checkpoint_dir=str(tmp_path), recovery_dir=str(tmp_path))
    saver.save_checkpoint(3, 0.5)
    wanted = [step(model, optimizer) for _ in range(3)]

    source = next(path for path in tmp_path.glob("*.pth.tar"))
    prefixed, _ = open_run(source, select="state_dict").edited(lambda one: ckpt_surgeon.add_prefix.plan(one, "module."))
    assert [".".join(twin.path) for twin in prefixed.twins] == ["state_dict_ema"]
    plain, _ = prefixed.edited(ckpt_surgeon.strip_prefix.plan)
    save_run(plain, tmp_path / "out.pth")
    again, fresh = made()
    assert resume_checkpoint(again, str(tmp_path / "out.pth"), fresh) == 4
    assert [step(again, fresh) for _ in range(3)] == wanted
