"""Classes that a user describes in a CSV file: a column ``name``, and one a attribute in any order."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from svip.data.tables import class_problems, column_problems, parse_csv, refuse


def parse_new_classes(content: bytes, attributes: Sequence[str], source: str) -> pd.DataFrame:
    """The classes of a CSV as a bundle has them: name, role (test_unseen), one float32 column an attribute, in order.

    ``source`` names the file in errors. DataError names the columns that are missing or unknown (with the nearest
    match), the cells that are no number (by line and column) and the names that stand there twice.
    """
    table = parse_csv(content, source)
    hint = ". `svip predict --template FILE` writes the header"
    refuse(source, list(column_problems(table.header, ["name", *attributes])), hint)
    refuse(source, list(class_problems(table, "name")))
    frame = table.frame()
    return pd.concat([frame[["name"]].assign(role="test_unseen"), frame[list(attributes)].astype(np.float32)], axis=1)
