"""Does the metadata of all four data sets parse at full length, with each attribute name over its own column?

``python -m benchmarks.metadata --root data`` reads xlsa17 and the attribute names below the root. A name is told by
content: the classes with the highest values in its column must be those that anybody would name (snow: ski slope).
Beside it the same check with all names moved by one column, which has to fail.
"""

from __future__ import annotations

import argparse
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from scipy.io import loadmat, savemat

from svip.data.catalog import CATALOG, attribute_file, xlsa17_folder
from svip.data.splits import Listing, read_listing

SUN_SCENES = {
    "swimming": "pool",
    "driving": "highway|freeway",
    "camping": "tent|woodland",
    "farming": "corn_field|farm|vineyard",
    "shopping": "store|shop|market",
    "praying": "apse|church|cathedral|chapel|organ_loft",
    "fencing": "^fence|corral",
    "railroad": "rail",
    "flowers": "florist|garden|greenhouse",
    "sand": "desert|sand|mastaba",
    "running water": "waterfall",
    "ice": "ice|igloo|crevasse",
    "snow": "ski_|snow|igloo",
    "smoke": "volcano|industrial|mill|power_plant",
    "ocean": "wave|ocean",
}
"""Attributes that say where one is -> the scenes of which there must be two at the head of its column."""
AWA2_ANIMALS = {
    "patches": "giant.panda",
    "spots": "dalmatian|leopard|giraffe",
    "stripes": "zebra|tiger|skunk",
    "longneck": "giraffe|horse",
    "buckteeth": "beaver|hamster|rabbit",
    "horns": "antelope|moose|rhinoceros",
    "tusks": "walrus|elephant",
    "smelly": "skunk|pig",
    "tunnels": "mole|hamster",
    "plankton": "blue.whale|humpback.whale",
    "meat": "lion|wolf|tiger",
    "arctic": "polar.bear|walrus",
    "jungle": "chimpanzee|gorilla|monkey",
    "tree": "monkey|squirrel",
}
APY_PLACES = {
    "Wing": (21, "aeroplane"),
    "Pedal": (32, "bicycle"),
    "Handlebars": (33, "jetski|motorbike|bicycle"),
    "Mast": (36, "boat"),
    "Label": (38, "bottle"),
    "Horn": (43, "goat"),
    "Saddle": (45, "horse"),
    "Leaf": (46, "pottedplant"),
    "Screen": (50, "tvmonitor"),
    "Feather": (58, "bird"),
    "Wool": (59, "sheep"),
    "Vegetation": (62, "pottedplant"),
    "Beak": (7, "bird"),
}
"""Attributes of aPY -> their place in the authors' list, and the class of the highest value."""
CUB_BIRDS = {
    "has_primary_color::red": "Tanager|Cardinal",
    "has_primary_color::blue": "Bunting|Blue_Grosbeak",
    "has_primary_color::black": "Frigatebird|Ani",
    "has_bill_shape::needle": "Hummingbird",
    "has_bill_shape::dagger": "Kingfisher",
    "has_bill_shape::spatulate": "Mallard|Gadwall",
    "has_bill_shape::hooked_seabird": "Frigatebird|Albatross|Cormorant",
    "has_shape::gull-like": "Gull",
    "has_shape::hummingbird-like": "Hummingbird",
    "has_shape::owl-like": "[Ww]ill",
    "has_shape::tree-clinging-like": "Woodpecker",
    "has_throat_color::red": "Tanager|Vermilion",
}
EXPECTED = {
    "cub": (CUB_BIRDS, 2),
    "sun": (SUN_SCENES, 2),
    "awa2": (AWA2_ANIMALS, 1),
    "apy": ({name: pattern for name, (_, pattern) in APY_PLACES.items()}, 1),
}
"""Data set -> attributes with a pattern of the classes, and how many at the head of the column must match it."""


def told_by_content(listing: Listing, expected: Mapping[str, str], top: int, shift: int = 0) -> int:
    """For how many attributes the highest classes are all of the expected ones; ``shift``: names moved by as much."""
    names = [name.strip() for name in listing.attribute_names]
    names = names[shift:] + names[:shift]
    count = 0
    for name, pattern in expected.items():
        highest = np.argsort(-listing.attributes[:, names.index(name)])[:top]
        count += all(re.search(pattern, listing.class_names[class_id]) for class_id in highest)
    return count


def made_up_apy(folder: Path, root: Path) -> Listing:
    """aPY's real att_splits and folds in ``folder``, with lists and res101.mat that are made up to fit, in ``root``."""
    splits = loadmat(folder / "att_splits.mat")
    classes = [str(name[0][0]) for name in splits["allclasses_names"]]
    unseen = (folder / "testclasses.txt").read_text().split()
    seen = [name for name in classes if name not in unseen]
    rows = np.arange(1, CATALOG["apy"].images + 1)
    is_unseen = np.isin(rows, splits["test_unseen_loc"])
    of_row = [(unseen if flag else seen)[row % (12 if flag else 20)] for row, flag in zip(rows, is_unseen, strict=True)]
    lists, made = root / "apy" / "attribute_data", root / "xlsa17" / "data" / "APY"
    lists.mkdir(parents=True)
    lines = [f"{row}.jpg {name} 1 1 9 9 {' '.join(['0'] * 64)}" for row, name in zip(rows, of_row, strict=True)]
    parts: dict[str, Sequence[str]] = {"apascal_train.txt": lines[:6340], "apascal_test.txt": lines[6340:12695]}
    for name, part in (parts | {"ayahoo_test.txt": lines[12695:]}).items():
        (lists / name).write_text("\n".join(part))
    names = [f"attribute {number}" for number in range(64)]
    for attribute, (place, _) in APY_PLACES.items():
        names[place] = attribute
    (lists / "attribute_names.txt").write_text("\n".join(names))
    shutil.copytree(folder, made, copy_function=shutil.copyfile)
    labels = np.array([[classes.index(name) + 1] for name in of_row])
    savemat(made / "res101.mat", {"image_files": np.array([[f"/{row}.jpg"] for row in rows], object), "labels": labels})
    return read_listing(CATALOG["apy"], made, lists / "attribute_names.txt")


def main() -> None:
    parser = argparse.ArgumentParser(description="Parse the metadata of all four data sets.")
    parser.add_argument("--root", type=Path, default=Path("data"), help="folder with xlsa17 and the attribute names")
    parser.add_argument("--out", type=Path, help="also write the table there")
    arguments = parser.parse_args()
    lines = [
        "| data set | images | classes | attributes | Proposed Split | test_seen in train_loc and val_loc "
        "| names told by content | moved by one |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name, spec in CATALOG.items():
        folder, label = xlsa17_folder(spec, arguments.root), name
        if name == "apy" and not (folder / "res101.mat").exists():
            label = "apy (lists and res101.mat made up to fit)"
            with tempfile.TemporaryDirectory() as made:
                listing = made_up_apy(folder, Path(made))
        else:
            listing = read_listing(spec, folder, attribute_file(spec, arguments.root))
        expected, top = EXPECTED[name]
        told = [f"{told_by_content(listing, expected, top, shift)} of {len(expected)}" for shift in (0, 1)]
        counts = (len(listing.images), len(listing.class_names), len(listing.attribute_names))
        cells = [label, *(f"{count:,}" for count in counts), *map(str, listing.origin.values()), *told]
        lines.append(f"| {' | '.join(cells)} |")
    table = "\n".join(lines) + "\n"
    print(table, end="")
    if arguments.out:
        arguments.out.write_text(table, encoding="utf-8")


if __name__ == "__main__":
    main()
