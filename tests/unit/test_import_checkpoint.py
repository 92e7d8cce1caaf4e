"""Files in the authors' format become checkpoints; whatever else a file holds is named, and nothing of it is run."""

from __future__ import annotations

import argparse
import functools
import json
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn, serialization

from svip import steps
from svip.config import ModelConfig, load_config
from svip.models.published import PublishedError, load_published, read_network
from svip.models.svip import SVIP
from svip.semantics.vectors import Embedding, VectorsError, write_embedding
from svip.training.checkpoint import load_model

ATTRIBUTES, WORD_SIZE, SIZE, WIDTH, HIDDEN = 5, 3, 16, 16, 8
SHAPE: dict[str, Any] = {"patch_size": 4, "embed_dim": WIDTH, "depth": 2, "num_heads": 2}
OVERRIDES = [
    "model.backbone_args={patch_size: 4, embed_dim: 16, depth: 2, num_heads: 2}",
    *("model.selected_groups=2", f"model.hidden={HIDDEN}", f"data.image_size={SIZE}", "train.device=cpu"),
]
WORDS = torch.randn(ATTRIBUTES, WORD_SIZE, generator=torch.Generator().manual_seed(0))
IMAGES = torch.randint(0, 256, (4, 3, SIZE, SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
CANARY = Path("touched")
"""What hostile content would make, in the folder that each test runs in."""


def published_network() -> nn.Module:
    """A module with the layers of the published one, and so its names; each call draws other weights."""
    network = timm.create_model("vit_tiny_patch16_224", img_size=SIZE, num_classes=ATTRIBUTES, **SHAPE)
    network.head_1 = nn.Linear(4 * WIDTH, ATTRIBUTES)
    network.token_cls = nn.Sequential(nn.Linear(4 * WIDTH, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 1))
    network.v2p = nn.Linear(WORD_SIZE, WIDTH)
    network.p2t = nn.Linear(ATTRIBUTES, 4)
    assert isinstance(network, nn.Module)
    return network


def our_model() -> SVIP:
    config: ModelConfig = load_config("smoke", OVERRIDES).model
    return SVIP(config, SIZE, WORDS).eval()


def filled_by_hand(network: nn.Module) -> SVIP:
    """Our model with the published module's weights, layer by layer."""
    model, layers = our_model(), dict(network.named_children())
    assert model.patch_classifier is not None and model.context is not None and model.patch_head is not None
    assert model.backbone.vit.load_state_dict(network.state_dict(), strict=False).missing_keys == []
    model.patch_classifier.load_state_dict(layers["token_cls"].state_dict())
    model.patch_head.load_state_dict(layers["head_1"].state_dict())
    context = dict(model.context.named_children())
    context["to_width"].load_state_dict(layers["v2p"].state_dict())
    context["to_tokens"].load_state_dict(layers["p2t"].state_dict())
    return model


def released(network: object, **more: object) -> dict[str, Any]:
    """The content of a file in the authors' format."""
    options = argparse.Namespace(dataset="CUB", lr=np.float32(3e-5), seeds=[1, np.int64(2)], device=torch.device("cpu"))
    best = {"H": np.float64(75.0), "curve": np.arange(3.0), "gamma": np.float16(0.5)}
    return {"epoch": 17, "args": options, "network": network, "best": best, **more}


def change_pickle(path: Path, change: Callable[[bytes], bytes], compression: int = zipfile.ZIP_STORED) -> None:
    """Rewrite the pickle within a file of torch.save."""
    with zipfile.ZipFile(path) as archive:
        records = {item.filename: archive.read(item) for item in archive.infolist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in records.items():
            archive.writestr(name, change(content) if name.endswith("/data.pkl") else content)


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    np.save("words.npy", WORDS.numpy())
    before = set(serialization.get_safe_globals())
    yield
    assert set(serialization.get_safe_globals()) == before, "what torch may read elsewhere is as it was"


def import_file(path: str = "file.pth", *overrides: str, words: str = "words.npy") -> dict[str, Any]:
    return steps.import_checkpoint(path, words, "out", "smoke", [*OVERRIDES, *overrides])


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("parallel", [True, False], ids=["module.", "bare"])
def test_an_imported_model_is_the_published_one(zipped: bool, parallel: bool) -> None:
    network = published_network()
    state = (nn.DataParallel(network) if parallel else network).state_dict()
    torch.save(released(state), "file.pth", _use_new_zipfile_serialization=zipped)
    import_file()
    imported, config, info = load_model(Path("out"))
    assert config.train.select is False
    assert [info[name] for name in ("gamma", "validation", "bundle_sha256", "seconds")] == [None] * 4
    assert info["imported"]["left_over"] == ["head.bias", "head.weight"]
    one, two = filled_by_hand(network).predict(IMAGES), imported.predict(IMAGES)
    assert torch.equal(one.attributes, two.attributes)
    assert torch.equal(one.selected, two.selected)
    assert one.attributes.std() > 0
    assert not torch.equal(our_model().predict(IMAGES).attributes, two.attributes), "another start is another model"


def test_numpy_s_old_names_are_left_unread_too() -> None:
    torch.save(released(published_network().state_dict()), "file.pth")
    seen = []

    def age(content: bytes) -> bytes:
        seen.append(content.count(b"cnumpy._core.multiarray\n"))
        return content.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")

    change_pickle(Path("file.pth"), age)
    assert seen[0] >= 2
    assert import_file()["attributes"] == ATTRIBUTES


def test_word_vectors_may_be_the_folder_of_embed_attributes() -> None:
    torch.save(released(published_network().state_dict()), "file.pth")
    write_embedding(Embedding(WORDS.numpy(), list("abcde"), {}), "words")
    import_file(words="words")
    assert torch.equal(load_model(Path("out"))[0].state_dict()["context.words"], WORDS)


class Runs:
    """Unpickled, it calls a function."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


class LoudOptions(argparse.Namespace):
    def __setstate__(self, state: object) -> None:
        CANARY.touch()


class Registered:
    """Some library has told torch that this is safe."""

    def __init__(self) -> None:
        self.some = "state"  # without any, pickle calls no __setstate__

    def __setstate__(self, state: object) -> None:
        CANARY.touch()


TOUCH = f"__import__('pathlib').Path('{CANARY}').touch()"
HOSTILE: dict[str, tuple[object, str]] = {
    "os.system": (Runs(os.system, f"touch {CANARY}"), f"would have run '{os.system.__module__}.system'"),
    "builtins.eval": (Runs(eval, TOUCH), "would have run 'eval'"),
    "builtins.getattr": (Runs(getattr, "text", "upper"), "would have run 'getattr'"),
    "functools.partial": (functools.partial(CANARY.touch), "would have run 'functools.partial'"),
    "a Namespace's heir": (LoudOptions(lr=1), f"would have run '{__name__}.LoudOptions'"),
    "registered": (Registered(), f"would have run '{__name__}.Registered'"),
}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("place", ["beside", "in the options", "in the network", "alone"])
@pytest.mark.parametrize("kind", HOSTILE)
def test_code_in_a_file_is_named_and_not_run(kind: str, place: str, zipped: bool) -> None:
    hostile, message = HOSTILE[kind]
    network = published_network().state_dict()
    content: object = {
        "beside": released(network, optimizer={"state": [hostile]}),
        "in the options": released(network, args=argparse.Namespace(lr=hostile)),
        "in the network": released({**network, "head_1.bias": hostile}),
        "alone": hostile,
    }[place]
    torch.save(content, "file.pth", _use_new_zipfile_serialization=zipped)
    with serialization.safe_globals([Registered]), pytest.raises(PublishedError) as refused:
        import_file()
    assert message in str(refused.value)
    assert str(refused.value).startswith("file.pth is not a released checkpoint: ")
    assert "Nothing of it was run" in str(refused.value)
    assert "weights_only" not in str(refused.value), "no advice to read it unsafely"
    assert sorted(os.listdir()) == ["file.pth", "words.npy"]


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_few_bytes_that_ask_for_all_memory_are_refused(zipped: bool) -> None:
    content = released(published_network().state_dict(), more=bytearray(8))
    torch.save(content, "file.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(PublishedError, match="it holds a bytearray, which no model does"):
        import_file()
    assert sorted(os.listdir()) == ["file.pth", "words.npy"]


def test_the_hostile_content_would_have_run_if_it_were_unpickled() -> None:
    for content, _ in (HOSTILE[kind] for kind in ("os.system", "builtins.eval", "a Namespace's heir", "registered")):
        pickle.loads(pickle.dumps(content, 2))
        assert CANARY.exists()
        CANARY.unlink()


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_persistent_id_within_another_is_refused(zipped: bool) -> None:
    torch.save({"network": 0}, "file.pth", _use_new_zipfile_serialization=zipped)
    # persistent ids ('storage', <persistent id of ('module', OrderedDict, 'file', 'source')>): no storage type
    inner = b"(X\6\0\0\0moduleccollections\nOrderedDict\nX\4\0\0\0fileX\6\0\0\0sourcetQ"
    hostile = b"\x80\2(X\7\0\0\0storage" + inner + b"tQ."
    if zipped:
        change_pickle(Path("file.pth"), lambda content: hostile)
    else:
        magic: tuple[object, ...] = (serialization.MAGIC_NUMBER, 1001, {})
        head = b"".join(pickle.dumps(value, 2) for value in magic)
        Path("file.pth").write_bytes(head + hostile)
    with pytest.raises(PublishedError, match="Only persistent_load of storage is allowed"):
        import_file()
    assert sorted(os.listdir()) == ["file.pth", "words.npy"]


def test_what_stands_in_for_numpy_ignores_any_state() -> None:
    # numpy believes it: this dtype has the size 2**31 - 1 and says that it holds references
    forged = b"cnumpy\ndtype\nX\2\0\0\0V8\x89\x88\x87R(K\3X\1\0\0\0|NNNJ\xff\xff\xff\x7fJ\xff\xff\xff\x7fK\x3ftb"
    assert pickle.loads(b"\x80\2" + forged + b".").itemsize == 2**31 - 1
    torch.save({"network": {"a": 1}, "dtype": None}, "file.pth")
    change_pickle(
        Path("file.pth"), lambda content: content.replace(b"Ns.", forged + b"s.").replace(b"Nu.", forged + b"u.")
    )
    with zipfile.ZipFile("file.pth") as archive:
        assert forged in archive.read("file/data.pkl")
    assert read_network(Path("file.pth")) == {"a": 1}


def bomb(path: Path) -> None:
    torch.save(released({"cls_token": torch.zeros(10**6)}), path)
    change_pickle(path, lambda content: content, zipfile.ZIP_DEFLATED)


def cut(path: Path, zipped: bool) -> None:
    torch.save(released(published_network().state_dict()), path, _use_new_zipfile_serialization=zipped)
    os.truncate(path, path.stat().st_size // 2)


def hidden(path: Path) -> None:
    """Containers whose attributes hide the methods of a dictionary."""
    content = OrderedDict(epoch=1)
    content.__dict__.update(get=torch.Size, items=torch.Size)
    torch.save(content, path)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (bomb, "it unpacks to 4,0.* bytes, more than its own size"),
        (lambda path: cut(path, True), "Nothing of it was run"),
        (lambda path: cut(path, False), "Nothing of it was run"),
        (lambda path: path.write_text("weights, somewhere else"), "Nothing of it was run"),
        (lambda path: path.write_bytes(b""), "Nothing of it was run"),
        (lambda path: path.write_bytes(b"PK\3\4" + bytes(200)), "Nothing of it was run"),
        (lambda path: path.write_bytes(pickle.dumps({"network": {}}, 4)), "Nothing of it was run"),
        (lambda path: path.write_bytes(struct.pack("<I", 7)), "Nothing of it was run"),
        (lambda path: torch.jit.save(torch.jit.script(nn.Linear(1, 1)), path), "Nothing of it was run"),
        (lambda path: path.mkdir(), "Nothing of it was run"),
        (lambda path: None, "No such file"),
        (lambda path: torch.save({"state_dict": {}}, path), "with a state dict as 'network'"),
        (lambda path: torch.save({"network": [1]}, path), "with a state dict as 'network'"),
        (lambda path: torch.save({"network": {}}, path), "with a state dict as 'network'"),
        (lambda path: torch.save({"network": {1: torch.ones(1)}}, path), "with a state dict as 'network'"),
        (lambda path: torch.save({"network": {"\x1b[2J": torch.ones(1)}}, path), "with a state dict as 'network'"),
        (lambda path: torch.save([1], path), "with a state dict as 'network'"),
        (lambda path: torch.save(argparse.Namespace(network={}), path), "with a state dict as 'network'"),
        (hidden, "with a state dict as 'network'"),
    ],
)
@pytest.mark.filterwarnings("ignore")  # torch's, of TorchScript and of other pickle protocols
def test_a_file_of_another_kind_is_refused(write: Callable[[Path], object], message: str) -> None:
    path = Path("file.pth")
    write(path)
    before = sorted(os.listdir())
    with pytest.raises(PublishedError, match=f"^file.pth is not a released checkpoint: .*{message}"):
        import_file()
    assert sorted(os.listdir()) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"p2t.bias": None, "norm.bias": None}, "(missing: norm.bias, p2t.bias)"),
        ({"head_2.bias": torch.ones(1), "head.scale": torch.ones(1)}, "(left over: head_2.bias)"),
        (
            {"token_cls.2.bias": torch.ones(2)},
            "(of another form: token_cls.2.bias (expected float32 [1], found float32 [2]))",
        ),
        ({"norm.bias": torch.ones(WIDTH).half()}, "(expected float32 [16], found float16 [16])"),
        ({"norm.bias": "text"}, "(expected float32 [16], found str)"),
        ({"norm.bias": argparse.Namespace()}, "(expected float32 [16], found Unread)"),
        ({"norm.bias": torch.ones(WIDTH).to_sparse()}, "found float32 [16] torch.sparse_coo cpu)"),
        ({"norm.bias": torch.ones(WIDTH, device="meta")}, "found float32 [16] torch.strided meta)"),
        ({"norm.bias": torch.full((WIDTH,), torch.nan)}, "(not finite: norm.bias)"),
        (
            {"head_1.bias": torch.full((ATTRIBUTES,), -torch.inf), "v2p.bias": None},
            "(missing: v2p.bias; not finite: head_1.bias)",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore")  # torch's, of sparse tensors
def test_tensors_that_do_not_fit_are_named_and_nothing_is_filled(change: dict[str, object], message: str) -> None:
    state: dict[str, object] = {**published_network().state_dict(), **change}
    torch.save(released({name: value for name, value in state.items() if value is not None}), "file.pth")
    model = our_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(PublishedError) as refused:
        load_published(model, Path("file.pth"))
    assert "file.pth does not fit " in str(refused.value)
    assert message in str(refused.value)
    assert "give the preset and the word vectors it was trained with" in str(refused.value)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    with pytest.raises(PublishedError):
        import_file()
    assert sorted(os.listdir()) == ["file.pth", "words.npy"]


def test_a_preset_or_word_vectors_of_another_shape_are_refused_by_name() -> None:
    torch.save(released(published_network().state_dict()), "file.pth")
    np.save("other.npy", np.zeros((ATTRIBUTES + 1, WORD_SIZE + 1), np.float32))
    with pytest.raises(PublishedError) as refused:
        import_file(words="other.npy")
    for name in ("v2p.weight (expected float32 [16, 4], found float32 [16, 3])", "p2t.weight", "head_1.weight"):
        assert name in str(refused.value)
    deeper = "model.backbone_args={patch_size: 4, embed_dim: 16, depth: 3, num_heads: 2}"
    with pytest.raises(PublishedError, match=r"missing: blocks\.2\.norm1\.weight, .* and 6 more"):
        import_file("file.pth", deeper)
    with pytest.raises(PublishedError, match=r"missing: context\.embedding; left over: p2t\.bias, p2t\.weight, v2p"):
        import_file("file.pth", "model.context=random")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.zeros(3, np.float32), r"found float32 \[3\]"),
        (np.zeros((5, 3), int), r"found int64 \[5, 3\]"),
        (np.full((5, 3), np.nan), "not finite"),
        (np.array([[Runs(os.system, f"touch {CANARY}")]]), "pickle"),
    ],
)
def test_word_vectors_that_can_t_be_used_are_refused(values: np.ndarray[Any, Any], message: str) -> None:
    np.save("odd.npy", values, allow_pickle=True)
    with pytest.raises(VectorsError, match=rf"^odd\.npy.*{message}"):
        import_file(words="odd.npy")
    assert sorted(os.listdir()) == ["odd.npy", "words.npy"]


def test_a_folder_with_content_is_not_written_to_and_a_killed_import_is_no_obstacle() -> None:
    torch.save(released(published_network().state_dict()), "file.pth")
    Path("out").mkdir()
    Path("out/mine").touch()
    with pytest.raises(FileExistsError, match="out is not empty"):
        import_file()
    assert os.listdir("out") == ["mine"]
    Path("out/mine").unlink()  # an empty folder is fine
    Path(".out.part").mkdir()
    Path(".out.part/model.safetensors").touch()
    import_file()
    assert sorted(os.listdir()) == ["file.pth", "out", "words.npy"]
    assert sorted(os.listdir("out")) == [
        "config.yaml",
        "history.json",
        "made_of.json",
        "model.json",
        "model.safetensors",
    ]
    assert len(json.loads(Path("out/model.json").read_text())["imported"]["sha256"]) == 64


def test_a_write_that_fails_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(released(published_network().state_dict()), "file.pth")

    def full(path: Path, content: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("svip.training.checkpoint.write_json", full)
    with pytest.raises(OSError, match="no space left"):
        import_file()
    assert sorted(os.listdir()) == ["file.pth", "words.npy"]


def test_a_tensor_that_is_one_number_seen_many_times_costs_no_memory() -> None:
    state: dict[str, Tensor] = {**published_network().state_dict(), "norm.bias": torch.zeros(1).expand(10**12)}
    torch.save(released(state), "file.pth")
    with pytest.raises(
        PublishedError, match=r"norm\.bias \(expected float32 \[16\], found float32 \[1000000000000\]\)"
    ):
        import_file()
