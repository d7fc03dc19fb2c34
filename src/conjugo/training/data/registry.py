"""Data sets by name: finding, loading, fetching, verifying and describing them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from conjugo.errors import CorruptFile, DataUnavailable, check, unknown
from conjugo.training.data import archives, bundled, folders
from conjugo.training.data.cache import cached, user_cache
from conjugo.training.data.dataset import Dataset
from conjugo.training.data.download import Progress, download
from conjugo.training.data.source import Source

__all__ = ["Info", "Verification", "fetch", "info", "load", "names", "verify"]

_NAMED = (*archives.ARCHIVES, "mnist")
_GENERIC = ("folder", "imagefolder")
_DATA_VARIABLE = "CONJUGO_DATA"


def names() -> tuple[str, ...]:
    """The names that :func:`load` knows; ``folder`` and ``imagefolder`` stand for any data of that form."""
    return (*bundled.NAMES, *_NAMED, *_GENERIC)


def load(
    name: str, *, root: str | os.PathLike[str] | None = None, download: bool = False, image_size: int | None = None
) -> Dataset:
    """A data set as tensors.

    name: one of :func:`names`. ``digits``, ``breast_cancer``, ``wine`` and ``iris`` need no files. ``cifar10``,
    ``cifar100`` and ``mnist`` are looked for in *root* and in its sub-folders ``<name>`` and ``<name>-jpeg``; without
    *root* in such sub-folders of the folder that the environment variable CONJUGO_DATA names, then where :func:`fetch`
    puts them. ``folder`` (parquet or npz files) and ``imagefolder`` (one folder of images per class) are whatever
    *root* holds. download: fetch an official archive that is absent. image_size: side in pixels to which encoded images
    are resized and cropped; None: they all have one size already, as those of archives, npz files and bundled sets do.

    Files are decoded once and cached next to the source or in the user's cache folder (the decoded data must fit in
    memory for that); images that come from the cache are mapped, not read.

    Raises UnknownName for a name that does not exist, DataUnavailable when the data is absent (the message says how to
    get it), CorruptFile when it is damaged (the message names the file), ValueError for an *image_size* that data which is
    not encoded does not have.
    """
    dataset = (
        bundled.load(name)
        if name in bundled.NAMES
        else cached(_source(name, root, download=download, image_size=image_size))
    )
    side = dataset.input_shape[1:]
    accepted = f"None for {name!r}, whose examples are of shape {dataset.input_shape}; only encoded images are scaled"
    check(image_size is None or side == (image_size, image_size), "load", "image_size", image_size, accepted)
    return dataset


def _source(name: str, root: str | os.PathLike[str] | None, *, download: bool, image_size: int | None) -> Source:
    """The files of a data set, fetched if that is wanted and possible; DataUnavailable without any."""
    source = _locate(name, root, image_size)
    if source is None and download and name in archives.ARCHIVES:
        fetch(name, root)
        source = _locate(name, root, image_size)
    if source is None:
        raise DataUnavailable(_how_to_get(name, root))
    return source


def fetch(
    name: str, root: str | os.PathLike[str] | None = None, *, url: str | None = None, progress: Progress | None = None
) -> Path:
    """Download the official archive of ``cifar10`` or ``cifar100`` and give its path.

    Nothing to do if it is there and has the published MD5; a damaged one is replaced when the new one is whole.

    root: folder for the archive; None: ``$CONJUGO_DATA/<name>`` or else a folder in the user's cache. url: a mirror;
    the MD5 must be the published one all the same. progress: called with (bytes so far, bytes in all or None).

    Raises UnknownName, DataUnavailable (no network, or data that cannot be downloaded), CorruptFile (wrong checksum).
    """
    _check_name(name)
    if name in bundled.NAMES:
        raise DataUnavailable(f"{name!r} comes with scikit-learn; there is nothing to fetch")
    if name not in archives.ARCHIVES:
        place = _download_folder(name, root)
        raise DataUnavailable(f"{name!r} cannot be downloaded; folder {place}: {_advice(name)}")
    archive = archives.ARCHIVES[name]
    path = _download_folder(name, root) / archive.file
    download(url or archive.url, path, checksum=archive.checksum, progress=progress)
    return path


@dataclass(frozen=True)
class Verification:
    """What :func:`verify` found. files: those that were read. problems: one sentence each; none means all is well."""

    name: str
    files: tuple[Path, ...]
    problems: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether the data is whole."""
        return not self.problems


def verify(name: str, root: str | os.PathLike[str] | None = None, *, image_size: int | None = None) -> Verification:
    """Read and decode all files of a data set, past any cache; archives are held against their published MD5.

    Raises UnknownName and DataUnavailable like :func:`load`; damage is reported, not raised.
    """
    if name in bundled.NAMES:
        bundled.load(name)
        return Verification(name, (), ())
    source = _source(name, root, download=False, image_size=image_size)
    try:
        source.read()
    except CorruptFile as error:
        return Verification(name, source.files, (str(error),))
    return Verification(name, source.files, ())


@dataclass(frozen=True)
class Info:
    """What :func:`info` knows.

    location: folder of the files, or None for bundled or absent data. train, test: numbers of examples. class_counts:
    training examples per class. bytes: size of the decoded data in memory. how_to_get: None when the data is there;
    otherwise what to do, and the fields above are None or empty.
    """

    name: str
    location: Path | None = None
    kind: Literal["image", "table"] | None = None
    train: int | None = None
    test: int | None = None
    input_shape: tuple[int, ...] = ()
    classes: tuple[str, ...] = ()
    class_counts: tuple[int, ...] = ()
    bytes: int | None = None
    how_to_get: str | None = None

    @property
    def available(self) -> bool:
        """Whether the data can be loaded now."""
        return self.how_to_get is None


def info(name: str, root: str | os.PathLike[str] | None = None, *, image_size: int | None = None) -> Info:
    """Size, shape and classes of a data set, or how to get it. Decodes and caches data not loaded before.

    Raises UnknownName and CorruptFile like :func:`load`.
    """
    location = None
    if name not in bundled.NAMES:
        try:
            source = _locate(name, root, image_size)
        except DataUnavailable as error:
            return Info(name, how_to_get=str(error))
        if source is None:
            return Info(name, how_to_get=_how_to_get(name, root))
        location = source.folder
        dataset = cached(source)
    else:
        dataset = bundled.load(name)
    splits = (dataset.train, dataset.test)
    return Info(
        name,
        location=location,
        kind=dataset.kind,
        train=len(dataset.train),
        test=len(dataset.test),
        input_shape=dataset.input_shape,
        classes=dataset.classes,
        class_counts=tuple(dataset.train.targets.bincount(minlength=dataset.num_classes).tolist()),
        bytes=sum(split.inputs.nbytes + split.targets.nbytes for split in splits),
    )


def _check_name(name: str) -> None:
    if name not in names():
        unknown("data set", name, names())


def _folders(name: str, root: str | os.PathLike[str] | None) -> list[Path]:
    """Where to look, in this order."""
    if root is not None:
        folder = Path(root).expanduser()
        return [folder] if name in _GENERIC else [folder, folder / name, folder / f"{name}-jpeg"]
    shared = os.environ.get(_DATA_VARIABLE)
    beside = [Path(shared) / name, Path(shared) / f"{name}-jpeg"] if shared else []
    return [*beside, user_cache() / "data" / name]


def _download_folder(name: str, root: str | os.PathLike[str] | None) -> Path:
    """The first of the places where :func:`load` looks."""
    return _folders(name, root)[0]


def _locate(name: str, root: str | os.PathLike[str] | None, image_size: int | None) -> Source | None:
    """The first source of the data set *name*, or None."""
    _check_name(name)
    check(image_size is None or image_size >= 1, "load", "image_size", image_size, ">= 1 or None")
    check(name not in _GENERIC or root is not None, "load", "root", root, f"a folder for data set {name!r}")
    for folder in _folders(name, root):
        if name == "imagefolder":
            source = folders.find_imagefolder(name, folder, image_size)
        else:
            source = (
                archives.find(name, folder)
                or folders.find_parquet(name, folder, image_size)
                or folders.find_npz(name, folder)
            )
        if source is not None:
            return source
    return None


def _how_to_get(name: str, root: str | os.PathLike[str] | None) -> str:
    searched = ", ".join(map(str, _folders(name, root)))
    where = "" if root is not None else f"; {_DATA_VARIABLE} may name a folder that holds {name}/"
    return f"no data for {name!r} in {searched}: {_advice(name)}{where}"


def _advice(name: str) -> str:
    forms = (
        "train*.parquet and test*.parquet (columns label and webp, jpeg, png or image), "
        "or an npz file with x_train, y_train, x_test, y_test"
    )
    if name in archives.ARCHIVES:
        return f"run `conjugo data fetch {name}`, or put {archives.ARCHIVES[name].file} there, or {forms}"
    if name == "imagefolder":
        return "it must hold images in train/<class>/ and val/<class>/"
    return f"put there {forms}"
