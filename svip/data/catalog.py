"""What each real data set is: how many of what, and where its original archives put things."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from svip.data.bundle import DataError


@dataclass(frozen=True, kw_only=True)
class DatasetSpec:
    """The numbers are those of Xian et al., "Zero-Shot Learning: A Comprehensive Evaluation", Tables 1 and 2."""

    name: str
    folder: str
    """Folder that the photo archive unpacks to; paths are matched from it on, whatever stands before it."""
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

    @property
    def images(self) -> int:
        return self.trainval + self.test_seen + self.test_unseen


CATALOG = {
    spec.name: spec
    for spec in (
        DatasetSpec(
            name="cub",
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
        ),
    )
}


def photo_folder(spec: DatasetSpec, root: Path) -> Path:
    """``spec.folder`` in the root itself, or in the data set's own folder there; DataError lists the places tried."""
    return _locate(f"the photos of {spec.name}", [parent / spec.folder for parent in _homes(spec, root)])


def attribute_file(spec: DatasetSpec, root: Path) -> Path:
    """The file with the attribute names, found even where there are no photos yet; DataError as above."""
    homes = [parent / spec.folder for parent in _homes(spec, root)]
    # normalised as text: "images/.." can't be followed where images is not there
    places = [_normal(home, name) for home in homes for name in spec.attribute_files]
    return _locate(f"the attribute names of {spec.name}", places)


def xlsa17_folder(spec: DatasetSpec, root: Path) -> Path:
    """The data set's folder of xlsa17, which holds att_splits.mat; DataError as above."""
    places = [root / parent / spec.xlsa17 for parent in ("xlsa17/data", "xlsa17", "data")]
    return _locate(f"xlsa17's att_splits.mat of {spec.name}", [place / "att_splits.mat" for place in places]).parent


def _homes(spec: DatasetSpec, root: Path) -> list[Path]:
    return [root / name for name in (spec.name, spec.xlsa17, "")]


def _normal(home: Path, name: str) -> Path:
    return home.parent / name.removeprefix("../") if name.startswith("../") else home / name


def _locate(what: str, places: Sequence[Path]) -> Path:
    for place in places:
        if place.exists():
            return place
    tried = "".join(f"\n  {place}" for place in places)
    raise DataError(f"{what} not found; set data.root (--root) to the folder that holds the archives. Tried:{tried}")
