"""What there is to fetch, and what each real data set is: how many of what, and where its archives put things.

Sizes and checksums are those that two or more public sources agree on (docs/datasets.md names them); None where there
are none, and then what is downloaded first is what is expected ever after.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from svip.data.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Archive:
    """One file as its owners publish it."""

    name: str
    urls: tuple[str, ...]
    """Tried in order."""
    size: int | None = None
    """Bytes; None where it is not known before the first download."""
    md5: str | None = None
    sha256: str | None = None
    folder: str = ""
    """Folder below the root that it is extracted into; empty: the root itself."""
    holds: tuple[str, ...] = ()
    """Paths below ``folder`` that must exist once it is extracted."""
    unpacked: float = 1.2
    """Disk that its content takes, in sizes of the archive: photos gain little."""


@dataclass(frozen=True, kw_only=True)
class Package:
    """What `svip fetch` takes by name."""

    name: str
    archives: tuple[Archive, ...] = ()
    licence: str = ""
    citation: str = ""


@dataclass(frozen=True, kw_only=True)
class DatasetSpec(Package):
    """The numbers are those of Xian et al., "Zero-Shot Learning: A Comprehensive Evaluation", Tables 1 and 2."""

    folder: str
    """Folder that the photo archive unpacks to; paths are matched from it on, whatever stands before it. ``.``: there
    are several, side by side."""
    xlsa17: str
    """Name of its folder in xlsa17."""
    attribute_files: tuple[str, ...]
    """Files with the attribute names in column order, relative to ``folder``."""
    classes: int
    unseen_classes: int
    val_classes: int
    """Validation classes of each of the three folds."""
    attributes: int
    trainval: int
    """Images of the Proposed Split's trainval_loc."""
    test_seen: int
    test_unseen: int
    mistaken_for: str = ""
    """What people take for it, said where photos are missing."""

    @property
    def images(self) -> int:
        return self.trainval + self.test_seen + self.test_unseen


GBU = (
    "Xian, Lampert, Schiele, Akata: Zero-Shot Learning - A Comprehensive Evaluation of the Good, the Bad and the Ugly. "
    "TPAMI 2019"
)
XLSA17 = Archive(
    name="xlsa17.zip",
    # serves version 2 of the Proposed Splits (no train_loc, no val_loc) since 2019; copies of version 1 are older
    urls=("https://datasets.d2.mpi-inf.mpg.de/xian/xlsa17.zip", "http://datasets.d2.mpi-inf.mpg.de/xian/xlsa17.zip"),
    holds=tuple(f"xlsa17/data/{name}/att_splits.mat" for name in ("CUB", "AWA2", "SUN", "APY")),
)

CATALOG = {
    spec.name: spec
    for spec in (
        DatasetSpec(
            name="cub",
            archives=(
                Archive(
                    name="CUB_200_2011.tgz",
                    urls=("https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz",),
                    size=1_150_585_339,
                    md5="97eceeb196236b17998738112f37df78",
                    sha256="0c685df5597a8b24909f6a7c9db6d11e008733779a671760afef78feb49bf081",
                    folder="cub",
                    holds=("CUB_200_2011/images", "attributes.txt"),
                ),
                XLSA17,
            ),
            licence="photos of many owners; research only",
            citation="Wah et al.: The Caltech-UCSD Birds-200-2011 Dataset. CNS-TR-2011-001, 2011",
            folder="CUB_200_2011",
            xlsa17="CUB",
            attribute_files=("../attributes.txt", "attributes.txt", "attributes/attributes.txt"),
            classes=200,
            unseen_classes=50,
            val_classes=50,
            attributes=312,
            trainval=7057,
            test_seen=1764,
            test_unseen=2967,
        ),
        DatasetSpec(
            name="awa2",
            archives=(
                Archive(
                    name="AwA2-data.zip",
                    urls=("https://cvml.ista.ac.at/AwA2/AwA2-data.zip",),
                    sha256="cc5a849879165acaa2b52f1de3f146ffcd1c475f6ef85bab0152c763e573744f",
                    folder="awa2",
                    holds=("Animals_with_Attributes2/JPEGImages", "Animals_with_Attributes2/predicates.txt"),
                ),
                XLSA17,
            ),
            licence="each photo's own, in the archive's licenses/",
            citation=GBU,
            folder="Animals_with_Attributes2",
            xlsa17="AWA2",
            attribute_files=("predicates.txt",),
            classes=50,
            unseen_classes=10,
            val_classes=13,
            attributes=85,
            trainval=23527,
            test_seen=5882,
            test_unseen=7913,
        ),
        DatasetSpec(
            name="sun",
            archives=(
                Archive(
                    name="SUNAttributeDB_Images.tar.gz",
                    urls=(
                        "https://cs.brown.edu/people/gmpatter/Attributes/SUNAttributeDB_Images.tar.gz",
                        "https://cs.brown.edu/~gmpatter/Attributes/SUNAttributeDB_Images.tar.gz",
                    ),
                    folder="sun",
                    holds=("images",),
                ),
                Archive(
                    name="SUNAttributeDB.tar.gz",
                    urls=(
                        "https://cs.brown.edu/people/gmpatter/Attributes/SUNAttributeDB.tar.gz",
                        "https://cs.brown.edu/~gmpatter/Attributes/SUNAttributeDB.tar.gz",
                    ),
                    md5="883293e5b645822f6ae0046c6df54183",
                    folder="sun",
                    holds=("SUNAttributeDB/attributes.mat",),
                ),
                XLSA17,
            ),
            licence="photos of many owners; research only",
            citation="Patterson, Xu, Su, Hays: The SUN Attribute Database. IJCV 2014",
            folder="images",
            xlsa17="SUN",
            attribute_files=("../attributes.txt", "../attributes.mat", "../SUNAttributeDB/attributes.mat"),
            classes=717,
            unseen_classes=72,
            val_classes=65,
            attributes=102,
            trainval=10320,
            test_seen=2580,
            test_unseen=1440,
            mistaken_for="SUN397 is another data set: the photos are those of SUNAttributeDB_Images.tar.gz",
        ),
        DatasetSpec(
            name="apy",
            archives=(
                Archive(
                    name="attribute_data.tar.gz",
                    urls=("http://vision.cs.uiuc.edu/attributes/attribute_data.tar.gz",),
                    folder="apy",
                    holds=("attribute_data/apascal_train.txt", "attribute_data/attribute_names.txt"),
                ),
                Archive(
                    name="ayahoo_test_images.tar.gz",
                    urls=("http://vision.cs.uiuc.edu/attributes/ayahoo_test_images.tar.gz",),
                    folder="apy",
                    holds=("ayahoo_test_images",),
                ),
                Archive(
                    # both parts of aPascal: its test objects are on VOC's val photos
                    name="VOCtrainval_14-Jul-2008.tar",
                    urls=("http://host.robots.ox.ac.uk/pascal/VOC/voc2008/VOCtrainval_14-Jul-2008.tar",),
                    md5="2629fa636546599198acfcfbfcf1904a",
                    sha256="7f0ca53c1b5a838fbe946965fc106c6e86832183240af5c88e3f6c306318d42e",
                    folder="apy",
                    holds=("VOCdevkit/VOC2008/JPEGImages",),
                ),
                XLSA17,
            ),
            licence="photos of Flickr and Yahoo users, under their terms",
            citation="Farhadi, Endres, Hoiem, Forsyth: Describing Objects by their Attributes. CVPR 2009",
            folder=".",
            xlsa17="APY",
            attribute_files=("attribute_data/attribute_names.txt",),
            classes=32,
            unseen_classes=12,
            val_classes=5,
            attributes=64,
            trainval=5932,
            test_seen=1483,
            test_unseen=7924,
        ),
    )
}
STANFORD = ("https://downloads.cs.stanford.edu/nlp/data", "https://nlp.stanford.edu/data")
GLOVE = {
    "licence": "PDDL 1.0",
    "citation": "Pennington, Socher, Manning: GloVe: Global Vectors for Word Representation. EMNLP 2014",
}
PACKAGES: dict[str, Package] = CATALOG | {
    package.name: package
    for package in (
        Package(name="xlsa17", archives=(XLSA17,), licence="none stated", citation=GBU),
        Package(
            name="glove.6B",
            archives=(
                Archive(
                    name="glove.6B.zip",
                    urls=tuple(f"{place}/glove.6B.zip" for place in STANFORD),
                    size=862_182_613,
                    md5="056ea991adb4740ac6bf1b6d9b50408b",
                    sha256="617afb2fe6cbd085c235baf7a465b96f4112bd7f7ccb2b2cbd649fed9cbcf2fb",
                    folder="word_vectors",
                    holds=("glove.6B.300d.txt",),
                    unpacked=2.61,  # 2,249,862,459 bytes in four files
                ),
            ),
            **GLOVE,
        ),
        Package(
            name="glove.840B",
            archives=(
                Archive(
                    name="glove.840B.300d.zip",
                    urls=tuple(f"{place}/glove.840B.300d.zip" for place in STANFORD),
                    size=2_176_768_927,
                    md5="2ffafcc9f9ae46fc8c95f32372976137",
                    sha256="c06db255e65095393609f19a4cfca20bf3a71e20cc53e892aafa490347e3849f",
                    folder="word_vectors",
                    holds=("glove.840B.300d.txt",),
                    unpacked=2.6,  # 5,646,236,541 bytes
                ),
            ),
            **GLOVE,
        ),
    )
}
"""The data sets, and what they share."""


def photo_folder(spec: DatasetSpec, root: Path) -> Path:
    """``spec.folder`` in the root itself, or in the data set's own folder there; DataError lists the places tried."""
    if spec.folder == ".":
        return attribute_file(spec, root).parents[1]
    hint = f" ({spec.mistaken_for})" if spec.mistaken_for else ""
    return _locate(
        spec, root, f"the photos of {spec.name}{hint}", [parent / spec.folder for parent in _homes(spec, root)]
    )


def attribute_file(spec: DatasetSpec, root: Path) -> Path:
    """The file with the attribute names, found even where there are no photos yet; DataError as above."""
    homes = [parent / spec.folder for parent in _homes(spec, root)]
    # normalised as text: "images/.." can't be followed where images is not there
    places = [_normal(home, name) for home in homes for name in spec.attribute_files]
    return _locate(spec, root, f"the attribute names of {spec.name}", places)


def xlsa17_folder(spec: DatasetSpec, root: Path) -> Path:
    """The data set's folder of xlsa17, which holds att_splits.mat; DataError as above."""
    places = [root / parent / spec.xlsa17 for parent in ("xlsa17/data", "xlsa17", "data")]
    files = [place / "att_splits.mat" for place in places]
    return _locate(spec, root, f"xlsa17's att_splits.mat of {spec.name}", files).parent


def _homes(spec: DatasetSpec, root: Path) -> list[Path]:
    return [root / name for name in (spec.name, spec.xlsa17, "")]


def _normal(home: Path, name: str) -> Path:
    return home.parent / name.removeprefix("../") if name.startswith("../") else home / name


def _locate(spec: DatasetSpec, root: Path, what: str, places: Sequence[Path]) -> Path:
    for place in places:
        if place.exists():
            return place
    tried = "".join(f"\n  {place}" for place in places)
    raise DataError(
        f"{what} not found; `svip fetch {spec.name} --root {root}` gets all of {spec.name}, or set data.root (--root) "
        f"to the folder that holds the archives. Tried:{tried}"
    )
