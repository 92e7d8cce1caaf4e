"""gensim's KeyedVectors files, read without running anything of them.

They are pickles, and unpickling one freely runs whatever its writer put in. Here each class that such a file names
becomes an inert stand-in, any other one is an error, and the arrays are built from their bytes.
"""

from __future__ import annotations

import pickle
from collections.abc import Set
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from svip.semantics.scan import COMMON, VectorsError, Words

NUMPY_CORE = ("numpy.core", "numpy._core")
KEYED_VECTORS = ("gensim.models.keyedvectors.KeyedVectors", "gensim.models.keyedvectors.Word2VecKeyedVectors")
WORD2VEC = "gensim.models.word2vec.Word2Vec"
RECONSTRUCT = tuple(f"{core}.multiarray._reconstruct" for core in NUMPY_CORE)
ENCODE = "_codecs.encode"
"""What bytes are made with in files of gensim 3 (pickle protocol 2)."""
FROM_BUFFER = tuple(f"{core}.numeric._frombuffer" for core in NUMPY_CORE)
UNREAD = (
    *("numpy.ndarray", "numpy.dtype", "gensim.models.keyedvectors.Vocab", "gensim.models.keyedvectors.CompatVocab"),
    *(f"{core}.multiarray.scalar" for core in NUMPY_CORE),
    # the rest of a Word2Vec: its random state, counts, and two functions that it refers to
    *("numpy.random._pickle.__randomstate_ctor", "numpy.random._pickle.__bit_generator_ctor"),
    *("numpy.random._mt19937.MT19937", "collections.defaultdict", "builtins.int", "builtins.hash"),
    "gensim.utils.call_on_class_only",
)
ADMITTED = frozenset((*KEYED_VECTORS, WORD2VEC, ENCODE, *RECONSTRUCT, *FROM_BUFFER, *UNREAD))
"""All that a file may name; nothing of it is imported or called."""


class StandIn:
    """Keeps what an object was to be built of, and does nothing with it."""

    name = ""
    state: Any = None

    def __init__(self, *arguments: object) -> None:
        self.arguments = arguments

    def __setstate__(self, state: object) -> None:
        self.state = state

    def __setitem__(self, key: object, value: object) -> None:
        """Items of a dictionary that is not needed."""


class _Unpickler(pickle._Unpickler):
    """Python's own, not C's: that one lets a file of ten bytes ask for a table that fills the memory (LONG_BINPUT)."""

    # and a bytearray is made, and filled with zeros, before it is known whether the file has as many bytes
    dispatch = pickle._Unpickler.dispatch | {
        pickle.BYTEARRAY8[0]: pickle._Unpickler.dispatch[pickle.BINBYTES8[0]],
    }

    def find_class(self, module: str, name: str) -> type[StandIn]:
        full = f"{module}.{name}"
        if full not in ADMITTED:
            raise pickle.UnpicklingError(f"it holds more than word vectors, and would have run {full!r}")
        return type(name, (StandIn,), {"name": full, "__new__": lambda cls, *arguments: object.__new__(cls)})


def read_keyed_vectors(file: IO[bytes], name: str, path: Path, wanted: Set[str]) -> Words:
    """The wanted words of what KeyedVectors.save or Word2Vec.save of gensim wrote.

    ``file``: the pickle at its beginning; ``path``: where it lies, beside its ``.vectors.npy`` if it has one.
    VectorsError names what the file would have run, or what does not fit.
    """
    try:
        content = _Unpickler(file).load()
    except Exception as error:  # a damaged pickle raises anything
        reason = str(error) or type(error).__name__
        raise VectorsError(f"{name} is no gensim KeyedVectors: {reason}. Nothing of it was run") from error
    prefix = ""
    if getattr(content, "name", "") == WORD2VEC and isinstance(content.state, dict):
        content, prefix = content.state.get("wv"), "wv."
    if getattr(content, "name", "") not in KEYED_VECTORS or not isinstance(content.state, dict):
        raise VectorsError(f"{name} is no gensim KeyedVectors; expected what its save() wrote")
    state = content.state
    words = state.get("index_to_key", state.get("index2word"))  # the latter in files of gensim 3
    if not isinstance(words, list) or not words or not all(isinstance(word, str) for word in words):
        raise VectorsError(f"{name}: expected the list of its words in index_to_key")
    if "vectors" in state:
        vectors = _array(state["vectors"], name)
    else:
        vectors = _open_array(path.with_name(f"{path.name}.{prefix}vectors.npy"), name)
    if vectors.dtype.kind != "f" or vectors.ndim != 2 or len(vectors) != len(words):
        raise VectorsError(
            f"{name}: expected vectors of floats [{len(words)}, V] for its words, "
            f"found {vectors.dtype} {list(vectors.shape)}; are its files of one saving?"
        )
    rows = {word: _row(vectors, index) for index, word in enumerate(words) if word in wanted}
    for word, vector in rows.items():
        if not np.isfinite(vector).all():
            raise VectorsError(f"{name}, word {word!r}: expected finite numbers")
    return Words(vectors.shape[1], rows, words[:COMMON])


def _open_array(path: Path, name: str) -> NDArray[Any]:
    try:
        array: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError as error:
        raise VectorsError(f"{name} keeps its vectors in {path}, which does not exist; put it beside") from error
    except Exception as error:  # numpy raises many types for a damaged header
        raise VectorsError(f"{path} holds no vectors for {name} ({error}); save them again") from error
    if not array.flags.c_contiguous:
        raise VectorsError(f"{path}: expected the rows of its array one after another, as gensim saves them")
    return array


def _row(vectors: NDArray[Any], index: int) -> NDArray[np.float32]:
    if isinstance(vectors, np.memmap) and vectors.filename:
        # read, for a look at one row of a mapped file may bring megabytes of it into the process's memory
        start = vectors.offset + index * vectors.strides[0]
        return np.fromfile(vectors.filename, vectors.dtype, vectors.shape[1], offset=start).astype(np.float32)
    return vectors[index].astype(np.float32)


def _array(pickled: object, name: str) -> NDArray[Any]:
    """The array that a pickle describes; numpy itself would trust what the file says of types and sizes."""
    expected = f"{name}: expected an array of floats as its vectors"
    function = getattr(pickled, "name", "")
    try:
        if function in RECONSTRUCT:
            _, shape, dtype, fortran, data = pickled.state  # type: ignore[attr-defined]
            order: Any = "F" if fortran else "C"
        elif function in FROM_BUFFER:
            data, dtype, shape, order = pickled.arguments  # type: ignore[attr-defined]
        else:
            raise VectorsError(expected)
        if getattr(data, "name", "") == ENCODE:
            data = data.arguments[0].encode("latin-1")
        code, byteorder = dtype.arguments[0], dtype.state[1]
        if code not in ("f2", "f4", "f8") or byteorder not in ("<", ">"):
            raise VectorsError(f"{expected}, found the type {code!r}")
        return np.ndarray(shape, f"{byteorder}{code}", data, order=order)
    except (TypeError, ValueError, AttributeError, LookupError) as error:
        if isinstance(error, VectorsError):
            raise
        raise VectorsError(f"{expected} ({error})") from error
