"""Temporary."""


def attribute_groups(dataset: str, names: list[str]) -> list[list[int]]:
    return [list(range(len(names)))]
