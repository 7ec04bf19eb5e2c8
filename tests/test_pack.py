"""Export and import: what goes in comes out, in few small files; what is damaged or foreign writes nothing."""

import json
import os
import re
import shutil
import subprocess
import zipfile
from dataclasses import asdict, replace
from io import BytesIO

import pytest
import torch

from samlib import pack
from samlib import spec as specs_of
from samlib.errors import InputError
from samlib.spec import OptimSpec, RunSpec
from samlib.store import NUMERICS, Record, Store

SPECS = [RunSpec(optim=OptimSpec("sam", rho=0.1), seed=seed) for seed in range(5)]
KEYS = [specs_of.key(spec) for spec in SPECS]


def record(spec, status="done", **fields):
    fields = {"environment": {"dirty": False}, "measures": {"lambda_max": 1 / 3, "residual": None}} | fields
    return Record(specs_of.key(spec), specs_of.canonical(spec), status, **fields)


def tensors(store, kind, key, content, at):
    path = store.folder / kind / f"{key}.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    os.utime(path, (at, at))
    return path


@pytest.fixture
def store(tmp_path):
    """Two finished runs, one that failed, one made by older code, and a fifth in progress."""
    store = Store(tmp_path / "runs" / "gpu", writable=True)
    store.save(record(SPECS[0]))
    store.save(record(SPECS[1], "diverged"))
    store.save(record(SPECS[2], "failed"))
    store.save(record(SPECS[3], numerics=NUMERICS - 1))
    tensors(store, "weights", KEYS[0], b"w" * 1000, at=100)
    tensors(store, "checkpoints", KEYS[4], b"c" * 3000, at=200)
    return store


@pytest.fixture
def target(tmp_path):
    return Store(tmp_path / "elsewhere" / "gpu", writable=True)


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_finished_records_make_the_round_trip_and_a_second_import_changes_nothing(store, target, tmp_path):
    packed = pack.export(store, tmp_path / "out", checkpoints=True, weights="full")
    assert str(packed) == "2 records and 2 checkpoints and weights"
    merged = pack.merge(pack.read(tmp_path / "out"), target)
    assert (merged.records, merged.there, merged.tensors) == (2, 0, 2)
    before = files(target.folder)
    assert {str(path) for path in before} == {
        *(f"records/{key}.json" for key in KEYS[:2]),
        f"weights/{KEYS[0]}.pt",
        f"checkpoints/{KEYS[4]}.pt",
    }
    assert all(content == (store.folder / path).read_bytes() for path, content in before.items())
    merged = pack.merge(pack.read(tmp_path / "out"), target)
    assert (merged.records, merged.there, merged.tensors) == (0, 2, 0)
    assert files(target.folder) == before


def test_records_that_are_known_and_tensors_that_were_not_asked_for_stay_behind(store, tmp_path):
    known = Store(tmp_path / "known" / "gpu", writable=True)
    known.save(record(SPECS[1], "diverged"))
    known.save(record(SPECS[0], "failed"))  # does not count: the run was made again here
    assert pack.export(store, tmp_path / "out", [known]).records == 1
    cargo = pack.read(tmp_path / "out")
    assert (list(cargo.records), cargo.tensors, cargo.profile) == ([KEYS[0]], {}, "gpu")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["records.zip"]


def test_an_archive_that_outgrows_a_file_is_cut_and_plain_tools_join_it(store, target, tmp_path, monkeypatch):
    monkeypatch.setattr(pack, "VOLUME_BYTES", 1000)
    out = tmp_path / "out"
    pack.export(store, out, checkpoints=True, weights="full")
    volumes = sorted(path.name for path in out.glob("tensors*"))
    assert volumes == [f"tensors.zip.{number:03}" for number in range(1, 6)]
    assert all(path.stat().st_size <= 1000 and re.fullmatch(r"[A-Za-z0-9._-]+", path.name) for path in out.iterdir())
    pack.merge(pack.read(out), target)
    assert target.weights_path(KEYS[0]).read_bytes() == b"w" * 1000
    subprocess.run("cat tensors.zip.* > joined.zip", shell=True, cwd=out, check=True)
    with zipfile.ZipFile(out / "joined.zip") as joined:
        assert joined.read(f"checkpoints/{KEYS[4]}.pt") == b"c" * 3000
    monkeypatch.undo()
    pack.export(store, out, checkpoints=True, weights="full")  # in one file again: the volumes are gone
    assert sorted(path.name for path in out.glob("tensors*")) == ["tensors.zip"]


@pytest.mark.parametrize(
    ("room", "size", "left_out"),
    [
        (10_000, 1000, []),
        (5000, 1000, ["checkpoints/"]),
        (6000, 4000, ["checkpoints/"]),  # either would fit
        (5000, 4000, ["weights/"]),
        (900, 1000, None),
    ],
)
def test_what_does_not_fit_is_named_and_finished_work_goes_first(store, tmp_path, monkeypatch, room, size, left_out):
    """Records, weights, checkpoints; but a smaller file still takes the room that a larger one could not."""
    tensors(store, "weights", KEYS[0], b"w" * size, at=100)
    monkeypatch.setattr(pack, "TOTAL_BYTES", room)
    packed = pack.export(store, tmp_path / "out", checkpoints=True, weights="full")
    assert sum(path.stat().st_size for path in (tmp_path / "out").iterdir()) <= room
    kinds = [name[: name.index("/") + 1] for name in packed.left_out]
    assert kinds == (["records/", "weights/", "checkpoints/"] if left_out is None else left_out)
    assert packed.records == 2 - kinds.count("records/")
    assert all(name in str(packed) for name in packed.left_out)


def test_an_export_cut_while_it_writes_leaves_the_one_before(store, target, tmp_path, monkeypatch):
    pack.export(store, tmp_path / "out")
    store.save(record(SPECS[2]))

    def fail(self, target):
        raise OSError("power cut")

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.replace", fail)
        with pytest.raises(InputError, match="cannot be written"):
            pack.export(store, tmp_path / "out")
    assert pack.merge(pack.read(tmp_path / "out"), target).records == 2


def test_what_probes_found_goes_along(store, target, tmp_path):
    entry = {"spec": specs_of.canonical(SPECS[0]), "images_per_second": 9.5, "finished": "2026-01-01"}
    found = [{"device": name} | entry for name in ("one", "two")]
    target.save_probes(found[1:])
    store.save_probes(found)
    pack.export(store, tmp_path / "out", weights="full")
    for _ in range(2):
        pack.merge(pack.read(tmp_path / "out"), target)
        assert target.probes() == found[::-1]
    store.save_probes([found[0] | {"images_per_second": 0}])
    pack.export(store, tmp_path / "out")
    with pytest.raises(InputError, match="no probe"):
        pack.read(tmp_path / "out")


def test_tensors_that_are_known_stay_behind(store, tmp_path):
    def exported(**wanted):
        pack.export(store, tmp_path / "out", [Store(tmp_path / "empty" / "gpu"), known], **wanted)
        return list(pack.read(tmp_path / "out").tensors)

    known = Store(tmp_path / "known" / "gpu", writable=True)
    tensors(known, "checkpoints", KEYS[4], b"k", at=199)
    assert exported(checkpoints=True) == [f"checkpoints/{KEYS[4]}.pt"]
    tensors(known, "checkpoints", KEYS[4], b"k", at=200)
    assert exported(checkpoints=True) == []
    assert exported(weights="full") == [f"weights/{KEYS[0]}.pt"]
    tensors(known, "weights", f"{KEYS[0]}.half", b"k", at=1)
    assert exported(weights="full") == [f"weights/{KEYS[0]}.pt"]  # the exact ones are new
    assert exported(weights="half") == []
    tensors(known, "weights", KEYS[0], b"k", at=1)
    assert exported(weights="full") == []


# ------------------------------------------------------------------------------------------------ in half precision


WEIGHTS = {"layer": torch.linspace(-1, 1, 4001), "bias": torch.tensor([1e6])}


@pytest.fixture
def trained(store):
    """The store with weights that are some, of the first run and of the one in progress, which was trained before."""
    for key, at in ((KEYS[0], 100), (KEYS[4], 300)):
        path = tensors(store, "weights", key, b"", at)
        torch.save(WEIGHTS, path)
        os.utime(path, (at, at))
    return store


def sent(source, target, folder, **wanted):
    """What comes of an export and its import."""
    pack.export(source, folder, **wanted)
    return pack.merge(pack.read(folder), target)


def test_weights_in_half_precision_say_so_by_their_name_and_take_half_the_room(trained, target, tmp_path):
    packed = pack.export(trained, tmp_path / "out", weights="half")
    assert (packed.records, packed.tensors, packed.left_out) == (2, 2, ())
    pack.merge(pack.read(tmp_path / "out"), target)
    assert {path.name for path in target.weights()} == {f"{KEYS[0]}.half.pt", f"{KEYS[4]}.half.pt"}
    path = target.half_weights_path(KEYS[0])
    assert path.stat().st_size < 0.7 * trained.weights_path(KEYS[0]).stat().st_size
    assert path.stat().st_mtime == 100
    found = torch.load(path, weights_only=True)
    assert torch.equal(found["layer"], WEIGHTS["layer"].half())
    assert torch.equal(found["bias"], WEIGHTS["bias"])


def test_exact_weights_are_never_replaced_and_half_ones_are(trained, target, tmp_path):
    assert sent(trained, target, tmp_path / "half", weights="half").tensors == 2
    assert sent(trained, target, tmp_path / "half", weights="half").tensors == 0
    assert sent(trained, target, tmp_path / "full", weights="full").tensors == 2
    assert {path.name for path in target.weights()} == {f"{KEYS[0]}.pt", f"{KEYS[4]}.pt"}
    assert files(target.folder / "weights") == files(trained.folder / "weights")
    before = files(target.folder)
    assert sent(trained, target, tmp_path / "half", weights="half").tensors == 0
    assert files(target.folder) == before


def test_weights_that_are_half_already_go_on_as_they_are(trained, target, tmp_path):
    sent(trained, target, tmp_path / "out", weights="half")
    for precision in pack.WEIGHTS:
        last = Store(tmp_path / precision / "gpu", writable=True)
        assert sent(target, last, tmp_path / "on", weights=precision).tensors == 2
        assert files(last.folder / "weights") == files(target.folder / "weights")


def test_rounded_weights_fit_where_exact_ones_do_not_and_the_newest_go_first(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(pack, "TOTAL_BYTES", 25_000)
    for precision, left_out in (("full", (f"weights/{KEYS[0]}.pt",)), ("half", ())):
        assert pack.export(trained, tmp_path / "out", weights=precision).left_out == left_out
        assert sum(path.stat().st_size for path in (tmp_path / "out").iterdir()) <= 25_000


def test_weights_that_rounding_makes_no_smaller_are_left_out_where_they_do_not_fit(store, tmp_path, monkeypatch):
    torch.save({"layer": torch.full((4000,), 1e6)}, store.weights_path(KEYS[0]))
    assert store.weights_path(KEYS[0]).stat().st_size > 16_000
    for room, left_out in ((20_000, ()), (15_000, (f"weights/{KEYS[0]}.half.pt",))):
        monkeypatch.setattr(pack, "TOTAL_BYTES", room)
        assert pack.export(store, tmp_path / "out", weights="half").left_out == left_out


def test_weights_that_cannot_be_read_cost_no_other_file(trained, tmp_path, capsys):
    tensors(trained, "weights", KEYS[1], b"broken", at=400)
    packed = pack.export(trained, tmp_path / "out", weights="half")
    assert (packed.records, packed.tensors) == (2, 2)
    assert f"{KEYS[1]}.pt cannot be read" in capsys.readouterr().err


def test_an_unknown_precision_is_refused(store, tmp_path):
    with pytest.raises(InputError, match=r"weights = 'quarter'.*full or half"):
        pack.export(store, tmp_path / "out", weights="quarter")
    assert not (tmp_path / "out").exists()


def test_no_weights_come_to_a_record_that_is_not_theirs(trained, target, tmp_path):
    """Neither those of another result of the run, nor are those of older code left beside a new record."""
    target.save(record(SPECS[0], wall_seconds=7.0))
    pack.export(trained, tmp_path / "out", weights="full")
    assert pack.merge(pack.read(tmp_path / "out"), target, keep_old=True).tensors == 1
    assert target.trained() == [KEYS[4]]
    target.save(record(SPECS[0], numerics=NUMERICS - 1))
    for name in (KEYS[0], f"{KEYS[0]}.half"):
        tensors(target, "weights", name, b"older", at=1)
    pack.export(trained, tmp_path / "records")
    pack.merge(pack.read(tmp_path / "records"), target)
    assert target.trained() == [KEYS[4]]
    assert pack.merge(pack.read(tmp_path / "out"), target).tensors == 1


def test_a_checkpoint_that_is_gone_meanwhile_is_no_loss(store):
    path = store.checkpoint_path(KEYS[4])
    members = [pack.Member("checkpoints/gone.pt", path.with_name("gone.pt")), pack.Member("checkpoints/there.pt", path)]
    content, packed, left_out = pack._archive({}, members, 10_000, zipfile.ZIP_STORED)
    assert (packed, left_out) == (["checkpoints/there.pt"], [])
    with zipfile.ZipFile(BytesIO(content)) as archive:
        assert archive.namelist() == ["about.json", "checkpoints/there.pt"]


# ------------------------------------------------------------------------------------------------ what an import meets


def test_the_newer_checkpoint_stays(store, target, tmp_path):
    pack.export(store, tmp_path / "out", checkpoints=True, weights="full")
    path = tensors(target, "checkpoints", KEYS[4], b"older", at=199)
    kept = tensors(target, "weights", KEYS[0], b"mine", at=1)
    assert pack.merge(pack.read(tmp_path / "out"), target).tensors == 1
    assert (path.read_bytes(), kept.read_bytes()) == (b"c" * 3000, b"mine")
    tensors(target, "checkpoints", KEYS[4], b"newer", at=201)
    assert pack.merge(pack.read(tmp_path / "out"), target).tensors == 0
    assert path.read_bytes() == b"newer"


def test_a_checkpoint_goes_when_its_run_is_finished_unless_it_is_trained_again(store, target, tmp_path):
    pack.export(store, tmp_path / "before", checkpoints=True)
    pack.merge(pack.read(tmp_path / "before"), target)
    path = target.checkpoint_path(KEYS[4])
    assert path.exists()
    store.checkpoint_path(KEYS[4]).unlink()
    store.save(record(SPECS[4], finished="1970-01-01T00:04:10+00:00"))  # 250 s: the checkpoint was of 200 s
    pack.export(store, tmp_path / "after", checkpoints=True)
    pack.merge(pack.read(tmp_path / "after"), target)
    assert not path.exists()
    for folder, at, there in (("before", None, False), ("again", 249, False), ("again", 251, True)):
        if at is not None:
            tensors(store, "checkpoints", KEYS[4], b"again", at)
            pack.export(store, tmp_path / "again", [target], checkpoints=True)
        pack.merge(pack.read(tmp_path / folder), target)
        assert path.exists() == there
    path.unlink()
    tensors(target, "weights", KEYS[4], b"weights", at=1)
    assert pack.merge(pack.read(tmp_path / "again"), target).tensors == 0


def test_committed_records_take_no_tensors_and_nothing_of_unknown_code(store, tmp_path):
    committed = Store(tmp_path / "results" / "gpu", writable=False)
    pack.export(store, tmp_path / "out", checkpoints=True, weights="full")
    assert pack.merge(pack.read(tmp_path / "out"), committed).tensors == 0
    assert committed.recorded() == sorted(KEYS[:2])
    assert [path.name for path in committed.folder.iterdir()] == ["records"]
    store.save(record(SPECS[4], environment={"dirty": True}))
    pack.export(store, tmp_path / "out")
    before = files(committed.folder)
    with pytest.raises(InputError, match=KEYS[4]):
        pack.merge(pack.read(tmp_path / "out"), committed)
    assert files(committed.folder) == before


def rewritten(path, members):
    with zipfile.ZipFile(path) as archive:
        old = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in (old | members).items():
            archive.writestr(name, content)


def as_json(spec, **changes):
    return json.dumps(asdict(replace(record(spec), **changes)))


def swapped(spec, key):
    return {f"records/{key}.json": as_json(spec)}


NAMES = ("../evil.json", "/etc/evil", "records/../../evil.json", "weights/evil.pt", f"checkpoints/{KEYS[0]}.half.pt")
OUTSIDE = dict.fromkeys(NAMES, b"x")


@pytest.mark.parametrize(
    ("members", "words"),
    [
        (swapped(SPECS[4], KEYS[1]), ["holds the spec of"]),
        (swapped(replace(SPECS[1], seed=9), KEYS[1]), ["holds the spec of"]),
        ({f"records/{KEYS[1]}.json": as_json(SPECS[1])[:300]}, ["truncated"]),
        ({f"records/{KEYS[1]}.json": b"\xff\xfe"}, ["truncated or no record"]),
        ({f"records/{KEYS[4]}.json": as_json(SPECS[4], numerics=NUMERICS - 1)}, [KEYS[4], "older code"]),
        ({f"records/{KEYS[4]}.json": as_json(SPECS[4], status="failed")}, [KEYS[4], "failed"]),
        *(({name: content}, [name, "no export"]) for name, content in OUTSIDE.items()),
        ({f"records/{KEYS[1]}.pt": b"x"}, ["no export"]),
        ({"about.json": b"{}"}, ["no export"]),
        ({"about.json": b"[]"}, ["no export"]),
        ({"about.json": b'{"format": 1, "profile": "gpu", "probes": [{"device": "one"}]}'}, ["no export"]),
        ({"about.json": b'{"format": 1, "profile": "../.."}'}, ["profile"]),
        ({"about.json": b'{"format": 2, "profile": "gpu"}'}, ["format = 2"]),
    ],
)
def test_a_tampered_export_is_refused_and_nothing_is_written(store, target, tmp_path, members, words):
    pack.export(store, tmp_path / "out")
    rewritten(tmp_path / "out" / "records.zip", members)
    before = files(tmp_path)
    with pytest.raises(InputError) as error:
        pack.merge(pack.read(tmp_path / "out"), target)
    for word in words:
        assert word in str(error.value)
    assert files(tmp_path) == before


def test_a_record_that_differs_from_the_one_there_is_refused_and_the_others_with_it(store, target, tmp_path):
    target.save(record(SPECS[1], "diverged", wall_seconds=7.0))
    before = files(target.folder)
    pack.export(store, tmp_path / "out")
    with pytest.raises(InputError, match=f"{KEYS[1]}.*differs"):
        pack.merge(pack.read(tmp_path / "out"), target)
    assert files(target.folder) == before
    kept = target.load(KEYS[1])
    assert pack.merge(pack.read(tmp_path / "out"), target, keep_old=True).records == 1
    assert target.load(KEYS[1]) == kept
    target.save(record(SPECS[1], "failed"))  # but one that has to be run again gives way
    assert pack.merge(pack.read(tmp_path / "out"), target).records == 1


@pytest.mark.parametrize("keep", [0, 1, 300, -1])
def test_a_truncated_file_is_refused(store, tmp_path, keep):
    pack.export(store, tmp_path / "out")
    path = tmp_path / "out" / "records.zip"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError, match="truncated"):
        pack.read(tmp_path / "out")


def test_a_lost_volume_is_noticed_and_the_records_are_taken(store, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pack, "VOLUME_BYTES", 1000)
    for lost in ("001", "003", "005"):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        pack.export(store, tmp_path / "out", checkpoints=True, weights="full")
        (tmp_path / "out" / f"tensors.zip.{lost}").unlink()
        cargo = pack.read(tmp_path / "out")
        assert cargo.records
        assert cargo.tensors == {}
        assert "truncated" in capsys.readouterr().err


def test_a_folder_without_an_export(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path, tmp_path / "absent", tmp_path / "file"):
        with pytest.raises(InputError, match=str(folder)):
            pack.read(folder)
    with pytest.raises(InputError, match="cannot be written"):
        pack.export(Store(tmp_path / "gpu"), tmp_path / "file")
