"""What the machine does to a paid teacher: full disks, locks, read-only files, proxies and TLS."""

import os
import sqlite3
import ssl
import subprocess
import threading
from functools import partial

import pytest
import torch
from disks import fill, small_disk
from moving_shapes import GRID, make_clips
from servers import OpenAIServer

from halo_fast.errors import UserError
from halo_fast.files import hash_bytes
from halo_fast.teachers import Clip, Label, LabelStore, TeacherRequest
from halo_fast.teachers import store as store_module
from halo_fast.teachers.labelling import label_clips
from halo_fast.teachers.openai.teacher import OpenAITeacher, load_openai

pytest.importorskip("openai")
CLIPS = make_clips(12, seed=5)
PROXIES = ("ALL_PROXY", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "SSL_CERT_FILE")


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test-5e1f7c0de0f1a5ecretkey")
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


def teacher(url: str, store: LabelStore, **changes) -> OpenAITeacher:
    quick = {"max_frames": 2, "patch_frames": 1, "retry_delay": 0.01, "timeout": 10.0, "budget": 50.0, "max_retries": 1}
    return load_openai(TeacherRequest("openai", GRID, store, {"base_url": url} | quick | changes, factors=(8, 4, True)))


def some_clips(count: int) -> list[Clip]:
    return [
        Clip(hash_bytes(video.tobytes()), prompt, partial(torch.from_numpy, video))
        for video, prompt in zip(CLIPS.videos[:count], CLIPS.prompts[:count], strict=True)
    ]


@pytest.fixture
def disk(tmp_path):
    with small_disk(tmp_path / "disk") as folder:
        yield folder


def test_a_disk_that_fills_up_loses_no_answer_and_the_spending_is_right(disk):
    def answer(number: int, question: dict) -> str:
        if number == 5:
            fill(disk)  # while six are under way
        return ""

    with OpenAIServer(answer, pause=1.5) as server:
        with (
            LabelStore(disk / "labels.sqlite") as store,
            pytest.raises(UserError, match="labels.sqlite: the disk is full; free some space and run again"),
        ):
            label_clips(some_clips(12), teacher(server.url, store, max_concurrency=6), store)
        (disk / "filler").unlink()
        assert len(server.requests) >= 6
        with LabelStore(disk / "labels.sqlite") as store:
            assert store.spent() == pytest.approx(server.billed), "each answer is there at its true cost"
            labels = label_clips(some_clips(12), teacher(server.url, store), store)
            assert {label.status for label in labels} == {"ok"} and store.spent() == pytest.approx(server.billed)
        assert len(server.requests) == 24, "nothing is asked twice"
    assert [path.name for path in disk.iterdir()] == ["labels.sqlite"]


def test_nothing_is_sent_while_the_disk_is_full(disk):
    with OpenAIServer() as server, LabelStore(disk / "labels.sqlite") as store:
        fill(disk)
        with pytest.raises(UserError, match="No space left on device; 2 MiB are kept free"):
            label_clips(some_clips(2), teacher(server.url, store), store)
        assert not server.requests and store.spent() == 0


def test_answers_wait_while_another_process_has_the_store_locked(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(store_module, "_PATIENCE", 0.05)
    path = tmp_path / "labels.sqlite"
    with OpenAIServer(pause=0.3) as server, LabelStore(path) as store:
        other = sqlite3.connect(path, isolation_level=None, check_same_thread=False)

        def lock() -> None:
            while len(server.requests) < 4:
                pass
            other.execute("BEGIN IMMEDIATE")
            threading.Timer(1.5, lambda: other.execute("COMMIT")).start()

        locking = threading.Thread(target=lock)
        locking.start()
        labels = label_clips(some_clips(4), teacher(server.url, store, max_concurrency=4), store)
        locking.join()
        assert {label.status for label in labels} == {"ok"} and len(server.requests) == 8
        assert store.spent() == pytest.approx(server.billed)
        other.close()
    assert any("another process has it locked" in message for message in caplog.messages)


def test_every_condition_of_the_store_has_its_name_and_none_says_to_move_labels_away(tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "_PATIENCE", 0.05)
    path, label = tmp_path / "labels.sqlite", Label({"visual_quality": 4.0})
    with LabelStore(path) as store:
        store.add({"kept": label}, "somebody")
        store._connection.execute("PRAGMA query_only = ON")
        with pytest.raises(UserError, match="can be written .*change their permissions") as read_only:
            store.add({"b": label}, "somebody")
        store._connection.execute("PRAGMA query_only = OFF")
        store._connection.execute("PRAGMA max_page_count = 1")
        with pytest.raises(UserError, match="the disk is full") as full:
            store.add({str(key): Label(reason="x" * 9000) for key in range(30)}, "somebody")
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(UserError, match="another process has it locked") as locked:
            store.add({"b": label}, "somebody")
        other.close()
        assert store.find(["kept", "b"]) == {"kept": label}
    path.write_bytes(path.read_bytes()[:4096] + b"\xff" * 4096 * 4)
    with pytest.raises(UserError, match="damaged .*keep it.*recover") as damaged, LabelStore(path) as store:
        store.find(["kept"])
    with pytest.raises(UserError, match="expected a file and folder that can be written"):
        LabelStore(tmp_path)
    assert not any("move the file" in str(caught.value) for caught in (read_only, full, locked, damaged))


@pytest.mark.parametrize("variable", ["ALL_PROXY", "http_proxy"])
@pytest.mark.parametrize("proxy", ["socks5://127.0.0.1:9", "http://127.0.0.1:9", "nonsense://x"])
def test_no_proxy_stands_before_a_server_on_this_machine(tmp_path, monkeypatch, variable, proxy):
    monkeypatch.setenv(variable, proxy)
    with OpenAIServer() as server, LabelStore(tmp_path / "labels.sqlite") as store:
        assert [label.status for label in label_clips(some_clips(1), teacher(server.url, store), store)] == ["ok"]


@pytest.mark.parametrize(
    ("variable", "proxy", "complaint"),
    [
        ("ALL_PROXY", "nonsense://me:secret@x:1", "ALL_PROXY nonsense://x:1: Unknown scheme.*or unset it"),
        ("HTTPS_PROXY", "http://me:secret@127.0.0.1:9", "no connection by way of HTTPS_PROXY http://127.0.0.1:9"),
    ],
)
def test_a_proxy_that_fails_is_named_without_its_password(tmp_path, monkeypatch, caplog, variable, proxy, complaint):
    monkeypatch.setenv(variable, proxy)
    with LabelStore(tmp_path / "labels.sqlite") as store:
        with pytest.raises(UserError, match=complaint) as caught:
            label_clips(some_clips(3), teacher("https://teacher.example/v1", store), store)
        assert "secret" not in str(caught.value) and store.spent() == 0
    assert "never retrieved" not in caplog.text


def test_a_proxy_that_refuses_is_named(tmp_path, monkeypatch):
    # the test server answers CONNECT as it answers every method that it does not have
    with OpenAIServer() as server, LabelStore(tmp_path / "labels.sqlite") as store:
        address = server.url.removesuffix("/v1")
        monkeypatch.setenv("HTTPS_PROXY", address)
        with pytest.raises(UserError, match=f"HTTPS_PROXY {address} answered .*501"):
            label_clips(some_clips(1), teacher("https://teacher.example/v1", store), store)
        assert store.spent() == 0


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tls")
    files = folder / "key.pem", folder / "cert.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", files[0], "-out", files[1]]
    try:
        subprocess.run(
            [*command, "-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"],
            check=True, capture_output=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs openssl")
    return files


def test_tls_that_fails_is_named_and_a_certificate_of_ones_own_is_taken(tmp_path, monkeypatch, certificate):
    with OpenAIServer() as server, LabelStore(tmp_path / "labels.sqlite") as store:
        url = server.url.replace("http://127.0.0.1", "https://localhost")
        with pytest.raises(UserError, match="no TLS connection .*does the server speak https"):
            label_clips(some_clips(1), teacher(url, store), store)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate[1], certificate[0])
        server._http.socket = context.wrap_socket(server._http.socket, server_side=True)
        with pytest.raises(UserError, match="certificate is not trusted .*self.signed.*SSL_CERT_FILE"):
            label_clips(some_clips(1), teacher(url, store), store)
        assert not server.requests and store.spent() == 0
        monkeypatch.setenv("SSL_CERT_FILE", os.fspath(certificate[1]))
        assert [label.status for label in label_clips(some_clips(1), teacher(url, store), store)] == ["ok"]
