"""Parquet and npz files, one folder per class: read as they are, damage named, nothing guessed."""

import os
import sys

import numpy as np
import pytest
import torch
from tests.training.data.sources import encode, parquet, pixels, truncate

from conjugo.errors import CorruptFile, DataUnavailable
from conjugo.training import data, models
from conjugo.training.data import folders

pytest.importorskip("pyarrow")
pytest.importorskip("PIL")


def load(folder, name="folder", **options):
    return data.load(name, root=folder, **options)


def write_parquet(folder, images, labels=None, *, form="png", column=None, test=2, **options):
    """All but the last *test* images for training, in two files."""
    labels = [i % 2 for i in range(len(images))] if labels is None else labels
    blobs = [encode(image, form, **options) for image in images]
    n = len(images) - test
    column = column or form
    parquet(folder / "train-0.parquet", blobs[: n // 2], labels[: n // 2], column=column)
    parquet(folder / "train-1.parquet", blobs[n // 2 : n], labels[n // 2 : n], column=column)
    parquet(folder / "test.parquet", blobs[n:], labels[n:], column=column)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("form", "options"), [("png", {}), ("webp", {"lossless": True})])
def test_lossless_parquet(tmp_path, channels, form, options):
    images = pixels(8, 16, channels)
    write_parquet(tmp_path, images, form=form, **options)
    dataset = load(tmp_path)
    # WebP has no grey images.
    kept = images if form == "png" else images.repeat(3 // channels, axis=1)
    assert np.array_equal(dataset.train.inputs, kept[:6])
    assert np.array_equal(dataset.test.inputs, kept[6:])
    assert dataset.train.targets.tolist() == [0, 1, 0, 1, 0, 1]
    assert dataset.classes == ("0", "1")


@pytest.mark.parametrize("side", [4, 32], ids=["one thread", "all processors"])
def test_more_images_than_one_thread_takes_at_once(tmp_path, side, monkeypatch):
    images = pixels(600, side)
    assert (len(encode(images[0], "png")) >= folders._THREADS_PAY) == (side == 32)
    sizes = []
    real = folders.ThreadPoolExecutor
    monkeypatch.setattr(folders.os, "cpu_count", lambda: 3)
    monkeypatch.setattr(folders, "ThreadPoolExecutor", lambda workers: (sizes.append(workers), real(workers))[1])
    write_parquet(tmp_path, images, test=50)
    dataset = load(tmp_path)
    assert sizes == [3 if side == 32 else 1]
    assert np.array_equal(dataset.train.inputs, images[:550])
    assert np.array_equal(dataset.test.inputs, images[550:])


def test_jpeg_parquet(tmp_path):
    flat = np.full((4, 3, 16, 16), 0, dtype=np.uint8) + np.array([200, 90, 30], dtype=np.uint8)[:, None, None]
    write_parquet(tmp_path, flat, form="jpeg")
    assert np.abs(load(tmp_path).train.inputs.numpy().astype(int) - flat[:2]).max() <= 3


def test_the_column_may_be_called_image(tmp_path):
    write_parquet(tmp_path, pixels(4, 4), column="image")
    assert np.array_equal(load(tmp_path).train.inputs, pixels(4, 4)[:2])


@pytest.mark.parametrize(("image", "label"), [("image", "label"), ("img", "fine_label")])
def test_the_form_of_hugging_face(tmp_path, image, label):
    import pyarrow
    from pyarrow.parquet import write_table

    for split in ("train", "test"):
        rows = [{"bytes": encode(picture, "png"), "path": None} for picture in pixels(4, 4)]
        write_table(pyarrow.table({image: rows, label: [0, 1, 0, 1]}), tmp_path / f"{split}-00000-of-00001.parquet")
    dataset = load(tmp_path)
    assert np.array_equal(dataset.train.inputs, pixels(4, 4))
    assert dataset.test.targets.tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize("text", ["cat\ndog\n", "cat\ndog", "cat\r\ndog\r\n\r\n"])
def test_class_names(tmp_path, text):
    write_parquet(tmp_path, pixels(4, 4))
    (tmp_path / "classes.txt").write_bytes(text.encode())
    assert load(tmp_path).classes == ("cat", "dog")


def test_known_class_names_unless_there_is_a_file(tmp_path):
    write_parquet(tmp_path, pixels(4, 4))
    assert load(tmp_path, "cifar10").classes[:2] == ("airplane", "automobile")
    assert len(load(tmp_path, "cifar10").classes) == 10
    names = tuple(f"kind {i}" for i in range(10))
    (tmp_path / "classes.txt").write_text("\n".join(names))  # seen although the images are in the cache
    assert load(tmp_path, "cifar10").classes == names


@pytest.mark.parametrize(
    ("name", "channels", "message"),
    [
        ("cifar100", 3, r"3 channel\(s\) in 2 classes are not cifar100, which has 3 in 100"),
        ("mnist", 3, r"3 channel\(s\) in 10 classes are not mnist, which has 1 in 10"),
        ("cifar10", 1, r"1 channel\(s\) in 10 classes are not cifar10, which has 3 in 10"),
    ],
)
def test_other_data_under_a_known_name(tmp_path, name, channels, message):
    write_parquet(tmp_path, pixels(4, 4, channels))
    with pytest.raises(CorruptFile, match=message) as caught:
        load(tmp_path, name)
    assert str(tmp_path) in str(caught.value)
    assert len(load(tmp_path).train) == 2


def test_no_other_program_decodes_an_image(tmp_path, monkeypatch):
    """Pillow gives PostScript to Ghostscript."""
    from PIL import EpsImagePlugin

    calls = []
    monkeypatch.setattr(EpsImagePlugin, "has_ghostscript", lambda: calls.append("looked for") or False)
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_: calls.append("called"))
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\n%%EndProlog\nshowpage\n%%EOF\n"
    parquet(tmp_path / "train.parquet", [script], [0], column="image")
    parquet(tmp_path / "test.parquet", [script], [0], column="image")
    with pytest.raises(CorruptFile, match=r"train\.parquet, row 0: not a readable image"):
        load(tmp_path)
    assert not calls


def test_a_classes_file_that_is_no_text(tmp_path):
    write_parquet(tmp_path, pixels(4, 4))
    (tmp_path / "classes.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(CorruptFile, match=r"classes\.txt: not a text file"):
        load(tmp_path)


@pytest.mark.parametrize("label", [2, -1])
def test_a_label_outside_the_classes(tmp_path, label):
    write_parquet(tmp_path, pixels(4, 4), [0, label, 0, 1])
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    with pytest.raises(CorruptFile, match=r"labels run from .* but there are 2 classes") as caught:
        load(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert not list(tmp_path.glob("*.cache"))


def test_images_of_different_sizes_need_image_size(tmp_path):
    images = [*pixels(3, 16), pixels(1, 20)[0], *pixels(2, 16)]
    write_parquet(tmp_path, images)
    with pytest.raises(
        CorruptFile, match=r"train-1\.parquet, row 1: 20x20 pixels, not 16x16 like the first; give image_size"
    ):
        load(tmp_path)
    dataset = load(tmp_path, image_size=8)
    assert dataset.input_shape == (3, 8, 8)
    # Each size has a cache of its own.
    assert load(tmp_path, image_size=12).input_shape == (3, 12, 12)
    assert len(list(tmp_path.glob("*.cache"))) == 2


def test_image_size_resizes_the_shorter_side_and_cuts_out_the_middle(tmp_path):
    """A wide image, left third black, middle grey, right third white: the middle square stays."""
    image = np.zeros((3, 8, 24), dtype=np.uint8)
    image[:, :, 8:16], image[:, :, 16:] = 100, 255
    write_parquet(tmp_path, [image] * 4)
    assert (load(tmp_path, image_size=8).train.inputs == 100).all()
    small = load(tmp_path, image_size=4).train.inputs
    assert small.shape[1:] == (3, 4, 4)
    assert ((small[..., 1:3].int() - 100).abs() <= 5).all()  # bicubic, near the edges


def test_an_image_size_that_all_have_changes_nothing(tmp_path):
    write_parquet(tmp_path, pixels(4, 16))
    assert np.array_equal(load(tmp_path, image_size=16).train.inputs, pixels(4, 16)[:2])


def test_grey_images_among_coloured_ones(tmp_path):
    grey, colour = pixels(1, 4, 1)[0], pixels(3, 4)
    write_parquet(tmp_path, [colour[0], grey, colour[1], colour[2]])
    assert np.array_equal(load(tmp_path).train.inputs[1], grey.repeat(3, axis=0))


def test_a_coloured_image_among_grey_ones(tmp_path):
    write_parquet(tmp_path, [*pixels(3, 4, 1), pixels(1, 4)[0]])
    with pytest.raises(CorruptFile, match=r"test\.parquet, row 1: a colour image, but the first one is grey"):
        load(tmp_path)


@pytest.mark.parametrize("blob", [b"no image", b"", None, "half"])
def test_an_image_that_cannot_be_read(tmp_path, blob):
    write_parquet(tmp_path, pixels(6, 16))
    good = encode(pixels(1, 16)[0], "png")
    parquet(tmp_path / "train-1.parquet", [good, good[: len(good) // 2] if blob == "half" else blob], [0, 1])
    with pytest.raises(CorruptFile, match=r"train-1\.parquet, row 1: not a readable image"):
        load(tmp_path)


@pytest.mark.parametrize(
    "damage", [truncate, lambda path: path.write_bytes(b""), lambda path: path.write_bytes(b"x" * 500)]
)
def test_a_broken_parquet_file(tmp_path, damage):
    write_parquet(tmp_path, pixels(6, 16))
    damage(tmp_path / "train-1.parquet")
    before = (tmp_path / "train-1.parquet").read_bytes()
    with pytest.raises(CorruptFile, match=r"train-1\.parquet: not a readable parquet file"):
        load(tmp_path)
    found = data.verify("folder", tmp_path)
    assert not found.ok
    assert "train-1.parquet" in found.problems[0]
    assert (tmp_path / "train-1.parquet").read_bytes() == before


def test_wrong_columns_are_named(tmp_path):
    write_parquet(tmp_path, pixels(4, 4))
    parquet(tmp_path / "test.parquet", [b""], [0], column="tiff")
    with pytest.raises(
        CorruptFile,
        match=r"test\.parquet: columns one of webp.* and one of label, fine_label expected, found label, tiff",
    ):
        load(tmp_path)


def test_missing_labels_and_empty_files(tmp_path):
    write_parquet(tmp_path, pixels(4, 4))
    good = encode(pixels(1, 4)[0], "png")
    parquet(tmp_path / "test.parquet", [good, good], [0, None])
    with pytest.raises(CorruptFile, match=r"test\.parquet: 2 rows, 1 of them without label"):
        load(tmp_path)
    parquet(tmp_path / "test.parquet", [], [])
    with pytest.raises(CorruptFile, match=r"test\.parquet: 0 rows"):
        load(tmp_path)


def npz(path, n=6, test=2, **other):
    images, labels = pixels(n + test, 5, 1)[:, 0], np.arange(n + test) % 3
    arrays = {"x_train": images[:n], "y_train": labels[:n], "x_test": images[n:], "y_test": labels[n:], **other}
    np.savez(path, **{key: value for key, value in arrays.items() if value is not None})
    return path


def test_npz(tmp_path):
    npz(tmp_path / "anything.npz")
    dataset = load(tmp_path)
    assert np.array_equal(dataset.train.inputs, pixels(8, 5, 1)[:6])
    assert np.array_equal(dataset.test.inputs, pixels(8, 5, 1)[6:])
    assert dataset.train.targets.tolist() == [0, 1, 2, 0, 1, 2]
    assert data.load("mnist", root=tmp_path).classes == tuple("0123456789")


def test_npz_in_colour(tmp_path):
    images = pixels(8, 5)
    npz(tmp_path / "a.npz", x_train=images[:6].transpose(0, 2, 3, 1), x_test=images[6:].transpose(0, 2, 3, 1))
    assert np.array_equal(load(tmp_path).train.inputs, images[:6])


def test_of_several_npz_files_only_the_named_one_is_taken(tmp_path):
    npz(tmp_path / "a.npz")
    npz(tmp_path / "b.npz")
    with pytest.raises(DataUnavailable):
        load(tmp_path)
    npz(tmp_path / "mnist.npz", n=4)
    assert len(data.load("mnist", root=tmp_path).train) == 4


@pytest.mark.parametrize(
    "wrong",
    [
        {"y_test": None},
        {"x_train": np.zeros((6, 5, 5))},
        {"x_train": np.zeros((6, 25), np.uint8)},
        {"y_train": np.zeros(6)},
        {"y_train": np.zeros(5, np.int64)},
        {"y_train": np.full(6, -1)},
        {"x_test": np.zeros((2, 4, 4), np.uint8)},
        {"x_train": np.zeros((0, 5, 5), np.uint8), "y_train": np.zeros(0, np.int64)},
        {"x_test": np.zeros((0, 5, 5), np.uint8), "y_test": np.zeros(0, np.int64)},
        {"y_train": np.array([None] * 6)},
    ],
    ids=["absent", "float", "flat", "float labels", "too few", "negative", "other size", "empty", "no test", "objects"],
)
def test_wrong_arrays(tmp_path, wrong):
    npz(tmp_path / "a.npz", **wrong)
    with pytest.raises(CorruptFile) as caught:
        load(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert os.listdir(tmp_path) == ["a.npz"]


@pytest.mark.parametrize(
    "damage", [truncate, lambda path: path.write_bytes(b""), lambda path: path.write_bytes(b"x" * 99)]
)
def test_a_broken_npz_file(tmp_path, damage):
    damage(npz(tmp_path / "a.npz"))
    with pytest.raises(CorruptFile, match=r"a\.npz: not an MNIST-style npz file"):
        load(tmp_path)


def test_pickles_in_npz_are_not_executed(tmp_path, monkeypatch):
    class Evil:
        def __reduce__(self):
            return (os.mkdir, ("executed",))

    monkeypatch.chdir(tmp_path)
    npz(tmp_path / "a.npz", x_train=np.array([Evil()], dtype=object))
    with pytest.raises(CorruptFile, match=r"a\.npz"):
        load(tmp_path)
    assert not (tmp_path / "executed").exists()


def write_imagefolder(folder, *, test="val", form="png", side=4):
    """Two training images and one for testing of each class; pixel values say which they are."""
    value = 0
    for split, count in (("train", 2), (test, 1)):
        for name in ("zebra", "ant"):
            for i in range(count):
                path = folder / split / name / "deeper" / f"{i}.{form.upper()}"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(encode(np.full((3, side, side), value, np.uint8), form))
                value += 10


@pytest.mark.parametrize("test", ["val", "test"])
def test_imagefolder(tmp_path, test):
    write_imagefolder(tmp_path, test=test)
    (tmp_path / "train" / "ant" / "notes.txt").write_text("no image")
    dataset = load(tmp_path, "imagefolder")
    assert dataset.classes == ("ant", "zebra")
    assert dataset.train.targets.tolist() == [0, 0, 1, 1]
    assert dataset.train.inputs[:, 0, 0, 0].tolist() == [20, 30, 0, 10]
    assert dataset.test.inputs[:, 0, 0, 0].tolist() == [50, 40]
    assert dataset.test.targets.tolist() == [0, 1]
    assert load(tmp_path, "imagefolder", image_size=2).input_shape == (3, 2, 2)


@pytest.mark.parametrize("form", ["png", "jpeg", "webp", "bmp", "ppm", "tiff"])
def test_every_format_of_imagefolder(tmp_path, form):
    write_imagefolder(tmp_path, form=form)
    found = load(tmp_path, "imagefolder").train.inputs[:, 0, 0, 0].int()
    assert (found - torch.tensor([20, 30, 0, 10])).abs().max() <= (3 if form in ("jpeg", "webp") else 0)


def test_resnet50_learns_from_an_imagefolder_of_different_sizes(tmp_path):
    write_imagefolder(tmp_path, side=40)
    (tmp_path / "train" / "ant" / "wide.png").write_bytes(encode(pixels(1, 50)[0][:, :45], "png"))
    dataset = load(tmp_path, "imagefolder", image_size=32)
    augment = data.default_augment(dataset)
    torch.manual_seed(0)
    model = models.build("resnet50", input_shape=dataset.input_shape, num_classes=dataset.num_classes)
    loss = torch.nn.functional.cross_entropy(model(augment(dataset.train.inputs, train=True)), dataset.train.targets)
    loss.backward()
    assert len(dataset.train) == 5
    assert torch.isfinite(loss)
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


def test_a_new_image_in_a_folder_is_seen(tmp_path):
    write_imagefolder(tmp_path)
    assert len(load(tmp_path, "imagefolder").train) == 4
    (tmp_path / "train" / "ant" / "new.png").write_bytes(encode(pixels(1, 4)[0], "png"))
    assert len(load(tmp_path, "imagefolder").train) == 5


def test_imagefolder_with_what_does_not_fit(tmp_path):
    with pytest.raises(DataUnavailable, match=r"train/<class>/ and val/<class>/"):
        load(tmp_path, "imagefolder")
    write_imagefolder(tmp_path)
    (tmp_path / "train" / "bee").mkdir()
    with pytest.raises(DataUnavailable, match=r"train/bee: no images"):
        load(tmp_path, "imagefolder")
    (tmp_path / "train" / "bee" / "0.png").write_bytes(b"no image")
    with pytest.raises(CorruptFile, match=r"train and val do not have the same classes \(bee\)"):
        load(tmp_path, "imagefolder")
    (tmp_path / "val" / "bee").mkdir()
    (tmp_path / "val" / "bee" / "0.png").write_bytes(encode(pixels(1, 4)[0], "png"))
    with pytest.raises(CorruptFile, match=r"train/bee/0\.png: not a readable image"):
        load(tmp_path, "imagefolder")
    assert data.info("folder", tmp_path).how_to_get


def test_imagefolder_without_classes(tmp_path):
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
    with pytest.raises(DataUnavailable, match=r"train: no folders"):
        load(tmp_path, "imagefolder")
    assert "no folders" in data.info("imagefolder", tmp_path).how_to_get


@pytest.mark.parametrize(
    ("module", "message"),
    [
        ("pyarrow", r"a parquet file needs pyarrow: pip install 'conjugo\[data\]'"),
        ("PIL", r"needs PIL: .*'conjugo\[vision\]'"),
    ],
)
def test_a_missing_extra_is_named(tmp_path, monkeypatch, module, message):
    write_parquet(tmp_path, pixels(4, 4))
    for name in [name for name in sys.modules if name.split(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)  # import raises ImportError
    with pytest.raises(DataUnavailable, match=message):
        load(tmp_path)


def test_the_cache_needs_no_extra(tmp_path, monkeypatch):
    write_parquet(tmp_path, pixels(4, 4))
    load(tmp_path)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert len(load(tmp_path).train) == 2
