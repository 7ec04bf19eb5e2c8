"""Data: splits, noise, scaling, and CIFAR read back from archives that this file makes itself."""

import hashlib
import pickle
import resource
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torchvision.datasets import CIFAR10, CIFAR100

from samlib import data
from samlib.errors import InputError
from samlib.spec import DataSpec

NOISY = DataSpec(train_size=600, validation_size=200, label_noise=0.4)


def test_digits_are_the_whole_of_scikit_learns_set():
    images = data.read("digits")
    assert images.train_images.shape == (1000, 8, 8, 1)
    assert images.test_images.shape == (797, 8, 8, 1)
    assert images.train_images.max() == images.maximum == 16
    assert len(images.classes) == 10


def test_splits_do_not_overlap_and_the_test_split_is_the_same_for_every_seed():
    train, validation = data.draw(1000, NOISY, seed=3)
    assert len(train) == 600
    assert len(validation) == 200
    assert not set(train.tolist()) & set(validation.tolist())
    one, two = data.load(NOISY, 0), data.load(NOISY, 1)
    assert torch.equal(one.test.inputs, two.test.inputs)
    assert not torch.equal(one.train.inputs, two.train.inputs)


def test_a_seed_gives_the_same_splits_each_time():
    one, two = data.load(NOISY, 5), data.load(NOISY, 5)
    for name in ("train", "validation", "test"):
        assert torch.equal(getattr(one, name).inputs, getattr(two, name).inputs)
        assert torch.equal(getattr(one, name).labels, getattr(two, name).labels)


@pytest.mark.parametrize("share", [0.0, 0.2, 0.4, 1.0])
def test_label_noise_is_exact_and_always_wrong(share):
    labels = torch.arange(600) % 10
    noisy = data.with_label_noise(labels, share, 10, data.generator(0, "noise"))
    assert (noisy != labels).sum() == round(share * 600)
    assert noisy.min() >= 0
    assert noisy.max() <= 9


def test_label_noise_moves_to_every_wrong_class_alike():
    labels = torch.zeros(90_000, dtype=torch.int64)
    counts = torch.bincount(data.with_label_noise(labels, 1.0, 10, data.generator(1, "noise")), minlength=10)
    assert counts[0] == 0
    assert (counts[1:] - 10_000).abs().max() < 5 * np.sqrt(10_000)


def test_noise_touches_training_labels_only_and_not_the_draw():
    noisy, clean = data.load(NOISY, 0), data.load(DataSpec(train_size=600, validation_size=200), 0)
    assert torch.equal(noisy.train.inputs, clean.train.inputs)
    assert (noisy.train.labels != clean.train.labels).sum() == 240
    assert torch.equal(noisy.validation.labels, clean.validation.labels)
    assert torch.equal(noisy.test.labels, clean.test.labels)


def test_scalings():
    images = data.read("digits")
    unit, _ = data.scaled(images, "unit")
    symmetric, _ = data.scaled(images, "symmetric")
    standard, _ = data.scaled(images, "standardize")
    assert (unit.min(), unit.max()) == (0, 1)
    assert (symmetric.min(), symmetric.max()) == (-1, 1)
    torch.testing.assert_close(standard.mean(), torch.tensor(0.0), atol=1e-5, rtol=0)
    torch.testing.assert_close(standard.std(), torch.tensor(1.0), atol=1e-5, rtol=0)


def test_images_are_scaled_once_for_all_seeds():
    data.scaled.cache_clear()
    first, second = (data.load(DataSpec("digits", scaling="unit"), seed) for seed in (0, 1))
    assert data.scaled.cache_info().misses == 1
    assert torch.equal(first.test.inputs, second.test.inputs)
    assert not torch.equal(first.train.inputs, second.train.inputs)


@pytest.mark.parametrize(("drop_last", "sizes"), [(True, [4, 4]), (False, [4, 4, 2])])
def test_batches_cover_an_epoch_once(drop_last, sizes):
    found = list(data.batches(10, 4, drop_last, data.generator(0, "order")))
    assert [len(batch) for batch in found] == sizes
    seen = torch.cat(found).tolist()
    assert len(set(seen)) == len(seen)


def test_generators_of_two_purposes_differ():
    assert data.generator(0, "noise").initial_seed() != data.generator(0, "order").initial_seed()
    assert data.generator(0, "noise").initial_seed() == data.generator(0, "noise").initial_seed()


def test_more_images_than_there_are_is_refused():
    with pytest.raises(InputError, match=r"train_size = 900.*validation_size = 200.*1000"):
        data.load(DataSpec(train_size=900, validation_size=200), 0)


# ------------------------------------------------------------------------------------------------ CIFAR


def tiny_archive(folder, source, rng):
    """An archive in the official layout with a few random images a file, and the digests that torchvision checks."""
    base = folder / source.base_folder
    base.mkdir(parents=True)
    label = "labels" if source is CIFAR10 else "fine_labels"
    names = [f"class {index}" for index in range(10 if source is CIFAR10 else 100)]

    def put(name, content):
        raw = pickle.dumps(content)
        (base / name).write_bytes(raw)
        return [name, hashlib.md5(raw).hexdigest()]

    def batch(name):
        return put(name, {"data": rng.integers(0, 256, (4, 3072), np.uint8), label: rng.integers(0, 10, 4).tolist()})

    return {
        "train_list": [batch(name) for name, _ in source.train_list],
        "test_list": [batch(name) for name, _ in source.test_list],
        "meta": {**source.meta, "md5": put(source.meta["filename"], {source.meta["key"]: names})[1]},
    }


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("SAMLIB_DATA", str(tmp_path))
    data._cifar.cache_clear()
    yield tmp_path
    data._cifar.cache_clear()


@pytest.mark.parametrize(("name", "source"), [("cifar10", CIFAR10), ("cifar100", CIFAR100)])
def test_cifar_through_torchvision_and_then_from_the_npz(root, monkeypatch, name, source):
    for attribute, value in tiny_archive(root, source, np.random.default_rng(0)).items():
        monkeypatch.setattr(source, attribute, value)
    first = data.read(name)
    original = source(str(root), train=True, download=False)
    assert np.array_equal(first.train_images, original.data)
    assert first.train_labels.tolist() == list(original.targets)
    assert first.test_images.shape == (4, 32, 32, 3)
    assert list(first.classes) == original.classes

    monkeypatch.setattr(
        source, "__init__", lambda *_, **__: pytest.fail("torchvision was asked although the npz is there")
    )
    data._cifar.cache_clear()
    again = data.read(name)
    assert np.array_equal(again.train_images, first.train_images)
    assert again.digest == first.digest
    splits = data.load(DataSpec(name, train_size=2, validation_size=1), seed=0)
    assert splits.train.inputs.shape == (2, 3, 32, 32)


def test_no_network_and_no_file_names_file_folder_command_and_way_out(root, monkeypatch):
    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:9/cifar-10-python.tar.gz")  # a port nobody listens on
    with pytest.raises(InputError) as error:
        data.load(DataSpec("cifar10"), 0)
    for word in ("cifar10.npz", str(root), "python -c", "SAMLIB_DATA", "--profile quick"):
        assert word in str(error.value)
    assert not (root / "cifar10.npz").exists()


def test_a_broken_npz_is_named(root):
    (root / "cifar10.npz").write_bytes(b"PK not really")
    with pytest.raises(InputError, match=r"cifar10\.npz cannot be read.*delete it"):
        data.read("cifar10")


def contents(**changes):
    """The arrays of a small CIFAR npz, some of them changed."""
    rng = np.random.default_rng(0)
    images = {f"{split}_images": rng.integers(0, 256, (4, 32, 32, 3), np.uint8) for split in ("train", "test")}
    labels = {f"{split}_labels": np.array([0, 3, 9, 1], np.uint8) for split in ("train", "test")}
    return {**images, **labels, "classes": np.array([f"class {index}" for index in range(10)]), **changes}


def flip_the_middle(raw):
    middle = len(raw) // 2
    return raw[:middle] + bytes(255 - byte for byte in raw[middle : middle + 64]) + raw[middle + 64 :]


@pytest.mark.parametrize(
    ("write", "spoil"),
    [
        (np.savez, lambda raw: raw[: len(raw) // 2]),
        (np.savez, lambda raw: b""),
        (np.savez, flip_the_middle),
        (np.savez_compressed, flip_the_middle),
    ],
    ids=["truncated", "empty", "checksum", "compressed stream"],
)
def test_a_damaged_npz_is_named(root, write, spoil):
    path = root / "cifar10.npz"
    write(path, **contents())
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(InputError, match=r"cifar10\.npz cannot be read.*delete it"):
        data.read("cifar10")


def test_a_single_array_under_the_name_of_an_npz_is_named(root):
    with open(root / "cifar10.npz", "wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(InputError, match=r"cifar10\.npz cannot be read.*delete it"):
        data.read("cifar10")


@pytest.mark.parametrize(
    ("field", "array", "found", "wanted"),
    [
        ("train_images", np.zeros((4, 3, 32, 32), np.float32), "float32 of shape (4, 3, 32, 32)", "uint8"),
        ("train_images", np.zeros((4, 3, 32, 32), np.uint8), "shape (4, 3, 32, 32)", "(N, height, width, 3)"),
        ("test_images", np.zeros((4, 32, 32, 3), np.float32), "float32", "uint8 of shape (N, height, width, 3)"),
        ("test_images", np.zeros((4, 3072), np.uint8), "shape (4, 3072)", "(N, height, width, 3)"),
        ("test_images", np.zeros((0, 32, 32, 3), np.uint8), "shape (0, 32, 32, 3)", "(N, height, width, 3)"),
        ("train_labels", np.zeros((4, 1), np.uint8), "uint8 of shape (4, 1)", "shape (4,)"),
        ("train_labels", np.zeros(4, np.float32), "float32", "uint8"),
        ("test_labels", np.zeros(3, np.uint8), "shape (3,)", "shape (4,)"),
        ("test_labels", np.array([0, 1, 2, 10], np.uint8), "up to 10", "0 to 9"),
        ("classes", np.array("class 0"), "shape ()", "(classes,)"),
    ],
)
def test_an_array_of_another_form_is_refused_with_what_was_found_and_what_is_wanted(root, field, array, found, wanted):
    np.savez(root / "cifar10.npz", **contents(**{field: array}))
    with pytest.raises(InputError) as error:
        data.read("cifar10")
    for word in (str(root / "cifar10.npz"), f"{field} is", found, wanted, "delete the file"):
        assert word in str(error.value)


def test_arrays_of_the_right_form_are_read(root):
    np.savez(root / "cifar10.npz", **contents())
    assert data.read("cifar10").train_labels.tolist() == [0, 3, 9, 1]


@contextmanager
def small_disk():
    """Files of this process end after 20,000 bytes, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_data_folder_is_named_and_keeps_no_part_of_a_file(root, monkeypatch):
    # each file of the archive fits below the limit (4 images of 3,072 bytes); the npz of all 24 does not
    for attribute, value in tiny_archive(root, CIFAR10, np.random.default_rng(0)).items():
        monkeypatch.setattr(CIFAR10, attribute, value)
    with small_disk(), pytest.raises(InputError) as error:
        data.read("cifar10")
    for word in (f"data folder {root} ", "cifar10.npz", "make room", "SAMLIB_DATA"):
        assert word in str(error.value)
    assert not list(root.glob("*.npz"))
    assert not list(root.glob(".*.npz"))


def test_standardising_takes_all_training_images_of_the_set_and_no_test_image():
    images = data.read("digits")
    pixels = images.train_images.astype(np.float64) / 16
    wanted = (pixels - pixels.mean()) / pixels.std(ddof=1)
    train, test = data.scaled(images, "standardize")
    np.testing.assert_allclose(train.numpy()[:, 0], wanted[..., 0], atol=1e-5)
    np.testing.assert_allclose(
        test.numpy()[:, 0], (images.test_images[..., 0] / 16 - pixels.mean()) / pixels.std(ddof=1), atol=1e-5
    )
    # the same pixels for every seed: an image of one seed's split is, digit for digit, one of the scaled pool
    for seed in (0, 1):
        split = data.load(NOISY, seed).train.inputs
        order, _ = data.draw(1000, NOISY, seed)
        assert torch.equal(split, train[order])
