import contextlib
import hashlib
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torchvision

from kdav_fast.data.sources.archives import open_archive, open_evaluation_archive
from kdav_fast.errors import InputError
from tests.data.sources.small_archives import FOLDERS, check, files_of, write_folder, write_tar

PUBLISHED = {
    "cifar10": torchvision.datasets.CIFAR10,
    "cifar100": torchvision.datasets.CIFAR100,
    "stl10": torchvision.datasets.STL10,
}


@pytest.fixture
def publish(tmp_path, monkeypatch):
    """Serve a small archive where torchvision says that the published one is; returns the requests, which are two
    for a download: torchvision first follows redirections."""
    fetched = []

    class Handler(SimpleHTTPRequestHandler):
        def do_GET(self):
            fetched.append(self.path)
            with contextlib.suppress(
                ConnectionError
            ):  # torchvision only asks where the archive is, then hangs up
                super().do_GET()

        def log_message(self, *_):
            pass

    place = tmp_path / "published"
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=place))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()

    def publish(name, md5=None):
        kind = PUBLISHED[name]
        path = write_tar(place / kind.filename, FOLDERS[name][kind.filename], files_of(name, kind.filename))
        monkeypatch.setattr(kind, "url", f"http://127.0.0.1:{server.server_port}/{kind.filename}")
        monkeypatch.setattr(kind, "tgz_md5", md5 or hashlib.md5(path.read_bytes()).hexdigest())
        return fetched

    yield publish
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_download_is_made_once_and_kept(tmp_path, publish, name):
    fetched = publish(name)
    root = tmp_path / "new/data"
    train, test = open_archive(name, root, download=True)
    check(name, train, "train", root)
    check(name, test, "test", root)
    check(name, open_evaluation_archive(name, root, download=True), "test", root)
    check(name, open_archive(name, root, download=False)[0], "train", root)
    assert len(fetched) == 2
    assert [path.name for path in root.iterdir() if path.name[0] != "."] == [PUBLISHED[name].filename]


def test_several_processes_share_one_download(tmp_path, publish):
    fetched = publish("cifar100")
    with ThreadPoolExecutor(4) as pool:
        opened = list(
            pool.map(lambda _: open_archive("cifar100", tmp_path / "data", download=True), range(4))
        )
    for train, _ in opened:
        check("cifar100", train, "train", tmp_path / "data")
    assert len(fetched) == 2


def test_a_found_archive_is_not_fetched(tmp_path, publish):
    fetched = publish("cifar10")
    write_folder(tmp_path / "data/cifar-10-batches-bin", files_of("cifar10", "binary"))
    open_archive("cifar10", tmp_path / "data", download=True)
    assert fetched == []


def test_a_download_that_fails_leaves_nothing(tmp_path, publish, monkeypatch):
    publish("cifar10", md5="0" * 32)
    root = tmp_path / "data"
    message = r"http://127.* cannot be fetched into .*data: .*; get it by other means and put it there as cifar-10-py"
    with pytest.raises(InputError, match=message):
        open_archive("cifar10", root, download=True)
    kind = PUBLISHED["cifar10"]
    for url in (f"{kind.url}.gone", "http://127.0.0.1:1/x", "file:///nowhere/at/all"):
        monkeypatch.setattr(kind, "url", url)
        with pytest.raises(
            InputError, match=r"cannot be fetched into .*data: .*; get it by other means"
        ) as error:
            open_archive("cifar10", root, download=True)
        assert "\n" not in str(error.value)
    assert [path for path in root.iterdir() if path.name != ".download.lock"] == []


def test_a_download_into_a_place_that_cannot_be_made_is_refused(tmp_path, publish):
    publish("cifar10")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"cannot be fetched into .*file/data: .*Not a directory"):
        open_archive("cifar10", tmp_path / "file/data", download=True)
