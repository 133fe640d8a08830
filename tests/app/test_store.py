"""Images on disk: what was written is read, in the same batches, and costs outlive a kill."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fewstep.app.store import COSTS, Cost, Store, check_out, read, read_batches, summary
from fewstep.samplers.errors import UserError


@pytest.mark.parametrize("shape", [(3, 8, 6), (4, 3, 8, 6)])
def test_images_and_clips_come_back_bit_for_bit(tmp_path: Path, shape: tuple[int, ...]):
    """Clips with two equal frames too, which an animated file would merge."""
    images = torch.randint(256, (5, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    if images.ndim == 5:
        images[:, 1] = images[:, 0]
    store = Store(tmp_path, Path("a/4-steps"), {"x": 1}, 5, images.ndim == 5)
    store.add(range(5), images, Cost(5, 1.0, 20, None))
    assert torch.equal(read(store.files, images.ndim == 5), images)
    parts = list(read_batches(store.files, [4, 0, 2], 2, images.ndim == 5))
    assert [numbers for numbers, _ in parts] == [[4, 0], [2]]
    assert torch.equal(torch.cat([x for _, x in parts]), images[[4, 0, 2]])


def test_images_of_two_sizes_are_not_one_tensor(tmp_path: Path):
    for i, size in enumerate(((8, 6), (8, 6), (6, 8))):
        Store(tmp_path, Path(f"{i}"), {}, 1).add(
            [0], torch.zeros(1, 3, *size, dtype=torch.uint8), Cost(1, 1.0, 1, None)
        )
    files = sorted(tmp_path.rglob("*.png"))
    with pytest.raises(
        UserError, match=r"2-.*: 6x8 \(height, width\), and .*0-.* 8x6; they are compared pixel by pixel"
    ):
        read(files)


def test_missing_batches_are_the_ones_of_a_whole_run(tmp_path: Path):
    """A batch of which one image is not there is drawn whole, since networks round by the batch."""
    store = Store(tmp_path, Path("a"), {}, 10)
    assert store.missing(4) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    store.add([0, 1, 2, 3], torch.zeros(4, 3, 2, 2, dtype=torch.uint8), Cost(4, 1.0, 4, None))
    store.add([4, 5], torch.zeros(2, 3, 2, 2, dtype=torch.uint8), Cost(2, 1.0, 2, None))
    assert store.missing(4) == [[4, 5, 6, 7], [8, 9]]
    assert Store(tmp_path, Path("a"), {}, 10).missing(4) == store.missing(4)
    assert len(Store(tmp_path, Path("a"), {"other": 1}, 10).missing(4)) == 3


@pytest.mark.parametrize("clips", [False, True])
def test_an_image_that_was_cut_off_is_drawn_again(tmp_path: Path, clips: bool):
    store = Store(tmp_path, Path("a"), {}, 3, clips)
    images = torch.randint(256, (3, 2, 3, 8, 8) if clips else (3, 3, 8, 8), dtype=torch.uint8)
    store.add(range(3), images, Cost(3, 1.0, 3, None))
    assert not store.missing(1)
    file = store.files[1] / "001.png" if clips else store.files[1]
    file.write_bytes(file.read_bytes()[:-7])
    assert store.missing(1) == [[1]]
    store.add([1], images[1:2], Cost(1, 1.0, 1, None))
    assert torch.equal(read(store.files, clips), images)


def test_a_line_of_costs_that_was_cut_off_is_left_out(tmp_path: Path):
    store = Store(tmp_path, Path("a"), {}, 2)
    image = torch.zeros(1, 3, 2, 2, dtype=torch.uint8)
    store.add([0], image, Cost(1, 0.5, 3, 100), rank=1)
    with (store.folder / f"{COSTS}-1.jsonl").open("a") as file:
        file.write('["a", "b", "c", null]\n[1, 0.')
    assert store.costs() == [Cost(1, 0.5, 3, 100)]


def test_costs_are_medians_over_batches_of_a_size():
    costs = [Cost(4, s, 8, p) for s, p in ((2.0, 10), (4.0, 30), (20.0, 20))] + [Cost(1, 1.0, 2, None)]
    nfe, table = summary(costs, [4])
    assert nfe == 2
    assert table == [{"batch_size": 4, "seconds_per_image": 1, "images_per_second": 1, "peak_memory_bytes": 30}]
    assert [line["batch_size"] for line in summary(costs, [16])[1]] == [1, 4]


def test_a_report_that_could_not_be_written_is_refused(tmp_path: Path):
    """One that would be written over by what stands beside it, a folder, and one below a file."""
    (tmp_path / "file").write_text("")
    for name, line in (
        ("report.md", r"--out .*report.md: must end in .json; .md, .html, .png and .images stand beside it"),
        (".", r"a folder; name a file in it, e.g. .*report.json"),
        ("file/report.json", r"file/report.json: cannot be written \(File exists\); name another file with --out"),
    ):
        with pytest.raises(UserError, match=line):
            check_out(tmp_path / name)
    check_out(tmp_path / "new" / "report.json")
    assert list((tmp_path / "new").iterdir()) == []
