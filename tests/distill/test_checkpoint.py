"""A checkpoint is whole or passed over, and nothing that was complete is ever lost."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from torch import Tensor

from fewstep.distill import checkpoint
from fewstep.samplers.errors import UserError

TENSORS = {"student": {"a": torch.arange(6.0).reshape(2, 3)}, "optimizer-student": {"0.step": torch.tensor(3.0)}}


def save(folder: Path, iteration: int) -> Path:
    tensors = {name: {k: v + iteration for k, v in group.items()} for name, group in TENSORS.items()}
    return checkpoint.save(folder, iteration, tensors, {"best": [0.1, 2], "method": {"x": 0.1 + 0.2}})


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_what_is_loaded_is_what_was_saved(tmp_path: Path):
    """Every bit, type and shape; tensors that share memory or are not contiguous; numbers of the meta exactly."""
    x = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    group = {"x": x, "same": x, "t": x.t(), "half": x.bfloat16(), "int": torch.tensor([3]), "scalar": x[0, 0]}
    folder = checkpoint.save(tmp_path, 12, {"student": group, "empty": {}}, {"loss": 0.1 + 0.2})
    groups, meta = checkpoint.load(folder)
    assert (folder.name, meta) == ("step-000012", {"iteration": 12, "loss": 0.1 + 0.2})
    assert groups.keys() == {"student", "empty"}
    assert groups["empty"] == {}
    for key, value in group.items():
        assert groups["student"][key].dtype == value.dtype
        assert groups["student"][key].equal(value)
    assert checkpoint.fault(folder) is None
    assert checkpoint.latest(tmp_path) == (folder, [])


def truncated(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


def flipped(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("damage", [truncated, flipped, os.remove], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", ["student.safetensors", "optimizer-student.safetensors", "meta.json", "manifest.json"])
def test_a_torn_checkpoint_is_passed_over(tmp_path: Path, name: str, damage: Callable[[Path], None]):
    """Whichever file, with a line that names the checkpoint; the one before it is used."""
    whole, torn = save(tmp_path, 4), save(tmp_path, 6)
    damage(torn / name)
    found, lines = checkpoint.latest(tmp_path)
    assert found == whole
    [line] = lines
    assert str(torn) in line
    assert "damaged" in line or "incomplete" in line


def test_with_only_torn_ones_there_is_none(tmp_path: Path):
    truncated(save(tmp_path, 4) / "meta.json")
    (tmp_path / "step-000006").mkdir()
    (tmp_path / ".step-000008.partial").mkdir()
    found, lines = checkpoint.latest(tmp_path)
    assert found is None
    assert len(lines) == 3
    assert checkpoint.latest(tmp_path / "missing") == (None, [])


def test_newest_means_iterations_not_letters(tmp_path: Path):
    """A seventh digit sorts before six in a listing."""
    for iteration in (999_999, 1_000_000, 5):
        save(tmp_path, iteration)
    assert [p.name for p in checkpoint.iterations(tmp_path)] == ["step-000005", "step-999999", "step-1000000"]
    assert checkpoint.latest(tmp_path)[0] == tmp_path / "step-1000000"


def failing(number: int, error: Callable[[], Exception]) -> tuple[Callable[..., Any], list[int]]:
    """Wraps what writes so that the `number`-th call fails; counts the calls."""
    calls = [0]

    def wrap(write: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            calls[0] += 1
            if calls[0] == number:
                raise error()
            return write(*args, **kwargs)

        return wrapped

    return wrap, calls


def wrap_writes(monkeypatch: pytest.MonkeyPatch, wrap: Callable[..., Any]) -> None:
    monkeypatch.setattr(checkpoint, "save_file", wrap(checkpoint.save_file))
    monkeypatch.setattr(checkpoint, "sync", wrap(checkpoint.sync))
    monkeypatch.setattr(os, "replace", wrap(os.replace))
    monkeypatch.setattr(Path, "write_text", wrap(Path.write_text))
    monkeypatch.setattr(Path, "mkdir", wrap(Path.mkdir))


WRITES = 13
"""mkdir twice, two groups, meta, manifest, five files' and one folder's sync, rename, the outer folder's sync."""


@pytest.mark.parametrize("number", range(1, WRITES + 1))
def test_an_error_at_any_write_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int):
    """One line that says where and why; earlier checkpoints whole; no half of the new one; the next save works."""
    folder = tmp_path / "checkpoints"
    whole = save(folder, 4)
    with monkeypatch.context() as patch:
        wrap, calls = failing(number, lambda: OSError(errno.ENOSPC, "No space left on device"))
        wrap_writes(patch, wrap)
        with pytest.raises(UserError) as caught:
            save(folder, 6)
        assert calls[0] == number
    message = f"{folder / 'step-000006'}: cannot be written (No space left on device); earlier checkpoints are whole"
    assert str(caught.value) == message
    last = number == WRITES  # the rename was done, only its sync failed
    assert names(folder) == ["step-000004", "step-000006"] if last else ["step-000004"]
    assert checkpoint.fault(whole) is None
    again = save(folder, 6)
    assert checkpoint.latest(folder) == (again, [])


def test_the_writes_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    wrap, calls = failing(0, OSError)
    wrap_writes(monkeypatch, wrap)
    save(tmp_path, 4)
    assert calls[0] == WRITES


def test_a_full_disk_while_tensors_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Safetensors says it with an exception of its own; here by the kernel, which refuses files beyond a size."""
    whole = save(tmp_path, 4)
    big = {"student": {"a": torch.zeros(1 << 16)}}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 14, hard))
    try:
        with pytest.raises(UserError, match=r"step-000006: cannot be written \(.*File too large") as caught:
            checkpoint.save(tmp_path, 6, big, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert isinstance(caught.value.__cause__, SafetensorError)
    assert names(tmp_path) == [whole.name]
    assert checkpoint.latest(tmp_path) == (whole, [])


@pytest.fixture
def read_only() -> Iterator[Path]:
    """A folder with one checkpoint that this process may not write to, root or not."""
    folder = Path(tempfile.mkdtemp())
    save(folder, 4)
    folder.chmod(0o555)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    yield folder
    if root:
        os.seteuid(0)
    folder.chmod(0o755)
    shutil.rmtree(folder)


def test_a_read_only_folder(read_only: Path):
    with pytest.raises(UserError, match=r"step-000006: cannot be written \(Permission denied\)"):
        save(read_only, 6)
    assert names(read_only) == ["step-000004"]


def killed_while_saving(folder: Path, number: int) -> None:
    """A child process that saves, and dies by SIGKILL at the `number`-th write."""
    child = os.fork()
    if child == 0:
        try:
            wrap, _ = failing(number, lambda: OSError(os.kill(os.getpid(), signal.SIGKILL)))
            wrap_writes(pytest.MonkeyPatch(), wrap)
            save(folder, 6)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@pytest.mark.parametrize("number", range(3, WRITES + 1))
def test_a_kill_at_any_write_loses_nothing(tmp_path: Path, number: int):
    """The one before is used, with a line that says so; what was left lying goes with the next save."""
    whole = save(tmp_path, 4)
    killed_while_saving(tmp_path, number)
    found, lines = checkpoint.latest(tmp_path)
    if number == WRITES:  # renamed: complete
        assert (found, lines) == (tmp_path / "step-000006", [])
    else:
        assert found == whole
        assert lines == [f"checkpoint {tmp_path / '.step-000006.partial'}: the run ended while it was written"]
    save(tmp_path, 8)
    assert ".step-000006.partial" not in names(tmp_path)


def test_prune_keeps_the_last_ones_and_the_best(tmp_path: Path):
    for i in (2, 4, 6, 8):
        save(tmp_path, i)
    checkpoint.prune(tmp_path, tmp_path / "step-000008", 2, tmp_path / "step-000002")
    assert names(tmp_path) == ["step-000002", "step-000006", "step-000008"]
    checkpoint.prune(tmp_path, tmp_path / "step-000008", 1, tmp_path / "step-000008")
    assert names(tmp_path) == ["step-000008"]
    checkpoint.prune(tmp_path, tmp_path / "step-000008", 3)
    assert names(tmp_path) == ["step-000008"]


def test_prune_does_not_count_torn_ones_as_the_last(tmp_path: Path):
    """Resumed from 4 since 8 was torn: after 6 is saved, 8 must not push a whole one out."""
    for i in (2, 4, 8):
        save(tmp_path, i)
    truncated(tmp_path / "step-000008" / "meta.json")
    checkpoint.prune(tmp_path, save(tmp_path, 6), 2)
    assert names(tmp_path) == ["step-000004", "step-000006"]


def trained(iterations: int, optimizer_of: Callable[[list[Tensor]], torch.optim.Optimizer]) -> Any:
    """Two parameters, one of which has no gradient in the first iterations, and their optimiser."""
    generator = torch.Generator().manual_seed(1)
    parameters = [torch.nn.Parameter(torch.randn(3, generator=generator)) for _ in range(2)]
    optimizer = optimizer_of(list(parameters))
    step(parameters, optimizer, range(iterations))
    return parameters, optimizer


def step(parameters: list[Any], optimizer: torch.optim.Optimizer, iterations: range) -> None:
    for i in iterations:
        for k, p in enumerate(parameters):
            p.grad = None if k == 1 and i < 3 else (p.detach() * (i + 1)).cos()
        optimizer.step()


def test_an_optimisers_state_is_laid_out_as_its_parameters(tmp_path: Path):
    """CUDA's fused AdamW refuses another layout, and files have one alone."""
    parameter = torch.nn.Parameter(torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last))
    optimizer = torch.optim.AdamW([parameter], 0.1)
    parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    tensors, meta = checkpoint.pack_optimizer(optimizer)
    folder = checkpoint.save(tmp_path, 1, {"optimizer": tensors}, {"optimizer": json.loads(json.dumps(meta))})
    groups, read = checkpoint.load(folder)
    fresh = torch.optim.AdamW([parameter], 0.1)
    checkpoint.unpack_optimizer(fresh, groups["optimizer"], read["optimizer"])
    for name in ("exp_avg", "exp_avg_sq"):
        found, want = fresh.state[parameter][name], optimizer.state[parameter][name]
        assert torch.equal(found, want)
        assert found.stride() == parameter.stride()


class Wrapping(torch.optim.AdamW):
    """Has its moments in a dict inside its state, as bitsandbytes since 0.49, and takes them back without it."""

    def state_dict(self) -> dict[str, Any]:
        found = super().state_dict()
        state = {
            i: {"step": s["step"], "__quant_state__": {k: v for k, v in s.items() if k != "step"}}
            for i, s in found["state"].items()
        }
        return found | {"state": state}


@pytest.mark.parametrize("at", [1, 5])
@pytest.mark.parametrize(
    "optimizer_of",
    [
        lambda p: torch.optim.AdamW(p, 0.1, (0.8, 0.9), weight_decay=0.1),
        lambda p: torch.optim.SGD(p, 0.1, 0.9),
        lambda p: Wrapping(p, 0.1, (0.8, 0.9), weight_decay=0.1),
    ],
    ids=["adamw", "sgd", "in a dict"],
)
def test_an_optimiser_goes_on_bit_for_bit(tmp_path: Path, optimizer_of: Callable[..., Any], at: int):
    """Through files, also where a parameter has no state yet."""
    parameters, optimizer = trained(at, optimizer_of)
    tensors, meta = checkpoint.pack_optimizer(optimizer)
    folder = checkpoint.save(tmp_path, at, {"optimizer": tensors}, {"optimizer": json.loads(json.dumps(meta))})
    groups, read = checkpoint.load(folder)
    fresh = optimizer_of(parameters)
    checkpoint.unpack_optimizer(fresh, groups["optimizer"], read["optimizer"])
    step(parameters, fresh, range(at, 10))
    straight, _ = trained(10, optimizer_of)
    assert all(a.equal(b) for a, b in zip(parameters, straight, strict=True))
