"""Two processes that save and load checkpoint folders together; as a script, this file is one of them."""

import errno
import hashlib
import json
import os
import sys
from pathlib import Path

import pytest

from kdav_fast.checkpoint.folders import CheckpointFolders
from kdav_fast.errors import InputError
from kdav_fast.runtime.processes import start_cluster
from tests.train import processes


def main(root: Path) -> None:
    """Save, fail to save and load on two ranks; prints what this one saw."""
    cluster = start_cluster("cpu")
    folders = CheckpointFolders(root, cluster, 2, True)
    own = f"rank-{cluster.rank:05d}.json"
    seen = {}

    def save_here(step):
        folders.begin(step, {own: b"%d" % step, f"more-{own}": b"%d" % step}, {"score": cluster.rank})
        folders.finish()

    def load():
        checked, digest = [], hashlib.file_digest

        def watched(file, name):
            checked.append(Path(file.name).name)
            return digest(file, name)

        hashlib.file_digest = watched
        folder, manifest = CheckpointFolders(root, cluster, 2, True).newest_intact()
        hashlib.file_digest = digest
        return {"folder": folder.name, "step": manifest["step"], "checked": checked}

    save_here(1)
    fsync = os.fsync
    if cluster.rank == 1:

        def full(handle):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        os.fsync = full
    try:
        save_here(2)
    except InputError as error:
        seen["failure"] = str(error)
    os.fsync = fsync
    seen["after failure"] = sorted(path.name for path in root.iterdir())
    seen["after failure, loaded"] = load()
    save_here(3)
    seen["loaded"] = load()
    cluster.gather(None)  # waits for all
    if cluster.is_first:
        (root / "step-00000003" / "more-rank-00001.json").write_bytes(b"4")
    cluster.gather(None)  # waits for all
    seen["damaged, loaded"] = load()
    print(json.dumps(seen))


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    root = tmp_path_factory.mktemp("two-ranks") / "checkpoints"
    texts = processes.run([__file__, str(root)], 2)
    return root, [json.loads(text.splitlines()[-1]) for text in texts], texts[0]


def test_one_ranks_failure_is_that_of_all_and_nothing_is_published(two_ranks):
    _, ranks, _ = two_ranks
    for seen in ranks:
        assert seen["failure"].startswith(
            "the checkpoint of step 2 could not be written (rank 1: No space left on device); earlier ones are"
        )
        assert seen["after failure"] == ["latest", "step-00000001"]
        assert seen["after failure, loaded"]["step"] == 1


def test_the_manifest_holds_the_files_of_all_ranks_and_the_facts_of_the_first(two_ranks):
    root, _, _ = two_ranks
    manifest = json.loads((root / "step-00000003" / "manifest.json").read_text())
    assert manifest["score"] == 0
    assert sorted(manifest["files"]) == [
        "more-rank-00000.json",
        "more-rank-00001.json",
        "rank-00000.json",
        "rank-00001.json",
    ]


def test_the_ranks_share_the_work_of_verifying(two_ranks):
    root, ranks, _ = two_ranks
    shares = [seen["loaded"]["checked"] for seen in ranks]
    assert all(len(share) == 2 for share in shares)
    files = json.loads((root / "step-00000003" / "manifest.json").read_text())["files"]
    assert sorted(shares[0] + shares[1]) == sorted(files)


def test_all_ranks_agree_on_the_one_before_a_damaged_one(two_ranks):
    root, ranks, printed_by_first = two_ranks
    assert [seen["loaded"]["step"] for seen in ranks] == [3, 3]
    assert [seen["damaged, loaded"]["folder"] for seen in ranks] == ["step-00000001", "step-00000001"]
    assert printed_by_first.count("is damaged") == 1
    assert (
        f"checkpoint {root / 'step-00000003'} is damaged: more-rank-00001.json has other content than was written"
        in printed_by_first
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
